"""Three methods that live in this file alone go everywhere that a plan goes: a score at fusion, a
merge between attention and MLP that carries state and restores, one with parameters of its own."""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.budgets import Questions
from meteor_jax.inference.calibrate import CalibrationBatch, calibrate_plans
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.models.family import build_model
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings, shard_batch
from meteor_jax.perf.programs import Request, build_program, tracing_for
from meteor_jax.pruning.budgets import Adaptive, Fixed
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.method import Method, Reduction, gather
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.ops.similarity import unit_tokens
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import FUSION, before_layer, inside_block
from meteor_jax.pruning.registry import preset, register
from meteor_jax.pruning.text import parse_plan
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.state import make_state
from meteor_jax.training.step import make_train_step
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN, Batch
from tests.evaluation import random_model

ROWS, TEXT = 8, 6
LATER = Step(before_layer(1), TextAttention(), Adaptive(4))  # so that there is λ to measure


@register("norm")
@dataclasses.dataclass(frozen=True)
class Norm(Method):
    """The longest tokens stay."""

    stages = ("fuse",)

    def scores(self, x, *, context):
        return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


@preset
def norm(*, keep: int) -> PrunePlan:
    return PrunePlan("norm", (Step(FUSION, Norm(), Fixed(keep)), LATER))


class Merged(flax.struct.PyTreeNode):
    """Which token left each token is in, int32[B, N], and how many reductions there were."""

    into: jax.Array
    count: jax.Array


@register("pairs")
@dataclasses.dataclass(frozen=True)
class Pairs(Method):
    """A token that is merged goes into the one before it, and comes back as the one it became; the
    second block merges what the first did."""

    stages = ("encode",)
    needs = frozenset({"keys"})
    restores = True

    def scores(self, x, *, context):
        """Low where a token's keys are like those of the one before; the first stays."""
        keys = context.keys.reshape(*context.keys.shape[:2], -1)
        unit = unit_tokens(keys)
        alike = (unit[:, 1:] * unit[:, :-1]).sum(-1)
        return jnp.pad(-alike, ((0, 0), (1, 0)), constant_values=2.0)

    def select(self, x, scores, *, context):
        if context.state is None:
            kept = context.keep_best(scores)
            stays = jax.vmap(lambda row, idx: row.at[idx].set(True))(
                jnp.zeros(x.shape[:2], bool), kept.idx
            )
            state = Merged(into=jnp.cumsum(stays, axis=1) - 1, count=jnp.zeros((), jnp.int32))
        else:
            state = context.state
        member = jax.nn.one_hot(state.into, context.keep, dtype=x.dtype)
        sizes = member.sum(1)
        merged = jnp.einsum("bnk,bnd->bkd", member, x) / sizes[..., None]
        first = jnp.argmax(member, axis=1)
        return Reduction(
            x=merged,
            idx=first,
            valid=jnp.ones(first.shape, bool),
            sizes=sizes,
            state=state.replace(count=state.count + 1),
        )

    def restore(self, x, *, state):
        return jnp.take_along_axis(x, state.into[..., None], axis=1)


@preset
def pairs(*, keep: int) -> PrunePlan:
    blocks = (Step(inside_block(block, of="clip"), Pairs(), Fixed(keep)) for block in (0, 1))
    return PrunePlan("pairs", (*blocks, LATER))


@register("gate")
@dataclasses.dataclass(frozen=True)
class Gate(Method):
    """A learned score, which also weighs the tokens that stay."""

    stages = ("fuse",)
    hidden: int = 2

    def init_params(self, key, *, widths):
        keys = jax.random.split(key)
        return {
            "first": jax.random.normal(keys[0], (widths["fusion"], self.hidden)) * 0.1,
            "second": jax.random.normal(keys[1], (self.hidden,)),
        }

    def scores(self, x, *, context):
        params = context.params_of(self)
        return jnp.tanh(x @ params["first"].astype(x.dtype)) @ params["second"].astype(x.dtype)

    def select(self, x, scores, *, context):
        return gather(x * jax.nn.sigmoid(scores)[..., None], context.keep_best(scores))


@preset
def gate(*, keep: int) -> PrunePlan:
    return PrunePlan("gate", (Step(FUSION, Gate(), Fixed(keep)), LATER))


TEXTS = {"norm": "norm(keep=7)", "pairs": "pairs(keep=11)", "gate": "gate(keep=7)"}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def experiment(data_dir="absent"):
    values = random_model.config(data_dir)
    for name in ("clip", "pix2struct"):
        values["model"]["encoders"][name]["depth"] = 2
    values["model"]["learned_methods"] = ("gate(hidden=3)",)
    values["train"]["finetune"] |= {"batch_size": ROWS, "learning_rate": 1e-2}
    values["plans"] = {}
    values["eval"] |= {"tasks": ("easyvqa_yesno",), "num_images": 2, "num_questions": 4}
    return load_experiment(values)


def family():
    return build_model(experiment().model)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def model():
    return family().module


@functools.cache
def params():
    return jax.device_get(jax.jit(lambda: family().init_params(batch(), seed=0))())


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 250, (ROWS, TEXT)).astype(np.int32)
    tokens[:, 1] = IMAGE_TOKEN
    return Batch(
        images=rng.integers(0, 256, (ROWS, 1, 32, 32, 3)).astype(np.uint8),
        image_valid=np.ones((ROWS, 1), bool),
        tokens=tokens,
        text_valid=np.ones((ROWS, TEXT), bool),
        labels=np.where(tokens == IMAGE_TOKEN, IGNORE_LABEL, tokens),
        example_id=np.arange(ROWS, dtype=np.int32),
    )


@functools.cache
def calibrated(text):
    """The plan with λ measured on the batch, and what was measured."""
    plan, asked = parse_plan(text), batch()
    questions = (Questions(asked.tokens, asked.text_valid, np.ones(ROWS, bool)),)
    calibration = calibrate_plans(
        model(),
        params(),
        plans=[plan],
        batch=CalibrationBatch(asked.images[:, 0], questions),
        calibration=Calibration(),
    )
    return plan.calibrated(calibration), calibration


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, quick_compilation):
    """By plan, its row of one evaluation, which finds the plans' λ in the workdir."""
    workdir = tmp_path_factory.mktemp("run")
    plans = {name: calibrated(text)[1].plans[name] for name, text in TEXTS.items()}
    Calibration(plans=plans).save(workdir / "calibration.json")
    rows = evaluate_checkpoint(
        experiment(workdir / "data"),
        params(),
        workdir=workdir,
        plans=tuple(TEXTS.values()),
        display="quiet",
    )
    return {row.plan: row for row in rows}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
class TestEverywhere:
    def test_it_survives_text_and_json_and_is_hashable(self, text):
        plan = parse_plan(text)
        assert PrunePlan.from_json(plan.to_json()) == plan
        assert isinstance(hash(plan), int)
        assert parse_plan("mine(decode.heads=1)", library={"mine": text}) != plan

    def test_it_trains(self, text):
        stage = experiment().train.finetune
        plan, optimizer = parse_plan(text), make_optimizer(stage)
        state = make_state(
            jax.tree.map(jnp.asarray, params()),
            optimizer=optimizer,
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        )
        step = make_train_step(family(), optimizer=optimizer, plan=plan, stage=stage)
        losses = []
        for _ in range(2):
            state, metrics = step(state, batch())
            losses.append(float(metrics["loss"]))
        assert losses[1] < losses[0]
        moved = jax.tree.map(
            lambda old, new: float(np.abs(old - new).max()), params(), jax.device_get(state.params)
        )
        learns = max(jax.tree.leaves(moved["pruning"]))
        assert (learns > 0) == text.startswith("gate")

    def test_it_is_calibrated(self, text):
        plan, calibration = calibrated(text)
        (step,) = plan.decoder_steps
        assert step.budget.lambda_ > 0 and set(calibration.plans) == {plan.name}

    def test_it_is_evaluated(self, text, evaluated):
        plan, _ = calibrated(text)
        row = evaluated[plan.name]
        entering = 7 if plan.fusion_steps else 25
        assert row.visual_tokens_fused == entering and 2 <= row.visual_tokens_kept < entering

    def test_it_costs_less_than_all_tokens(self, text):
        plan, _ = calibrated(text)
        full = family().count_cost(parse_plan("full"), text_tokens=TEXT)
        cost = family().count_cost(plan, text_tokens=TEXT)
        assert 0 < cost.total_flops < full.total_flops
        assert cost.visual_tokens_fused == (7 if plan.fusion_steps else 25)

    @pytest.mark.parametrize("program", ["train", "prefill"])
    def test_it_is_lowered_ahead_of_time(self, text, program):
        mesh = make_mesh(MeshConfig(data=2, fsdp=-1))
        request = Request(program, experiment(), plan=text, rows=ROWS)
        built = build_program(request, mesh, platform="cpu")
        with tracing_for("cpu", mesh):
            lowered = built.function.lower(*built.args)
        assert "stablehlo" in lowered.as_text()

    def test_eight_devices_compute_what_one_does(self, text):
        plan, _ = calibrated(text)

        def forward(sizes):
            mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])
            shardings = parameter_shardings(params(), mesh, rules=family().sharding_rules)
            placed = jax.device_put(params(), shardings)
            with jax.set_mesh(mesh):
                function = jax.jit(lambda p, b: model().apply({"params": p}, b, plan=plan))
                out = jax.device_get(function(placed, shard_batch(batch(1), mesh)))
            return out.logits, out.trace

        (one, trace), (eight, other) = forward((1, 1, 1)), forward((2, 2, 2))
        np.testing.assert_allclose(one, eight, rtol=0, atol=2e-5)
        jax.tree.map(
            np.testing.assert_array_equal,
            (trace.fused_patch_index, trace.prune_steps[0].visual),
            (other.fused_patch_index, other.prune_steps[0].visual),
        )


def test_the_merge_restores_all_tokens_and_what_two_merged_tokens_became():
    images = batch().images[:, 0]
    encode = functools.partial(model().apply, {"params": params()}, images, method="encode_images")
    encoded = encode(plan=parse_plan("pairs(keep=11)")).tokens
    full = encode(plan=PrunePlan()).tokens
    assert encoded.num_tokens == 25
    clip = np.asarray(encoded.x)[:, :16]
    equal = (np.abs(np.diff(clip, axis=1)).max(-1) == 0).sum(1)
    np.testing.assert_array_equal(equal, 5)  # five went into the one before
    np.testing.assert_array_equal(encoded.x[:, 16:], full.x[:, 16:])
    np.testing.assert_array_equal(encoded.patch_index, full.patch_index)


def test_a_learned_method_that_the_model_does_not_list_is_one_line():
    config = dataclasses.replace(experiment().model, learned_methods=())
    with pytest.raises(ValueError, match="'gate' has parameters of its own: name it in"):
        jax.eval_shape(
            lambda: Meteor(config).apply(
                {"params": params()}, batch(), plan=parse_plan("gate(keep=7)")
            )
        )


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="a method 'norm' is registered already, by tests"):

        @register("norm")
        @dataclasses.dataclass(frozen=True)
        class Other(Method):
            pass
