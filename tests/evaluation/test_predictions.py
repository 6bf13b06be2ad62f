"""An evaluation that is killed, and one that many share: nothing twice, the same answers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.evaluation.predictions import Fingerprint, PredictionStore, digest_params
from meteor_jax.evaluation.token_stats import describe
from tests.evaluation.fakes import run, without_clock

ROOT = Path(__file__).parents[2]


def start(workdir, *arguments, devices=1):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation.fakes", str(workdir), *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stderr=subprocess.PIPE,
        text=True,
    )


def read(folder):
    """The lines without what depends on the clock and on how many are asked together."""
    lines = (Path(folder) / "fake.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": None, "rows": None} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done, predictor = run(folder)
    return folder, without_clock(done.result), predictor.num_batches


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    process = start(folder, "--kill-at=8")
    assert process.wait(timeout=120) == -signal.SIGKILL, process.stderr.read()
    return folder


def test_what_was_answered_before_a_kill_is_not_asked_again(killed, undisturbed):
    folder, expected, num_batches = undisturbed
    total, before = len(expected.predictions), read(killed)
    assert 0 < len(before) < total
    with (killed / "fake.jsonl").open("a") as file:
        file.write('{"key": "cut off in the mid')
    said = []
    done, predictor = run(killed, log=said.append)
    assert said == [f"fake: {len(before)} of {total} questions were answered before."]
    assert without_clock(done.result) == expected
    assert read(killed) == read(folder)
    assert done.seconds["asked"] == total - len(before)
    assert 0 < predictor.num_batches < num_batches

    again, predictor = run(killed)
    assert again.result == done.result
    assert predictor.num_batches == 0 and predictor.encoded == []


def test_every_question_is_answered_once(undisturbed):
    folder, done, _ = undisturbed
    lines = read(folder)
    assert len({line["key"] for line in lines}) == len(lines) == len(done.predictions)
    assert [line["corrupt"] for line in lines] == [line["image_id"] == 5 for line in lines]
    assert all(line["score"] == 1 - line["corrupt"] for line in lines)


def test_two_processes_answer_as_one_does(tmp_path, undisturbed):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pair = [start(tmp_path, f"--port={port}", f"--process={i}", devices=1) for i in range(2)]
    try:
        ended = [process.communicate(timeout=120)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], ended
    assert read(tmp_path) == read(undisturbed[0])


def test_more_questions_ask_only_those_that_are_new(tmp_path):
    run(tmp_path, num_images=6)
    done, predictor = run(tmp_path, num_images=9)
    assert sorted(grey for grey in predictor.encoded if grey) == [60, 70, 80]
    assert len(read(tmp_path)) == len(done.result.predictions)

    _, fewer = run(tmp_path, num_images=3)
    assert len(read(tmp_path)) == 6 and fewer.num_batches == 0
    assert len((tmp_path / "fake.cache.jsonl").read_text().splitlines()) == 12
    run(tmp_path, fewer, num_images=9)
    assert len(read(tmp_path)) == len(done.result.predictions) and fewer.num_batches == 0


def test_other_batch_sizes_keep_the_numbers_of_the_first_and_say_so(tmp_path):
    said = []
    first, _ = run(tmp_path, num_images=6, batch=4)
    again, predictor = run(tmp_path, num_images=6, batch=2, log=said.append)
    assert predictor.num_batches == 0 and again.result == first.result
    assert said == [
        "fake: 12 of 12 questions were answered before, 9 of them in batches of 4 instead of 2: "
        "their tokens computed, TFLOPs and seconds are of those."
    ]


def test_answers_without_a_field_are_asked_again(tmp_path):
    run(tmp_path, num_images=3)
    path, before = tmp_path / "fake.jsonl", read(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(
            json.dumps({name: value for name, value in line.items() if name != "rows"}) + "\n"
            for line in lines
        )
    )
    _, predictor = run(tmp_path, num_images=3)
    assert predictor.num_batches and read(tmp_path) == before


def test_another_checkpoint_leaves_the_answers_of_the_first_and_says_so(tmp_path):
    said = []
    run(tmp_path, num_images=6, log=said.append)
    assert said == []
    before = (tmp_path / "fake.jsonl").read_text()
    done, _ = run(tmp_path, num_images=6, params="others", log=said.append)
    assert done.seconds["asked"] == len(done.result.predictions)
    assert (tmp_path / "fake.jsonl").read_text() == before
    assert re.fullmatch(r"fake-[0-9a-f]{16}\.jsonl", done.path.name)
    assert said == [
        "fake.jsonl is of another run (other params) and stays; these answers go to "
        f"{done.path.name}."
    ]
    for params in ("none", "others"):  # both go on where they ended
        assert run(tmp_path, num_images=6, params=params)[1].num_batches == 0


def test_lines_that_cannot_be_used_are_dropped(tmp_path):
    store = PredictionStore(tmp_path, "p", fingerprint=Fingerprint({"a": 1}))
    assert store.start() == {}
    for line in ({"key": "x", "said": "a\u2028b"}, {"key": "y"}):
        store.append(line)
    path = tmp_path / "p.jsonl"
    path.write_text(path.read_text() + '[1]\nnot json\n{"key": "z"}\n{"key": "torn"')
    assert list(PredictionStore(tmp_path, "p", fingerprint=Fingerprint({"a": 1})).start()) == [
        "x",
        "y",
    ]
    assert len(path.read_text().split("\n")) == 3
    other = PredictionStore(tmp_path, "p", fingerprint=Fingerprint({"a": (2,)}))
    assert other.start() == {} and "other a" in other.note
    assert other.path != path and len(path.read_text().split("\n")) == 3


def test_params_have_a_digest_that_sees_every_bit():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32), "b": jnp.ones(7)}
    same = digest_params(params)
    assert digest_params({name: jnp.array(leaf) for name, leaf in params.items()}) == same
    changed = params | {"a": params["a"].at[1, 2, 3].add(1e-6)}
    swapped = params | {"a": params["a"][:, ::-1]}
    half = params | {"b": jnp.ones(7, jnp.bfloat16) * 2}
    assert len({same, digest_params(changed), digest_params(swapped), digest_params(half)}) == 4


def test_a_spread_adds_up():
    spread = describe([3, 3, 4, 9])
    assert spread["mean"] == 4.75 and spread["percentiles"]["50"] == 3.5
    assert sum(spread["histogram"]["counts"]) == 4
    assert (spread["min"], spread["max"]) == (3, 9)
    assert describe([6, 6])["histogram"]["counts"] == [2]
