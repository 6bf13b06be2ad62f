"""EVA-02's tensors, under the names of EVA's detector."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np

from meteor_jax.models import conversion as cv
from meteor_jax.models.encoders.eva02.model import Eva02Config, rope_freqs

FORMATS = {
    "eva02": cv.Format(
        part="eva02",
        mark=r"(model\.)?(backbone\.net\.)?blocks\.\d+\.attn\.q_bias",
        renames=(
            (
                r"(?:model\.)?(?:backbone\.net\.)?(pos_embed|(?:patch_embed|rope_win)\..*|"
                r"blocks\.\d+\.(?!attn\.rope\.).*)",
                r"\1",
            ),
        ),
        ignored=(
            # The detector's images are larger than EAGLE's, so its grid is another.
            (r".*\brope_glb\..*", "rotary table of the detector's grid"),
            (r".*\bblocks\.\d+\.attn\.rope\..*", "copy of a rotary table"),
            (r"(?!(model\.)?backbone\.net\.).*", "detector around the backbone"),
        ),
    ),
}


def table(config: Eva02Config) -> cv.Table:
    """EVA-02. Its rotary tables are stored once, and again in every block."""
    block = [
        *cv.norm("norm1", "norm1"),
        *cv.linear("attn.q_proj", "attention/query", bias=False),
        cv.Rule("attn.q_bias", "attention/query/bias"),
        *cv.linear("attn.k_proj", "attention/key", bias=False),
        *cv.linear("attn.v_proj", "attention/value", bias=False),
        cv.Rule("attn.v_bias", "attention/value/bias"),
        *cv.linear("attn.proj", "attention/out"),
        *cv.norm("norm2", "norm2"),
        *cv.linear("mlp.w1", "mlp/gate"),
        *cv.linear("mlp.w2", "mlp/up"),
        *cv.norm("mlp.ffn_ln", "mlp/norm"),
        *cv.linear("mlp.w3", "mlp/out"),
    ]
    rules = [
        cv.Rule("pos_embed", "position_embedding", cv.BATCH_OF_ONE),
        *cv.convolution("patch_embed.proj", "patch_embedding", patch=config.patch_size),
        *cv.stacked(block, source="blocks.{i}", layers=range(config.depth)),
    ]
    for theirs, ours in (("rope_win", "window"), ("rope_glb", "global")):
        is_global = ours == "global"
        users = [i for i in range(config.depth) if (i in config.global_blocks) == is_global]
        for wave in ("cos", "sin"):
            rules.append(
                cv.Rule(
                    f"{theirs}.freqs_{wave}",
                    f"tables/{ours}_{wave}",
                    fallbacks=tuple(f"blocks.{i}.attn.rope.freqs_{wave}" for i in users),
                    compute=functools.partial(_rotary_table, config=config, name=f"{ours}_{wave}"),
                )
            )
    copies = cv.Unused(r"blocks\.\d+\.attn\.rope\.freqs_(cos|sin)", "copy of a rotary table")
    return cv.Table(tuple(rules), (copies,))


def _rotary_table(dtype: np.dtype, *, config: Eva02Config, name: str) -> np.ndarray:
    """Rounded to bfloat16, as in the checkpoints that hold it, unless the weights are wider."""
    table = np.asarray(rope_freqs(config)[name])
    return table if dtype.itemsize > 2 else table.astype(jnp.bfloat16)


def sizes(found: cv.Shapes) -> cv.Fields:
    width, patch = (found.size("patch_embed.proj.weight", axis) for axis in (0, 2))
    positions = found.size("pos_embed", 1)
    copies = r"blocks\.\d+\.attn\.rope\.freqs_cos"
    head_dim = found.size("rope_win.freqs_cos", 1) or found.first(copies, 1)
    window = found.size("rope_win.freqs_cos") or min(found.sizes(copies), default=None)
    grid = found.size("rope_glb.freqs_cos") or max(found.sizes(copies), default=None)
    numbered = copies.replace(r"\d+", r"(\d+)")
    whole = found.where(numbered, lambda shape: shape[0] == grid != window)
    return {
        "image_size": patch and grid and patch * math.isqrt(grid),
        "patch_size": patch,
        "width": width,
        "depth": found.count(r"blocks\.(\d+)\.(?:attn|norm|mlp)"),
        "num_heads": width // head_dim if width and head_dim else cv.heads(width),
        "mlp_dim": found.first(r"blocks\.\d+\.mlp\.w1\.weight"),
        "window": window and math.isqrt(window),
        "global_every": whole[0] + 1 if whole else None,
        "position_side": positions and math.isqrt(positions - 1),
    }


CONVERSION = cv.PartConversion(formats=FORMATS, table=table, sizes=sizes)
