"""The walk-throughs of CONTRIBUTING.md, each executed and then used as its section says."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from meteor_jax.config import ConfigError, build
from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.tasks import registry
from meteor_jax.experiment.config import load_experiment
from meteor_jax.models import family
from meteor_jax.models.eagle.config import MeteorConfig
from meteor_jax.models.encoders import registry as encoders
from meteor_jax.models.family import build_model
from meteor_jax.pruning import registry as methods
from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.methods.random import Random
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import after_segment
from meteor_jax.pruning.text import parse_plan
from tests import tiny_model as tiny
from tests.documents import ROOT
from tests.evaluation.random_model import config, make_params, png
from tests.evaluation.tasks.benchmark_fixtures import IMAGE


def code(heading: str) -> str:
    """The Python block below a heading of CONTRIBUTING.md."""
    _, _, rest = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n## {heading}\n")
    (block,) = re.findall(r"```python[^\n]*\n(.*?)```", rest.split("\n## ")[0], flags=re.DOTALL)
    return block


@pytest.fixture
def restored():
    """Registries, which are as before after the test."""
    registries = []
    yield lambda registry: registries.append((registry, dict(registry)))
    for registered, before in registries:
        registered.clear()
        registered.update(before)


def test_add_a_pruning_method(restored):
    restored(methods._METHODS)
    restored(methods._PRESETS)
    exec(compile(code("Add a pruning method"), "my_method.py", "exec"), {"__name__": "my_method"})
    plan = parse_plan("largest_norm(keep=9, fuse.order=1)")
    trace = tiny.encode(tiny.params(), tiny.make_batch().images, plan=plan).trace
    assert trace.fused_patch_index.shape[1] == 9 and plan.steps[0].method.order == 1


def test_add_an_encoder(tmp_path, restored):
    restored(encoders.ENCODERS)
    exec(compile(code("Add an encoder"), "my_encoder.py", "exec"), {"__name__": "my_encoder"})
    two = {"near": {"type": "patches"}, "far": {"type": "patches", "patch_size": 16}}
    llama = dataclasses.asdict(tiny.CONFIG.llama)
    model = build_model(build(MeteorConfig, {"encoders": two, "llama": llama, "image_size": 32}))
    plan = PrunePlan("near", (Step(after_segment(3, of="near"), Random(), Fixed(5)),))
    batch = tiny.make_batch()
    params = model.init_params(batch, seed=0)
    encoded = model.module.apply(
        {"params": params}, batch.images[:, 0], plan=plan, method="encode_images"
    )
    assert encoded.tokens.x.shape == (3, 5 + 4, 32)

    weight = np.random.default_rng(0).normal(size=(6, 3, 4, 4)).astype(np.float32)
    tensors = {"embed.proj.weight": weight, "embed.proj.bias": np.zeros(6, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "workdir")
    assert (config.encoder("patches").width, config.encoder("patches").patch_size) == (6, 4)


def test_add_a_family(restored):
    restored(family._FAMILIES)
    exec(compile(code("Add a family"), "my_family.py", "exec"), {"__name__": "my_family"})
    experiment = load_experiment(
        {
            "model": {"family": "bag"},
            "data": {"sources": ("easy-vqa",), "classes": ("yes", "no")},
            "train": {"finetune": {"task": "classification", "steps": 1}},
        }
    )
    model = build_model(experiment.model)
    batch = jax.tree.map(lambda spec: jnp.ones(spec.shape, spec.dtype), model.inputs_spec(3))
    params = model.init_params(batch, seed=0)
    sums, gradients = jax.value_and_grad(
        lambda params: model.loss(params, batch, plan=PrunePlan(), rng=jax.random.key(0)).loss
    )(params)
    assert np.isfinite(sums) and jax.tree.all(jax.tree.map(jnp.any, gradients["head"]))
    probabilities = model.predict_batch(params, batch, plan=PrunePlan())
    assert probabilities.shape == (3, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert dict(model.count_cost(PrunePlan()).rows) == {"image": 2 * 48 * 16, "head": 2 * 16 * 2}


def test_add_a_benchmark(tmp_path, restored):
    for registered in (registry.FOLDERS, registry.BENCHMARKS, registry.REGISTRY):
        restored(registered)
    example = code("Add a benchmark")
    exec(compile(example, "my_benchmark.py", "exec"), {})
    with pytest.raises(ConfigError, match="exists; rename"):
        exec(example, {})

    experiment = load_experiment(config(tmp_path))
    params = make_params(experiment)
    options = {"tasks": ("counting",), "workdir": tmp_path / "run", "display": "quiet"}
    with pytest.raises(ConfigError, match="hf download example/Counting"):
        evaluate_checkpoint(experiment, params, **options)
    rows = [
        {"question": "How many?", "number": i, "image": {"bytes": png(i), "path": f"{i}.png"}}
        for i in range(3)
    ]
    schema = pa.schema([("question", pa.string()), ("number", pa.int64()), ("image", IMAGE)])
    (tmp_path / "Counting").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "Counting/test-0.parquet")
    (row,) = (
        row for row in evaluate_checkpoint(experiment, params, **options) if row.plan == "full"
    )
    assert row.task == "counting" and row.n == 3
