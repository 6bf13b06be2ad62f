"""The programs that a config runs, as shapes with shardings: nothing is computed, all is traced.

B rows, T text tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import Experiment, StageConfig
from meteor_jax.inference.layout import param_dtype, param_shapes
from meteor_jax.models.family import build_model
from meteor_jax.models.flops import trace_flops
from meteor_jax.models.layers.attention import attention_kernel
from meteor_jax.models.layers.platform import compiling_for
from meteor_jax.parallel.mesh import BATCH_AXES, check_batch_size
from meteor_jax.parallel.rules import parameter_shardings, with_shardings
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from meteor_jax.training.init import placeholder_ranks
from meteor_jax.training.optimizer import make_optimizer, split_trainable
from meteor_jax.training.state import make_state
from meteor_jax.training.step import make_train_step
from meteor_jax.types import Batch, DecodeCache

PROGRAMS = ("train", "prefill", "extend", "predict")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
        program: one of `PROGRAMS`.
        stage: of training, "pretrain" or "finetune".
        plan: a name or text; "" takes the stage's first.
        rows: prompts of prefill and extend; 0 takes the config's, rounded up to the mesh.
    """

    program: str
    experiment: Experiment
    stage: str = "finetune"
    plan: str = ""
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    rows: int = 0

    @property
    def stage_config(self) -> StageConfig:
        return getattr(self.experiment.train, self.stage)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes and shardings of its arguments.

    Attributes:
        function: jitted, to be lowered with `args` in `tracing_for`.
        resident_bytes: of each device, a lower bound: the arguments, and for a train step the
            gradients at the smallest that they can be.
        total_bytes: the same of all devices together, nothing held twice.
        rows: examples, or tokens of extend.
    """

    function: Any
    args: tuple[Any, ...]
    resident_bytes: float
    total_bytes: float
    rows: int


def build_program(request: Request, mesh: Mesh, *, platform: str) -> Program:
    """What `request` asks for on `mesh`; nothing but shapes is computed.

    Prefill and extend are those of evaluation: `inference_mesh` is the mesh that it runs on.

    Raises:
        ConfigError: for batches that the mesh does not divide.
        ValueError: for a plan that does not fit the model.
    """
    make = {"train": _train, "prefill": _prefill, "extend": _extend, "predict": _predict}
    known = programs_of(request.experiment)
    if request.program not in known:
        raise ConfigError(f"programs: this model has {', '.join(known)}, got '{request.program}'.")
    with tracing_for(platform, mesh):
        return make[request.program](request, mesh)


def programs_of(experiment: Experiment) -> tuple[str, ...]:
    """The programs that a model of this family has."""
    output = {"text": ("prefill", "extend"), "probabilities": ("predict",)}
    return ("train", *output[build_model(experiment.model).output])


def count_flops(request: Request, mesh: Mesh, *, platform: str) -> tuple[float, float]:
    """Operations of all devices together, with and without what remat computes again.

    The program is built and traced once more: the counter does not see into custom kernels, and
    jit keeps what it has traced.
    """
    with attention_kernel("xla"):
        program = build_program(request, mesh, platform=platform)
        with tracing_for(platform, mesh):
            flops, _ = trace_flops(program.function, *program.args)
    return flops.total, flops.needed


@contextlib.contextmanager
def tracing_for(platform: str, mesh: Mesh) -> Generator[None]:
    """Constraints pin to `mesh`, and models take the forms of `platform`."""
    with jax.set_mesh(mesh), compiling_for(platform):
        yield


def with_remat(experiment: Experiment, remat: str) -> Experiment:
    """`experiment` with one remat policy in every part of the model."""
    return dataclasses.replace(experiment, model=build_model(experiment.model).with_remat(remat))


def device_bytes(tree: Any) -> int:
    """What each device holds of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _program(function: Any, args: tuple[Any, ...], *, rows: int, gradients: Any = ()) -> Program:
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((args, gradients)))
    return Program(function, args, device_bytes((args, gradients)), whole, rows=rows)


def _train(request: Request, mesh: Mesh) -> Program:
    experiment, stage = request.experiment, request.stage_config
    check_batch_size(
        stage.batch_size // stage.grad_accum_steps,
        mesh,
        where=f"train.{request.stage}.batch_size / grad_accum_steps",
    )
    plan = _plan(request)
    model, optimizer = build_model(experiment.model), make_optimizer(stage)
    batch = model.inputs_spec(
        stage.batch_size,
        text_length=stage.text_length or experiment.data.text_length,
        max_images=experiment.data.max_images,
        segments=experiment.data.attention_of(stage.task) == "independent_qa",
    )

    def fresh(batch: Batch) -> Any:
        return make_state(
            model.init_params(batch, seed=0),
            optimizer=optimizer,
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=experiment.train.ema_decay > 0,
        )

    state = jax.eval_shape(fresh, batch)
    shardings = parameter_shardings(state, mesh, rules=model.sharding_rules)
    state = with_shardings(state, shardings)
    step = make_train_step(
        model,
        optimizer=optimizer,
        plan=plan,
        stage=stage,
        ema_decay=experiment.train.ema_decay,
        state_shardings=shardings,
    )
    gradients = ()
    if stage.grad_clip:  # needs them all at once; else each can be used up as it comes
        dtype = experiment.model.dtype  # XLA may keep them so until they are summed up
        gradients = {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
            for path, leaf in split_trainable(state.params, stage.trainable)[0].items()
        }
    args = (state, _by_rows(batch, mesh))
    return _program(step, args, rows=stage.batch_size, gradients=gradients)


def _prefill(request: Request, mesh: Mesh) -> Program:
    params, batch, prefill = _inference(request, mesh)
    args = (params, batch.images, batch.image_valid, batch.tokens, batch.text_valid)
    cache = _cache_shardings(jax.eval_shape(prefill, *args)[1], mesh)
    function = jax.jit(prefill, out_shardings=(None, cache))
    return _program(function, args, rows=batch.tokens.shape[0])


def _extend(request: Request, mesh: Mesh) -> Program:
    params, batch, prefill = _inference(request, mesh)
    cache = jax.eval_shape(
        prefill, params, batch.images, batch.image_valid, batch.tokens, batch.text_valid
    )[1]
    shardings = _cache_shardings(cache, mesh)
    model = build_model(request.experiment.model).module

    def extend(params: Any, cache: DecodeCache, tokens: Any) -> Any:
        extended = model.apply({"params": params}, cache, tokens, method="extend")
        return extended.logits, extended.cache

    rows = batch.tokens.shape[0]
    tokens = _by_rows(jax.ShapeDtypeStruct((rows, 1), jnp.int32), mesh)
    function = jax.jit(extend, donate_argnums=1, out_shardings=(None, shardings))
    args = (params, with_shardings(cache, shardings), tokens)
    return _program(function, args, rows=rows)


def _predict(request: Request, mesh: Mesh) -> Program:
    """Probabilities of classes, from pixels and prompts."""
    params, batch, plan = _inputs(request, mesh)
    function = functools.partial(build_model(request.experiment.model).predict_batch, plan=plan)
    return _program(jax.jit(function), (params, batch), rows=batch.tokens.shape[0])


def _inference(request: Request, mesh: Mesh) -> tuple[Any, Batch, Callable[..., Any]]:
    """`_inputs`, and the function from pixels to the first token."""
    params, batch, plan = _inputs(request, mesh)
    model = build_model(request.experiment.model).module

    def prefill(params: Any, images: Any, image_valid: Any, tokens: Any, text_valid: Any) -> Any:
        variables, rows = {"params": params}, image_valid.shape
        encoded = model.apply(
            variables, images.reshape(-1, *images.shape[2:]), plan=plan, method="encode_images"
        )
        prefilled = model.apply(
            variables,
            jax.tree.map(lambda array: array.reshape(*rows, *array.shape[1:]), encoded.tokens),
            image_valid=image_valid,
            tokens=tokens,
            text_valid=text_valid,
            plan=plan,
            max_new_tokens=request.experiment.eval.max_new_tokens,
            method="prefill",
        )
        return prefilled.logits, prefilled.cache

    return params, batch, prefill


def _inputs(request: Request, mesh: Mesh) -> tuple[Any, Batch, PrunePlan]:
    """Parameters as inference holds them, prompts with one image each, and the plan."""
    experiment = request.experiment
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = request.rows or math.ceil(experiment.eval.batch_size / shards) * shards
    check_batch_size(rows, mesh, where="rows")
    data = experiment.data
    batch = build_model(experiment.model).inputs_spec(
        rows, text_length=data.text_length, max_images=data.max_images
    )
    params = param_shapes(experiment, mesh=mesh, dtype=param_dtype(experiment))
    return params, _by_rows(batch, mesh), _plan(request)


def _plan(request: Request) -> PrunePlan:
    """The plan; where nothing was calibrated, with equal ranks and any λ, which have the same
    budgets and the same largest buckets."""
    text = request.plan or request.stage_config.plans[0]
    plan = parse_plan(text, library=request.experiment.plans)
    ranks = placeholder_ranks(build_model(request.experiment.model), plans=[plan])
    return plan.calibrated(ranks).calibrated(request.calibration).with_placeholder_lambda()


def _by_rows(tree: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _cache_shardings(cache: DecodeCache, mesh: Mesh) -> Any:
    """Keys and values [L, B, S, K, d] by rows and heads, the rest by rows."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if leaf.ndim == 5:
            heads = "tensor" if leaf.shape[3] % mesh.shape["tensor"] == 0 else None
            return NamedSharding(mesh, P(None, BATCH_AXES, None, heads, None))
        return NamedSharding(mesh, P(BATCH_AXES) if leaf.ndim else P())

    return jax.tree.map(sharding, cache)


def check_program(name: str) -> str:
    """`name`, if it is one of `PROGRAMS`; else ConfigError."""
    if name not in PROGRAMS:
        raise ConfigError(f"programs: expected names out of {', '.join(PROGRAMS)}, got '{name}'.")
    return name
