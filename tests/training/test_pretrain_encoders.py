"""Encoders that learn what lies where."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from meteor_jax.checkpoint import restore_parts
from meteor_jax.data.pipeline import DataConfig
from meteor_jax.experiment.config import Experiment, StageConfig, TrainConfig
from meteor_jax.inference.layout import param_shapes
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.eagle.model import MeteorConfig
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.parallel.mesh import make_mesh
from meteor_jax.training import pretrain_encoders

MODEL = MeteorConfig(
    encoders={
        "clip": ClipConfig(
            image_size=96, patch_size=12, width=32, depth=1, num_heads=2, mlp_dim=32
        ),
        "pix2struct": Pix2StructConfig(
            grid_side=6, patch_size=16, width=32, depth=1, num_heads=2, mlp_dim=32, num_positions=8
        ),
    },
    image_size=96,
    llama=LlamaConfig(
        depth=1,
        width=32,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=32,
        vocab_size=300,
        max_positions=256,
    ),
)


@pytest.fixture(autouse=True)
def few_test_pictures(monkeypatch):
    monkeypatch.setattr(pretrain_encoders, "NUM_TEST", 16)


def experiment(model=MODEL):
    train = TrainConfig(pretrain=StageConfig(task="captioning", steps=1))
    return Experiment(model=model, data=DataConfig(sources=("reading",)), train=train)


def run(workdir, *, model=MODEL, steps=100, **settings):
    settings = {"batch_size": 8, "learning_rate": 3e-3, "num_images": 32} | settings
    pretrain_encoders.pretrain(
        experiment(model), workdir=workdir, config={"a": 1}, steps=steps, **settings
    )


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.long
def test_encoders_learn_and_can_be_started_from(tmp_path, capsys):
    run(tmp_path)
    out = capsys.readouterr().out
    for name in MODEL.encoders:
        first, last = losses(tmp_path / name)  # after 50 and 100 steps
        assert last < first < np.log(59) + np.log(7)  # of classes and colours: better than a guess
        assert f"{name} sees in pictures of the test split: digits" in out

    mesh = make_mesh(experiment().train.mesh)
    like = param_shapes(experiment(), mesh=mesh)
    parts = restore_parts([tmp_path / name for name in MODEL.encoders], like)
    assert set(parts) == set(MODEL.encoders)
    assert jax.tree.map(np.shape, parts) == jax.tree.map(
        lambda leaf: leaf.shape, {name: like[name] for name in parts}
    )


def test_a_finished_encoder_is_left_alone(tmp_path, capsys):
    run(tmp_path, model=MODEL.with_encoders("clip"), steps=1)
    (tmp_path / "pix2struct").mkdir()  # as a run that was killed leaves it: without a checkpoint
    (tmp_path / "pix2struct/config.json").write_text("{}")
    run(tmp_path, steps=2)
    assert f"clip is there already: {tmp_path / 'clip'}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "clip/checkpoints").iterdir()] == ["1"]
    assert [path.name for path in (tmp_path / "pix2struct/checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({"image_size": 64}, {}, "96 to 128 pixels"),
        ({}, {"num_images": 4}, "do not fill one batch of 8"),
        (
            {"encoders": {"clip": ClipConfig(image_size=90, patch_size=18)}, "encoder_order": ()},
            {},
            "clip: its 5 × 5 tokens do not divide 24 × 24 cells of 4 pixels",
        ),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, changes, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model=dataclasses.replace(MODEL, **changes), **settings)
