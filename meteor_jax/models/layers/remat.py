"""Rematerialisation: which of a block's values the backward pass finds saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from meteor_jax.types import Array

# Policies of jax.checkpoint_policies that are complete as they are, and those that take names.
PLAIN = (
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
NAMED = ("save_only_these_names", "save_anything_except_these_names")

# What the blocks name: queries, keys and values as attention takes them; what attention gives; the
# residual stream after it; and the inner layer of the MLP before its nonlinearity.
SavedName = Literal["qkv", "attention", "residual", "mlp"]


def save_as(name: SavedName, x: Array) -> Array:
    """`x`, which policies that take names know by this one."""
    return checkpoint_name(x, name)


def remat_policy(text: str) -> Callable[..., Any] | None:
    """The policy that a config's `remat` names; None for "none", which is no rematerialisation.

    A policy that takes names is given them in parentheses: "save_only_these_names(qkv, mlp)".

    Raises:
        ValueError: for anything else, in one line.
    """
    if text == "none":
        return None
    policy, _, names = text.partition("(")
    if text in PLAIN:
        return getattr(jax.checkpoint_policies, text)
    if policy not in NAMED or not re.fullmatch(r"[\w, ]+\)", names):
        raise ValueError(
            f"expected 'none' or a name in jax.checkpoint_policies out of {', '.join(PLAIN)}, or "
            f"such as '{NAMED[0]}(qkv, mlp)', got '{text}'."
        )
    names = [name.strip() for name in names.removesuffix(")").split(",")]
    unknown = [name for name in names if name not in get_args(SavedName)]
    if unknown:
        raise ValueError(
            f"{policy}: expected names out of {', '.join(get_args(SavedName))}, got '{unknown[0]}'."
        )
    return getattr(jax.checkpoint_policies, policy)(*names)
