"""Checkpoints and configs that fit in all shapes and yet do not belong together."""

import dataclasses

import pytest

from meteor_jax.checkpoint import CheckpointError
from meteor_jax.config import build
from meteor_jax.experiment.config import TrainConfig
from meteor_jax.models.family import build_model
from meteor_jax.training.checkpoint_compat import check_model, resumed_stage
from tests.training.tiny_run import make_experiment


def replaced(experiment, **fields):
    """Fields by dotted path with "__" for the dot."""
    for path, value in fields.items():
        *outer, leaf = path.split("__")
        owners = [experiment]
        for name in outer:
            owner = owners[-1]
            owners.append(owner[name] if isinstance(owner, dict) else getattr(owner, name))
        changed = dataclasses.replace(owners.pop(), **{leaf: value})
        for owner, name in zip(reversed(owners), reversed(outer), strict=True):
            change = {name: changed}
            is_dict = isinstance(owner, dict)
            changed = owner | change if is_dict else dataclasses.replace(owner, **change)
        experiment = changed
    return experiment


SAVED = make_experiment()  # four steps of captions, four of questions
DOCUMENT = dataclasses.asdict(SAVED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__encoders__clip__num_heads": 8}, "model.clip.num_heads: checkpoint 16, config 8"),
        ({"model__image_size": 512}, "model.image_size: checkpoint 1024, config 512"),
        ({"data__sources": ("elsewhere/vqa",)}, r"data.sources: checkpoint \('easy-vqa',\)"),
        ({"model__llama__rope_theta": 5e5}, "rope_theta: checkpoint 10000.0, config 500000.0"),
        (
            {"model__encoder_order": ("pix2struct", "clip")},
            r"model.encoder_order: checkpoint \('clip'",
        ),
        ({"data__seed": 3}, "data.seed: checkpoint 0, config 3"),
        ({"data__weights": (2.0,)}, r"data.weights: checkpoint \(\), config \(2.0,\)"),
        ({"seed": 1}, "seed: checkpoint 0, config 1"),
        ({"train__finetune__batch_size": 16}, "train.finetune.batch_size: checkpoint 8, config 16"),
        ({"train__pretrain__steps": 5}, "finetune: checkpoint from step 4, config from step 5"),
        ({"train__finetune__steps": 1}, "train.finetune.steps: checkpoint 4, config 1"),
        ({"train__finetune__steps": 0}, "train.finetune: checkpoint from step 4, config none"),
    ],
)
def test_what_would_go_on_as_something_else_is_refused_in_one_line(fields, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        resumed_stage(DOCUMENT, replaced(SAVED, **fields), step=6, workdir="runs/a")
    assert "\n" not in str(caught.value) and "runs/a" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"train__finetune__steps": 9},  # a run may go on for longer
        {"train__finetune__learning_rate": 1e-4},
        {"train__finetune__grad_accum_steps": 2},
        {"train__log_every": 7},
        {"data__num_workers": 2},
        {"model__encoders__clip__remat": "nothing_saveable"},
        {"model__llama__max_positions": 8192},
    ],
)
def test_what_only_changes_how_it_goes_on_is_not(fields):
    assert resumed_stage(DOCUMENT, replaced(SAVED, **fields), step=6, workdir="") == "finetune"


def test_stages_that_have_not_begun_are_free():
    changed = replaced(SAVED, train__finetune__batch_size=16)
    assert resumed_stage(DOCUMENT, changed, step=3, workdir="") == "pretrain"


def test_a_run_of_one_stage_stands_at_its_end():
    alone = replaced(SAVED, train__finetune__steps=0)
    document = dataclasses.asdict(alone)
    assert resumed_stage(document, SAVED, step=4, workdir="") == "pretrain"
    assert resumed_stage(DOCUMENT, SAVED, step=4, workdir="") == "finetune"


def test_parts_may_come_from_a_model_of_another_resolution_but_not_of_other_heads():
    other = replaced(SAVED, model__encoders__clip__image_size=224).model.with_encoders("clip")
    check_model(DOCUMENT, model=build_model(other), source="", parts=("clip",))
    heads = replaced(SAVED, model__encoders__clip__num_heads=8).model
    with pytest.raises(CheckpointError, match=r"model\.clip\.num_heads"):
        check_model(DOCUMENT, model=build_model(heads), source="", parts=("clip",))
    check_model(DOCUMENT, model=build_model(heads), source="", parts=("llama",))


def test_channels_that_are_joined_keep_their_order_and_their_grid():
    saved = replaced(SAVED, model__fusion="pre")
    document = dataclasses.asdict(saved)
    swapped = replaced(saved, model__encoder_order=("pix2struct", "clip")).model
    with pytest.raises(CheckpointError, match=r"model\.encoder_order"):
        check_model(document, model=build_model(swapped), source="", parts=("llama", "projector"))
    check_model(document, model=build_model(swapped), source="", parts=("llama",))
    with pytest.raises(CheckpointError, match=r"model\.grid: checkpoint 32, config 16"):
        check_model(document, model=build_model(replaced(saved, model__grid=16).model), source="")


def test_folders_may_have_moved():
    saved = replaced(SAVED, data__tokenizer="/old/vicuna/tokenizer", data__sources=("/a/x.json",))
    moved = replaced(SAVED, data__tokenizer="vicuna/tokenizer", data__sources=("/b/x.json",))
    assert resumed_stage(dataclasses.asdict(saved), moved, step=6, workdir="") == "finetune"


@pytest.mark.parametrize("document", [{}, {"model": {"a field of later": 1}}, {"written by": "me"}])
def test_what_says_nothing_is_not_judged(document):
    check_model(document, model=build_model(SAVED.model), source="")
    assert resumed_stage(document, SAVED, step=4, workdir="") is None


def test_build_reads_back_what_asdict_writes():
    assert build(TrainConfig, DOCUMENT["train"]) == SAVED.train
