"""What the configs of the transformer encoders share."""

from __future__ import annotations


class TransformerSizes:
    """What stage 1 must know of an encoder (`encode_plan.EncoderShape`), the base of its config.

    Attributes:
        grid: side of the output grid.
        cuttable: at which boundaries tokens can be dropped.
        num_windows: what a number of kept tokens must be a multiple of.
        has_attention: whether the criterion "attention" makes sense.
    """

    grid: int
    cuttable = (True, True, True)
    num_windows = 1
    has_attention = True

    @property
    def num_tokens(self) -> int:
        return self.grid**2


def check_multiple(name: str, value: int, *, of: str, factor: int) -> None:
    """Raises ValueError unless `value` is a multiple of `factor`, which is called `of`."""
    if value % factor:
        raise ValueError(f"{name}: expected a multiple of {of} {factor}, got {value}.")
