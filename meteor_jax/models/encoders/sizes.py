"""What the configs of the transformer encoders share."""

from __future__ import annotations

from meteor_jax.models.layers.stack import segment_bounds
from meteor_jax.pruning.encode import NUM_SEGMENTS


class TransformerSizes:
    """What stage 1 must know of an encoder (`encode_plan.EncoderShape`), the base of its config.

    Attributes:
        grid: side of the output grid.
        cuttable: at which boundaries tokens can be dropped.
        num_windows: what a number of kept tokens must be a multiple of.
        has_attention: whether the criterion "attention" makes sense.
        period: blocks after which their kinds repeat; no boundary lies inside a period.
    """

    grid: int
    depth: int
    cuttable = (True, True, True)
    num_windows = 1
    has_attention = True
    period = 1

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def segment_ends(self) -> tuple[int, ...]:
        """The block at which each segment of stage 1 ends."""
        return segment_bounds(self.depth, NUM_SEGMENTS, period=self.period)


def check_multiple(name: str, value: int, *, of: str, factor: int) -> None:
    """Raises ValueError unless `value` is a multiple of `factor`, which is called `of`."""
    if value % factor:
        raise ValueError(f"{name}: expected a multiple of {of} {factor}, got {value}.")
