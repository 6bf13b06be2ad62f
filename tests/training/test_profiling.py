"""Which steps are traced, as the command line says it."""

import pytest

from meteor_jax.config import ConfigError
from meteor_jax.training.logging.profiling import parse_range


def test_both_ends_are_traced():
    assert list(parse_range("20:22")) == [20, 21, 22]
    assert list(parse_range("3:3")) == [3]


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "6:5", "-1:5", "a:b", "1:2:3"])
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected FIRST:LAST, two steps, such as 20:24"):
        parse_range(text)
