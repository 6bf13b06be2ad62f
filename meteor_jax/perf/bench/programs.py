"""What the bench times: one plan's compiled programs, with random weights made on the device.

B rows, each an image and a question; N new tokens of an answer.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meteor_jax.experiment.config import StageConfig
from meteor_jax.inference.engine.predictor import PromptBatch
from meteor_jax.inference.generate import (
    DecodeState,
    Started,
    choose_cache_length,
    start,
    step,
    trim,
)
from meteor_jax.inference.layout import cast_matrices
from meteor_jax.models.family import build_model, count_cost
from meteor_jax.models.flops import Cost
from meteor_jax.parallel.mesh import BATCH_AXES
from meteor_jax.parallel.rules import parameter_shardings
from meteor_jax.pruning.budgets import Adaptive, Fixed
from meteor_jax.pruning.ops.budgets import fit_edges, fit_lambda
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.flops import train_step_flops
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.state import TrainState, make_state
from meteor_jax.training.step import make_train_step
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN, Batch, VisualTokens

FormConfig = (
    Any  # a `ModelConfig` with the fields `fusion`, METEOR's form or the other, and `llama`
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled programs of one plan, to be run again and again.

    Attributes:
        run: () → seconds by part.
        flops: of one run.
        compile_s: of all programs.
        peak_bytes: of the hungriest one, its arguments (all parameters), results and temporaries,
            as the compiler laid them out.
    """

    run: Callable[[], dict[str, float]]
    flops: float
    compile_s: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Inference(Programs):
    """`run` takes an image and a question to the end of the answer, in the parts "encode",
    "prefill" (up to the first token) and "decode" (all others).

    Attributes:
        plan: as it ran: an adaptive one with λ.
        cost: of one row.
        decode_bytes: that a device must read in a decoding step: the decoder's parameters and the
            cache, what lies there of both.
    """

    plan: PrunePlan
    cost: Cost
    decode_bytes: int


def form_of(model: FormConfig, plan: PrunePlan) -> FormConfig:
    """The model that `plan` runs in: METEOR's form, a projector an encoder, where it prunes inside
    the encoders; else the config's own."""
    return dataclasses.replace(model, fusion="post") if plan.prunes_encoders else model


def make_inputs(
    model: FormConfig, *, batch: int, text_tokens: int, mesh: Mesh | None = None
) -> Batch:
    """Noise as images and as text, by rows on `mesh` or on the default device: half of the text,
    an image, the other half, which is what training learns."""
    rng = np.random.default_rng(0)
    side, middle = model.image_size, text_tokens // 2
    tokens = rng.integers(1, model.llama.vocab_size, (batch, text_tokens + 1), np.int32)
    tokens[:, middle] = IMAGE_TOKEN
    learnt = np.arange(text_tokens + 1) > middle
    return jax.device_put(
        Batch(
            images=rng.integers(0, 256, (batch, 1, side, side, 3), np.uint8),
            image_valid=np.ones((batch, 1), bool),
            tokens=tokens,
            text_valid=np.ones(tokens.shape, bool),
            labels=np.where(learnt, tokens, IGNORE_LABEL).astype(np.int32),
            example_id=np.arange(batch, dtype=np.int32),
        ),
        mesh and NamedSharding(mesh, PartitionSpec(BATCH_AXES)),
    )


def make_params(
    models: Iterable[FormConfig], *, dtype: str, mesh: Mesh | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Random parameters by `fusion` of a config, made where they lie on `mesh`, or on the default
    device; matrices in `dtype`. What the forms share is the same arrays."""
    made: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for model in models:
        if model.fusion not in made:
            params = _init(
                make_inputs(model, batch=1, text_tokens=2),
                model=model,
                dtype=dtype,
                mesh=mesh,
                seed=seed,
                without=frozenset(shared),
            )
            shared |= {name: tree for name, tree in params.items() if "projector" not in name}
            made[model.fusion] = shared | params
    return made


@functools.partial(jax.jit, static_argnames=("model", "dtype", "mesh", "seed", "without"))
def _init(
    batch: Batch,
    *,
    model: FormConfig,
    dtype: str,
    mesh: Mesh | None,
    seed: int,
    without: frozenset[str],
) -> dict[str, Any]:
    """Parameters but those `without`. The compiler leaves out the forward pass, whose input is an
    argument because constants would be computed with."""
    params = build_model(model).init_params(batch, seed=seed)
    own = {name: tree for name, tree in params.items() if name not in without}
    own = cast_matrices(own, dtype)
    if mesh is None:
        return own
    shardings = parameter_shardings(own, mesh, rules=build_model(model).sharding_rules)
    return jax.lax.with_sharding_constraint(own, shardings)


def compile_inference(
    model: FormConfig, params: Any, inputs: Batch, *, plan: PrunePlan, new_tokens: int
) -> Inference:
    """Encoding, prefill, and decoding of `new_tokens` tokens, the first of which prefill gives.

    λ of an adaptive plan is set so that the mean of K over these rows is the plan's `keep`.
    """
    meteor = build_model(model).module
    apply = functools.partial(meteor.apply, plan=plan)

    @functools.partial(jax.jit, keep_unused=True)
    def encode(params: Any, images: Any) -> VisualTokens:
        flat = images.reshape(-1, *images.shape[2:])
        encoded = apply({"params": params}, flat, method="encode_images")
        rows = images.shape[:2]
        return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), encoded.tokens)

    compiler = Compiler()
    encode_images = compiler.compile(encode, params, inputs.images)
    visual = encode_images(params, inputs.images)
    if plan.is_adaptive:
        plan = _with_lambda(model, params, visual, inputs, plan=plan)
    programs = compile_generation(
        compiler, meteor, params, visual, inputs, plan=plan, new_tokens=new_tokens
    )
    started = programs.start()
    decode_bytes = _device_bytes((params["llama"], started.state.cache))
    jax.block_until_ready(programs.decode(started))

    def run() -> dict[str, float]:
        times = [time.perf_counter()]

        def wait(result: Any) -> Any:
            jax.block_until_ready(result)
            times.append(time.perf_counter())
            return result

        visual = wait(encode_images(params, inputs.images))
        wait(programs.decode(wait(programs.start(visual))))
        return dict(zip(("encode", "prefill", "decode"), np.diff(times).tolist(), strict=True))

    rows, text_tokens = inputs.tokens.shape
    computed = tuple(float(step.num_computed.mean()) for step in started.prune_steps)
    cost = count_cost(model, plan, text_tokens=text_tokens, computed=computed or None, rows=rows)
    return Inference(
        run=run,
        flops=rows * cost.total_flops,
        compile_s=compiler.seconds,
        peak_bytes=compiler.peak_bytes,
        plan=plan,
        cost=cost,
        decode_bytes=decode_bytes,
    )


@dataclasses.dataclass(frozen=True)
class CompiledGeneration:
    """The two programs of `inference.generate`, compiled.

    Attributes:
        start: visual tokens → rows after their first token.
        decode: these, whose state it takes → every row with all of its new tokens.
    """

    start: Callable[..., Started]
    decode: Callable[[Started], DecodeState]


def compile_generation(
    compiler: Compiler,
    meteor: Any,
    params: Any,
    visual: VisualTokens,
    inputs: Batch,
    *,
    plan: PrunePlan,
    new_tokens: int,
) -> CompiledGeneration:
    """The programs that answer `inputs`; no token ends a row."""
    prompts, never, limit = _prompts(inputs), -1, np.int32(new_tokens)
    start_rows = compiler.compile(
        start, meteor, params, visual, prompts, plan=plan, max_new_tokens=new_tokens, eos_id=never
    )
    started = start_rows(params, visual, prompts, eos_id=never)
    choice = choose_cache_length(started)
    state = trim(started.state, choice)
    decode = compiler.compile(step, meteor, params, state, limit, eos_id=never)
    return CompiledGeneration(
        start=lambda visual=visual: start_rows(params, visual, prompts, eos_id=never),
        decode=lambda started: decode(params, trim(started.state, choice), limit, eos_id=never),
    )


def _prompts(inputs: Batch) -> PromptBatch:
    seeds = jnp.zeros(len(inputs.tokens), jnp.uint32)
    return PromptBatch(inputs.tokens, inputs.text_valid, inputs.image_valid, seeds)


def _with_lambda(
    model: FormConfig, params: Any, visual: VisualTokens, inputs: Batch, *, plan: PrunePlan
) -> PrunePlan:
    """`plan` with the λ that meets its `keep` when every earlier step does."""
    asked_for = [step.budget for step in plan.decoder_steps]
    started = start(
        build_model(model).module,
        params,
        visual,
        _prompts(inputs),
        plan=plan.with_decoder_budgets([Fixed(budget.keep) for budget in asked_for]),
        max_new_tokens=1,
        eos_id=-1,
    )
    budgets, available = [], visual.num_tokens
    for budget, trace in zip(asked_for, jax.device_get(started.prune_steps), strict=True):
        if isinstance(budget, Adaptive):
            total_vav, low_high = trace.budget_signal, budget.bounds
            lambda_ = fit_lambda(
                total_vav,
                low_high=low_high,
                target=budget.keep,
                available=np.full(total_vav.shape, available),
            )
            kept = np.clip(np.round(lambda_ * total_vav), *low_high)
            edges = fit_edges(
                [kept[row : row + 1] for row in range(len(kept))],
                high=low_high[1],
                num_totals=budget.num_totals,
            )
            budget = dataclasses.replace(budget, lambda_=lambda_, edges=edges)
        budgets.append(budget)
        available = budget.keep
    return plan.with_decoder_budgets(budgets)


def train_states(
    models: Iterable[FormConfig], *, stage: StageConfig, mesh: Mesh
) -> dict[str, TrainState]:
    """A fresh state by form, float32 and on `mesh` as training has it."""

    def fresh(params: Any) -> TrainState:
        return make_state(  # copies, since training gives its state away
            jax.tree.map(jnp.copy, params),
            optimizer=make_optimizer(stage),
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        )

    models = list(models)
    rules = build_model(models[0]).sharding_rules
    params, states = make_params(models, dtype="float32", mesh=mesh), {}
    for fusion, tree in params.items():
        shardings = parameter_shardings(jax.eval_shape(fresh, tree), mesh, rules=rules)
        states[fusion] = jax.jit(fresh, out_shardings=shardings)(tree)
    return states


def compile_train(
    model: FormConfig,
    states: dict[str, TrainState],
    inputs: Batch,
    *,
    plan: PrunePlan,
    stage: StageConfig,
) -> Programs:
    """A training step, part "train"; plans of one form take turns on one state."""
    compiler, form = Compiler(), model.fusion
    step = make_train_step(
        build_model(model),
        optimizer=make_optimizer(stage),
        plan=plan,
        stage=stage,
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, states[form]),
    )
    flops = train_step_flops(step, states[form], inputs)
    step = compiler.compile(step, states[form], inputs)

    def run() -> dict[str, float]:
        started = time.perf_counter()
        states[form], metrics = step(states[form], inputs)
        jax.block_until_ready((states[form], metrics))
        return {"train": time.perf_counter() - started}

    run()
    return Programs(
        run=run, flops=flops, compile_s=compiler.seconds, peak_bytes=compiler.peak_bytes
    )


class Compiler:
    """Compiles, and keeps count of the seconds and of the most memory that a program needs."""

    def __init__(self) -> None:
        self.seconds, self.peak_bytes = 0.0, 0

    def compile(self, function: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        started = time.perf_counter()
        compiled = function.lower(*args, **kwargs).compile()
        self.seconds += time.perf_counter() - started
        memory = compiled.memory_analysis()
        needed = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        self.peak_bytes = max(self.peak_bytes, needed)
        return compiled


def _device_bytes(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
