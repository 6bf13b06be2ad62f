"""Which layers' attention follows the question."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.tools.calibrate import CalibrationBatch
from meteor_jax.tools.cut_layers import kept_alike, measure_cut_layers
from tests import tiny_model as tiny


def test_what_two_questions_keep_alike():
    kept = np.array([[0, 1, 2, -1], [1, 2, 3, 4], [7, 8, 9, -1], [7, 8, 9, -1]])
    assert kept_alike(kept, groups=[0, 0, 1, 1]) == pytest.approx((2 / 3 + 1) / 2)
    # Rows of different images are never compared.
    assert kept_alike(kept[[0, 2, 3]], groups=[0, 1, 1]) == 1
    with pytest.raises(ValueError, match="two questions or more about an image"):
        kept_alike(kept, groups=[0, 1, 2, 3])


@pytest.mark.long
def test_the_same_question_twice_keeps_the_same_tokens():
    rows = tiny.make_batch(lengths=(12, 12), with_image=(True, True))
    images = jnp.repeat(rows.images[:1, 0], 2, axis=0)
    other = CalibrationBatch(images, rows.tokens, rows.text_valid)
    twice = dataclasses.replace(other, tokens=jnp.repeat(rows.tokens[:1], 2, axis=0))
    plan = tiny.plan(tiny.METEOR)

    def measure(batch):
        return measure_cut_layers(
            tiny.MODEL, tiny.params(), plan=plan, batch=batch, groups=(0, 0), share=0.5
        )

    same, different = measure(twice), measure(other)
    assert [row.layer for row in same] == [1, 2, 3]
    for row in same:
        mean, low, high = row.value
        assert row.same == 1 and row.chance == 0.5  # 10 of the 20 tokens that leave fusion
        assert 0 < low <= mean <= high <= 1
    assert any(row.same < 1 for row in different)


@pytest.mark.long
def test_a_plan_without_stage_3_takes_its_defaults():
    rows = tiny.make_batch(lengths=(12, 9), with_image=(True, True))
    batch = CalibrationBatch(rows.images[:, 0], rows.tokens, rows.text_valid)
    found = measure_cut_layers(
        tiny.MODEL, tiny.params(), plan=tiny.plan("random(keep=9)"), batch=batch, groups=(0, 0)
    )
    assert len(found) == 3 and found[0].chance == pytest.approx(4 / 9)
    assert jax.tree.all(jax.tree.map(np.isfinite, [dataclasses.astuple(row) for row in found]))
