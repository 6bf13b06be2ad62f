"""Sizes of a model from its config.json, and where that is silent from its tensors' shapes."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meteor_jax.config import ConfigError, build
from meteor_jax.convert.sources import ConversionError
from meteor_jax.convert.tables import PROJECTOR, TOWER
from meteor_jax.models.eagle.model import MeteorConfig

HEAD_DIM = 64  # of every large vision transformer here; --set says otherwise
# What EAGLE's config.json calls its towers, before the dash and the pixels.
TOWERS = {
    "clip": "clip",
    "convnext": "convnext",
    "sam": "sam",
    "det": "eva02",
    "pix2struct": "pix2struct",
}
RELEASED = {
    6656: "clip-448;convnext-1024;det-1024;pix2struct-1024",
    7680: "clip-448;convnext-1024;sam-1024;det-1024;pix2struct-1024",
}
ACTIVATIONS = {"clip": "quick_gelu", "convnext": "gelu", "sam": "gelu"}
EAGLE_GRID, EAGLE_IMAGE = 32, 1024

Shape = tuple[int, ...]
Fields = dict[str, Any]


class Shapes:
    """Shapes by name; what is absent is None, and so is every size that needs it."""

    def __init__(self, shapes: Mapping[str, Shape], prefix: str):
        self._shapes = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }

    def size(self, name: str, axis: int = 0) -> int | None:
        shape = self._shapes.get(name, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else None

    def first(self, pattern: str, axis: int = 0) -> int | None:
        """The size in the first tensor whose whole name matches."""
        return next(iter(self.sizes(pattern, axis)), None)

    def sizes(self, pattern: str, axis: int = 0) -> list[int | None]:
        """The size in every tensor whose whole name matches."""
        return [self.size(name, axis) for name in self._shapes if re.fullmatch(pattern, name)]

    def count(self, pattern: str) -> int | None:
        """One more than the largest number that `pattern` catches at the start of a name."""
        matches = (re.match(pattern, name) for name in self._shapes)
        return max((int(match[1]) + 1 for match in matches if match), default=None)

    def where(self, pattern: str, test: Callable[[Shape], bool]) -> tuple[int, ...]:
        """The numbers that `pattern` catches, of tensors whose shape passes."""
        matches = ((re.fullmatch(pattern, name), shape) for name, shape in self._shapes.items())
        return tuple(sorted({int(m[1]) for m, shape in matches if m and test(shape)}))


def model_fields(part: str, *, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Fields:
    """Fields of `MeteorConfig` for what a checkpoint holds.

    Args:
        part: as in `Format.part`.
        shapes: under EAGLE's names.
        config: the checkpoint's config.json, or nothing.

    Raises:
        ConversionError: where config.json asks for what the model cannot do.
    """
    if part == "llama":
        return {"llama": llama_fields(shapes, config)}
    if part in SIZES:
        tower = Shapes(shapes, TOWER.replace("{n}", "0"))
        fields = _known(SIZES[part](tower) | _stated(part, config))
        return {"encoders": (part,), part: fields}
    if part == "projector":
        width, channels = (Shapes(shapes, PROJECTOR).size("0.weight", axis) for axis in (0, 1))
        llama = llama_fields(shapes, config) if "hidden_size" in config else {"width": width}
        return eagle_fields(config, channels=channels) | {"llama": _known(llama)}
    fields = eagle_fields(config)
    for index, name in enumerate(fields["encoders"]):
        fields[name] = _known(SIZES[name](Shapes(shapes, TOWER.replace("{n}", str(index)))))
    return fields | {"llama": llama_fields(shapes, config)}


def eagle_fields(config: Mapping[str, Any], *, channels: int | None = None) -> Fields:
    """Which encoders, and how EAGLE joins them. Where config.json does not tell, those of the
    released model whose encoders have so many `channels`."""
    text = config.get("mm_vision_tower") or RELEASED.get(channels, "")
    names = [tower.split("-")[0] for tower in text.split(";")]
    unknown = [name for name in names if name not in TOWERS]
    if unknown:
        raise ConversionError(
            [
                f"config.json: mm_vision_tower={text!r}; expected towers out of "
                f"{', '.join(TOWERS)}, joined by ';'."
            ]
        )
    kind = config.get("mm_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu":
        raise ConversionError(
            [f"config.json: expected mm_projector_type='mlp2x_gelu', got {kind!r}."]
        )
    return {
        "encoders": tuple(TOWERS[name] for name in names),
        "fusion": "pre",
        "grid": EAGLE_GRID,
        "image_size": EAGLE_IMAGE,
    }


def llama_fields(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Fields:
    """Sizes of a LLaMA; without config.json heads are taken to be 128 wide, as in large ones."""
    found = Shapes(shapes, "")
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
        raise ConversionError(problems)
    return _known(
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


def clip_sizes(found: Shapes) -> Fields:
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
        "num_heads": _heads(width),
        "mlp_dim": found.first(layer + r"\d+\.mlp\.fc1\.weight"),
    }


def convnext_sizes(found: Shapes) -> Fields:
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


def pix2struct_sizes(found: Shapes) -> Fields:
    width = found.size("embeddings.patch_projection.weight")
    pixels = found.size("embeddings.patch_projection.weight", 1)
    return {
        "patch_size": pixels and math.isqrt(pixels // 3),
        "width": width,
        "depth": found.count(r"encoder\.layer\.(\d+)\.(?:attention|mlp|pre_)"),
        "num_heads": _heads(width),
        "mlp_dim": found.first(r"encoder\.layer\.\d+\.mlp\.wi_0\.weight"),
        "num_positions": found.size("embeddings.row_embedder.weight"),
    }


def sam_sizes(found: Shapes) -> Fields:
    width, patch = (found.size("patch_embed.projection.weight", axis) for axis in (0, 2))
    grid = found.size("pos_embed", 1)
    table = r"layers\.(\d+)\.attn\.rel_pos_h"
    depth = found.count(r"layers\.(\d+)\.(?:attn|layer_norm|mlp)")
    whole = 2 * (grid or 0) - 1  # rows of a table for the whole grid
    windowed = found.where(table, lambda shape: shape[0] != whole)
    rows = windowed and found.size(f"layers.{windowed[0]}.attn.rel_pos_h")
    head_dim = found.first(table, 1)
    return {
        "image_size": patch and grid and patch * grid,
        "patch_size": patch,
        "block_width": width,
        "depth": depth,
        "num_heads": width // head_dim if width and head_dim else _heads(width),
        "mlp_dim": found.first(r"layers\.\d+\.mlp\.lin1\.weight"),
        "window": (rows + 1) // 2 if rows else None,
        "global_blocks": found.where(table, lambda shape: shape[0] == whole) if depth else None,
        "neck_width": found.size("neck.conv1.weight"),
    }


def eva02_sizes(found: Shapes) -> Fields:
    width, patch = (found.size("patch_embed.proj.weight", axis) for axis in (0, 2))
    positions = found.size("pos_embed", 1)
    copies = r"blocks\.\d+\.attn\.rope\.freqs_cos"
    head_dim = found.size("rope_win.freqs_cos", 1) or found.first(copies, 1)
    window = found.size("rope_win.freqs_cos") or min(found.sizes(copies), default=None)
    grid = found.size("rope_glb.freqs_cos") or max(found.sizes(copies), default=None)
    numbered = copies.replace(r"\d+", r"(\d+)")
    whole = found.where(numbered, lambda shape: shape[0] == grid != window)
    return {
        "image_size": patch and grid and patch * math.isqrt(grid),
        "patch_size": patch,
        "width": width,
        "depth": found.count(r"blocks\.(\d+)\.(?:attn|norm|mlp)"),
        "num_heads": width // head_dim if width and head_dim else _heads(width),
        "mlp_dim": found.first(r"blocks\.\d+\.mlp\.w1\.weight"),
        "window": window and math.isqrt(window),
        "global_every": whole[0] + 1 if whole else None,
        "position_side": positions and math.isqrt(positions - 1),
    }


SIZES: dict[str, Callable[[Shapes], Fields]] = {
    "clip": clip_sizes,
    "convnext": convnext_sizes,
    "sam": sam_sizes,
    "eva02": eva02_sizes,
    "pix2struct": pix2struct_sizes,
}


def _stated(part: str, config: Mapping[str, Any]) -> Fields:
    """What a Hugging Face config.json says of an encoder that its tensors do not show."""
    vision = config.get("vision_config") or config
    activation = vision.get("hidden_act", ACTIVATIONS.get(part))
    if part in ACTIVATIONS and activation != ACTIVATIONS[part]:
        raise ConversionError(
            [f"config.json: expected hidden_act={ACTIVATIONS[part]!r}, got {activation!r}."]
        )
    if part in ("clip", "pix2struct"):
        return _known({"num_heads": vision.get("num_attention_heads")})
    if part == "sam":
        blocks = vision.get("global_attn_indexes")
        return _known(
            {
                "num_heads": vision.get("num_attention_heads"),
                "window": vision.get("window_size"),
                "global_blocks": blocks and tuple(blocks),
            }
        )
    return {}


def build_config(fields: Fields, overrides: Sequence[str] = ()) -> MeteorConfig:
    """The model's config, with `--set` texts such as "clip.num_heads=2" on top.

    Raises:
        ConfigError: an override without "=", of a field that does not exist or of another type.
    """
    values = {
        name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()
    }
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected FIELD=VALUE, such as clip.num_heads=2.")
        *groups, name = path.strip().split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {text}: '{group}' has no fields.")
        inner[name] = _literal(value.strip())
    return build(MeteorConfig, values, where="--set")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _heads(width: int | None) -> int | None:
    return width and max(width // HEAD_DIM, 1)


def _known(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if value is not None}
