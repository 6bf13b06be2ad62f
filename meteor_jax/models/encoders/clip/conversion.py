"""CLIP's tensors, under the names of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from meteor_jax.models import conversion as cv
from meteor_jax.models.encoders.clip.model import ClipConfig

FORMATS = {
    "clip": cv.Format(
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


def table(config: ClipConfig) -> cv.Table:
    """CLIP. The CLS token's embedding and position have parameters only where it is kept."""
    embeddings = "vision_model.embeddings"
    block = [
        *cv.norm("layer_norm1", "norm1"),
        *cv.linear("self_attn.q_proj", "attention/query"),
        *cv.linear("self_attn.k_proj", "attention/key"),
        *cv.linear("self_attn.v_proj", "attention/value"),
        *cv.linear("self_attn.out_proj", "attention/out"),
        *cv.norm("layer_norm2", "norm2"),
        *cv.linear("mlp.fc1", "mlp/fc1"),
        *cv.linear("mlp.fc2", "mlp/fc2"),
    ]
    rules = [
        *cv.convolution(
            f"{embeddings}.patch_embedding", "patch_embedding", patch=config.patch_size, bias=False
        ),
        cv.Rule(
            f"{embeddings}.position_embedding.weight",
            "position_embedding",
            unused_rows=0 if config.keep_cls else 1,
        ),
        *cv.norm("vision_model.pre_layrnorm", "pre_norm"),
        *cv.stacked(block, source="vision_model.encoder.layers.{i}", layers=range(config.depth)),
    ]
    unused = [
        cv.Unused(r"vision_model\.post_layernorm\.(weight|bias)", "norm after the last block"),
        cv.Unused(r"vision_model\.embeddings\.position_ids", "0, 1, 2, …"),
    ]
    cls = f"{embeddings}.class_embedding"
    if config.keep_cls:
        rules.append(cv.Rule(cls, "class_embedding"))
    else:
        unused.append(cv.Unused(cls.replace(".", r"\."), "CLS token, dropped before the blocks"))
    return cv.Table(tuple(rules), tuple(unused))


def sizes(found: cv.Shapes) -> cv.Fields:
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
        "num_heads": cv.heads(width),
        "mlp_dim": found.first(layer + r"\d+\.mlp\.fc1\.weight"),
    }


def stated(config: Mapping[str, Any]) -> cv.Fields:
    vision = cv.vision_config(config)
    cv.check_activation(vision, "quick_gelu")
    return cv.known({"num_heads": vision.get("num_attention_heads")})


CONVERSION = cv.PartConversion(formats=FORMATS, table=table, sizes=sizes, stated=stated)
