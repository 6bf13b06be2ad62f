"""The tensors of Pix2Struct's encoder, under the names of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from meteor_jax.models import conversion as cv
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig

FORMATS = {
    "pix2struct": cv.Format(
        part="pix2struct",
        model_types=("pix2struct", "pix2struct_vision_model"),
        mark=r"(encoder\.)?embeddings\.row_embedder\.",
        renames=(
            (
                r"(?:encoder\.)?(embeddings\..*|encoder\.layer\..*|layernorm\.weight)",
                r"\1",
            ),
        ),
        ignored=((r"decoder\..*", "text decoder"),),
    ),
}


def table(config: Pix2StructConfig) -> cv.Table:
    """Pix2Struct's encoder. Its patch vectors are laid out as `patchify` lays them."""
    names = {"query": "query", "key": "key", "value": "value", "output": "out"}
    block = [
        *cv.norm("pre_attention_layer_norm", "norm1", bias=False),
        *(
            rule
            for theirs, ours in names.items()
            for rule in cv.linear(f"attention.{theirs}", f"attention/{ours}", bias=False)
        ),
        *cv.norm("pre_mlp_layer_norm", "norm2", bias=False),
        *cv.linear("mlp.wi_0", "mlp/gate", bias=False),
        *cv.linear("mlp.wi_1", "mlp/up", bias=False),
        *cv.linear("mlp.wo", "mlp/out", bias=False),
    ]
    rules = [
        *cv.linear("embeddings.patch_projection", "patch_embedding"),
        cv.Rule("embeddings.row_embedder.weight", "row_embedding"),
        cv.Rule("embeddings.column_embedder.weight", "column_embedding"),
        *cv.stacked(block, source="encoder.layer.{i}", layers=range(config.depth)),
        *cv.norm("layernorm", "final_norm", bias=False),
    ]
    return cv.Table(tuple(rules))


def sizes(found: cv.Shapes) -> cv.Fields:
    width = found.size("embeddings.patch_projection.weight")
    pixels = found.size("embeddings.patch_projection.weight", 1)
    return {
        "patch_size": pixels and math.isqrt(pixels // 3),
        "width": width,
        "depth": found.count(r"encoder\.layer\.(\d+)\.(?:attention|mlp|pre_)"),
        "num_heads": cv.heads(width),
        "mlp_dim": found.first(r"encoder\.layer\.\d+\.mlp\.wi_0\.weight"),
        "num_positions": found.size("embeddings.row_embedder.weight"),
    }


def stated(config: Mapping[str, Any]) -> cv.Fields:
    return cv.known({"num_heads": cv.vision_config(config).get("num_attention_heads")})


CONVERSION = cv.PartConversion(formats=FORMATS, table=table, sizes=sizes, stated=stated)
