"""What a plan's steps in the encoders ask of a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.config import ConfigError
from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.pruning.methods.attention_received import AttentionReceived
from meteor_jax.pruning.methods.mean_token import MeanToken
from meteor_jax.pruning.methods.random import Random
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.text import override, parse_plan
from tests import tiny_model as tiny

SHAPES = {name: tiny.CONFIG.encoder(name) for name in tiny.CONFIG.encoders}


def random_plan():
    return parse_plan(
        "meteor(encode=(26, 18, 24), fuse=24, encode.assignment=uniform, encode.method=random)"
    )


def kept(images):
    """int[I, K] by encoder and segment."""
    trace = tiny.encode(tiny.params(), images, plan=random_plan()).trace
    return {name: jax.device_get(encode.kept) for name, encode in trace.encode.items()}


def test_a_random_draw_depends_on_image_encoder_and_segment_and_not_on_the_batch():
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
    for name, segments in together.items():
        for segment, tokens in enumerate(segments):
            np.testing.assert_array_equal(others[name][segment][0], tokens[1], err_msg=name)


def test_every_random_draw_has_a_seed_of_its_own():
    """16 equal tokens of four encoders, drawn at three places with two seeds: all differently."""
    draws = [
        np.asarray(Random(seed).scores(jnp.ones((1, 16, 1)), context=context))[0].tobytes()
        for seed in (0, 1, 0)
        for context in (
            ReductionContext(image_seed=jnp.asarray([5], jnp.uint32), encoder=name, index=index)
            for name in (*SHAPES, "")
            for index in range(3 if name else 1)
        )
    ]
    assert draws[:10] == draws[20:] and len(set(draws)) == 20


def test_a_share_is_part_of_what_a_plan_asks_for():
    measured = {"energy 0.99": 9.0, "energy 0.9": 4.0, "effective": 7.0}
    calibration = Calibration(
        ranks={kind: dict.fromkeys(SHAPES, (rank,) * 3) for kind, rank in measured.items()}
    )

    def clip(fields):
        plan = parse_plan(f"meteor(encode=(26, 22, 30), fuse=20{fields})").calibrated(calibration)
        return [dict(step.budget.ranks).get("clip") for step in plan.stage("encode")]

    assert clip("") == clip(", encode.energy=.99") == [9.0] * 3
    assert clip(", encode.energy=.9") == [4.0] * 3
    assert clip(", encode.rank=effective") == [7.0] * 3
    assert clip(", encode.energy=.95") == [None] * 3
    one, other = (
        parse_plan(f"meteor(encode.energy={share})", library={"meteor": tiny.METEOR})
        for share in (0.99, 0.9)
    )
    assert one.fingerprint != other.fingerprint


def test_ranks_of_another_kind_are_none():
    plan = parse_plan("meteor(encode=(26, 22, 30), fuse=20, encode.energy=.9)")
    with pytest.raises(ValueError, match=r"no feature ranks \(energy 0.9\) for clip"):
        plan.calibrated(tiny.RANKS).encoder_steps(SHAPES)
    with pytest.raises(ConfigError, match=r"encode.*energy: expected a share"):
        parse_plan("meteor(encode=(26, 22, 30), fuse=20, encode.energy=99.0)")


def test_each_segment_meets_its_budget_and_convnext_drops_at_its_end_only():
    plan = tiny.plan(tiny.METEOR)
    steps = plan.encoder_steps(SHAPES)
    assert [step.point.index for step in steps["convnext"]] == [3]
    for segment, step in enumerate(plan.stage("encode"), 1):
        here = [s.keep for of in steps.values() for s in of if s.point.index == segment]
        assert sum(here) == step.budget.keep
    assert steps["clip"][0].keep > steps["pix2struct"][0].keep  # rank 4 against 2
    inverse = override(plan, **{"encode.assignment": "inverse_rank"}).encoder_steps(SHAPES)
    assert inverse["clip"][0].keep < inverse["pix2struct"][0].keep


def test_a_step_may_name_one_encoder():
    step = Step("clip.segment2", MeanToken(), Fixed(5))
    steps = PrunePlan(steps=(step,)).encoder_steps(SHAPES)
    assert {name: len(of) for name, of in steps.items()} == {
        "clip": 1,
        "convnext": 0,
        "pix2struct": 0,
    }
    trace = tiny.encode(tiny.params(), tiny.make_batch().images, plan=PrunePlan(steps=(step,)))
    assert [kept.shape[1] for kept in trace.trace.encode["clip"].kept] == [16, 5, 5]


def test_a_point_that_the_model_lacks_is_refused():
    for at, method, message in (
        ("sam.segment1", MeanToken(), "no reduction point 'sam.segment1' in this model"),
        ("clip.layer1", MeanToken(), "this model has clip.segment<number>, clip.block<number>"),
        ("decoder.block1", Random(), "this model has decoder.layer<number>"),
    ):
        plan = PrunePlan("mine", (Step(at, method, Fixed(5)),))
        with pytest.raises(ConfigError, match=message):
            tiny.CONFIG.active_encoders(plan)


def test_steps_that_do_not_go_together_are_one_line():
    clip = {"clip": tiny.CONFIG.encoder("clip")}
    inside = Step("clip.block0", Restoring(), Fixed(9))
    after = Step("clip.segment2", MeanToken(), Fixed(5))
    with pytest.raises(ValueError, match="'mean_token' restores what it drops, so no other"):
        PrunePlan(steps=(inside, after)).encoder_steps(clip)
    # The attention of a block inside of which tokens were dropped.
    inside = Step("clip.block0", MeanToken(), Fixed(9))
    after = Step("clip.segment1", AttentionReceived(), Fixed(5))
    with pytest.raises(ValueError, match="asks for the attention of block 0, inside of which"):
        jax.eval_shape(
            lambda: tiny.encode.__wrapped__(
                tiny.params(), tiny.make_batch().images, plan=PrunePlan(steps=(inside, after))
            )
        )


class Restoring(MeanToken):
    restores = True
