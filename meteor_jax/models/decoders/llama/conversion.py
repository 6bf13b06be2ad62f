"""LLaMA's tensors, under the names of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meteor_jax.models import conversion as cv
from meteor_jax.models.decoders.llama.model import LlamaConfig

FORMATS = {
    "llama": cv.Format(
        part="llama",
        model_types=("llama",),
        mark=r"model\.layers\.\d+\.self_attn\.q_proj\.",
        renames=((r"(.*)", r"\1"),),
    ),
}


def table(config: LlamaConfig) -> cv.Table:
    """LLaMA, under its Hugging Face names."""
    block = [
        *cv.norm("input_layernorm", "attention_norm", bias=False),
        *cv.linear("self_attn.q_proj", "query", bias=False),
        *cv.linear("self_attn.k_proj", "key", bias=False),
        *cv.linear("self_attn.v_proj", "value", bias=False),
        *cv.linear("self_attn.o_proj", "out", bias=False),
        *cv.norm("post_attention_layernorm", "mlp_norm", bias=False),
        *cv.linear("mlp.gate_proj", "gate", bias=False),
        *cv.linear("mlp.up_proj", "up", bias=False),
        *cv.linear("mlp.down_proj", "down", bias=False),
    ]
    padding = config.num_columns - config.vocab_size
    rules = [
        cv.Rule("model.embed_tokens.weight", "embedding/embedding", padding_rows=padding),
        *cv.stacked(block, source="model.layers.{i}", layers=range(config.depth)),
        *cv.norm("model.norm", "norm", bias=False),
    ]
    unused = [
        cv.Unused(
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary table, computed anew"
        )
    ]
    if config.tie_embeddings:
        unused.append(cv.Unused(r"lm_head\.weight", "tied to the embedding"))
    else:
        rules.append(cv.Rule("lm_head.weight", "head/kernel", cv.LINEAR, padding_rows=padding))
    return cv.Table(tuple(rules), tuple(unused))


def sizes(found: cv.Shapes, config: Mapping[str, Any]) -> cv.Fields:
    """Sizes of a LLaMA; without config.json heads are taken to be 128 wide, as in large ones."""
    layer = r"model\.layers\.\d+\."
    width = found.size("model.embed_tokens.weight", 1)
    head_dim = config.get("head_dim") or 128
    query = found.first(layer + r"self_attn\.q_proj\.weight")
    key = found.first(layer + r"self_attn\.k_proj\.weight")
    heads = config.get("num_attention_heads") or (query and query // head_dim)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    problems = []
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        problems.append(f"config.json: rotary scaling {dict(rope)} is not supported.")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"config.json: expected hidden_act='silu', got {config['hidden_act']!r}.")
    if config.get("head_dim") and heads and heads * head_dim != config.get("hidden_size"):
        problems.append(
            f"config.json: expected head_dim=hidden_size/num_attention_heads, got {head_dim}."
        )
    if problems:
        raise cv.ConversionError(problems)
    return cv.known(
        {
            "depth": config.get("num_hidden_layers")
            or found.count(r"model\.layers\.(\d+)\.(?:self_attn|mlp)"),
            "width": config.get("hidden_size") or width,
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads")
            or (heads if config else key and key // head_dim),
            "mlp_dim": config.get("intermediate_size")
            or found.first(layer + r"mlp\.up_proj\.weight"),
            "vocab_size": config.get("vocab_size") or found.size("model.embed_tokens.weight"),
            "max_positions": config.get("max_position_embeddings"),
            "rope_theta": config.get("rope_theta") or rope.get("rope_theta"),
            "norm_eps": config.get("rms_norm_eps"),
            "tie_embeddings": config.get("tie_word_embeddings", False),
        }
    )
