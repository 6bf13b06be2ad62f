"""ConvNeXt's tensors, under timm's names but for the layer scale's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meteor_jax.models import conversion as cv
from meteor_jax.models.encoders.convnext.model import STEM, ConvNextConfig

_HF_STAGE = r"(?:convnext\.)?encoder\.stages\.(\d+)"
_STAGE = r"stages.\1"

FORMATS = {
    "convnext_timm": cv.Format(
        part="convnext",
        mark=r"stages\.\d+\.blocks\.\d+\.(gamma|conv_dw\.)",
        renames=(
            (r"(stages\.\d+\.blocks\.\d+)\.gamma", r"\1.weight"),
            (r"((?:stem|stages|head)\..*)", r"\1"),
        ),
    ),
    "convnext_hf": cv.Format(
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


def table(config: ConvNextConfig) -> cv.Table:
    """ConvNeXt; a block's layer scale is called "<block>.weight"."""
    block = [
        cv.Rule("conv_dw.weight", "depthwise/kernel", cv.DEPTHWISE),
        cv.Rule("conv_dw.bias", "depthwise/bias"),
        *cv.norm("norm", "norm"),
        *cv.linear("mlp.fc1", "fc1"),
        *cv.linear("mlp.fc2", "fc2"),
        cv.Rule("weight", "layer_scale"),
    ]
    rules = [*cv.convolution("stem.0", "stem", patch=STEM), *cv.norm("stem.1", "stem_norm")]
    for stage, depth in enumerate(config.depths):
        if stage:
            rules += cv.norm(f"stages.{stage}.downsample.0", f"downsample{stage}_norm")
            rules += cv.convolution(f"stages.{stage}.downsample.1", f"downsample{stage}", patch=2)
        rules += cv.stacked(
            block,
            source=f"stages.{stage}.blocks.{{i}}",
            target=f"stage{stage}/stack",
            layers=range(depth),
        )
    head = cv.Unused(r"head\..*", "classification head")
    return cv.Table(tuple(rules), (head,))


def sizes(found: cv.Shapes) -> cv.Fields:
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


def stated(config: Mapping[str, Any]) -> cv.Fields:
    cv.check_activation(cv.vision_config(config), "gelu")
    return {}


CONVERSION = cv.PartConversion(formats=FORMATS, table=table, sizes=sizes, stated=stated)
