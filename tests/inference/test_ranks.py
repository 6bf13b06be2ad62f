"""Ranks of a model's features: which are measured, by whom, and what is said of full ones."""

import collections
import dataclasses
import functools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from meteor_jax.inference import ranks as measuring
from meteor_jax.inference.ranks import calibrate_ranks, feature_shapes, full_rank_warnings
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.ops.ranks import numerical_ranks
from meteor_jax.pruning.text import parse_plan
from tests import tiny_model as tiny

ROOT = Path(__file__).parents[2]
NAMES = ("clip", "convnext", "pix2struct")


def images(count=8):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def decomposed(monkeypatch):
    """The feature maps that are decomposed, how often each."""
    counts = collections.Counter()

    def count(features, **options):
        assert features.dtype == np.float32
        counts[features.tobytes()] += 1
        return numerical_ranks(features, **options)

    monkeypatch.setattr(measuring, "numerical_ranks", count)
    return counts


def test_ranks_are_those_of_the_features():
    x = images(4)
    plans = [parse_plan("meteor(encode=(26, 22, 30), fuse=20, encode.energy=.8)")]
    ranks = calibrate_ranks(tiny.MODEL, tiny.params(), x, plans=plans)
    assert set(ranks) == {"tolerance", "effective", "energy 0.99", "energy 0.8"}
    run = functools.partial(tiny.MODEL.apply, method="segment_features")
    features = jax.jit(run)({"params": tiny.params()}, x)
    for name, boundaries in jax.device_get(features).items():
        for boundary, maps in enumerate(boundaries):
            assert maps.shape == (4, 16, 16)
            expected = np.mean([np.linalg.matrix_rank(row) for row in maps])
            tolerance, effective, most, some = (
                ranks[kind][name][boundary]
                for kind in ("tolerance", "effective", "energy 0.99", "energy 0.8")
            )
            assert abs(tolerance - expected) <= 0.5
            assert 1 <= some <= most <= tolerance and 1 <= effective <= tolerance


def test_eight_images_are_enough(decomposed):
    calibrate_ranks(tiny.MODEL, tiny.params(), images(20))
    # ConvNeXt's grid is the same at all its boundaries.
    assert set(decomposed.values()) <= {1, 3} and sum(decomposed.values()) == 8 * 3 * 3


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 2), (2, 4, 1)])
def test_a_mesh_decomposes_each_map_once(sizes, decomposed):
    expected = calibrate_ranks(tiny.MODEL, tiny.params(), images(3))
    once = decomposed.copy()
    decomposed.clear()
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        ranks = calibrate_ranks(tiny.MODEL, tiny.params(), images(3))
        assert feature_shapes(tiny.MODEL, tiny.params()) == dict.fromkeys(NAMES, (16, 16))
    assert sum(decomposed.values()) == sum(once.values()) == 3 * 3 * 3
    assert ranks.keys() == expected.keys()
    for kind in ranks:
        for name in NAMES:
            np.testing.assert_allclose(ranks[kind][name], expected[kind][name], atol=0.4)


@pytest.mark.long
def test_two_processes_share_the_images():
    """Also where each has all rows, because `tensor` spans them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.inference.ranks_of_two", str(port), str(process)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    lines = [process.communicate(timeout=240)[0].splitlines()[-1] for process in running]
    counts, ranks = zip(*map(json.loads, lines), strict=True)
    assert counts == (4 * 3 * 3, 4 * 3 * 3) and ranks[0] == ranks[1]
    expected = calibrate_ranks(tiny.MODEL, tiny.params(), images())
    for name in NAMES:
        np.testing.assert_allclose(
            ranks[0]["effective"][name], expected["effective"][name], rtol=1e-3
        )


def test_features_are_in_float32_whatever_the_model_computes_in(decomposed):
    half = tiny.MODEL.clone(config=dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))
    ranks = [calibrate_ranks(model, tiny.params(), images(2)) for model in (half, tiny.MODEL)]
    assert ranks[0] == ranks[1]


def test_features_that_are_not_finite_have_no_rank():
    params = dict(tiny.params())
    params["clip"] = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params["clip"])
    with pytest.raises(ValueError, match="the features of clip are not all finite"):
        calibrate_ranks(tiny.MODEL, params, images(1))


@pytest.mark.parametrize(
    ("clip", "fields", "lines"),
    [
        (
            15.0,
            "",
            [
                "ranks by energy 0.99 are full in every encoder (clip 15 of 16, convnext 16 of "
                "16), so stage 1 of meteor shares tokens by how many each encoder has, not by "
                "what is in them; set a smaller encode.energy, or encode.assignment=tokens if "
                "that is meant."
            ],
        ),
        (15.0, ", encode.rank=tolerance", ["set encode.rank=energy, or encode.assignment=tokens"]),
        (9.0, "", []),
        (15.0, ", encode.assignment=uniform", []),
        (15.0, ", encode.rank=effective", []),  # which nothing measured
    ],
)
def test_full_ranks_are_told(clip, fields, lines):
    measured = {"clip": (16.0, 16.0, clip), "convnext": (16.0,) * 3}
    calibration = Calibration(ranks=dict.fromkeys(("energy 0.99", "tolerance"), measured))
    plan = parse_plan(f"meteor(encode=(26, 22, 30), fuse=20{fields})")
    plan = dataclasses.replace(plan, name="meteor")
    told = full_rank_warnings(
        [plan, parse_plan("full")],
        calibration=calibration,
        shapes={"clip": (16, 64), "convnext": (20, 16)},
    )
    assert len(told) == len(lines)
    assert all(line in text and "\n" not in text for line, text in zip(lines, told, strict=True))
