"""Resize matrices against numbers worked out by hand, and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.layers import resize as resize_lib
from meteor_jax.models.layers.resize import patchify, resize

METHODS = ("bilinear_align_corners", "bilinear_antialias", "bicubic", "bicubic_antialias")


def test_align_corners_by_hand():
    np.testing.assert_allclose(
        resize_lib.bilinear_align_corners(3, 5),
        [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]],
    )


def test_antialias_by_hand():
    # Scale 2: centres at 1 and 3, triangles of half-width 2 over pixel centres 0.5 … 3.5.
    np.testing.assert_allclose(
        resize_lib.bilinear_antialias(4, 2),
        np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7,
        rtol=1e-6,
    )


def test_antialias_enlarges_bilinearly():
    np.testing.assert_allclose(
        resize_lib.bilinear_antialias(2, 4),
        [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]],
        rtol=1e-6,
    )


def test_bicubic_by_hand():
    # Twice as large: pixel 3 lies at source 1.25, so its taps are 0, 1, 2, 3 at distances
    # 1.25, 0.25, 0.75, 1.75 and Keys' polynomial with a = −0.75 gives these weights.
    expected = np.array([-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    np.testing.assert_allclose(resize_lib.bicubic(4, 8)[3], expected, atol=1e-7)


def test_bicubic_repeats_edges():
    # Pixel 0 lies at source −0.25: taps −2, −1, 0, 1, of which two fall on pixel 0 by clamping.
    taps = np.array([-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    np.testing.assert_allclose(
        resize_lib.bicubic(4, 8)[0], [taps[:3].sum(), taps[3], 0, 0], atol=1e-7
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(14, 64), (1024, 720), (24, 32), (7, 7)])
def test_rows_sum_to_one(method, sizes):
    matrix = getattr(resize_lib, method)(*sizes)
    assert matrix.shape == sizes[::-1]
    np.testing.assert_allclose(matrix.sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_same_size_is_the_identity(method):
    np.testing.assert_allclose(getattr(resize_lib, method)(6, 6), np.eye(6), atol=1e-6)
    images = jnp.ones((1, 6, 6, 3))
    assert resize(images, size=6, method=method) is images


def test_rows_and_columns_are_told_apart():
    ramp = jnp.broadcast_to(jnp.arange(5.0)[:, None, None], (5, 9, 2))
    out = resize(ramp, size=3)
    np.testing.assert_allclose(out, np.broadcast_to([[[0.0]], [[2.0]], [[4.0]]], (3, 3, 2)))


def test_dtype_survives():
    assert resize(jnp.ones((8, 8, 3), jnp.bfloat16), size=4).dtype == jnp.bfloat16


def test_patchify_layout():
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(images, patch=2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2], images[1, 2:4, 4:6].reshape(-1))


@pytest.mark.torch
@pytest.mark.parametrize("sizes", [(64, 45), (14, 64), (24, 32), (64, 32), (10, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_equals_torch(method, sizes):
    torch = pytest.importorskip("torch")
    size_in, size_out = sizes
    x = np.random.default_rng(0).normal(size=(2, size_in, size_in, 3)).astype(np.float32)
    options = {
        "bilinear_align_corners": {"mode": "bilinear", "align_corners": True},
        "bilinear_antialias": {"mode": "bilinear", "align_corners": False, "antialias": True},
        "bicubic": {"mode": "bicubic", "align_corners": False},
        "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
    }[method]
    # In float64, because PyTorch's float32 also rounds the coordinates.
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x).double().permute(0, 3, 1, 2), size=(size_out, size_out), **options
    )
    ours = jax.jit(lambda x: resize(x, size=size_out, method=method))(x)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=5e-6)
