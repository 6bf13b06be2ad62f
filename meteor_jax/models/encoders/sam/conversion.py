"""The tensors of SAM's image encoder, under the names of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meteor_jax.models import conversion as cv
from meteor_jax.models.encoders.sam.model import SamConfig

FORMATS = {
    "sam": cv.Format(
        part="sam",
        model_types=("sam", "sam_vision_model"),
        mark=r"(vision_encoder\.)?layers\.\d+\.attn\.rel_pos_h",
        renames=(
            (
                r"(?:vision_encoder\.)?(pos_embed|patch_embed\..*|layers\..*|"
                r"neck\.(?:conv1|layer_norm1)\..*)",
                r"\1",
            ),
        ),
        ignored=(
            (r"(vision_encoder\.)?neck\.(conv2|layer_norm2)\..*", "second half of SAM's own neck"),
            (r"(prompt_encoder|mask_decoder|shared_image_embedding)\..*", "segmentation decoder"),
        ),
    ),
}


def table(config: SamConfig) -> cv.Table:
    """SAM's image encoder with EAGLE's neck, which is the first half of SAM's own."""
    block = [
        *cv.norm("layer_norm1", "norm1"),
        *cv.linear("attn.qkv", "attention/qkv"),
        *cv.linear("attn.proj", "attention/out"),
        *cv.norm("layer_norm2", "norm2"),
        *cv.linear("mlp.lin1", "mlp/fc1"),
        *cv.linear("mlp.lin2", "mlp/fc2"),
    ]
    rules = [
        cv.Rule("pos_embed", "position_embedding", cv.BATCH_OF_ONE),
        *cv.convolution("patch_embed.projection", "patch_embedding", patch=config.patch_size),
        *cv.stacked(block, source="layers.{i}", layers=range(config.depth)),
        *cv.convolution("neck.conv1", "neck", patch=1, bias=False),
        *cv.norm("neck.layer_norm1", "neck_norm"),
    ]
    relative = [cv.Rule("attn.rel_pos_h", "height"), cv.Rule("attn.rel_pos_w", "width")]
    windowed = [i for i in range(config.depth) if i not in config.global_blocks]
    for name, layers in (("window", windowed), ("global", config.global_blocks)):
        rules += cv.stacked(relative, source="layers.{i}", target=f"relative_{name}", layers=layers)
    return cv.Table(tuple(rules))


def sizes(found: cv.Shapes) -> cv.Fields:
    width, patch = (found.size("patch_embed.projection.weight", axis) for axis in (0, 2))
    grid = found.size("pos_embed", 1)
    table = r"layers\.(\d+)\.attn\.rel_pos_h"
    depth = found.count(r"layers\.(\d+)\.(?:attn|layer_norm|mlp)")
    whole = 2 * (grid or 0) - 1  # rows of a table for the whole grid
    windowed = found.where(table, lambda shape: shape[0] != whole)
    rows = found.size(f"layers.{windowed[0]}.attn.rel_pos_h") if windowed else None
    head_dim = found.first(table, 1)
    return {
        "image_size": patch and grid and patch * grid,
        "patch_size": patch,
        "block_width": width,
        "depth": depth,
        "num_heads": width // head_dim if width and head_dim else cv.heads(width),
        "mlp_dim": found.first(r"layers\.\d+\.mlp\.lin1\.weight"),
        "window": (rows + 1) // 2 if rows else None,
        "global_blocks": found.where(table, lambda shape: shape[0] == whole) if depth else None,
        "neck_width": found.size("neck.conv1.weight"),
    }


def stated(config: Mapping[str, Any]) -> cv.Fields:
    vision = cv.vision_config(config)
    cv.check_activation(vision, "gelu")
    blocks = vision.get("global_attn_indexes")
    return cv.known(
        {
            "num_heads": vision.get("num_attention_heads"),
            "window": vision.get("window_size"),
            "global_blocks": blocks and tuple(blocks),
        }
    )


CONVERSION = cv.PartConversion(formats=FORMATS, table=table, sizes=sizes, stated=stated)
