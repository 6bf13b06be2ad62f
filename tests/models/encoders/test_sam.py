"""SAM against Hugging Face's, and its pruned blocks against the same sums without windows."""

import functools

import jax
import numpy as np
import pytest

from meteor_jax.models.encoders.sam.model import (
    Sam,
    SamConfig,
    WindowLayout,
    join_relative_positions,
    padded_windows,
)
from meteor_jax.pruning.ops.windows import window_order
from tests.encoder_steps import segment_steps
from tests.models.encoders.test_golden import dense, norm, patches, stack

# 10×10 tokens, so 4×4 windows are cut off at the far edges. Segments end after blocks 0, 2, 3.
CONFIG = SamConfig(
    image_size=40,
    patch_size=4,
    block_width=16,
    depth=4,
    num_heads=2,
    mlp_dim=20,
    window=4,
    global_blocks=(1, 3),
    neck_width=5,
)
MODEL = Sam(CONFIG)


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 40, 40, 3)).astype(np.float32)


@functools.cache
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), images())["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda s: random.normal(scale=0.5, size=s.shape).astype(s.dtype), shapes)


@functools.cache
def compiled(steps):
    return jax.jit(functools.partial(MODEL.apply, steps=steps))


def run(params, *keeps, method="attention"):
    return compiled(segment_steps(keeps, method))({"params": params}, images())


def to_raster(groups):
    """float[I, 25, 4E], groups of four tokens, to float[I, 10, 10, E]."""
    x = np.asarray(groups).reshape(2, 5, 5, 2, 2, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(2, 10, 10, -1)


@pytest.mark.torch
def test_equals_hugging_face():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.SamVisionModel(
        transformers.SamVisionConfig(
            hidden_size=16,
            output_channels=5,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=40,
            patch_size=4,
            window_size=4,
            global_attn_indexes=[1, 3],
            mlp_dim=20,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        seen = {}
        theirs.vision_encoder.neck.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
        theirs(torch.from_numpy(np.array(images())).permute(0, 3, 1, 2))
    w = {
        name.removeprefix("vision_encoder."): tensor.numpy()
        for name, tensor in theirs.state_dict().items()
    }
    ours = {
        "patch_embedding": patches(w, "patch_embed.projection"),
        "position_embedding": w["pos_embed"][0],
        "blocks": stack(
            [
                {
                    "norm1": norm(w, f"layers.{i}.layer_norm1"),
                    "attention": {
                        "qkv": dense(w, f"layers.{i}.attn.qkv"),
                        "out": dense(w, f"layers.{i}.attn.proj"),
                    },
                    "norm2": norm(w, f"layers.{i}.layer_norm2"),
                    "mlp": {f"fc{j}": dense(w, f"layers.{i}.mlp.lin{j}") for j in (1, 2)},
                }
                for i in range(4)
            ]
        ),
        **{
            f"relative_{kind}": {
                axis: np.stack([w[f"layers.{i}.attn.rel_pos_{axis[0]}"] for i in layers])
                for axis in ("height", "width")
            }
            for kind, layers in (("window", (0, 2)), ("global", (1, 3)))
        },
        "neck": params()["neck"],
        "neck_norm": params()["neck_norm"],
    }
    out = run(ours, 25, 25, 25)
    expected = seen["x"].numpy()
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(to_raster(out.features[-1]), expected, atol=tolerance)


@pytest.mark.torch
def test_neck_equals_torch():
    """1×1 convolution, norm over channels, pixel_unshuffle."""
    torch = pytest.importorskip("torch")
    out = run(params(), 25, 25, 25)
    x = torch.from_numpy(to_raster(out.features[-1]).copy())
    x = x @ torch.from_numpy(params()["neck"]["kernel"])
    scale, bias = (torch.from_numpy(params()["neck_norm"][name]) for name in ("scale", "bias"))
    x = torch.nn.functional.layer_norm(x, (5,), scale, bias, eps=1e-6)
    x = torch.nn.functional.pixel_unshuffle(x.permute(0, 3, 1, 2), 2)
    np.testing.assert_allclose(out.x, x.flatten(2).transpose(1, 2).numpy(), atol=1e-5)


def places(patch_index):
    """Rows and columns of the tokens of groups, float[4N] each."""
    row, column = np.divmod(patch_index, CONFIG.grid)
    row = 2 * row[:, None] + np.array([0, 0, 1, 1])
    column = 2 * column[:, None] + np.array([0, 1, 0, 1])
    return row.reshape(-1), column.reshape(-1)


def naive_block(index, x, patch_index):
    """One block over the squares float[N, 4E] at `patch_index`, every pair of tokens written out:
    what comes out, and the attention that each square receives, a mean over its tokens."""
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params())
    p = jax.tree.map(lambda leaf: leaf[index], leaves["blocks"]["stack"])
    row, column = places(patch_index)
    num_tokens = len(row)
    x = x.reshape(num_tokens, -1)

    def normed(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    is_global = index in CONFIG.global_blocks
    y = normed(x, p["norm1"])
    if not is_global and len(patch_index) == CONFIG.num_tokens:
        more_rows, more_columns = np.divmod(np.arange(144), 12)
        outside = (more_rows >= 10) | (more_columns >= 10)
        row = np.concatenate([row, more_rows[outside]])
        column = np.concatenate([column, more_columns[outside]])
        y = np.concatenate([y, np.zeros((outside.sum(), y.shape[1]))])
    qkv = linear(y, p["attention"]["qkv"])
    q, k, v = qkv.reshape(len(y), 3, 2, -1).transpose(1, 2, 0, 3)
    windows = np.zeros(len(y)) if is_global else row // 4 * 10 + column // 4
    near = windows[:num_tokens, None] == windows
    kind, side = ("relative_global", 10) if is_global else ("relative_window", 4)
    q = q[:, :num_tokens]
    logits = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5
    for axis, place in (("height", row), ("width", column)):
        table = leaves[kind][axis][index // 2]
        distance = np.clip(place[:num_tokens, None] - place + side - 1, 0, 2 * side - 2)
        logits += np.einsum("htd,tsd->hts", q, table[distance])
    weight = np.where(near, np.exp(logits - logits.max()), 0)
    weight /= weight.sum(-1, keepdims=True)
    x = x + linear((weight @ v).swapaxes(0, 1).reshape(x.shape), p["attention"]["out"])
    hidden = linear(normed(x, p["norm2"]), p["mlp"]["fc1"])
    x = x + linear(np.asarray(jax.nn.gelu(hidden, approximate=False)), p["mlp"]["fc2"])
    # Windows hold unequal numbers, so a window's mean is over its own queries.
    received = (weight.mean(0).sum(0) / near.sum(0))[:num_tokens]
    return x.reshape(len(patch_index), -1), received.reshape(-1, 4).mean(-1)


@pytest.mark.parametrize("keep", [25, 18])
def test_blocks(keep):
    """Relative positions of the original places, and the edge windows: padded while all tokens
    are there, of unequal quotas and without padding after a step."""
    out = run(params(), keep, keep, keep, method="mean_token")
    for image in range(2):
        patch_index = np.asarray(out.kept[0])[image]
        x = np.asarray(out.features[0], np.float64)[image]
        for boundary, blocks in ((1, (1, 2)), (2, (3,))):
            for block in blocks:
                x, _ = naive_block(block, x, patch_index)
            theirs = np.asarray(out.features[boundary])[image]
            np.testing.assert_allclose(theirs, x, atol=1e-3 * np.abs(x).max())


@pytest.mark.parametrize(
    ("keeps", "blocks"),
    [((25, 9, 9), (1, 2)), ((20, 9, 9), (1, 2)), ((20, 20, 9), (3,))],
)
def test_attention_received(keeps, blocks):
    out = run(params(), *keeps)
    before = keeps.index(9) - 1
    for image in range(2):
        patch_index = np.asarray(out.kept[before])[image]
        x = np.asarray(out.features[before], np.float64)[image]
        for block in blocks:
            x, received = naive_block(block, x, patch_index)
        window = patch_index // 5 // 2 * 3 + patch_index % 5 // 2
        kept = np.asarray(out.patch_index)[image]
        for w in range(9):
            inside = patch_index[window == w]
            best = inside[np.argsort(-received[window == w], kind="stable")]
            chosen = kept[np.isin(kept, inside)]
            np.testing.assert_array_equal(chosen, np.sort(best[: len(chosen)]))


def test_padding_of_the_edge_windows():
    """Real places first, in the order of the tokens; every place of a window once."""
    row, column = padded_windows(5, 2)
    order, sizes = window_order(5, 2)
    at = 0
    for w, size in enumerate(sizes):
        places = list(zip(row[w] % 2, column[w] % 2, strict=True))
        assert sorted(places) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        np.testing.assert_array_equal(row[w][:size] * 5 + column[w][:size], order[at : at + size])
        assert ((row[w][size:] >= 5) | (column[w][size:] >= 5)).all()
        at += size


def test_relative_positions_by_hand():
    """Relative positions meet the queries before the scale 1/√d."""
    layout = WindowLayout(
        row=np.array([[0, 1]]),
        column=np.array([[0, 0]]),
        real=np.ones((1, 2), bool),
        seen=None,
        sizes=(2,),
        side=2,
    )
    q, k = (np.full((1, 1, 2, 1, 4), value, np.float32) for value in (3.0, 5.0))
    heights = np.repeat(np.arange(3, dtype=np.float32)[:, None], 4, axis=1)
    relative = {"height": heights, "width": np.zeros((3, 4), np.float32)}
    join = jax.jit(functools.partial(join_relative_positions, layout=layout, relative=relative))
    logits = np.einsum("iwshd,iwthd->st", *join(q, k))
    # q·k / √d = 4 · 3 · 5 / 2; row − row + 1 picks the entry, 4 · 3 times it.
    np.testing.assert_allclose(logits, 30 + 12 * np.array([[1, 0], [2, 1]]))


def test_bad_sizes():
    with pytest.raises(ValueError, match="image_size: expected a multiple of 2 · patch_size 32"):
        SamConfig(image_size=1008)
    with pytest.raises(ValueError, match="window: expected a multiple of a square's side, 2"):
        SamConfig(window=7)
    with pytest.raises(ValueError, match="block_width: expected a multiple of num_heads 15"):
        SamConfig(num_heads=15)
    with pytest.raises(ValueError, match="global_blocks: expected numbers from 0 to 11"):
        SamConfig(depth=12)
