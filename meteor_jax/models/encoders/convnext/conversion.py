"""ConvNeXt's tensors, under timm's names but for the layer scale's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meteor_jax.models.conversion import (
    DEPTHWISE,
    Fields,
    Format,
    PartConversion,
    Rule,
    Shapes,
    Table,
    Unused,
    check_activation,
    convolution,
    linear,
    norm,
    stacked,
    vision_config,
)
from meteor_jax.models.encoders.convnext.model import STEM, ConvNextConfig

_HF_STAGE = r"(?:convnext\.)?encoder\.stages\.(\d+)"
_STAGE = r"stages.\1"

FORMATS = {
    "convnext_timm": Format(
        part="convnext",
        mark=r"stages\.\d+\.blocks\.\d+\.(gamma|conv_dw\.)",
        renames=(
            (r"(stages\.\d+\.blocks\.\d+)\.gamma", r"\1.weight"),
            (r"((?:stem|stages|head)\..*)", r"\1"),
        ),
    ),
    "convnext_hf": Format(
        part="convnext",
        model_types=("convnext",),
        mark=r"(convnext\.)?encoder\.stages\.\d+\.layers\.\d+\.dwconv\.",
        renames=(
            (r"(?:convnext\.)?embeddings\.patch_embeddings\.(.*)", r"stem.0.\1"),
            (r"(?:convnext\.)?embeddings\.layernorm\.(.*)", r"stem.1.\1"),
            (rf"{_HF_STAGE}\.downsampling_layer\.(.*)", rf"{_STAGE}.downsample.\2"),
            (rf"{_HF_STAGE}\.layers\.(\d+)\.layer_scale_parameter", rf"{_STAGE}.blocks.\2.weight"),
            (rf"{_HF_STAGE}\.layers\.(\d+)\.dwconv\.(.*)", rf"{_STAGE}.blocks.\2.conv_dw.\3"),
            (rf"{_HF_STAGE}\.layers\.(\d+)\.layernorm\.(.*)", rf"{_STAGE}.blocks.\2.norm.\3"),
            (
                rf"{_HF_STAGE}\.layers\.(\d+)\.pwconv([12])\.(.*)",
                rf"{_STAGE}.blocks.\2.mlp.fc\3.\4",
            ),
            (r"(?:convnext\.)?layernorm\.(.*)", r"head.norm.\1"),
            (r"classifier\.(.*)", r"head.fc.\1"),
        ),
    ),
}


def table(config: ConvNextConfig) -> Table:
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


def sizes(found: Shapes) -> Fields:
    stages = found.count(r"stages\.(\d+)\.") or 0
    depths = [
        found.count(rf"stages\.{stage}\.blocks\.(\d+)\.(?:conv_dw|norm|mlp)")
        for stage in range(stages)
    ]
    widths = [
        found.first(rf"stages\.{stage}\.blocks\.\d+\.conv_dw\.weight") for stage in range(stages)
    ]
    complete = stages and None not in (*depths, *widths)
    return {"depths": tuple(depths), "widths": tuple(widths)} if complete else {}


def stated(config: Mapping[str, Any]) -> Fields:
    check_activation(vision_config(config), "gelu")
    return {}


CONVERSION = PartConversion(formats=FORMATS, table=table, sizes=sizes, stated=stated)
