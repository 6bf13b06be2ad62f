"""Named plans: METEOR, its controls and its competitors, and how a command line names them.

A baseline is a plan and nothing else; the code that runs it is METEOR's.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meteor_jax.config import ConfigError, suggest
from meteor_jax.pruning.plan import DecodePlan, EncodePlan, FusePlan, PrunePlan, override


def full() -> PrunePlan:
    """Nothing is pruned."""
    return PrunePlan(name="full")


def meteor(
    *,
    fuse: int,
    encode: tuple[int, int, int] | None = None,
    layers: tuple[int, ...] = (),
    keep: tuple[int, ...] = (),
) -> PrunePlan:
    """METEOR's three stages; without `encode` not the first, without `layers` not the third."""
    return PrunePlan(
        name="meteor",
        encode=EncodePlan(keep=encode) if encode else None,
        fuse=FusePlan(keep=fuse),
        decode=DecodePlan(layers=layers, keep=keep) if layers else None,
    )


def random(*, keep: int, seed: int = 0) -> PrunePlan:
    """`keep` tokens drawn by chance at fusion."""
    return PrunePlan(name="random", fuse=FusePlan(keep=keep, criterion="random", seed=seed))


def uniform(*, keep: int) -> PrunePlan:
    """Every n-th token at fusion."""
    return PrunePlan(name="uniform", fuse=FusePlan(keep=keep, criterion="uniform"))


def pool(*, keep: int) -> PrunePlan:
    """Each encoder's grid averaged down to at most `keep` cells over all."""
    return PrunePlan(name="pool", fuse=FusePlan(keep=keep, criterion="pool"))


def independent(*, keep: int) -> PrunePlan:
    """Each encoder drops its own redundant tokens, without looking at the others."""
    return PrunePlan(name="independent", fuse=FusePlan(keep=keep, criterion="independent"))


def fastv(*, layer: int = 2, keep: int) -> PrunePlan:
    """FastV (ECCV 2024): before `layer`, by the last prompt token's attention one layer earlier,
    mean over heads; positions stay."""
    return PrunePlan(
        name="fastv",
        decode=DecodePlan(layers=(layer,), keep=(keep,), budget="fixed", queries="last", heads=0),
    )


def pyramiddrop(*, layers: tuple[int, ...], keep: tuple[int, ...]) -> PrunePlan:
    """PyramidDrop (CVPR 2025): several cuts, ranked with the next layer's queries and keys of
    the last prompt token, mean over heads; positions are numbered anew."""
    return PrunePlan(
        name="pyramiddrop",
        decode=DecodePlan(
            layers=layers,
            keep=keep,
            budget="fixed",
            queries="last",
            heads=0,
            score_layer="next",
            positions="contiguous",
        ),
    )


def sparsevlm(*, layers: tuple[int, ...], keep: tuple[int, ...], recycle: float = 0.3) -> PrunePlan:
    """SparseVLM (ICML 2025): several cuts, by the attention of the text that the image speaks of,
    one layer earlier, mean over heads; the best of what is dropped lives on in averages; positions
    are numbered anew. Its layers 2, 6 and 15 of 32, after which it cuts, are our 3, 7 and 16.

    Our reading: budgets are fixed, as in its public code, where the paper adapts them to the rank
    of the attention; the averages count among `keep`, where that code adds them; and they stand
    where their centres stood, not behind all others.
    """
    return PrunePlan(
        name="sparsevlm",
        decode=DecodePlan(
            layers=layers,
            keep=keep,
            budget="fixed",
            queries="raters",
            heads=0,
            positions="contiguous",
            recycle=recycle,
        ),
    )


def visionzip(*, keep: int, merged: float = 10 / 64) -> PrunePlan:
    """VisionZip (CVPR 2025): at each encoder's output, before its projector, the tokens that are
    looked at most stay, and a share of `keep` averages the rest; 10 of 64 as in the paper.

    Our reading, for several encoders without a CLS token: each keeps its share of `keep`, by how
    many tokens it has; attention received from all tokens in the last block stands for that of the
    CLS token (ConvNeXt: least like the mean token); likeness is the cosine of features, not of
    keys; and tokens stay in raster order. Needs post-projection fusion.
    """
    return PrunePlan(
        name="visionzip",
        encode=EncodePlan(keep=(0, 0, keep), assignment="tokens", merged=merged),
    )


def divprune(*, keep: int) -> PrunePlan:
    """DivPrune (CVPR 2025): of the tokens that enter the LLM, those farthest from one another,
    chosen greedily. Our reading: over the tokens of all encoders at once."""
    return PrunePlan(name="divprune", fuse=FusePlan(keep=keep, criterion="max_min"))


def dart(*, layer: int = 2, keep: int, pivots: tuple[int, int] = (4, 4)) -> PrunePlan:
    """DART (EMNLP 2025): before `layer`, the tokens least like a few pivots, visual and text, that
    have the largest keys one layer earlier; positions stay. Our reading: states are compared
    without the LLM's last norm, and pivots that get one token more than others are the first."""
    return PrunePlan(
        name="dart",
        decode=DecodePlan(
            layers=(layer,), keep=(keep,), budget="fixed", criterion="pivots", pivots=pivots
        ),
    )


def only(*, encoders: tuple[str, ...] | str) -> PrunePlan:
    """Some encoders alone, nothing pruned: the rival that drops an encoder."""
    encoders = (encoders,) if isinstance(encoders, str) else tuple(encoders)
    return PrunePlan(name="only_" + "_".join(encoders), encoders=encoders)


PRESETS: dict[str, Callable[..., PrunePlan]] = {
    function.__name__: function
    for function in (
        full,
        meteor,
        random,
        uniform,
        pool,
        independent,
        fastv,
        pyramiddrop,
        sparsevlm,
        visionzip,
        divprune,
        dart,
        only,
    )
}


def parse_plan(text: str, *, library: Mapping[str, str] | None = None) -> PrunePlan:
    """The plan that `text` names.

    `text` is a JSON file's path, or a name with optional arguments: `full`,
    `fastv(layer=2, keep=256)`, `meteor(decode.heads=0)`. A name is looked up in `library` (a
    config's `plans`: name → text) first and then among the presets. Arguments of a library plan
    replace its fields, by dotted name; those of a preset are its parameters, or dotted fields.

    Raises:
        ConfigError: one line that says what is wrong and what would be right.
    """
    library = dict(library or {})
    text = text.strip()
    if text.endswith(".json"):
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"plan file {text} does not exist.")
        return PrunePlan.from_json(path.read_text(), where=text)
    match = re.fullmatch(r"([A-Za-z_]\w*)\s*(?:\((.*)\))?", text, flags=re.DOTALL)
    if not match:
        raise ConfigError(f"plan '{text}': expected a name, name(field=value, …) or a .json file.")
    name, arguments = match[1], _arguments(match[2] or "", text)
    if name in library:
        rest = {key: value for key, value in library.items() if key != name}
        plan = override(parse_plan(library[name], library=rest), name=name)
        return override(plan, **{"name": text.replace(" ", "")} | arguments) if arguments else plan
    if name not in PRESETS:
        raise ConfigError(f"no plan '{name}'.{suggest(name, [*library, *PRESETS])}")
    dotted = {key: value for key, value in arguments.items() if "." in key or key == "positions"}
    direct = {key: value for key, value in arguments.items() if key not in dotted}
    parameters = inspect.signature(PRESETS[name]).parameters
    for key in direct:
        if key not in parameters:
            raise ConfigError(f"plan '{text}': no argument '{key}'.{suggest(key, parameters)}")
    required = [key for key, value in parameters.items() if value.default is value.empty]
    missing = [key for key in required if key not in direct]
    if missing:
        raise ConfigError(
            f"plan '{text}': missing {', '.join(missing)}; write {name}"
            f"({', '.join(f'{key}=…' for key in required)})."
        )
    try:
        return override(PRESETS[name](**direct), **dotted)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"plan '{text}': {error}") from error


def split_plans(text: str) -> list[str]:
    """Plans separated by commas; commas within parentheses belong to a plan."""
    return [part.strip() for part in _split(text)]


def _split(text: str) -> list[str]:
    """Splits at commas outside of parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _arguments(text: str, plan: str) -> dict[str, Any]:
    """`layer=2, decode.heads=0, keep=(1, 2)` as a dict; values are Python literals or words."""
    arguments = {}
    for part in _split(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
            raise ConfigError(f"plan '{plan}': expected field=value, got '{part}'.")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments
