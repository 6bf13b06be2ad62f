"""The plans that an experiment names."""

import pytest

from meteor_jax.config import ConfigError
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.pruning.calibration import Calibration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("divprune(keep=4, name=blind)", "cannot be called 'blind'"),
        ("mine", "cannot be called ''"),
        ("nope", "Valid: dart, divprune, "),
    ],
)
def test_a_name_that_means_something_else_is_refused(text, message):
    library = {"random": "random(keep=4)", "mine": "divprune(keep=4)"}
    with pytest.raises(ConfigError) as error:
        resolve_plans(
            (text + "(name='')" if text == "mine" else text,),
            library=library,
            calibration=Calibration(),
        )
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_preset_that_the_config_hides_is_listed_once():
    with pytest.raises(ConfigError) as error:
        resolve_plans(("nope",), library={"random": "full"}, calibration=Calibration())
    assert str(error.value).count("random") == 1
