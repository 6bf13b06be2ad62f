"""The tables of all models, under the names that EAGLE's checkpoints give their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from meteor_jax.convert.rules import (
    BATCH_OF_ONE,
    DEPTHWISE,
    LINEAR,
    Rule,
    Table,
    Unused,
    convolution,
    linear,
    norm,
    part,
    stacked,
)
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.convnext.model import STEM, ConvNextConfig
from meteor_jax.models.encoders.eva02.model import Eva02Config, rotary_tables
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.models.encoders.sam.model import SamConfig

TOWER = "model.vision_tower.vision_towers.{n}.vision_tower."
PROJECTOR = "model.mm_projector."


def clip_table(config: ClipConfig) -> Table:
    """CLIP. The CLS token's embedding and position have parameters only where it is kept."""
    embeddings = "vision_model.embeddings"
    block = [
        *norm("layer_norm1", "norm1"),
        *linear("self_attn.q_proj", "attention/query"),
        *linear("self_attn.k_proj", "attention/key"),
        *linear("self_attn.v_proj", "attention/value"),
        *linear("self_attn.out_proj", "attention/out"),
        *norm("layer_norm2", "norm2"),
        *linear("mlp.fc1", "mlp/fc1"),
        *linear("mlp.fc2", "mlp/fc2"),
    ]
    rules = [
        *convolution(
            f"{embeddings}.patch_embedding", "patch_embedding", patch=config.patch_size, bias=False
        ),
        Rule(
            f"{embeddings}.position_embedding.weight",
            "position_embedding",
            unused_rows=0 if config.keep_cls else 1,
        ),
        *norm("vision_model.pre_layrnorm", "pre_norm"),
        *stacked(block, source="vision_model.encoder.layers.{i}", layers=range(config.depth)),
    ]
    unused = [
        Unused(r"vision_model\.post_layernorm\.(weight|bias)", "norm after the last block"),
        Unused(r"vision_model\.embeddings\.position_ids", "0, 1, 2, …"),
    ]
    cls = f"{embeddings}.class_embedding"
    if config.keep_cls:
        rules.append(Rule(cls, "class_embedding"))
    else:
        unused.append(Unused(cls.replace(".", r"\."), "CLS token, dropped before the blocks"))
    return Table(tuple(rules), tuple(unused))


def convnext_table(config: ConvNextConfig) -> Table:
    """ConvNeXt; a block's layer scale is called "<block>.weight"."""
    block = [
        Rule("conv_dw.weight", "depthwise/kernel", DEPTHWISE),
        Rule("conv_dw.bias", "depthwise/bias"),
        *norm("norm", "norm"),
        *linear("mlp.fc1", "fc1"),
        *linear("mlp.fc2", "fc2"),
        Rule("weight", "layer_scale"),
    ]
    rules = [*convolution("stem.0", "stem", patch=STEM), *norm("stem.1", "stem_norm")]
    for stage, depth in enumerate(config.depths):
        if stage:
            rules += norm(f"stages.{stage}.downsample.0", f"downsample{stage}_norm")
            rules += convolution(f"stages.{stage}.downsample.1", f"downsample{stage}", patch=2)
        rules += stacked(
            block,
            source=f"stages.{stage}.blocks.{{i}}",
            target=f"stage{stage}/stack",
            layers=range(depth),
        )
    head = Unused(r"head\..*", "classification head")
    return Table(tuple(rules), (head,))


def sam_table(config: SamConfig) -> Table:
    """SAM's image encoder with EAGLE's neck, which is the first half of SAM's own."""
    block = [
        *norm("layer_norm1", "norm1"),
        *linear("attn.qkv", "attention/qkv"),
        *linear("attn.proj", "attention/out"),
        *norm("layer_norm2", "norm2"),
        *linear("mlp.lin1", "mlp/fc1"),
        *linear("mlp.lin2", "mlp/fc2"),
    ]
    rules = [
        Rule("pos_embed", "position_embedding", BATCH_OF_ONE),
        *convolution("patch_embed.projection", "patch_embedding", patch=config.patch_size),
        *stacked(block, source="layers.{i}", layers=range(config.depth)),
        *convolution("neck.conv1", "neck", patch=1, bias=False),
        *norm("neck.layer_norm1", "neck_norm"),
    ]
    relative = [Rule("attn.rel_pos_h", "height"), Rule("attn.rel_pos_w", "width")]
    windowed = [i for i in range(config.depth) if i not in config.global_blocks]
    for name, layers in (("window", windowed), ("global", config.global_blocks)):
        rules += stacked(relative, source="layers.{i}", target=f"relative_{name}", layers=layers)
    return Table(tuple(rules))


def eva02_table(config: Eva02Config) -> Table:
    """EVA-02. Its rotary tables are stored once, and again in every block."""
    block = [
        *norm("norm1", "norm1"),
        *linear("attn.q_proj", "attention/query", bias=False),
        Rule("attn.q_bias", "attention/query/bias"),
        *linear("attn.k_proj", "attention/key", bias=False),
        *linear("attn.v_proj", "attention/value", bias=False),
        Rule("attn.v_bias", "attention/value/bias"),
        *linear("attn.proj", "attention/out"),
        *norm("norm2", "norm2"),
        *linear("mlp.w1", "mlp/gate"),
        *linear("mlp.w2", "mlp/up"),
        *norm("mlp.ffn_ln", "mlp/norm"),
        *linear("mlp.w3", "mlp/out"),
    ]
    rules = [
        Rule("pos_embed", "position_embedding", BATCH_OF_ONE),
        *convolution("patch_embed.proj", "patch_embedding", patch=config.patch_size),
        *stacked(block, source="blocks.{i}", layers=range(config.depth)),
    ]
    for theirs, ours in (("rope_win", "window"), ("rope_glb", "global")):
        is_global = ours == "global"
        users = [i for i in range(config.depth) if (i in config.global_blocks) == is_global]
        for wave in ("cos", "sin"):
            rules.append(
                Rule(
                    f"{theirs}.freqs_{wave}",
                    f"tables/{ours}_{wave}",
                    fallbacks=tuple(f"blocks.{i}.attn.rope.freqs_{wave}" for i in users),
                    compute=functools.partial(_rotary_table, config=config, name=f"{ours}_{wave}"),
                )
            )
    copies = Unused(r"blocks\.\d+\.attn\.rope\.freqs_(cos|sin)", "copy of a rotary table")
    return Table(tuple(rules), (copies,))


def _rotary_table(dtype: np.dtype, *, config: Eva02Config, name: str) -> np.ndarray:
    """Rounded to bfloat16, as in the checkpoints that hold it, unless the weights are wider."""
    table = np.asarray(rotary_tables(config)[name])
    return table if dtype.itemsize > 2 else table.astype(jnp.bfloat16)


def pix2struct_table(config: Pix2StructConfig) -> Table:
    """Pix2Struct's encoder. Its patch vectors are laid out as `patchify` lays them."""
    names = {"query": "query", "key": "key", "value": "value", "output": "out"}
    block = [
        *norm("pre_attention_layer_norm", "norm1", bias=False),
        *(
            rule
            for theirs, ours in names.items()
            for rule in linear(f"attention.{theirs}", f"attention/{ours}", bias=False)
        ),
        *norm("pre_mlp_layer_norm", "norm2", bias=False),
        *linear("mlp.wi_0", "mlp/gate", bias=False),
        *linear("mlp.wi_1", "mlp/up", bias=False),
        *linear("mlp.wo", "mlp/out", bias=False),
    ]
    rules = [
        *linear("embeddings.patch_projection", "patch_embedding"),
        Rule("embeddings.row_embedder.weight", "row_embedding"),
        Rule("embeddings.column_embedder.weight", "column_embedding"),
        *stacked(block, source="encoder.layer.{i}", layers=range(config.depth)),
        *norm("layernorm", "final_norm", bias=False),
    ]
    return Table(tuple(rules))


def llama_table(config: LlamaConfig) -> Table:
    """LLaMA, under its Hugging Face names."""
    block = [
        *norm("input_layernorm", "attention_norm", bias=False),
        *linear("self_attn.q_proj", "query", bias=False),
        *linear("self_attn.k_proj", "key", bias=False),
        *linear("self_attn.v_proj", "value", bias=False),
        *linear("self_attn.o_proj", "out", bias=False),
        *norm("post_attention_layernorm", "mlp_norm", bias=False),
        *linear("mlp.gate_proj", "gate", bias=False),
        *linear("mlp.up_proj", "up", bias=False),
        *linear("mlp.down_proj", "down", bias=False),
    ]
    padding = config.num_columns - config.vocab_size
    rules = [
        Rule("model.embed_tokens.weight", "embedding/embedding", padding_rows=padding),
        *stacked(block, source="model.layers.{i}", layers=range(config.depth)),
        *norm("model.norm", "norm", bias=False),
    ]
    unused = [
        Unused(
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary table, computed anew"
        )
    ]
    if config.tie_embeddings:
        unused.append(Unused(r"lm_head\.weight", "tied to the embedding"))
    else:
        rules.append(Rule("lm_head.weight", "head/kernel", LINEAR, padding_rows=padding))
    return Table(tuple(rules), tuple(unused))


def projector_table() -> Table:
    """EAGLE's one projector over the joined channels."""
    return Table((*linear("0", "fc1"), *linear("2", "fc2")))


def split_projector_tables(widths: dict[str, int], *, out_width: int) -> dict[str, Table]:
    """METEOR's projector an encoder, each from its slice of EAGLE's.

    The first layer is cut by input channel and its bias shared out: every encoder gets an equal
    part and the last one what is left, so that the first layers' outputs sum to EAGLE's. The second
    layer, which is not linear in the encoders, is EAGLE's in each.
    """
    tables, start = {}, 0
    for index, (name, width) in enumerate(widths.items()):
        is_last = index == len(widths) - 1
        rules = [
            Rule(
                "0.weight",
                "fc1/kernel",
                part(functools.partial(_rows, start=start, size=width)),
                whole=(out_width, sum(widths.values())),
            ),
            Rule(
                "0.bias",
                "fc1/bias",
                part(functools.partial(_share, parts=len(widths), is_last=is_last)),
                whole=(out_width,),
            ),
            *linear("2", "fc2"),
        ]
        tables[name] = Table(tuple(rules))
        start += width
    return tables


def _rows(weight: np.ndarray, *, start: int, size: int) -> np.ndarray:
    return weight.T[start : start + size]


def _share(bias: np.ndarray, *, parts: int, is_last: bool) -> np.ndarray:
    share = (bias.astype(np.float64) / parts).astype(bias.dtype)
    if not is_last:
        return share
    return (bias.astype(np.float64) - (parts - 1) * share.astype(np.float64)).astype(bias.dtype)


TABLES: dict[str, Callable[[Any], Table]] = {
    "clip": clip_table,
    "convnext": convnext_table,
    "sam": sam_table,
    "eva02": eva02_table,
    "pix2struct": pix2struct_table,
}
