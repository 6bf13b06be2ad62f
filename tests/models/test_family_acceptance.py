"""A family of one's own, all of it in this file: a classifier of pictures and questions.

It trains, is killed and resumes, is converted, sharded, evaluated, counted and compiled by the code
that does so for EAGLE. This file is also its config: `train.py --config=` this file.
"""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from meteor_jax import Request, checkpoint, load_engine
from meteor_jax.config import ConfigError, build
from meteor_jax.convert.exporting import export_checkpoint
from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.experiment.config import StageConfig, complete, load_experiment
from meteor_jax.models import conversion as cv
from meteor_jax.models.family import (
    Family,
    LossSums,
    ModelConfig,
    build_model,
    count_cost,
    register_family,
)
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings, shard_batch
from meteor_jax.perf.programs import Request as ProgramRequest
from meteor_jax.perf.programs import build_program, count_flops, programs_of, tracing_for
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.state import make_state
from meteor_jax.training.step import make_train_step
from tests.training.tiny_run import read_steps

ROOT = Path(__file__).parents[2]
CLASSES = ("yes", "no")
STAGE = {"task": "classification", "template": "qa", "steps": 2, "batch_size": 8}


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    family: str = "toy"
    image_size: int = 16
    width: int = 16
    vocab_size: int = 259
    num_classes: int = 2
    dtype: str = "float32"


class ToyModel(nn.Module):
    """The mean of a picture's columns and the mean of a question's tokens, then a head."""

    config: ToyConfig

    def setup(self) -> None:
        self.picture = nn.Dense(self.config.width)
        self.question = nn.Embed(self.config.vocab_size, self.config.width)
        self.head = nn.Dense(self.config.num_classes)

    def encode(self, images):
        pixels = images.astype(jnp.float32).mean(2) / 255
        return nn.gelu(self.picture(pixels.reshape(len(images), -1)))

    def classify(self, pictures, image_valid, tokens, text_valid):
        words = self.question(jnp.maximum(tokens, 0)) * text_valid[..., None]
        words = words.sum(1) / jnp.maximum(text_valid.sum(1, keepdims=True), 1)
        seen = (pictures * image_valid[..., None]).sum(1)
        return self.head(jnp.tanh(words * seen))

    def __call__(self, batch, *, plan):
        rows, images = batch.image_valid.shape
        pictures = self.encode(batch.images.reshape(-1, *batch.images.shape[2:]))
        return self.classify(
            pictures.reshape(rows, images, -1), batch.image_valid, batch.tokens, batch.text_valid
        )


class ToyConversion(cv.Conversion):
    whole = "toy"

    @property
    def formats(self):
        return {
            "toy": cv.Format(
                part="toy",
                mark=r"net\.picture\.",
                renames=((r"net\.(.*)", r"\1"),),
                ignored=((r"step", "a counter"),),
            )
        }

    def fields(self, part, *, shapes, config):
        found = cv.Shapes(shapes)
        width, columns = found.size("picture.weight"), found.size("picture.weight", 1)
        return cv.known(
            {
                "width": width,
                "image_size": columns and columns // 3,
                "vocab_size": found.size("question.weight"),
                "num_classes": found.size("head.weight"),
            }
        )

    def parts(self, config, part):
        return ("picture", "question", "head")

    def table(self, config, parts):
        return cv.Table(
            (
                *cv.linear("picture", "picture"),
                cv.Rule("question.weight", "question/embedding"),
                *cv.linear("head", "head"),
            )
        )

    def param_shapes(self, config, parts):
        init = functools.partial(build_model(config).module.init, plan=PrunePlan())
        return cv.flat_shapes(init, build_model(config).inputs_spec(1))


@register_family("toy")
@dataclasses.dataclass(frozen=True)
class Toy(Family):
    config_class = ToyConfig
    conversion = ToyConversion()
    output = "probabilities"
    sharding_rules = (
        (r"picture/kernel$", ("fsdp", "tensor")),
        (r"question/embedding$", ("tensor", "fsdp")),
    )

    @property
    def module(self):
        return ToyModel(self.config)

    def loss(self, params, batch, *, plan, rng):
        logits = self.module.apply({"params": params}, batch, plan=plan)
        known = batch.target >= 0
        targets = jnp.where(known, batch.target, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = (logits.argmax(-1) == targets) & known
        return LossSums(
            loss=jnp.sum(losses * known),
            correct=jnp.sum(hits).astype(jnp.float32),
            count=jnp.sum(known).astype(jnp.float32),
            tokens=jnp.sum(batch.text_valid).astype(jnp.float32),
        )

    def num_targets(self, batch):
        return jnp.sum(batch.target >= 0)

    def inputs_spec(self, rows, **options):
        batch = super().inputs_spec(rows, **options)
        return batch.replace(target=batch.example_id)

    def check_data(self, *, vocabulary, classes):
        if len(classes) != self.config.num_classes or vocabulary > self.config.vocab_size:
            raise ConfigError(f"{len(classes)} classes and {vocabulary} tokens do not fit the toy.")

    def encode(self, params, images, *, plan):
        return self.module.apply({"params": params}, images, method="encode")

    def predict(self, params, visual, *, image_valid, tokens, text_valid, plan):
        args = (visual, image_valid, tokens, text_valid)
        logits = self.module.apply({"params": params}, *args, method="classify")
        return jax.nn.softmax(logits)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = {"family": "toy"}
    config.data = {
        "sources": ("easy-vqa",),
        "num_images": (24,),
        "classes": CLASSES,
        "image_size": 16,
        "text_length": 64,
    }
    config.train = {"finetune": STAGE, "checkpoint_every": 1, "log_every": 1, "mesh": {"data": -1}}
    config.eval = {
        "tasks": ("easyvqa_yesno",),
        "num_images": 8,
        "num_questions": 6,
        "encode_batch_size": 2,
        "batch_size": 4,
        "num_visualizations": 0,
    }
    return complete(config)


if os.environ.get("KILL_AFTER"):  # as a power cut would end the run, once that step is saved
    save = checkpoint.save

    def save_and_die(checkpoints, *args, step, **options):
        save(checkpoints, *args, step=step, **options)
        checkpoints.wait_until_finished()
        if step == int(os.environ["KILL_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = save_and_die


def train(workdir, **environment):
    command = [sys.executable, "train.py", f"--config={__file__}", f"--workdir={workdir}"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was killed after its first step, and went on."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    killed = train(workdir, KILL_AFTER="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    again = train(workdir)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at step 1 of 2" in again.stderr + again.stdout
    return workdir


def test_it_resumes_where_it_was_killed(run, tmp_path):
    whole = train(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert read_steps(run) == read_steps(tmp_path / "whole")
    assert [row["step"] for row in read_steps(run)] == [0, 1]


def test_its_evaluation_names_classes(run):
    rows = json.loads((run / "eval.json").read_text())["rows"]
    assert {row["plan"] for row in rows} == {"full", "blind", "majority"}
    (file,) = (run / "predictions").glob("step_2/full.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 6 and {line["prediction"] for line in lines} <= set(CLASSES)


def test_the_engine_gives_probabilities(run):
    engine = load_engine(run)
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    questions = [Request(f"is there a {shape}?", images=[image]) for shape in ("circle", "box")]
    found = sorted(engine.predict(questions), key=lambda prediction: prediction.index)
    for prediction in found:
        assert sum(prediction.scores) == pytest.approx(1, abs=1e-6)
        assert prediction.text == CLASSES[int(np.argmax(prediction.scores))]
    assert found[0].scores != found[1].scores


def test_it_is_converted_and_back(tmp_path):
    random = np.random.default_rng(0)
    shapes = {
        "net.picture.weight": (8, 36),
        "net.picture.bias": (8,),
        "net.question.weight": (30, 8),
        "net.head.weight": (3, 8),
        "net.head.bias": (3,),
    }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors | {"step": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    config = convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "workdir")
    assert config == ToyConfig(image_size=12, width=8, vocab_size=30, num_classes=3)
    like = jax.eval_shape(
        functools.partial(build_model(config).init_params, seed=0),
        build_model(config).inputs_spec(1),
    )
    params = checkpoint.restore_params(tmp_path / "workdir", like)
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["net.head.weight"].T)
    export_checkpoint(tmp_path / "workdir", tmp_path / "back")
    (file,) = (tmp_path / "back").glob("*.safetensors")
    back = load_file(file)
    assert back.keys() == {name.removeprefix("net.") for name in tensors}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[f"net.{name}"])


def losses(sizes):
    """Of two steps on a mesh of so many devices along each axis."""
    model, stage = build_model(ToyConfig()), build(StageConfig, STAGE)
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])
    spec, random = model.inputs_spec(8), np.random.default_rng(0)
    batch = jax.tree.map(lambda x: random.integers(0, 2, x.shape).astype(x.dtype), spec)
    optimizer = make_optimizer(stage)

    def fresh(batch):
        return make_state(
            model.init_params(batch, seed=0),
            optimizer=optimizer,
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        )

    shapes = jax.eval_shape(fresh, batch)
    shardings = parameter_shardings(shapes, mesh, rules=model.sharding_rules)
    with jax.set_mesh(mesh):
        state = jax.jit(fresh, out_shardings=shardings)(batch)
        step = make_train_step(
            model, optimizer=optimizer, plan=PrunePlan(), stage=stage, state_shardings=shardings
        )
        found = []
        for _ in range(2):
            state, metrics = step(state, shard_batch(batch, mesh))
            found.append(float(metrics["loss"]))
    if mesh.size > 1:
        assert not state.params["picture"]["kernel"].sharding.is_fully_replicated
    return found


def test_eight_devices_lose_what_one_loses():
    np.testing.assert_allclose(losses((2, 2, 2)), losses((1, 1, 1)), rtol=1e-6)


def test_it_is_counted():
    config = ToyConfig(width=4, num_classes=3)
    cost = dict(count_cost(config, PrunePlan(), text_tokens=5).rows)
    assert cost == {"picture": 2 * 48 * 4, "head": 2 * 4 * 3}


def test_it_is_evaluated_through_the_engine(tmp_path):
    values = get_config()
    values.eval.num_questions, values.eval.plans = None, ("full",)
    experiment = load_experiment(values)
    model = build_model(experiment.model)
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.inputs_spec(1))
    rows = evaluate_checkpoint(
        experiment, model.init_params(batch, seed=0), workdir=tmp_path, display="quiet"
    )
    (row,) = [row for row in rows if row.plan == "full"]
    assert row.task == "easyvqa_yesno" and row.tflops > 0 and row.visual_tokens_fused == 0
    lines = (tmp_path / "predictions/no_step/full.jsonl").read_text().splitlines()
    said = [json.loads(line)["prediction"] for line in lines]
    assert len(said) == row.n and set(said) == set(CLASSES)
    assert list(Path(tmp_path).glob("*.png")) == []


@pytest.mark.parametrize("program", ["train", "predict"])
def test_it_is_lowered_for_a_pod(program):
    experiment = load_experiment(get_config())
    assert program in programs_of(experiment)
    mesh = make_mesh(MeshConfig(2, 2, 2), devices=jax.devices()[:8])
    built = build_program(ProgramRequest(program, experiment), mesh, platform="tpu")
    with tracing_for("tpu", mesh):
        text = built.function.lower(*built.args).as_text()
    assert "sdy.sharding" in text or "mhlo.sharding" in text
    assert built.rows == {"train": 8, "predict": 4}[program]
    assert min(count_flops(ProgramRequest(program, experiment), mesh, platform="tpu")) > 0


def test_a_program_of_text_is_refused():
    experiment = load_experiment(get_config())
    mesh = make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="this model has train, predict, got 'prefill'"):
        build_program(ProgramRequest("prefill", experiment), mesh, platform="tpu")
