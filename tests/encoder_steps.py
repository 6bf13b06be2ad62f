"""Steps of one encoder, for tests of encoders alone."""

from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.methods.attention_received import AttentionReceived
from meteor_jax.pruning.methods.mean_token import MeanToken
from meteor_jax.pruning.methods.random import Random
from meteor_jax.pruning.methods.uniform import Uniform
from meteor_jax.pruning.points import Point

METHODS = {
    "mean_token": MeanToken(),
    "attention": AttentionReceived(),
    "cls": AttentionReceived(queries="cls"),
    "random": Random(),
    "uniform": Uniform(),
}


def segment_steps(keeps, methods="mean_token", *, encoder="encoder"):
    """A step after each segment that keeps so many tokens, by one method or one a segment."""
    if isinstance(methods, str):
        methods = (methods,) * len(keeps)
    return tuple(
        EncoderStep(Point(encoder, "segment", number), keep, METHODS[name])
        for number, (keep, name) in enumerate(zip(keeps, methods, strict=True), 1)
    )
