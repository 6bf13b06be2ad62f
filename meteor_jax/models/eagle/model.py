"""The whole model: encoders, projectors, fusion and decoder, tokens dropped as a `PrunePlan` says.

B examples, M images an example, I images, N visual tokens, T text tokens, S entries of the joined
row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from meteor_jax.models.decoders.llama.caches import new_position, pin_cache
from meteor_jax.models.decoders.llama.model import Llama
from meteor_jax.models.eagle.config import MeteorConfig
from meteor_jax.models.eagle.fusion import (
    concatenate_sequence,
    contiguous_positions,
    entry_of_text,
    on_common_grid,
    prune_fused,
    splice,
    to_common_grid,
)
from meteor_jax.models.eagle.outputs import Encoded, Extended, Forward, HiddenStates, Prefilled
from meteor_jax.models.eagle.prefill import DecoderRun, run_decoder
from meteor_jax.models.eagle.projector import Projector
from meteor_jax.models.encoders.registry import ENCODERS
from meteor_jax.models.layers.method_params import MethodParams
from meteor_jax.models.layers.pixels import hash_images, normalise
from meteor_jax.models.layers.stack import constrain
from meteor_jax.pruning.method import ReductionContext, Span, add_losses
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, Batch, DecodeCache, EncodeTrace, PruneTrace, VisualTokens


class Meteor(nn.Module):
    """A multi-encoder vision-language model. Its parameters do not depend on any plan."""

    config: MeteorConfig

    if TYPE_CHECKING:  # Flax declares a pair too, which comes with `mutable` only

        def apply(self, *args: Any, **options: Any) -> Any: ...

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        width = config.llama.width
        for name in config.encoders:
            encoder = config.encoder(name)
            setattr(self, name, ENCODERS[encoder.type].module(encoder, dtype))
            if config.fusion == "post":
                setattr(self, f"projector_{name}", Projector(width, dtype))
        if config.fusion == "pre":
            self.projector = Projector(width, dtype)
        self.llama = Llama(config.llama, dtype)
        if config.learned_methods:
            widths = tuple(config.token_widths.items())
            self.pruning = MethodParams(config.methods_with_params, widths)

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
        run = self._run_decoder(
            visual,
            image_valid=batch.image_valid,
            tokens=batch.tokens,
            text_valid=batch.text_valid,
            segment_ids=batch.segment_ids,
            plan=plan,
            decode_capacity=0,
        )
        entries = entry_of_text(run.sequence, num_text=batch.tokens.shape[1])
        x = jnp.take_along_axis(run.sequence.x, entries[..., None], axis=1)
        trace = encoded.trace.replace(prune_steps=run.prune_steps)
        return HiddenStates(x=constrain(x, "btd"), trace=trace)

    def logits(self, x: Array) -> Array:
        """float32[B, T, V] of hidden states float[B, T, D]."""
        return constrain(self.llama.logits(x), "btv")

    @nn.nowrap
    def head_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `params` that `logits` reads."""
        last = "embedding" if self.config.llama.tie_embeddings else "head"
        return {"llama": {name: params["llama"][name] for name in ("norm", last)}}

    def encode_images(self, images: Array, *, plan: PrunePlan) -> Encoded:
        """Raw RGB uint8[I, H, W, 3] to the visual tokens that enter the decoder, tokens dropped in
        the encoders and where their tokens are joined.

        Images of a float dtype are taken as they are: normalised with CLIP's mean and deviation.
        """
        config = self.config
        names = tuple(config.encoders) if self.is_initializing() else config.active_encoders(plan)
        shapes = {name: config.encoder(name) for name in names}
        steps = plan.encoder_steps(shapes)
        context = ReductionContext(image_seed=hash_images(images), learned=self._method_params())
        pixels = self._pixels(images)
        outputs = {
            name: getattr(self, name)(pixels, steps=steps[name], context=context) for name in names
        }
        grids = [shapes[name].grid for name in names]
        features = [outputs[name].x for name in names]
        if config.fusion == "post":
            tokens, spans = concatenate_sequence(
                [self.projector_of(name)(x) for name, x in zip(names, features, strict=True)],
                [outputs[name].patch_index for name in names],
                names=names,
                grids=grids,
                positions=plan.positions,
            )
        else:
            if plan.prunes_encoders or len(names) < len(config.encoders):
                raise ValueError(
                    f"plan '{plan.name}' drops tokens inside the encoders, but fusion='pre' needs "
                    "all their grids whole; use fusion='post'."
                )
            features = to_common_grid(features, grids=grids, grid=config.grid)
            tokens = on_common_grid(self.projector(jnp.concatenate(features, axis=-1)))
            spans = (Span(encoder="all", start=0, size=config.grid**2, grid=config.grid),)
        losses = [output.loss for output in outputs.values()]
        for index, step in enumerate(plan.fusion_steps):
            seen = context
            if config.fusion == "pre" and "encoder_parts" in step.method.needs:
                here = features
                if index:  # those of the places that the steps before left
                    places = tokens.patch_index[..., None]
                    here = [jnp.take_along_axis(x, places, axis=1) for x in features]
                with jax.named_scope("scores"):
                    seen = context.replace(encoder_parts=tuple(self.projector.parts(here)))
            tokens, spans, loss = prune_fused(
                tokens, step, spans=spans, context=seen.replace(index=index)
            )
            losses.append(loss)
            if plan.positions == "contiguous":
                tokens = contiguous_positions(tokens)
        return Encoded(
            tokens=tokens.replace(x=constrain(tokens.x, "btd")),
            trace=PruneTrace(
                encode={name: EncodeTrace(kept=outputs[name].kept) for name in names},
                fused_encoder=tokens.encoder,
                fused_patch_index=tokens.patch_index,
                loss=add_losses(*losses),
            ),
        )

    def segment_features(self, images: Array) -> dict[str, tuple[Array, ...]]:
        """Every encoder's features float[I, N, E] after its three segments, nothing dropped."""
        pixels = self._pixels(images)
        return {
            name: getattr(self, name)(pixels, all_segments=True).features
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
        """Reads the prompts, dropping visual tokens on the way up.

        Shapes:
            visual: VisualTokens of [B, M, N, D]; image_valid: bool[B, M].
            tokens: int32[B, T], padded on the right; text_valid: bool[B, T].
            max_new_tokens: room in the cache.
        """
        run = self._run_decoder(
            visual,
            image_valid=image_valid,
            tokens=tokens,
            text_valid=text_valid,
            plan=plan,
            decode_capacity=max_new_tokens,
        )
        last = jnp.maximum(run.sequence.valid.sum(1) - 1, 0)
        x = jnp.take_along_axis(run.sequence.x, last[:, None, None], axis=1)[:, 0]
        return Prefilled(
            logits=self.llama.logits(x),
            cache=pin_cache(
                DecodeCache(
                    ranges=run.ranges,
                    cache_index=jnp.zeros((), jnp.int32),
                    overflowed=jnp.zeros((), bool),
                )
            ),
            prune_steps=run.prune_steps,
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
        index = cache.cache_index
        taken = 0 if isinstance(index, Tracer) else int(index)
        if taken + count > cache.decode_capacity:
            raise ValueError(
                f"expected at most {cache.decode_capacity - taken} more tokens, for which prefill "
                f"left room, got {count}; raise max_new_tokens."
            )
        x = self.llama.embed(tokens)
        ranges, start = [], 0
        for layers in cache.ranges:
            stop = start + layers.k.shape[0]
            position = new_position(layers, index, count=count)
            out = self.llama.run_cached(x, position, layers, start=start, stop=stop)
            ranges.append(layers.append(*out.extras, cache_index=index))
            x, start = out.x, stop
        fits = index + count <= cache.decode_capacity
        grown = DecodeCache(
            ranges=tuple(ranges),
            cache_index=index + jnp.where(fits, count, 0),
            overflowed=cache.overflowed | ~fits,
        )
        logits = jnp.where(fits, self.llama.logits(x), jnp.nan)
        return Extended(logits=logits, cache=pin_cache(grown))

    def encoder_output(self, images: Array, *, encoder: str) -> Array:
        """What one encoder alone, unpruned, makes of uint8[I, H, W, 3]:
        float[I, N, E], row-major."""
        return getattr(self, encoder)(self._pixels(images)).x

    def _pixels(self, images: Array) -> Array:
        return normalise(images, size=self.config.image_size, dtype=self.config.dtype)

    def projector_of(self, name: str) -> Projector:
        """One encoder's projector."""
        return getattr(self, f"projector_{name}")

    def _method_params(self) -> dict[str, Any] | None:
        return self.pruning() if self.config.learned_methods else None

    def _run_decoder(
        self,
        visual: VisualTokens,
        *,
        image_valid: Array,
        tokens: Array,
        text_valid: Array,
        plan: PrunePlan,
        decode_capacity: int,
        segment_ids: Array | None = None,
    ) -> DecoderRun:
        config, num_text, max_images = self.config, tokens.shape[1], image_valid.shape[1]
        longest = num_text + max_images * visual.span + decode_capacity
        if longest > config.llama.max_positions and not self.is_initializing():
            raise ValueError(
                f"a row of {num_text} text places, {max_images} × {visual.span} positions of "
                f"images and {decode_capacity} new tokens needs {longest} positions, but "
                f"llama.max_positions={config.llama.max_positions}; shorten the text, or set the "
                "plan's positions='contiguous'."
            )
        sequence = splice(
            self.llama.embed(jnp.maximum(tokens, 0)),
            tokens=tokens,
            text_valid=text_valid,
            visual=visual,
            image_valid=image_valid,
            segment_ids=segment_ids,
        )
        sequence = sequence.replace(x=constrain(sequence.x, "btd"))
        if self.is_initializing():
            out = self.llama.run(sequence.x, sequence.position, start=0, stop=1)
            return DecoderRun(sequence.replace(x=out.x), ranges=(), prune_steps=())
        return run_decoder(
            Llama(config.llama, jnp.dtype(config.dtype), parent=None),
            self.llama.variables,
            sequence,
            plan=plan,
            num_text=num_text,
            num_images=image_valid.sum(1),
            max_images=max_images,
            visual_per_image=visual.num_tokens,
            decode_capacity=decode_capacity,
            learned=self._method_params(),
        )
