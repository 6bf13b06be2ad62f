"""CLIP's tensors, under the names of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from meteor_jax.models.conversion import (
    Fields,
    Format,
    PartConversion,
    Rule,
    Shapes,
    Table,
    Unused,
    check_activation,
    convolution,
    heads,
    known,
    linear,
    norm,
    stacked,
    vision_config,
)
from meteor_jax.models.encoders.clip.model import ClipConfig

FORMATS = {
    "clip": Format(
        part="clip",
        model_types=("clip", "clip_vision_model"),
        mark=r"(vision_model\.)?pre_layrnorm\.",
        renames=(
            (
                r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..*)",
                r"vision_model.\1",
            ),
        ),
        ignored=(
            (r"text_model\..*", "text encoder"),
            (r"(visual|text)_projection\.weight|logit_scale", "contrastive head"),
        ),
    ),
}


def table(config: ClipConfig) -> Table:
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


def sizes(found: Shapes) -> Fields:
    at = "vision_model.embeddings."
    layer = r"vision_model\.encoder\.layers\."
    width = found.size(at + "patch_embedding.weight")
    patch = found.size(at + "patch_embedding.weight", 2)
    positions = found.size(at + "position_embedding.weight")
    return {
        "image_size": patch and positions and patch * math.isqrt(positions - 1),
        "patch_size": patch,
        "width": width,
        "depth": found.count(layer + r"(\d+)\.(?:self_attn|layer_norm|mlp)"),
        "num_heads": heads(width),
        "mlp_dim": found.first(layer + r"\d+\.mlp\.fc1\.weight"),
    }


def stated(config: Mapping[str, Any]) -> Fields:
    vision = vision_config(config)
    check_activation(vision, "quick_gelu")
    return known({"num_heads": vision.get("num_attention_heads")})


CONVERSION = PartConversion(formats=FORMATS, table=table, sizes=sizes, stated=stated)
