"""The public formats: how each is recognised, and what EAGLE calls its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from meteor_jax.config import suggest
from meteor_jax.convert.sources import ConversionError, Source
from meteor_jax.convert.tables import PROJECTOR, TOWER

LONE_TOWER = TOWER.replace("{n}", "0")  # an encoder that comes alone takes the first place


@dataclasses.dataclass(frozen=True)
class Format:
    """One way in which others store a model.

    Attributes:
        part: what it holds: an encoder's name, "llama", "projector", or "eagle" for everything.
        model_types: `model_type` in a config.json of this format.
        mark: a regular expression; a tensor whose name it matches betrays the format.
        renames: (regular expression for a whole name, EAGLE's name), the first that matches counts.
        ignored: (regular expression for a whole name, why the tensor is left out).
    """

    part: str
    mark: str
    renames: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...] = ()
    model_types: tuple[str, ...] = ()


_HF_STAGE = r"(?:convnext\.)?encoder\.stages\.(\d+)"
_STAGE = LONE_TOWER + r"stages.\1"

FORMATS = {
    "eagle": Format(
        part="eagle",
        model_types=("eagle_llama",),
        mark=r"model\.vision_tower\.vision_towers\.",
        renames=((r"(.*)", r"\1"),),
    ),
    "projector": Format(
        part="projector",
        mark=r"(.*\.)?mm_projector\.",
        renames=((r"(?:.*\.)?mm_projector\.(.*)", PROJECTOR + r"\1"),),
    ),
    "clip": Format(
        part="clip",
        model_types=("clip", "clip_vision_model"),
        mark=r"(vision_model\.)?pre_layrnorm\.",
        renames=(
            (
                r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..*)",
                LONE_TOWER + r"vision_model.\1",
            ),
        ),
        ignored=(
            (r"text_model\..*", "text encoder"),
            (r"(visual|text)_projection\.weight|logit_scale", "contrastive head"),
        ),
    ),
    "convnext_timm": Format(
        part="convnext",
        mark=r"stages\.\d+\.blocks\.\d+\.(gamma|conv_dw\.)",
        renames=(
            (r"(stages\.\d+\.blocks\.\d+)\.gamma", LONE_TOWER + r"\1.weight"),
            (r"((?:stem|stages|head)\..*)", LONE_TOWER + r"\1"),
        ),
    ),
    "convnext_hf": Format(
        part="convnext",
        model_types=("convnext",),
        mark=r"(convnext\.)?encoder\.stages\.\d+\.layers\.\d+\.dwconv\.",
        renames=(
            (r"(?:convnext\.)?embeddings\.patch_embeddings\.(.*)", LONE_TOWER + r"stem.0.\1"),
            (r"(?:convnext\.)?embeddings\.layernorm\.(.*)", LONE_TOWER + r"stem.1.\1"),
            (rf"{_HF_STAGE}\.downsampling_layer\.(.*)", rf"{_STAGE}.downsample.\2"),
            (rf"{_HF_STAGE}\.layers\.(\d+)\.layer_scale_parameter", rf"{_STAGE}.blocks.\2.weight"),
            (rf"{_HF_STAGE}\.layers\.(\d+)\.dwconv\.(.*)", rf"{_STAGE}.blocks.\2.conv_dw.\3"),
            (rf"{_HF_STAGE}\.layers\.(\d+)\.layernorm\.(.*)", rf"{_STAGE}.blocks.\2.norm.\3"),
            (
                rf"{_HF_STAGE}\.layers\.(\d+)\.pwconv([12])\.(.*)",
                rf"{_STAGE}.blocks.\2.mlp.fc\3.\4",
            ),
            (r"(?:convnext\.)?layernorm\.(.*)", LONE_TOWER + r"head.norm.\1"),
            (r"classifier\.(.*)", LONE_TOWER + r"head.fc.\1"),
        ),
    ),
    "sam": Format(
        part="sam",
        model_types=("sam", "sam_vision_model"),
        mark=r"(vision_encoder\.)?layers\.\d+\.attn\.rel_pos_h",
        renames=(
            (
                r"(?:vision_encoder\.)?(pos_embed|patch_embed\..*|layers\..*|"
                r"neck\.(?:conv1|layer_norm1)\..*)",
                LONE_TOWER + r"\1",
            ),
        ),
        ignored=(
            (r"(vision_encoder\.)?neck\.(conv2|layer_norm2)\..*", "second half of SAM's own neck"),
            (r"(prompt_encoder|mask_decoder|shared_image_embedding)\..*", "segmentation decoder"),
        ),
    ),
    "pix2struct": Format(
        part="pix2struct",
        model_types=("pix2struct", "pix2struct_vision_model"),
        mark=r"(encoder\.)?embeddings\.row_embedder\.",
        renames=(
            (
                r"(?:encoder\.)?(embeddings\..*|encoder\.layer\..*|layernorm\.weight)",
                LONE_TOWER + r"\1",
            ),
        ),
        ignored=((r"decoder\..*", "text decoder"),),
    ),
    "eva02": Format(
        part="eva02",
        mark=r"(model\.)?(backbone\.net\.)?blocks\.\d+\.attn\.q_bias",
        renames=(
            (
                r"(?:model\.)?(?:backbone\.net\.)?(pos_embed|(?:patch_embed|rope_win)\..*|"
                r"blocks\.\d+\.(?!attn\.rope\.).*)",
                LONE_TOWER + r"\1",
            ),
        ),
        ignored=(
            # The detector's images are larger than EAGLE's, so its grid is another.
            (r".*\brope_glb\..*", "rotary table of the detector's grid"),
            (r".*\bblocks\.\d+\.attn\.rope\..*", "copy of a rotary table"),
            (r"(?!(model\.)?backbone\.net\.).*", "detector around the backbone"),
        ),
    ),
    "llama": Format(
        part="llama",
        model_types=("llama",),
        mark=r"model\.layers\.\d+\.self_attn\.q_proj\.",
        renames=((r"(.*)", r"\1"),),
    ),
}


def recognise(source: Source, *, name: str | None = None) -> Format:
    """The format called `name`, or the one that config.json or the tensors' names betray.

    Raises:
        ConversionError: for an unknown name, or a checkpoint of no known format.
    """
    if name is not None:
        if name not in FORMATS:
            raise ConversionError([f"--format {name}: no such format.{suggest(name, FORMATS)}"])
        return FORMATS[name]
    model_type = source.config.get("model_type")
    for candidate in FORMATS.values():
        is_named = model_type in candidate.model_types
        if is_named and any(re.match(candidate.mark, name) for name in source.entries):
            return candidate
    for candidate in FORMATS.values():
        if any(re.match(candidate.mark, name) for name in source.entries):
            return candidate
    some = ", ".join(sorted(source.entries)[:3])
    raise ConversionError(
        [
            f"{source.folder}: of no known format (model_type {model_type!r}, tensors {some}, …); "
            f"name one with --format: {', '.join(FORMATS)}."
        ]
    )


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Tensors under EAGLE's names.

    Attributes:
        names: EAGLE's name → the name in the file.
        ignored: the name in the file → why it is left out.
        unknown: names in the file that the format does not have.
        problems: two tensors that would get one name.
    """

    names: Mapping[str, str]
    ignored: Mapping[str, str]
    unknown: tuple[str, ...]
    problems: tuple[str, ...]


def rename(names: Iterable[str], form: Format) -> Renamed:
    """Translates a format's names into EAGLE's."""
    renamed: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unknown, problems = [], []
    for name in names:
        new = _first_match(name, form.renames)
        if new is None:
            reason = _first_match(name, form.ignored)
            if reason is None:
                unknown.append(name)
            else:
                ignored[name] = reason
        elif new in renamed:
            problems.append(f"twice: {name} and {renamed[new]} both mean {new}")
        else:
            renamed[new] = name
    return Renamed(renamed, ignored, tuple(unknown), tuple(problems))


def _first_match(name: str, patterns: Iterable[tuple[str, Any]]) -> str | None:
    for pattern, replacement in patterns:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None
