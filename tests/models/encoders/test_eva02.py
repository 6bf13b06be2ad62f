"""EVA-02 against EAGLE's PyTorch code, and pruned blocks against sums without windows."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.eva02.model import Eva02, Eva02Config, rope_freqs
from tests.encoder_steps import segment_steps
from tests.models.encoders.test_golden import assert_close, dense, encode, norm, patches, stack

GOLDEN = Path(__file__).parents[2] / "golden"
TOWER = "model.vision_tower.vision_towers.2.vision_tower."
# 8×8 tokens in four windows; a segment is a block; the last block attends over all.
CONFIG = Eva02Config(
    image_size=32,
    patch_size=4,
    width=16,
    depth=3,
    num_heads=2,
    mlp_dim=20,
    window=4,
    position_side=3,
)
MODEL = Eva02(CONFIG)


@pytest.fixture(scope="module")
def weights():
    with np.load(GOLDEN / "eagle_x4_tiny_weights.npz") as arrays:
        names = [name for name in arrays if name.startswith(TOWER)]
        return {name.removeprefix(TOWER): arrays[name] for name in names}


def golden_params(w, depth):
    def biased(name, bias):
        return dense(w, name) | {"bias": w[bias]}

    def block(i):
        at = f"blocks.{i}"
        mlp = {"gate": "w1", "up": "w2", "out": "w3"}
        return {
            "norm1": norm(w, f"{at}.norm1"),
            "attention": {
                "query": biased(f"{at}.attn.q_proj", f"{at}.attn.q_bias"),
                "key": dense(w, f"{at}.attn.k_proj"),
                "value": biased(f"{at}.attn.v_proj", f"{at}.attn.v_bias"),
                "out": dense(w, f"{at}.attn.proj"),
            },
            "norm2": norm(w, f"{at}.norm2"),
            "mlp": {ours: dense(w, f"{at}.mlp.{theirs}") for ours, theirs in mlp.items()}
            | {"norm": norm(w, f"{at}.mlp.ffn_ln")},
        }

    return {
        "patch_embedding": patches(w, "patch_embed.proj"),
        "position_embedding": w["pos_embed"][0],
        "tables": {
            f"{ours}_{wave}": w[f"{theirs}.freqs_{wave}"]
            for ours, theirs in (("window", "rope_win"), ("global", "rope_glb"))
            for wave in ("cos", "sin")
        },
        "blocks": stack([block(i) for i in range(depth)]),
    }


def test_equals_eagle(weights):
    config = Eva02Config(width=32, depth=3, num_heads=2, mlp_dim=85)
    params = golden_params(weights, config.depth)
    with np.load(GOLDEN / "eagle_x4_tiny_outputs.npz") as arrays:
        theirs = arrays["tower2_raw"]
    theirs = theirs.reshape(1, config.width, -1).transpose(0, 2, 1)
    assert_close(encode(Eva02(config), params), theirs)


def test_rope_freqs_are_those_of_the_checkpoint(weights):
    config = Eva02Config(width=32, num_heads=2)
    stored = golden_params(weights, depth=3)["tables"]
    for name, table in rope_freqs(config).items():
        np.testing.assert_allclose(table, stored[name], atol=2e-7, err_msg=name)


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(3, 32, 32, 3)).astype(np.float32)


@functools.cache
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), images())["params"]
    random = np.random.default_rng(1)
    drawn = jax.tree.map(lambda s: random.normal(scale=0.5, size=s.shape).astype(s.dtype), shapes)
    return drawn | {"tables": rope_freqs(CONFIG)}


@functools.cache
def run(*keeps, methods="attention"):
    steps = segment_steps(keeps, methods)
    return jax.jit(functools.partial(MODEL.apply, steps=steps))({"params": params()}, images())


def naive_block(index, x, patch_index):
    """One block over float[N, E] at `patch_index`, every pair of tokens and every rotation written
    out: what comes out, and the mean over heads of the attention map."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf[index], np.float64), params()["blocks"]["stack"])
    side, window, heads = CONFIG.grid, CONFIG.window, CONFIG.num_heads
    row, column = np.divmod(patch_index, side)

    def normed(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def turn(x, row, column):
        dim = x.shape[-1] // 2
        for axis, place in enumerate((row, column)):
            for pair in range(dim // 2):
                angle = place * 10000 ** (-2 * pair / dim)
                at = axis * dim + 2 * pair
                first, second = x[..., at].copy(), x[..., at + 1].copy()
                x[..., at] = first * np.cos(angle) - second * np.sin(angle)
                x[..., at + 1] = second * np.cos(angle) + first * np.sin(angle)
        return x

    y = normed(x, p["norm1"])
    a = p["attention"]
    q, k, v = (
        (y @ a[name]["kernel"] + a[name].get("bias", 0)).reshape(len(x), heads, -1).swapaxes(0, 1)
        for name in ("query", "key", "value")
    )
    if index in CONFIG.global_blocks:
        near, places = True, (row * window / side, column * window / side)
    else:
        windows = row // window * side + column // window
        near, places = windows[:, None] == windows, (row % window, column % window)
    logits = turn(q, *places) @ turn(k, *places).swapaxes(1, 2) / q.shape[-1] ** 0.5
    weight = np.where(near, np.exp(logits), 0)
    weight /= weight.sum(-1, keepdims=True)
    mixed = (weight @ v).swapaxes(0, 1).reshape(x.shape)
    x = x + mixed @ a["out"]["kernel"] + a["out"]["bias"]
    m = p["mlp"]
    y = normed(x, p["norm2"])
    gate, up = (y @ m[name]["kernel"] + m[name]["bias"] for name in ("gate", "up"))
    hidden = normed(gate / (1 + np.exp(-gate)) * up, m["norm"])
    return x + hidden @ m["out"]["kernel"] + m["out"]["bias"], weight.mean(0)


def naive_blocks(blocks, out, boundary, image):
    """Runs blocks over the tokens that an output holds at a boundary."""
    patch_index = np.asarray(out.kept[boundary])[image]
    x = np.asarray(out.features[boundary], np.float64)[image]
    for block in blocks:
        x, weight = naive_block(block, x, patch_index)
    return x, weight, patch_index


@pytest.mark.parametrize("keep", [64, 40])
def test_blocks_after_a_step(keep):
    """A window block, then a global one, over the tokens that the first boundary left."""
    out = run(keep, keep, keep, methods="mean_token")
    for image in range(3):
        x, _, patch_index = naive_blocks((1, 2), out, 0, image)
        np.testing.assert_array_equal(out.patch_index[image], patch_index)
        np.testing.assert_allclose(out.x[image], x, atol=1e-3 * np.abs(x).max())


@pytest.mark.parametrize(("keeps", "block"), [((40, 20, 20), 1), ((40, 40, 20), 2)])
def test_attention_received(keeps, block):
    """Of each window the tokens stay that the segment's last block looks at most, in their window
    or, after a global block, from everywhere."""
    out = run(*keeps)
    for image in range(3):
        _, weight, patch_index = naive_blocks((block,), out, block - 1, image)
        windows = patch_index // 8 // 4 * 2 + patch_index % 8 // 4
        expected = [
            token
            for w in range(4)
            for token in sorted(
                patch_index[windows == w], key=lambda t: -weight.mean(0)[list(patch_index).index(t)]
            )[:5]
        ]
        np.testing.assert_array_equal(out.patch_index[image], sorted(expected))


def test_a_kept_number_must_divide_by_the_windows():
    with pytest.raises(ValueError, match="keep: expected a multiple of num_windows 4, got 30"):
        run(40, 30, 20)


def test_a_deeper_encoder_is_no_larger_a_program():
    """Pruned three times, eight periods of blocks take the program of three."""
    steps = segment_steps((40, 20, 12), ("mean_token", "attention", "attention"))

    def lines(depth):
        model = MODEL.clone(config=dataclasses.replace(CONFIG, depth=depth))
        shapes = jax.eval_shape(model.init, jax.random.key(0), images())
        lowered = jax.jit(functools.partial(model.apply, steps=steps)).lower(shapes, images())
        return lowered.as_text().count("\n")

    assert lines(24) < 1.2 * lines(9)


def test_no_segment_ends_inside_a_period():
    assert dataclasses.replace(CONFIG, depth=24).segment_ends == (9, 15, 24)
    assert CONFIG.segment_ends == (1, 2, 3)  # fewer periods than segments


def test_tables_stay_exact_in_bfloat16():
    bfloat16 = MODEL.clone(dtype=jnp.bfloat16)
    program = str(jax.make_jaxpr(bfloat16.apply)({"params": params()}, images()))
    assert "f32[3,4,16,1,8]" in program  # cosines of a window, gathered

    out = jax.eval_shape(bfloat16.apply, {"params": params()}, images())
    assert out.x.dtype == jnp.bfloat16


def test_position_of_a_larger_image():
    """Positions come from the trained grid whatever the image's size."""
    larger = Eva02(dataclasses.replace(CONFIG, image_size=48))
    shapes = [
        jax.eval_shape(model.init, jax.random.key(0), images())["params"]
        for model in (MODEL, larger)
    ]
    assert [tree.pop("tables")["global_cos"].shape for tree in shapes] == [(64, 8), (144, 8)]
    assert shapes[0] == shapes[1]


def test_bad_sizes():
    with pytest.raises(ValueError, match="image_size: expected a multiple of patch_size 16"):
        Eva02Config(image_size=1000)
    with pytest.raises(ValueError, match="grid: expected a multiple of window 15, got 64"):
        Eva02Config(window=15)
    with pytest.raises(ValueError, match="width: expected a multiple of 4 · num_heads 44"):
        Eva02Config(num_heads=11)
