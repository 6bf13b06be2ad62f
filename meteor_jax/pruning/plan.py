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
from pathlib import Path
from typing import Any, Literal

from meteor_jax.config import ConfigError, build
from meteor_jax.pruning.encode_plan import EncodePlan


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
        rounds: 1 drops all at once (METEOR as read). With more, each drops its share and R is
            counted anew over what is left, so that one copy of what two encoders share can stay.
        floor: share of `keep` that every encoder is sure of (our addition; 0 is METEOR).
        seed: of "random", which also depends on the image, never on its batch.
    """

    keep: int
    criterion: Literal[
        "cooperative", "independent", "random", "uniform", "pool", "max_min"
    ] = "cooperative"
    similarity: Literal["cosine", "centered_cosine", "abs_cosine", "max_cosine"] = "centered_cosine"
    rounds: int = 1
    floor: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"fuse.rounds: expected 1 or more, got {self.rounds}.")


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Stage 3: visual tokens dropped between layers of the LLM, at inference only.

    Attributes:
        layers: a cut is made before each of these layers.
        keep: visual tokens of one image kept at each cut: exactly (budget "fixed"), or on average
            over the calibration set ("adaptive").
        budget: "adaptive" is METEOR's K = λ · Σ of the visual attention values of the chosen
            heads, one K an example, clipped to [limits[0]·keep, limits[1]·keep].
        scale: λ of each cut, measured offline.
        limits: see `budget`; our reading.
        num_buckets: static sizes between K_min and K_max that a batch is packed into.
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
            ("renumber", PyramidDrop).
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
    limits: tuple[float, float] = (0.5, 1.5)
    num_buckets: int = 3
    criterion: Literal["text_attention", "random", "uniform", "pivots"] = "text_attention"
    queries: Literal["after_image", "last", "raters"] = "after_image"
    heads: int = 8
    score_layer: Literal["previous", "next"] = "previous"
    rotary: Literal["with", "without"] = "with"
    positions: Literal["original", "renumber"] = "original"
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
        if self.num_buckets < 1:
            raise ValueError(f"decode.num_buckets: expected 1 or more, got {self.num_buckets}.")
        low, high = self.limits
        if not 0 <= low <= 1 <= high:  # the mean of K must lie between them
            raise ValueError(
                f"decode.limits: expected a share up to 1 and a multiple from 1 on, got {low}, "
                f"{high}."
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
                f"{plan} is adaptive and needs λ (decode.scale): run `python -m "
                f"meteor_jax.tools.calibrate{flag}`, or set decode.budget='fixed'."
            )

    def bounds(self, cut: int) -> tuple[int, int]:
        """(K_min, K_max): the fewest and the most visual tokens of an image after a cut."""
        if self.budget == "fixed":
            return self.keep[cut], self.keep[cut]
        low, high = (round(limit * self.keep[cut]) for limit in self.limits)
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

    def buckets(self, cut: int, *, available: int) -> tuple[int, ...]:
        """Static sizes, increasing, that hold any K of the cut; `available` tokens at most."""
        low, high = (min(bound, available) for bound in self.bounds(cut))
        if low == high or self.num_buckets == 1:
            return (high,)
        steps = self.num_buckets - 1
        return tuple(low + round((high - low) * step / steps) for step in range(steps + 1))


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """What is pruned: any of METEOR's three stages, or of a baseline's.

    Attributes:
        name: for tables and files.
        encode, fuse, decode: the stages; None leaves a stage out.
        encoders: the only encoders to run; () means all (the ablation "one encoder dropped").
        positions: rotary positions of an image's tokens when stages 1 or 2 dropped some: their
            places among all tokens there would have been ("original"), or 0, 1, 2, … ("compact").
    """

    name: str = "full"
    encode: EncodePlan | None = None
    fuse: FusePlan | None = None
    decode: DecodePlan | None = None
    encoders: tuple[str, ...] = ()
    positions: Literal["original", "compact"] = "original"

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
            plan = dataclasses.replace(plan, decode=dataclasses.replace(plan.decode, scale=scale))
        return plan

    @property
    def fingerprint(self) -> str:
        """Tells plans apart that differ in more than what is measured, whatever their names."""
        encode, decode = self.encode, self.decode
        bare = dataclasses.replace(
            self, name="", encode=encode and dataclasses.replace(encode, ranks=()),
            decode=decode and dataclasses.replace(decode, scale=()),
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
        fingerprints: by plan, that of the plan as λ was measured: an edited one needs its own.
    """

    ranks: dict[str, dict[str, tuple[float, ...]]] = dataclasses.field(default_factory=dict)
    scales: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)

    def scale_of(self, plan: PrunePlan) -> tuple[float, ...]:
        """λ of each cut of `plan`; () where it has no stage 3 or was not measured as it is now."""
        measured = self.fingerprints.get(plan.name, plan.fingerprint)
        if plan.decode is None or measured != plan.fingerprint:
            return ()
        return tuple(self.scales.get(plan.name, ()))

    def with_scale(self, plan: PrunePlan, scale: tuple[float, ...]) -> Calibration:
        """This calibration and λ of each cut of `plan`."""
        return dataclasses.replace(
            self, scales=self.scales | {plan.name: scale},
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
