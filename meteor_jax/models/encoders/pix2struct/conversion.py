"""The tensors of Pix2Struct's encoder, under the names of Hugging Face."""

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
    heads,
    known,
    linear,
    norm,
    stacked,
    vision_config,
)
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig

FORMATS = {
    "pix2struct": Format(
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


def table(config: Pix2StructConfig) -> Table:
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


def sizes(found: Shapes) -> Fields:
    width = found.size("embeddings.patch_projection.weight")
    pixels = found.size("embeddings.patch_projection.weight", 1)
    return {
        "patch_size": pixels and math.isqrt(pixels // 3),
        "width": width,
        "depth": found.count(r"encoder\.layer\.(\d+)\.(?:attention|mlp|pre_)"),
        "num_heads": heads(width),
        "mlp_dim": found.first(r"encoder\.layer\.\d+\.mlp\.wi_0\.weight"),
        "num_positions": found.size("embeddings.row_embedder.weight"),
    }


def stated(config: Mapping[str, Any]) -> Fields:
    return known({"num_heads": vision_config(config).get("num_attention_heads")})


CONVERSION = PartConversion(formats=FORMATS, table=table, sizes=sizes, stated=stated)
