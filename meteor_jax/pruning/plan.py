"""`PrunePlan`: one static description of what is pruned where.

The same object serves training, evaluation, generation, cost counting and ahead-of-time
compilation. It is hashable, so a jitted function takes it as a static argument. Each field marked
"our reading" settles something the METEOR paper (arXiv 2507.20842) leaves open.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

from meteor_jax.config import ConfigError, build
from meteor_jax.pruning.encode_plan import EncodePlan

MAX_TOTALS = 3  # static sizes that a batch is packed into after a cut: each is compiled
SMALL_MARGIN = 1.05  # the smallest total, of the mean of K, where nothing was measured
LONG_ROW = 1.25  # a row of more than this share of the mean of K is rare


@dataclasses.dataclass(frozen=True)
class FusePlan:
    """Stage 2: tokens dropped where the encoders are joined.

    Attributes:
        keep: visual tokens of one image that enter the LLM.
        criterion: "cooperative" (METEOR: least similar to the other encoders' tokens stay),
            "independent" (each encoder drops what is most like its own mean token), "random",
            "uniform" (equal strides), "pool" (cells of each encoder's grid are averaged),
            "max_min" (those farthest from one another stay, DivPrune).
        similarity: S of METEOR's mutual redundancy. "cosine" is the plain reading; but what all
            tokens of an encoder have in common then decides, so that it ranks encoders instead of
            tokens (measured, see the README). "centered_cosine", our reading, takes each
            encoder's mean token away first; "abs_cosine" ignores the sign; "max_cosine" counts
            the most similar token alone instead of the sum over all.
        num_iterations: 1 drops all at once (METEOR as read). With more, each drops its share and R
            is computed again over the tokens left, so that one copy of what two encoders share can
            stay.
        min_share_per_encoder: share of `keep` that every encoder gets (our addition; 0 is METEOR).
        seed: of "random", which also depends on the image, never on its batch.
    """

    keep: int
    criterion: Literal["cooperative", "independent", "random", "uniform", "pool", "max_min"] = (
        "cooperative"
    )
    similarity: Literal["cosine", "centered_cosine", "abs_cosine", "max_cosine"] = "centered_cosine"
    num_iterations: int = 1
    min_share_per_encoder: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"fuse.num_iterations: expected 1 or more, got {self.num_iterations}.")


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Stage 3: visual tokens dropped between layers of the LLM, at inference only.

    Attributes:
        layers: a cut is made before each of these layers.
        keep: visual tokens of one image kept at each cut: exactly (budget "fixed"), or on average
            over the calibration set ("adaptive").
        budget: "adaptive" is METEOR's K = λ · Σ of the visual attention values of the chosen
            heads, one K an example, clipped to [budget_range[0]·keep, budget_range[1]·keep].
        scale: λ of each cut, measured offline.
        budget_range: see `budget`; our reading.
        num_totals: static sizes, at most, that the rows of a batch are packed into together; the
            last holds any K.
        edges: of each cut, (rows, visual tokens of an image that the smaller totals hold, mean
            over so many rows), measured offline; without, a little and a half more than `keep`.
        criterion: "text_attention", the controls "random" and "uniform", or "pivots" (those
            least like a few pivot tokens stay, DART).
        queries: whose attention counts: text "after_image" (METEOR; our reading of which), the
            "last" prompt token (FastV, PyramidDrop), or "raters", of the text after the image
            what is closest to it at the decoder's input (SparseVLM).
        heads: how many heads count, those with the highest visual attention value; 0 means all.
        score_layer: the attention of the layer before the cut ("previous"), or of the one after
            ("next", PyramidDrop).
        rotary: scores from rotated queries and keys ("with"), or from unrotated ones
            ("without"), which do not favour the encoder that comes last.
        positions: kept tokens keep their positions ("original"), or are numbered anew
            ("contiguous", PyramidDrop).
        seed: of "random".
        pivots: how many visual and how many text tokens of a row "pivots" compares with: those
            with the largest keys in the layer before the cut (L1 norm).
        recycle: share of a cut's dropped tokens, the best of them, that are averaged into a tenth
            as many, which count among `keep` (SparseVLM: 0.3); needs a fixed budget.
    """

    layers: tuple[int, ...]
    keep: tuple[int, ...]
    budget: Literal["adaptive", "fixed"] = "adaptive"
    scale: tuple[float, ...] = ()
    budget_range: tuple[float, float] = (0.5, 1.5)
    num_totals: int = 3
    edges: tuple[tuple[tuple[int, tuple[float, ...]], ...], ...] = ()
    criterion: Literal["text_attention", "random", "uniform", "pivots"] = "text_attention"
    queries: Literal["after_image", "last", "raters"] = "after_image"
    heads: int = 8
    score_layer: Literal["previous", "next"] = "previous"
    rotary: Literal["with", "without"] = "with"
    positions: Literal["original", "contiguous"] = "original"
    seed: int = 0
    pivots: tuple[int, int] = (4, 4)
    recycle: float = 0.0

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.keep):
            raise ValueError(
                f"decode: {len(self.layers)} layers but {len(self.keep)} budgets; give one "
                "`keep` a cut."
            )
        if any(later <= earlier for earlier, later in itertools.pairwise(self.layers)):
            raise ValueError(f"decode.layers must increase, got {self.layers}.")
        if not 1 <= self.num_totals <= MAX_TOTALS:
            raise ValueError(
                f"decode.num_totals: expected 1 to {MAX_TOTALS}, got {self.num_totals}."
            )
        low, high = self.budget_range
        if not 0 <= low <= 1 <= high:  # the mean of K must lie between them
            raise ValueError(
                "decode.budget_range: expected a share up to 1 and a multiple from 1 on, got "
                f"{low}, {high}."
            )
        if min(self.pivots) < 0 or not sum(self.pivots):
            raise ValueError(f"decode.pivots: expected one pivot at least, got {self.pivots}.")
        if not 0 <= self.recycle <= 1:
            raise ValueError(f"decode.recycle: expected a share from 0 to 1, got {self.recycle}.")
        if self.recycle and self.budget != "fixed":
            raise ValueError("decode.recycle needs decode.budget='fixed'.")

    def check_measured(self, name: str = "") -> None:
        """Refuses an adaptive budget without its λ; `name` is the plan's, for the message.

        Raises:
            ValueError: if the budget is adaptive and λ was never measured.
        """
        if self.budget == "adaptive" and len(self.scale) != len(self.layers):
            plan, flag = (f"plan '{name}'", f' --plans="{name}"') if name else ("the plan", "")
            raise ValueError(
                f"{plan} is adaptive and needs λ (decode.scale): run `meteor calibrate{flag}` with "
                "the run's --config and --workdir, or set "
                "decode.budget='fixed'."
            )

    def bounds(self, cut: int) -> tuple[int, int]:
        """(K_min, K_max): the fewest and the most visual tokens of an image after a cut."""
        if self.budget == "fixed":
            return self.keep[cut], self.keep[cut]
        low, high = (round(limit * self.keep[cut]) for limit in self.budget_range)
        return max(low, 1), high

    def recycling(self, cut: int, *, available: int) -> tuple[int, int]:
        """(tokens of an image that are recycled, tokens that they become), as SparseVLM counts
        them; `available` tokens reach the cut.

        Raises:
            ValueError: if what they become would fill the whole budget.
        """
        dropped = available - self.keep[cut]
        if not self.recycle or dropped <= 0:
            return 0, 0
        recycled = int(self.recycle * dropped) + 1
        clusters = recycled // 10 + 1
        if clusters >= self.keep[cut]:
            raise ValueError(
                f"decode.recycle={self.recycle} makes {clusters} tokens of {dropped} dropped ones, "
                f"but decode.keep[{cut}]={self.keep[cut]}; keep more or recycle fewer."
            )
        return recycled, clusters

    def cuts_that_drop(self, *, available: int) -> tuple[int, ...]:
        """The cuts that can drop something of the `available` visual tokens of an image."""
        drops = []
        for cut in range(len(self.layers)):
            if self.keep[cut] > available:
                raise ValueError(
                    f"decode.keep[{cut}]={self.keep[cut]} but only {available} visual tokens of an "
                    "image are left there; lower it."
                )
            low, high = self.bounds(cut)
            if low < available:
                drops.append(cut)
            available = min(high, available)
        return tuple(drops)

    def totals(self, cut: int, *, rows: int, available: int) -> tuple[int, ...]:
        """Static numbers of visual tokens, increasing, for `rows` images together, of each of
        which `available` reach the cut. The last holds any K."""
        low, high = (min(bound, available) for bound in self.bounds(cut))
        edges: tuple[float, ...] = ()
        if low < high:
            keep = self.keep[cut]
            edges = (SMALL_MARGIN * keep, (keep + high) / 2)
            if cut < len(self.edges) and self.edges[cut]:
                measured = dict(self.edges[cut])  # fewer rows vary more, so they are safe for more
                edges = measured[max((n for n in measured if n <= rows), default=min(measured))]
        smaller = {math.ceil(rows * edge) for edge in edges[: self.num_totals - 1]}
        return (*sorted(size for size in smaller if rows * low <= size < rows * high), rows * high)

    def cache_lengths(self, cut: int, *, available: int) -> tuple[int, ...]:
        """Visual tokens of an image, increasing, that a cache may be cut to after prefill."""
        low, high = (min(bound, available) for bound in self.bounds(cut))
        usual = round(LONG_ROW * self.keep[cut])
        return (usual, high) if low <= usual < high else (high,)


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """What is pruned: any of METEOR's three stages, or of a baseline's.

    Attributes:
        name: for tables and files.
        encode, fuse, decode: the stages; None leaves a stage out.
        encoders: the only encoders to run; () means all (the ablation "one encoder dropped").
        positions: rotary positions of an image's tokens when stages 1 or 2 dropped some: their
            places among all tokens there would have been ("original"), or 0, 1, 2, …
            ("contiguous").
    """

    name: str = "full"
    encode: EncodePlan | None = None
    fuse: FusePlan | None = None
    decode: DecodePlan | None = None
    encoders: tuple[str, ...] = ()
    positions: Literal["original", "contiguous"] = "original"

    def for_training(self) -> PrunePlan:
        """Stages 1 and 2 alone: stage 3 is for inference."""
        return dataclasses.replace(self, decode=None)

    def calibrated(self, calibration: Calibration) -> PrunePlan:
        """This plan with the ranks and λ that were measured."""
        plan = self
        measured = calibration.ranks.get(str(plan.encode.rank_kind)) if plan.encode else None
        if measured is not None:
            ranks = tuple((name, tuple(rank)) for name, rank in measured.items())
            plan = dataclasses.replace(plan, encode=dataclasses.replace(plan.encode, ranks=ranks))
        scale = calibration.scale_of(plan)
        if scale:
            edges = calibration.edges.get(plan.name, ())
            decode = dataclasses.replace(plan.decode, scale=scale, edges=edges)
            plan = dataclasses.replace(plan, decode=decode)
        return plan

    @property
    def fingerprint(self) -> str:
        """Tells plans apart that differ in more than what is measured, whatever their names."""
        encode, decode = self.encode, self.decode
        bare = dataclasses.replace(
            self,
            name="",
            encode=encode and dataclasses.replace(encode, ranks=()),
            decode=decode and dataclasses.replace(decode, scale=(), edges=()),
        )
        return hashlib.sha256(bare.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str, *, where: str = "plan") -> PrunePlan:
        """Reads `to_json`'s text.

        Raises:
            ConfigError: for an unknown field, a value of the wrong type, or broken JSON.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not valid JSON ({error}).") from error
        return build(PrunePlan, values, where=where)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Numbers measured offline that plans need; kept as `calibration.json` in the workdir.

    Attributes:
        ranks: by kind of rank ("energy 0.99", "effective", "tolerance"; see `ranks.RankKind`) and
            encoder, the rank of its features at each boundary.
        scales: by plan, λ of each cut.
        edges: by plan, `DecodePlan.edges`.
        fingerprints: by plan, that of the plan as λ was measured: an edited one needs its own.
    """

    ranks: dict[str, dict[str, tuple[float, ...]]] = dataclasses.field(default_factory=dict)
    scales: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    edges: dict[str, tuple[tuple[tuple[int, tuple[float, ...]], ...], ...]] = dataclasses.field(
        default_factory=dict
    )
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)

    def scale_of(self, plan: PrunePlan) -> tuple[float, ...]:
        """λ of each cut of `plan`; () where it has no stage 3 or was not measured as it is now."""
        measured = self.fingerprints.get(plan.name, plan.fingerprint)
        if plan.decode is None or measured != plan.fingerprint:
            return ()
        return tuple(self.scales.get(plan.name, ()))

    def with_decode(self, plan: PrunePlan, decode: DecodePlan) -> Calibration:
        """This calibration and what was measured for stage 3 of `plan`: λ and edges."""
        return dataclasses.replace(
            self,
            scales=self.scales | {plan.name: decode.scale},
            edges=self.edges | {plan.name: decode.edges},
            fingerprints=self.fingerprints | {plan.name: plan.fingerprint},
        )

    def save(self, path: Path) -> None:
        """Writes JSON, atomically."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Calibration:
        """Reads what `save` wrote; an absent file is an empty calibration."""
        if not path.is_file():
            return Calibration()
        return build(Calibration, json.loads(path.read_text()), where=str(path))


def override(plan: PrunePlan, **fields: Any) -> PrunePlan:
    """`plan` with fields replaced, nested ones by dotted names such as `decode.heads`.

    Raises:
        ConfigError: for an unknown field, a wrong type, or a field of a stage the plan lacks.
    """
    values = dataclasses.asdict(plan)
    for path, value in fields.items():
        *stages, leaf = path.split(".")
        target = values
        for stage in stages:
            target = target.get(stage)
            if not isinstance(target, dict):
                raise ConfigError(f"plan '{plan.name}' has no stage '{stage}' to set {path} in.")
        target[leaf] = value
    return build(PrunePlan, values, where=f"plan '{plan.name}'")
