"""The whole model: encoders, projectors, fusion and decoder, each cut as a `PrunePlan` says.

B examples, M images an example, I images, N visual tokens, T text tokens, S entries of the joined
row, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from meteor_jax.models.decoders.llama.model import Llama, LlamaConfig
from meteor_jax.models.eagle.fusion import (
    concatenate_sequence,
    contiguous_positions,
    entry_of_slot,
    splice,
    to_common_grid,
)
from meteor_jax.models.eagle.outputs import Encoded, Extended, Forward, HiddenStates, Prefilled
from meteor_jax.models.eagle.prefill import SegmentRun, new_position, run_segments
from meteor_jax.models.eagle.projector import Projector
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.convnext.model import ConvNextConfig
from meteor_jax.models.encoders.eva02.model import Eva02Config
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.models.encoders.registry import ENCODERS
from meteor_jax.models.encoders.sam.model import SamConfig
from meteor_jax.models.family import ModelConfig
from meteor_jax.models.layers.remat import remat_policy
from meteor_jax.models.layers.resize import IMAGE_MEAN, IMAGE_STD
from meteor_jax.models.layers.stack import constrain
from meteor_jax.pruning.encode import NUM_SEGMENTS, EncoderCut
from meteor_jax.pruning.fuse import Span, fuse, position_redundancy
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, Batch, DecodeCache, EncodeTrace, PruneTrace, VisualTokens


@dataclasses.dataclass(frozen=True)
class MeteorConfig(ModelConfig):
    """Which encoders, which decoder, and how they are joined.

    Attributes:
        encoders: names out of `ENCODERS`, in the order of their tokens or channels.
        fusion: "post": a projector an encoder, tokens joined along the sequence (METEOR);
            "pre": channels joined on a common grid, one projector (EAGLE).
        grid: side of the common grid of "pre".
        image_size: side of the images that all encoders start from.
        dtype: of the computation; parameters are float32.
    """

    family: Literal["eagle"] = "eagle"
    encoders: tuple[str, ...] = ("clip", "convnext", "pix2struct")
    clip: ClipConfig = ClipConfig()
    convnext: ConvNextConfig = ConvNextConfig()
    sam: SamConfig = SamConfig()
    eva02: Eva02Config = Eva02Config()
    pix2struct: Pix2StructConfig = Pix2StructConfig()
    llama: LlamaConfig = LlamaConfig()
    fusion: Literal["post", "pre"] = "post"
    grid: int = 32
    image_size: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        unknown = [name for name in self.encoders if name not in ENCODERS]
        if unknown or not self.encoders:
            raise ValueError(
                f"encoders: expected names out of {', '.join(ENCODERS)}, got {self.encoders}."
            )
        for name in (*self.encoders, "llama"):
            try:
                remat_policy(getattr(self, name).remat)
            except ValueError as error:
                raise ValueError(f"{name}.remat: {error}") from None

    def encoder(self, name: str) -> Any:
        """The config of one encoder."""
        return getattr(self, name)

    def active_encoders(self, plan: PrunePlan) -> tuple[str, ...]:
        """The encoders that `plan` runs, in the model's order.

        Raises:
            ValueError: if the plan names an encoder that the model lacks.
        """
        unknown = [name for name in plan.encoders if name not in self.encoders]
        if unknown:
            raise ValueError(
                f"plan '{plan.name}' runs {', '.join(unknown)}, but the model has "
                f"{', '.join(self.encoders)}."
            )
        return tuple(name for name in self.encoders if not plan.encoders or name in plan.encoders)


class Meteor(nn.Module):
    """A multi-encoder vision-language model. Its parameters do not depend on any plan."""

    config: MeteorConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        width = config.llama.width
        for name in config.encoders:
            setattr(self, name, ENCODERS[name].module(config.encoder(name), dtype))
            if config.fusion == "post":
                setattr(self, f"projector_{name}", Projector(width, dtype))
        if config.fusion == "pre":
            self.projector = Projector(width, dtype)
        self.llama = Llama(config.llama, dtype)

    def __call__(self, batch: Batch, *, plan: PrunePlan) -> Forward:
        """One forward pass over whole conversations, for scoring text."""
        hidden = self.hidden_states(batch, plan=plan)
        return Forward(logits=self.logits(hidden.x), trace=hidden.trace)

    def hidden_states(self, batch: Batch, *, plan: PrunePlan) -> HiddenStates:
        """The same up to the head, for training, which need not hold all logits at once."""
        rows, images = batch.image_valid.shape
        encoded = self.encode_images(
            batch.images.reshape(rows * images, *batch.images.shape[2:]), plan=plan
        )
        visual = jax.tree.map(
            lambda array: array.reshape(rows, images, *array.shape[1:]), encoded.tokens
        )
        run = self._run_segments(
            visual,
            image_valid=batch.image_valid,
            tokens=batch.tokens,
            text_valid=batch.text_valid,
            segment_ids=batch.segment_ids,
            plan=plan,
            num_new=0,
        )
        entries = entry_of_slot(run.sequence, num_slots=batch.tokens.shape[1])
        x = jnp.take_along_axis(run.sequence.x, entries[..., None], axis=1)
        return HiddenStates(x=constrain(x, "btd"), trace=encoded.trace.replace(cuts=run.cuts))

    def logits(self, x: Array) -> Array:
        """float32[B, T, V] of hidden states float[B, T, D]."""
        return constrain(self.llama.logits(x), "btv")

    @nn.nowrap
    def head_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `params` that `logits` reads."""
        last = "embedding" if self.config.llama.tie_embeddings else "head"
        return {"llama": {name: params["llama"][name] for name in ("norm", last)}}

    def encode_images(self, images: Array, *, plan: PrunePlan) -> Encoded:
        """Stages 1 and 2: raw RGB uint8[I, H, W, 3] to the visual tokens that enter the LLM.

        Images of a float dtype are taken as they are: normalised with CLIP's mean and deviation.
        """
        config = self.config
        names = config.active_encoders(plan)
        if self.is_initializing():
            names = config.encoders
        pixels = self._normalise(images)
        shapes = {name: config.encoder(name) for name in names}
        cuts = plan.encode.encoder_cuts(shapes) if plan.encode else {}
        image_seed = _hash_images(images)
        outputs = {
            name: getattr(self, name)(pixels, cuts=cuts.get(name), image_seed=image_seed)
            for name in names
        }
        grids = [shapes[name].grid for name in names]

        if config.fusion == "post":
            tokens, spans = concatenate_sequence(
                [getattr(self, f"projector_{name}")(outputs[name].x) for name in names],
                [outputs[name].raster for name in names],
                names=names,
                grids=grids,
                positions=plan.positions,
            )
        else:
            if plan.encode is not None or len(names) < len(config.encoders):
                raise ValueError(
                    f"plan '{plan.name}' cuts inside the encoders, but fusion='pre' needs all "
                    "their grids whole; use fusion='post'."
                )
            features = to_common_grid(
                [outputs[name].x for name in names], grids=grids, grid=config.grid
            )
            tokens = _on_common_grid(self.projector(jnp.concatenate(features, axis=-1)))
            spans = (Span(encoder="all", start=0, size=config.grid**2, grid=config.grid),)
        if plan.fuse is not None:
            scores = None
            if config.fusion == "pre" and plan.fuse.criterion == "cooperative":
                if plan.fuse.num_iterations > 1:
                    raise ValueError(
                        f"plan '{plan.name}': fuse.num_iterations={plan.fuse.num_iterations}, but "
                        "fusion='pre' drops whole places at once; set fuse.num_iterations=1."
                    )
                with jax.named_scope("scores"):
                    parts = self.projector.parts(features)
                    scores = -position_redundancy(parts, similarity=plan.fuse.similarity)
            tokens = fuse(tokens, plan=plan.fuse, spans=spans, image_seed=image_seed, scores=scores)
            if plan.positions == "contiguous":
                tokens = contiguous_positions(tokens)
        return Encoded(
            tokens=tokens.replace(x=constrain(tokens.x, "btd")),
            trace=PruneTrace(
                encode={name: EncodeTrace(kept=outputs[name].kept) for name in names},
                fused_encoder=tokens.encoder,
                fused_raster=tokens.raster,
            ),
        )

    def boundary_features(self, images: Array) -> dict[str, tuple[Array, ...]]:
        """Every encoder's features float[I, N, E] at its three boundaries, nothing dropped."""
        pixels = self._normalise(images)
        return {
            name: getattr(self, name)(pixels, cuts=_keep_all(self.config.encoder(name))).features
            for name in self.config.encoders
        }

    def prefill(
        self,
        visual: VisualTokens,
        *,
        image_valid: Array,
        tokens: Array,
        text_valid: Array,
        plan: PrunePlan,
        max_new_tokens: int,
    ) -> Prefilled:
        """Stage 3: reads the prompts, dropping visual tokens on the way up.

        Shapes:
            visual: VisualTokens of [B, M, N, D]; image_valid: bool[B, M].
            tokens: int32[B, T], padded on the right; text_valid: bool[B, T].
            max_new_tokens: room in the cache.
        """
        run = self._run_segments(
            visual,
            image_valid=image_valid,
            tokens=tokens,
            text_valid=text_valid,
            plan=plan,
            num_new=max_new_tokens,
        )
        last = jnp.maximum(run.sequence.valid.sum(1) - 1, 0)
        x = jnp.take_along_axis(run.sequence.x, last[:, None, None], axis=1)[:, 0]
        return Prefilled(
            logits=self.llama.logits(x),
            cache=_pinned(
                DecodeCache(
                    segments=run.segments,
                    num_new=jnp.zeros((), jnp.int32),
                    overflowed=jnp.zeros((), bool),
                )
            ),
            cuts=run.cuts,
        )

    def extend(self, cache: DecodeCache, tokens: Array) -> Extended:
        """Appends int32[B, T] text tokens to every row of the cache.

        Where the room that `prefill` left does not hold them, and only the running program knows,
        nothing is written: the cache says `overflowed`, and the logits are NaN.

        Raises:
            ValueError: if T is more than that room, or the cache, outside of jit, has not enough
                left.
        """
        count = tokens.shape[1]
        taken = 0 if isinstance(cache.num_new, jax.core.Tracer) else int(cache.num_new)
        if taken + count > cache.decode_capacity:
            raise ValueError(
                f"expected at most {cache.decode_capacity - taken} more tokens, for which prefill "
                f"left room, got {count}; raise max_new_tokens."
            )
        x = self.llama.embed(tokens)
        segments, start = [], 0
        for segment in cache.segments:
            stop = start + segment.k.shape[0]
            position = new_position(segment, cache.num_new, count=count)
            out = self.llama.run_cached(x, position, segment, start=start, stop=stop)
            segments.append(segment.append(*out.extras, num_new=cache.num_new))
            x, start = out.x, stop
        fits = cache.num_new + count <= cache.decode_capacity
        grown = DecodeCache(
            segments=tuple(segments),
            num_new=cache.num_new + jnp.where(fits, count, 0),
            overflowed=cache.overflowed | ~fits,
        )
        logits = jnp.where(fits, self.llama.logits(x), jnp.nan)
        return Extended(logits=logits, cache=_pinned(grown))

    def encoder_output(self, images: Array, *, encoder: str) -> Array:
        """What one encoder alone, uncut, says of uint8[I, H, W, 3]: float[I, N, E], row-major."""
        return getattr(self, encoder)(self._normalise(images)).x

    def _normalise(self, images: Array) -> Array:
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"expected images of {size}×{size}×3, got {'×'.join(map(str, images.shape[1:]))}; "
                "set model.image_size or resize the data."
            )
        if jnp.issubdtype(images.dtype, jnp.floating):
            return images.astype(self.config.dtype)
        pixels = (images / jnp.float32(255) - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
        return pixels.astype(self.config.dtype)

    def _run_segments(
        self,
        visual: VisualTokens,
        *,
        image_valid: Array,
        tokens: Array,
        text_valid: Array,
        plan: PrunePlan,
        num_new: int,
        segment_ids: Array | None = None,
    ) -> SegmentRun:
        longest = tokens.shape[1] + image_valid.shape[1] * visual.span + num_new
        if longest > self.config.llama.max_positions and not self.is_initializing():
            raise ValueError(
                f"a row of {tokens.shape[1]} text places, {image_valid.shape[1]} × {visual.span} "
                f"positions of images and {num_new} new tokens needs {longest} positions, but "
                f"llama.max_positions={self.config.llama.max_positions}; shorten the text, or set "
                "the plan's positions='contiguous'."
            )
        text = self.llama.embed(jnp.maximum(tokens, 0))
        sequence = splice(
            text,
            tokens=tokens,
            text_valid=text_valid,
            visual=visual,
            image_valid=image_valid,
            segment_ids=segment_ids,
        )
        sequence = sequence.replace(x=constrain(sequence.x, "btd"))
        if self.is_initializing():
            out = self.llama.run(sequence.x, sequence.position, start=0, stop=1)
            return SegmentRun(sequence.replace(x=out.x), segments=(), cuts=())
        return run_segments(
            Llama(self.config.llama, jnp.dtype(self.config.dtype), parent=None),
            self.llama.variables,
            sequence,
            plan=plan.decode,
            num_text=tokens.shape[1],
            num_images=image_valid.sum(1),
            max_images=image_valid.shape[1],
            visual_per_image=visual.num_tokens,
            num_new=num_new,
        )


def _pinned(cache: DecodeCache) -> DecodeCache:
    """`cache` by rows and kv heads, so that it stays where it is from one program to the next."""
    return cache.replace(
        segments=tuple(
            segment.replace(
                k=constrain(segment.k, "lbshd"),
                v=constrain(segment.v, "lbshd"),
                valid=constrain(segment.valid, "bs"),
            )
            for segment in cache.segments
        )
    )


def _keep_all(encoder: Any) -> tuple[EncoderCut, ...]:
    return (EncoderCut(keep=encoder.num_tokens),) * NUM_SEGMENTS


def _on_common_grid(x: Array) -> VisualTokens:
    """VisualTokens of [I, N, D] whose tokens lie on one grid that all encoders share."""
    place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return VisualTokens(
        x=x, encoder=jnp.zeros_like(place), raster=place, position=place, span=x.shape[1]
    )


def _hash_images(images: Array) -> Array:
    """uint32[I]: a hash of the pixels, exact, so the same on every device and in every batch."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        images = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32)
    flat = images.reshape(images.shape[0], -1).astype(jnp.uint32)
    weight = jnp.arange(flat.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    return (flat * weight).sum(1, dtype=jnp.uint32)
