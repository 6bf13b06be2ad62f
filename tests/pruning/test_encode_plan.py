"""What a stage 1 plan asks of a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.config import ConfigError
from meteor_jax.pruning.baselines import parse_plan
from meteor_jax.pruning.plan import Calibration, override
from tests import tiny_model as tiny

SHAPES = {name: tiny.CONFIG.encoder(name) for name in tiny.CONFIG.encoders}


def random_plan(*, criterion="random"):
    return parse_plan(
        "meteor(encode=(26, 18, 24), fuse=24, encode.assignment=uniform, "
        f"encode.criteria={(criterion,) * 3})"
    )


def kept(images):
    """int[I, K] by encoder and boundary."""
    trace = tiny.encode(tiny.params(), images, plan=random_plan()).trace
    return {name: jax.device_get(encode.kept) for name, encode in trace.encode.items()}


def test_a_random_draw_depends_on_image_encoder_and_boundary_and_not_on_the_batch():
    images = tiny.make_batch().images
    together = kept(images)
    for name in ("clip", "pix2struct"):
        first, second, last = together[name]
        assert (first[0] != first[1]).any() and (second[0] != second[1]).any()
        assert (last[0] != last[1]).any()
        # Of 13 tokens 9 stay, then 8: not those at the same places.
        places = [np.searchsorted(old[0], new[0]) for old, new in ((first, second), (second, last))]
        assert set(places[0][:8]) != set(places[1])
    assert (together["clip"][0] != together["pix2struct"][0]).any()
    others = kept(jnp.concatenate([images[1:2], 255 - images[:2]]))
    for name, boundaries in together.items():
        for boundary, tokens in enumerate(boundaries):
            np.testing.assert_array_equal(others[name][boundary][0], tokens[1], err_msg=name)


def test_every_random_draw_has_a_seed_of_its_own():
    def seeds(plan):
        return [cut.seed for cuts in plan.encode.encoder_cuts(SHAPES).values() for cut in cuts]

    plan = random_plan()
    one, other = seeds(plan), seeds(override(plan, **{"encode.seed": 1}))
    assert len({*one, *other}) == 2 * 3 * 3 and seeds(override(plan, **{"encode.seed": 0})) == one


def test_only_what_needs_attention_is_replaced_where_there_is_none():
    def of_convnext(criterion):
        cuts = random_plan(criterion=criterion).encode.encoder_cuts(SHAPES)["convnext"]
        return cuts[-1].criterion

    assert [of_convnext(name) for name in ("random", "uniform")] == ["random", "uniform"]
    assert [of_convnext(name) for name in ("attention", "cls")] == ["mean_token"] * 2


def test_a_share_is_part_of_what_a_plan_asks_for():
    measured = {"energy 0.99": 9.0, "energy 0.9": 4.0, "effective": 7.0}
    calibration = Calibration(
        ranks={kind: dict.fromkeys(SHAPES, (rank,) * 3) for kind, rank in measured.items()}
    )

    def clip(fields):
        plan = parse_plan(f"meteor(encode=(26, 22, 30), fuse=20{fields})")
        return dict(plan.calibrated(calibration).encode.ranks).get("clip")

    assert clip("") == clip(", encode.energy=.99") == (9.0,) * 3
    assert clip(", encode.energy=.9") == (4.0,) * 3
    assert clip(", encode.rank=effective") == (7.0,) * 3
    assert clip(", encode.energy=.95") is None
    one, other = (
        parse_plan(f"meteor(encode.energy={share})", library={"meteor": tiny.METEOR})
        for share in (0.99, 0.9)
    )
    assert one.fingerprint != other.fingerprint


def test_ranks_of_another_kind_are_none():
    plan = parse_plan("meteor(encode=(26, 22, 30), fuse=20, encode.energy=.9)")
    with pytest.raises(ValueError, match=r"no feature ranks \(energy 0.9\) for clip"):
        plan.calibrated(tiny.RANKS).encode.encoder_cuts(SHAPES)
    with pytest.raises(ConfigError, match=r"encode.*energy: expected a share"):
        parse_plan("meteor(encode=(26, 22, 30), fuse=20, encode.energy=99.0)")
