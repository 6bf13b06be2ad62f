"""What every registered method and preset must hold. A new one belongs in `TOGETHER`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.eagle.family import Eagle
from meteor_jax.models.eagle.fusion import concatenate_sequence, splice
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings, shard_batch
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.registry import methods, presets
from meteor_jax.types import IMAGE_TOKEN
from tests import tiny_model as tiny

OURS = "meteor_jax.pruning.methods"
# The steps of several presets in one plan, so that there are few programs to compile.
TOGETHER = (
    (tiny.METEOR,),
    ("visionzip(keep=24)", "divprune(keep=15)", "sparsevlm(layers=(1, 3), keep=(11, 5))"),
    (
        "meteor(encode=(26, 22, 30), fuse=25, encode.method=random)",
        "random(keep=15)",
        "dart(layer=2, keep=7)",
    ),
    ("uniform(keep=20)", "fastv(layer=1, keep=11, decode.method=random)"),
    ("pool(keep=20)", "pyramiddrop(layers=(1, 3), keep=(11, 5))"),
    ("independent(keep=20)", "fastv(layer=2, keep=7)", "only(encoders=(clip, convnext))"),
    ("full", "fastv(layer=2, keep=7, decode.method=uniform)"),
)
ROWS = 8


def plan_of(texts):
    plans = [tiny.plan(text) for text in texts]
    return PrunePlan(
        name="+".join(plan.name for plan in plans),
        steps=tuple(step for plan in plans for step in plan.steps),
        encoders=next((plan.encoders for plan in plans if plan.encoders), ()),
    )


def test_every_method_and_preset_is_tested_here():
    plans = [tiny.plan(text) for texts in TOGETHER for text in texts]
    used = {step.method.name for plan in plans for step in plan.steps}
    assert used == {name for name, cls in methods().items() if cls.__module__.startswith(OURS)}
    ours = {name for name, make in presets().items() if make.__module__.startswith(OURS)}
    assert ours == {text.split("(")[0] for texts in TOGETHER for text in texts}


def batch_of(seed, text_length=tiny.TEXT_LENGTH):
    lengths = (12, 9, 6, 12, 10, 8, 12, 7)
    batch = tiny.make_batch(
        lengths=lengths, with_image=(True,) * 7 + (False,), seed=seed, text_length=text_length
    )
    return jax.device_get(batch)


@functools.cache
def forward(plan):
    return jax.jit(lambda params, batch: tiny.MODEL.apply({"params": params}, batch, plan=plan))


def assert_rows_equal(one, other, *, rows, length=tiny.TEXT_LENGTH):
    valid = np.asarray(batch_of(0).text_valid)[rows]
    np.testing.assert_allclose(
        np.asarray(one.logits)[rows, :length][valid],
        np.asarray(other.logits)[rows, :length][valid],
        rtol=0,
        atol=2e-5,
    )
    kept = [
        (
            trace.fused_encoder[rows],
            trace.fused_patch_index[rows],
            [step.visual[rows] for step in trace.prune_steps],
            [step.num_kept[rows] for step in trace.prune_steps],
        )
        for trace in (one.trace, other.trace)
    ]
    jax.tree.map(np.testing.assert_array_equal, *kept)


@pytest.mark.parametrize("texts", TOGETHER, ids=lambda texts: plan_of(texts).name)
def test_an_example_depends_on_nothing_but_itself(texts):
    """Not on its batch mates, on its padding, or on how many devices there are."""
    plan, batch, others = plan_of(texts), batch_of(0), batch_of(1)
    rows = np.array([0, 2, 7])
    alone = forward(plan)(tiny.params(), batch)
    mixed = jax.tree.map(np.copy, others)
    for array, own in zip(jax.tree.leaves(mixed), jax.tree.leaves(batch), strict=True):
        array[rows] = own[rows]
    assert_rows_equal(alone, forward(plan)(tiny.params(), mixed), rows=rows)
    differ = np.asarray(alone.trace.fused_patch_index) != np.asarray(
        forward(plan)(tiny.params(), others).trace.fused_patch_index
    )
    chooses = {step.method.name for step in plan.fusion_steps} - {"uniform", "pool"}
    assert differ.any() or not chooses

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    longer = jax.tree.map(np.asarray, batch)
    pad = ((0, 0), (0, 3))
    longer = longer.replace(
        tokens=np.pad(batch.tokens, pad),
        text_valid=np.pad(batch.text_valid, pad),
        labels=np.pad(batch.labels, pad),
    )
    params = jax.device_put(
        tiny.params(),
        parameter_shardings(tiny.params(), mesh, rules=Eagle(tiny.CONFIG).sharding_rules),
    )
    with jax.set_mesh(mesh):
        split = jax.device_get(forward(plan)(params, shard_batch(longer, mesh)))
    assert_rows_equal(alone, split, rows=np.arange(ROWS))


def row_of_tokens(x):
    """A packed row: text, the tokens, text."""
    size = x.shape[1]
    index = jnp.broadcast_to(jnp.arange(size), x.shape[:2])
    tokens, spans = concatenate_sequence(
        [x], [index], names=("one",), grids=(int(size**0.5),), positions="original"
    )
    text = jnp.asarray(np.random.default_rng(2).normal(size=(x.shape[0], 4, x.shape[2])), x.dtype)
    ids = jnp.broadcast_to(jnp.asarray([5, IMAGE_TOKEN, 6, 7]), (x.shape[0], 4))
    row = splice(
        text,
        tokens=ids,
        text_valid=ids != 0,
        visual=jax.tree.map(lambda leaf: leaf[:, None], tokens),
        image_valid=jnp.ones((x.shape[0], 1), bool),
    )
    return row, spans


@pytest.mark.parametrize("name", sorted(n for n, c in methods().items() if OURS in c.__module__))
def test_keeping_all_is_the_identity(name):
    """At every stage where the method can act: the same tokens in the same order."""
    method = methods()[name]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.float32)
    row, spans = row_of_tokens(x)
    for stage in method.stages:
        context = ReductionContext(
            keep=16,
            available=16,
            image_seed=jnp.asarray([3, 4], jnp.uint32),
            attention_received=jnp.ones((2, 16)),
            spans=spans,
            window_sizes=(16,) if stage == "encode" else (),
        )
        here = x
        if stage == "decode":
            here = row.x
            context = context.replace(
                sequence=row,
                num_images=jnp.ones(2, int),
                num_kept=jnp.full(2, 16),
                num_text=4,
                max_images=1,
                capacity=16,
                attention_received=jnp.ones((2, 3, here.shape[1])),
                keys=jnp.ones((2, here.shape[1], 1, 4)),
            )
        left = method.reduce(here, context=context)
        valid = np.asarray(left.valid)
        np.testing.assert_array_equal(
            np.asarray(left.x)[valid], np.asarray(here)[:, : left.x.shape[1]][valid]
        )
        np.testing.assert_array_equal(left.idx[0], np.arange(left.idx.shape[1]))
        expected = 16 if stage != "decode" else 19
        assert valid.sum(1).tolist() == [expected] * 2
