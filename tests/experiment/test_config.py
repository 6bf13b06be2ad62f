"""From a config to an experiment, and what a wrong one is told."""

import pytest

from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import complete, load_experiment


def make_config(**train_fields):
    return {
        "model": {"encoders": {"clip": {}}},
        "data": {"sources": ("easy-vqa",)},
        "train": {"finetune": {"steps": 5}} | train_fields,
        "plans": {"half": "random(keep=8)"},
        "eval": {"num_questions": None},
    }


def test_stages():
    config = load_experiment(make_config(pretrain={"steps": 3, "plans": ("full", "half")})).train
    first, second = config.stages()
    assert (first.name, first.start, first.stop) == ("pretrain", 0, 3)
    assert (second.name, second.start, second.stop) == ("finetune", 3, 8)
    assert [first.plan_name(step) for step in range(3)] == ["full", "half", "full"]
    assert [config.stage_at(step).name for step in (2, 3, 8)] == ["pretrain", *["finetune"] * 2]


def test_stage_without_steps_is_left_out():
    stages = load_experiment(make_config()).train.stages()
    assert [(stage.name, stage.start) for stage in stages] == [("finetune", 0)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"finetune": {"stepz": 5}}, "train.finetune.stepz: no such field. Did you mean 'steps'?"),
        (
            {"finetune": {"task": "captions"}},
            "expected one of captioning, instruction, ",
        ),
        (
            {"finetune": {"batch_size": 6, "grad_accum_steps": 4}},
            "does not divide into grad_accum_steps=4",
        ),
        ({"finetune": {"steps": 0}}, "nothing to train"),
        ({"log_every": 0}, "log_every is at least 1"),
        ({"held_out_batches": 0}, "held_out_batches is at least 1"),
        ({"finetune": {"plans": ()}}, "config.train.finetune: plans is empty"),
        ({"pretrain": {"batch_size": 5, "grad_accum_steps": 2}}, "config.train.pretrain: batch"),
        ({"log_every": -1}, "config.train: log_every is at least 1, got -1"),
        ({"held_out_every": 5}, "train.held_out_every is 5, but data.held_out is 0"),
        ({"ema_decay": "0.9"}, "train.ema_decay: expected float, got '0.9'"),
        ({"mesh": {"dat": 1}}, "train.mesh.dat: no such field. Did you mean 'data'?"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError) as error:
        load_experiment(make_config(**fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_completed_config_has_every_field_and_means_the_same():
    config = complete(make_config())
    assert config.train.finetune.weight_decay == 0.0
    assert load_experiment(config) == load_experiment(make_config())
    with config.unlocked():
        config.eval.num_questions = 7  # a field that was None takes a value
    assert load_experiment(config).eval.num_questions == 7
