"""One attention over three kernels: the same numbers, and which of them runs where."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meteor_jax.models.layers.attention import attend, attention_kernel, select_kernel
from meteor_jax.models.layers.kernels import cpu
from meteor_jax.models.layers.kernels import fused as fused_attention
from meteor_jax.models.layers.platform import compiling_for
from meteor_jax.models.layers.windows import attend_windows
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.perf.aot import open_topology

# Splash sums blocks of keys in another order. Outputs are about 1, gradients up to 60.
FORWARD, BACKWARD = 2e-6, 2e-4


def make(*, rows=2, queries=130, keys=130, heads=2, kv=2, width=8, value=8, dtype=jnp.float32):
    """(q, k, v) of unit variance."""
    rng = np.random.default_rng(0)
    shapes = ((rows, queries, heads, width), (rows, keys, kv, width), (rows, keys, kv, value))
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def valid_keys(rows, keys):
    """bool[B, 1, S]: 3/4 of the first row's keys, and all of the others'."""
    counts = np.full((rows, 1, 1), keys)
    counts[0] = keys * 3 // 4
    return np.arange(keys) < counts


def make_segments(rows, queries, keys):
    """Three unequal segments, which all have queries and keys."""
    return tuple(
        np.broadcast_to((np.arange(n) * 6 // n + 1) // 3, (rows, n)).astype(np.int32)
        for n in (queries, keys)
    )


def plainly(q, k, v, *, mask, scale):
    """Attention as it is defined, for bool[B, T, S] `mask`."""
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.where(mask[:, None], np.einsum("bthd,bshd->bhts", q * scale, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def outputs_and_gradients(q, k, v, *, kernel, **options):
    def loss(q, k, v):
        out = attend(q, k, v, kernel=kernel, **options)
        return jnp.sum(jnp.sin(out) * jnp.arange(1, out.shape[-1] + 1)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], atol=FORWARD)
    for name, a, b in zip("qkv", ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, atol=BACKWARD, err_msg=f"gradient of {name}")


def test_xla_is_attention_by_definition():
    q, k, v = make(queries=9, keys=9, heads=4, kv=2, value=6)
    rng = np.random.default_rng(1)
    mask = (rng.random((2, 9, 9)) < 0.7) | np.eye(9, dtype=bool)
    segments = make_segments(2, 9, 9)
    own = segments[0][:, :, None] == segments[1][:, None]
    expected = plainly(q, k, v, mask=mask & own & np.tri(9, dtype=bool), scale=0.3)
    run = functools.partial(attend, causal=True, mask=mask, segments=segments, scale=0.3)
    out = jax.jit(run)(q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_map_in_chunks_is_the_whole_map(causal, monkeypatch):
    """On CPUs: 3 heads over one of keys, whose 3·130 query rows are ten chunks of 39."""
    q, k, v = make(heads=6, kv=2, value=6)
    monkeypatch.setattr(cpu, "CAUSAL_CHUNK", 130)
    whole = outputs_and_gradients(q, k, v, kernel="xla", causal=causal)
    monkeypatch.setattr(cpu, "CHUNK", 48)
    monkeypatch.setattr(cpu, "CAUSAL_CHUNK", 48)
    assert_same(outputs_and_gradients(q, k, v, kernel="xla", causal=causal), whole)


CASES = {
    "causal, grouped, invalid keys": (
        {"heads": 4},
        {"causal": True, "mask": valid_keys(2, 130)},
    ),
    "segments of unequal lengths, own width of values, own scale": (
        {"queries": 130, "keys": 200, "value": 16},
        {"segments": make_segments(2, 130, 200), "scale": 1.0},
    ),
}


@pytest.mark.parametrize(("shapes", "options"), CASES.values(), ids=CASES)
def test_splash_is_xla(shapes, options):
    q, k, v = make(**shapes)
    assert select_kernel(q, k, v, mask=options.get("mask"), kernel="splash") == "splash"
    assert_same(
        outputs_and_gradients(q, k, v, kernel="splash", **options),
        outputs_and_gradients(q, k, v, kernel="xla", **options),
    )


ON_A_MESH = {
    "rows and heads divide": (
        {"rows": 4, "heads": 4},
        {"causal": True, "mask": valid_keys(4, 130)},
    ),
    "neither does, whole blocks": ({"rows": 1, "queries": 128, "keys": 256, "kv": 1}, {}),
}


@pytest.mark.parametrize(("shapes", "options"), ON_A_MESH.values(), ids=ON_A_MESH)
def test_splash_on_a_mesh_is_xla(shapes, options):
    q, k, v = make(**shapes)
    expected = outputs_and_gradients(q, k, v, kernel="xla", **options)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2), devices=jax.devices()[:8])):
        assert_same(outputs_and_gradients(q, k, v, kernel="splash", **options), expected)


def test_each_device_attends_to_its_own_rows_and_heads():
    seen = []

    def run(q, k, v, mask):
        seen.append((q.shape, k.shape, mask.shape))
        return attend(q, k, v, mask=mask)

    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2), devices=jax.devices()[:8])):
        split = functools.partial(fused_attention.split_over_mesh, run)
        jax.jit(split)(*make(rows=8, queries=3, keys=5, heads=4), jnp.ones((8, 1, 5), bool))
    assert seen == [((2, 3, 2, 8), (2, 5, 1, 8), (2, 1, 5))]


def kernels_in(platform, *arrays, **options):
    with compiling_for(platform):
        return select_kernel(*arrays, **options)


@pytest.fixture
def hopper(monkeypatch):
    """A device of compute capability 9.0, and every call that cuDNN gets."""
    calls = []

    def record(q, k, v, **options):
        calls.append({"q": q.shape, "k": k.shape, "v": v.shape, **options})
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)

    device = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(fused_attention.jax, "devices", lambda: [device])
    monkeypatch.setattr(fused_attention.jax.nn, "dot_product_attention", record)
    with compiling_for("gpu"):
        yield types.SimpleNamespace(calls=calls, device=device)


def test_platform_chooses_the_kernel():
    arrays = make(dtype=jnp.bfloat16)
    assert kernels_in("cpu", *arrays) == "xla"
    assert kernels_in("tpu", *arrays) == "splash"
    assert kernels_in("gpu", *arrays) == "xla"  # this machine has none to ask
    with attention_kernel("xla"):
        assert kernels_in("tpu", *arrays) == "xla"
        assert kernels_in("tpu", *arrays, kernel="splash") == "splash"


def test_mesh_of_another_platform_chooses_the_kernel():
    mesh = make_mesh(MeshConfig(1), devices=jax.devices()[:1]).abstract_mesh
    device = dataclasses.replace(mesh.abstract_device, device_kind="TPU v5 lite", platform="tpu")
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        assert select_kernel(*make()) == "splash"


def test_splash_leaves_to_xla_what_it_cannot_do():
    q, k, v = make()
    one_by_one = jnp.ones((2, 130, 130), bool)
    assert kernels_in("tpu", q, k, v, mask=one_by_one[:, :1]) == "splash"
    assert kernels_in("tpu", q, k, v, mask=one_by_one) == "xla"
    assert kernels_in("tpu", q[:, :127], k, v) == "xla"
    assert kernels_in("tpu", q, k[:, :1], v[:, :1]) == "xla"


def test_cudnn_gets_what_it_wants(hopper):
    q, k, v = make(queries=7, keys=9, heads=4, width=12, value=10, dtype=jnp.bfloat16)
    segments = make_segments(2, 7, 9)
    out = attend(q, k, v, causal=True, mask=valid_keys(2, 9), segments=segments, scale=0.5)
    assert out.shape == (2, 7, 4, 10)
    mask = hopper.calls[0].pop("mask")
    own = segments[0][:, :, None] == segments[1][:, None]
    np.testing.assert_array_equal(mask[:, 0, :7, :9], own & valid_keys(2, 9))
    assert mask.shape == (2, 1, 8, 10)
    assert not mask[:, :, 7:].any()
    assert not mask[..., 9:].any()
    assert hopper.calls == [
        {
            "q": (2, 8, 4, 16),
            "k": (2, 10, 2, 16),
            "v": (2, 10, 2, 16),
            "is_causal": True,
            "scale": 0.5,
            "implementation": "cudnn",
        }
    ]


def test_cudnn_without_a_mask_pads_no_lengths(hopper):
    attend(*make(queries=7, keys=9, dtype=jnp.float16))
    assert hopper.calls == [
        {
            "q": (2, 7, 2, 8),
            "k": (2, 9, 2, 8),
            "v": (2, 9, 2, 8),
            "mask": None,
            "is_causal": False,
            "scale": 8**-0.5,
            "implementation": "cudnn",
        }
    ]


def test_cudnn_is_asked_for_half_precision_alone(hopper):
    q, k, v = make(queries=8, keys=8)
    half = jnp.bfloat16
    attend(q, k, v)
    attend(q, k.astype(half), v.astype(half))
    attend(q, k, v, kernel="cudnn")
    assert hopper.calls == []
    attend(*make(queries=8, keys=8, dtype=half))
    assert len(hopper.calls) == 1


@pytest.mark.parametrize(
    ("capability", "widths"),
    [("9.0", (128, 256)), ("8.0", (128,)), ("7.5", ()), ("gfx942", ())],
)
def test_gpus_differ_in_the_widest_head(hopper, capability, widths):
    hopper.device.compute_capability = capability
    taken = [
        width
        for width in (128, 256, 264)
        if select_kernel(*make(keys=4, queries=4, width=width, dtype=jnp.bfloat16)) == "cudnn"
    ]
    assert taken == list(widths)


def test_long_windows_are_cut_up_for_xla_alone(hopper, monkeypatch):
    monkeypatch.setattr("meteor_jax.models.layers.windows.LONG", 4)
    q, k, v = make(rows=2, queries=8, keys=8, dtype=jnp.bfloat16)
    attend_windows(*(x[:, None] for x in (q, k, v)))
    assert [call["q"] for call in hopper.calls] == [(2, 8, 2, 8)]


@pytest.mark.tpu_compile
def test_splash_compiles_for_tpus_without_collectives():
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(1, 2, 2), devices=open_topology("v5e:2x2"))
    by_head = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    q, k, v = (
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=by_head)
        for array in make(queries=300, keys=300, heads=4, width=92, value=64, dtype=jnp.bfloat16)
    )

    def loss(q, k, v):
        return attend(q, k, v, causal=True).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().as_text()
    assert text.count("tpu_custom_call") == 3  # forward, and backward for queries and for the rest
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all"))
