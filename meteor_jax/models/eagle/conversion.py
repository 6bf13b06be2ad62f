"""EAGLE's checkpoints: encoders by their place, the projector, and the decoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.config import ConfigError
from meteor_jax.models import conversion as cv
from meteor_jax.models.decoders.llama import conversion as llama_conversion
from meteor_jax.models.decoders.llama.model import Llama
from meteor_jax.models.eagle.model import MeteorConfig
from meteor_jax.models.eagle.projector import Projector
from meteor_jax.models.encoders.registry import ENCODERS

TOWER = "model.vision_tower.vision_towers.{n}.vision_tower."
PROJECTOR = "model.mm_projector."
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
EAGLE_GRID, EAGLE_IMAGE = 32, 1024


FORMATS = {
    "eagle": cv.Format(
        part="eagle",
        model_types=("eagle_llama",),
        mark=r"model\.vision_tower\.vision_towers\.",
        renames=((r"(.*)", r"\1"),),
    ),
    "projector": cv.Format(
        part="projector",
        mark=r"(.*\.)?mm_projector\.",
        renames=((r"(?:.*\.)?mm_projector\.(.*)", PROJECTOR + r"\1"),),
    ),
}


def projector_table() -> cv.Table:
    """EAGLE's one projector over the joined channels."""
    return cv.Table((*cv.linear("0", "fc1"), *cv.linear("2", "fc2")))


def split_projector_tables(widths: dict[str, int], *, out_width: int) -> dict[str, cv.Table]:
    """METEOR's projector an encoder, each from its slice of EAGLE's.

    The first layer is cut by input channel and its bias shared out: every encoder gets an equal
    part and the last one what is left, so that the first layers' outputs sum to EAGLE's. The second
    layer, which is not linear in the encoders, is EAGLE's in each.
    """
    tables, start = {}, 0
    for index, (name, width) in enumerate(widths.items()):
        is_last = index == len(widths) - 1
        rules = [
            cv.Rule(
                "0.weight",
                "fc1/kernel",
                cv.one_way(functools.partial(_rows, start=start, size=width)),
                whole=(out_width, sum(widths.values())),
            ),
            cv.Rule(
                "0.bias",
                "fc1/bias",
                cv.one_way(functools.partial(_share, parts=len(widths), is_last=is_last)),
                whole=(out_width,),
            ),
            *cv.linear("2", "fc2"),
        ]
        tables[name] = cv.Table(tuple(rules))
        start += width
    return tables


def _rows(weight: np.ndarray, *, start: int, size: int) -> np.ndarray:
    return weight.T[start : start + size]


def _share(bias: np.ndarray, *, parts: int, is_last: bool) -> np.ndarray:
    share = (bias.astype(np.float64) / parts).astype(bias.dtype)
    if not is_last:
        return share
    return (bias.astype(np.float64) - (parts - 1) * share.astype(np.float64)).astype(bias.dtype)


def eagle_fields(config: Mapping[str, Any], *, channels: int | None = None) -> cv.Fields:
    """Which encoders, and how EAGLE joins them. Where config.json does not tell, those of the
    released model whose encoders have so many `channels`."""
    text = config.get("mm_vision_tower") or RELEASED.get(channels, "")
    names = [tower.split("-")[0] for tower in text.split(";")]
    unknown = [name for name in names if name not in TOWERS]
    if unknown:
        raise cv.ConversionError(
            [
                f"config.json: mm_vision_tower={text!r}; expected towers out of "
                f"{', '.join(TOWERS)}, joined by ';'."
            ]
        )
    kind = config.get("mm_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu":
        raise cv.ConversionError(
            [f"config.json: expected mm_projector_type='mlp2x_gelu', got {kind!r}."]
        )
    types = [TOWERS[name] for name in names]
    # The second of a type gets a number.
    order = [f"{t}_{types[:i].count(t) + 1}" if t in types[:i] else t for i, t in enumerate(types)]
    return {
        "encoders": {name: {"type": type_} for name, type_ in zip(order, types, strict=True)},
        "encoder_order": tuple(order),
        "fusion": "pre",
        "grid": EAGLE_GRID,
        "image_size": EAGLE_IMAGE,
    }


class EagleConversion(cv.Conversion):
    """Of whole EAGLE checkpoints, of their projector, and of each encoder and decoder alone."""

    whole = "eagle"

    @property
    def formats(self) -> Mapping[str, cv.Format]:
        # An encoder that comes alone takes the first place.
        alone = {
            name: form.under(TOWER.replace("{n}", "0"))
            for encoder in ENCODERS.values()
            for name, form in encoder.conversion.formats.items()
        }
        return FORMATS | alone | llama_conversion.FORMATS

    def fields(
        self, part: str, *, shapes: Mapping[str, cv.Shape], config: Mapping[str, Any]
    ) -> cv.Fields:
        if part == "llama":
            return {"llama": llama_conversion.sizes(cv.Shapes(shapes), config)}
        if part in ENCODERS:
            conversion = ENCODERS[part].conversion
            sizes = conversion.sizes(cv.Shapes(shapes, TOWER.replace("{n}", "0")))
            fields = cv.known(sizes | conversion.stated(config))
            return {"encoders": {part: {"type": part} | fields}, "encoder_order": (part,)}
        if part == "projector":
            found = cv.Shapes(shapes, PROJECTOR)
            width, channels = (found.size("0.weight", axis) for axis in (0, 1))
            llama = {"width": width}
            if "hidden_size" in config:
                llama = llama_conversion.sizes(cv.Shapes(shapes), config)
            return eagle_fields(config, channels=channels) | {"llama": cv.known(llama)}
        fields = eagle_fields(config)
        for index, name in enumerate(fields["encoder_order"]):
            found, encoder = cv.Shapes(shapes, TOWER.replace("{n}", str(index))), fields["encoders"]
            encoder[name] |= cv.known(ENCODERS[encoder[name]["type"]].conversion.sizes(found))
        return fields | {"llama": llama_conversion.sizes(cv.Shapes(shapes), config)}

    def split_projector(self, part: str, fields: cv.Fields) -> cv.Fields:
        if part not in ("eagle", "projector"):
            raise ConfigError("--split_projector: the source holds no EAGLE projector.")
        return fields | {"fusion": "post"}

    def rename_encoder(self, part: str, fields: cv.Fields, *, name: str) -> cv.Fields:
        if part not in ENCODERS:
            return super().rename_encoder(part, fields, name=name)
        return {"encoders": {name: fields["encoders"][part]}, "encoder_order": (name,)}

    def parts(self, config: MeteorConfig, part: str) -> tuple[str, ...]:
        joint = ("projector",)
        if config.fusion == "post":
            joint = tuple(f"projector_{name}" for name in config.encoders)
        if part == "projector":
            return joint
        if part in ENCODERS:
            return config.encoder_order
        return (part,) if part != "eagle" else (*config.encoders, *joint, "llama")

    def table(self, config: MeteorConfig, parts: Sequence[str]) -> cv.Table:
        whole = cv.Table(())
        for index, name in enumerate(config.encoders):
            if name in parts:
                encoder = config.encoder(name)
                table = ENCODERS[encoder.type].conversion.table(encoder)
                whole += table.under(source=TOWER.replace("{n}", str(index)), target=name)
        if "projector" in parts:
            whole += projector_table().under(source=PROJECTOR, target="projector")
        if any(part.startswith("projector_") for part in parts):
            widths = {name: config.encoder(name).width for name in config.encoders}
            split = split_projector_tables(widths, out_width=config.llama.width)
            for name, table in split.items():
                whole += table.under(source=PROJECTOR, target=f"projector_{name}")
        if "llama" in parts:
            whole += llama_conversion.table(config.llama).under(source="", target="llama")
        return whole

    def param_shapes(self, config: MeteorConfig, parts: Sequence[str]) -> dict[str, cv.Shape]:
        return {
            f"{part}/{path}": shape
            for part in parts
            for path, shape in _shapes_of_part(config, part).items()
        }

    def part_of(self, config: MeteorConfig, name: str) -> tuple[str, str]:
        for index, encoder in enumerate(config.encoders):
            prefix = TOWER.replace("{n}", str(index))
            if name.startswith(prefix):
                return encoder, name.removeprefix(prefix)
        return "", name

    def config_json(
        self, config: MeteorConfig, *, part: str, source: Mapping[str, Any]
    ) -> dict[str, Any]:
        if source and part in ("eagle", "llama"):
            return dict(source)
        llama, theirs = config.llama, {ours: name for name, ours in TOWERS.items()}
        encoders = [
            (theirs[e.type], 448 if e.type == "clip" else config.image_size)
            for e in config.encoders.values()
        ]
        return {
            "architectures": ["EagleLlamaForCausalLM"],
            "model_type": "eagle_llama",
            "hidden_act": "silu",
            "hidden_size": llama.width,
            "intermediate_size": llama.mlp_dim,
            "max_position_embeddings": llama.max_positions,
            "num_attention_heads": llama.num_heads,
            "num_hidden_layers": llama.depth,
            "num_key_value_heads": llama.num_kv_heads,
            "rms_norm_eps": llama.norm_eps,
            "rope_theta": llama.rope_theta,
            "tie_word_embeddings": llama.tie_embeddings,
            "vocab_size": llama.vocab_size,
            "mm_hidden_size": sum(config.encoder(name).width for name in config.encoders),
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": ";".join(f"{tower}-{size}" for tower, size in encoders),
            "image_aspect_ratio": "pad",
            "tokenizer_model_max_length": 2048,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
        }


@functools.cache
def _shapes_of_part(config: MeteorConfig, part: str) -> dict[str, cv.Shape]:
    """Each part by itself: a lone encoder is not traced with a whole decoder."""
    if part in config.encoders:
        image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
        encoder = config.encoder(part)
        return cv.flat_shapes(ENCODERS[encoder.type].module(encoder).init, image)
    if part == "llama":
        llama = Llama(config.llama)

        def run(llama: Llama, tokens: jax.Array) -> jax.Array:
            return llama.logits(llama.run(llama.embed(tokens), tokens, start=0, stop=1).x)

        init = functools.partial(llama.init, method=run)
        return cv.flat_shapes(init, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    owner = part.removeprefix("projector_")  # itself where all encoders share one
    width = sum(config.encoder(e).width for e in config.encoders if owner in (e, part))
    x = jax.ShapeDtypeStruct((1, width), jnp.float32)
    return cv.flat_shapes(Projector(config.llama.width).init, x)
