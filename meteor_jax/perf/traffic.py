"""What a device moves in one run of a compiled program: to and from memory, and to others.

XLA's own cost analysis counts the body of a loop once; here it counts once per trip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from meteor_jax.perf.hlo import (
    Computation,
    Instruction,
    Module,
    parse,
    replica_groups,
    trip_counts,
)

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Instructions that name, pair or wait for buffers and move nothing themselves.
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "iota",
    "add-dependency",
    "domain",
)
SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective, summed over the trips of all loops; bytes are a device's.

    Attributes:
        count: how often one is started.
        result_bytes: of its results.
        sent_bytes: what a ring sends: n − 1 of n parts, twice for an all-reduce.
        network_bytes: of `sent_bytes`, what goes to other slices.
    """

    count: float = 0.0
    result_bytes: float = 0.0
    sent_bytes: float = 0.0
    network_bytes: float = 0.0

    def __add__(self, other: Collective) -> Collective:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Collective(*(a + b for a, b in pairs))

    def times(self, trips: float) -> Collective:
        return Collective(*(trips * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves.

    Attributes:
        hbm_bytes: read and written by fusions and the like, loops unrolled; of a conditional's
            branches the one that moves most. Arrays that XLA placed on the chip are free.
        collectives: by kind, those of `COLLECTIVES` that occur.
        unknown_loops: loops whose trip count cannot be read off, counted as one trip.
    """

    hbm_bytes: float = 0.0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        none, both = Collective(), (self.collectives, other.collectives)
        return Traffic(
            self.hbm_bytes + other.hbm_bytes,
            {
                kind: both[0].get(kind, none) + both[1].get(kind, none)
                for kind in COLLECTIVES
                if kind in both[0] or kind in both[1]
            },
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, trips: float) -> Traffic:
        collectives = {kind: moved.times(trips) for kind, moved in self.collectives.items()}
        return Traffic(trips * self.hbm_bytes, collectives, self.unknown_loops)

    @property
    def link_bytes(self) -> float:
        """Sent within the slice."""
        return sum(c.sent_bytes - c.network_bytes for c in self.collectives.values())

    @property
    def network_bytes(self) -> float:
        """Sent to other slices."""
        return sum(c.network_bytes for c in self.collectives.values())


def read_traffic(text: str, *, slice_size: int | None = None) -> Traffic:
    """The traffic of a compiled program.

    Args:
        text: `compiled.as_text()`.
        slice_size: devices of a slice, where there is more than one slice.

    Raises:
        ValueError: if the text is not that of a compiled program.
    """
    module = parse(text)
    return _Reader(module, slice_size=slice_size).traffic(module.entry)


class _Reader:
    """Adds up computations, each once."""

    def __init__(self, module: Module, *, slice_size: int | None) -> None:
        self._module = module
        self._slice_size = slice_size
        self._known: dict[str, Traffic] = {}

    def traffic(self, name: str) -> Traffic:
        if name not in self._known:
            where = self._module.computations[name]
            parts = (self._instruction(it, where) for it in where.instructions.values())
            self._known[name] = sum(parts, Traffic())
        return self._known[name]

    def _instruction(self, it: Instruction, where: Computation) -> Traffic:
        opcode = it.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return Traffic()
        if opcode == "while":
            body, trips = self.traffic(it.called("body")[0]), trip_counts(it, where, self._module)
            return body + Traffic(unknown_loops=1) if trips is None else body.times(trips)
        if opcode == "conditional":
            names = it.called("branch_computations")
            names += it.called("true_computation") + it.called("false_computation")
            return max(map(self.traffic, names), key=lambda traffic: traffic.hbm_bytes)
        if opcode in ("call", "async-start"):
            names = it.called("to_apply") + it.called("calls")
            return sum(map(self.traffic, names), Traffic())
        if opcode == "fusion":
            moved = Traffic(fusion_bytes(it, where, self._module))
            return moved + self._collectives_inside(it.called("calls")[0])
        return Traffic(plain_bytes(it, where)) + self._collective(it, where)

    def _collectives_inside(self, name: str) -> Traffic:
        """Of a fusion. One that is begun in a fusion stands once more in that which ends it."""
        inside, total = self._module.computations[name], Traffic()
        ended = {
            operand
            for it in inside.instructions.values()
            if "AsyncCollectiveDone" in it.attributes
            for operand in it.operands
        }
        for it in inside.instructions.values():
            if it.opcode == "fusion":
                total += self._collectives_inside(it.called("calls")[0])
            elif it.name not in ended:
                total += self._collective(it, inside)
        return total

    def _collective(self, it: Instruction, where: Computation) -> Traffic:
        kind = it.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return Traffic()
        known = where.instructions
        given = sum(known[name].num_bytes for name in it.operands if name in known)
        groups = replica_groups(it.attributes)
        size = len(groups[0]) if groups else 1
        share = (size - 1) / size
        result = {"all-gather": given * size, "reduce-scatter": given / size}.get(kind, given)
        sent = {
            "all-gather": (size - 1) * given,
            "reduce-scatter": share * given,
            "all-reduce": 2 * share * given,
            "all-to-all": share * given,
            "collective-permute": given,
        }[kind]
        crosses = self._slice_size is not None and any(
            len({device // self._slice_size for device in group}) > 1 for group in groups
        )
        moved = Collective(1, result, sent, sent if crosses else 0.0)
        return Traffic(collectives={kind: moved})


def plain_bytes(it: Instruction, where: Computation) -> float:
    """HBM traffic of an instruction outside a fusion."""
    if it.opcode in SLICES:
        return 2 * it.hbm_bytes
    if it.opcode == "dynamic-update-slice":
        return 2 * where.bytes_of(it.operands[1:2])
    read = where.bytes_of(it.operands)
    if it.opcode.endswith("-start"):  # its result repeats its operands
        return max(it.hbm_bytes, read)
    return read + it.hbm_bytes


def fusion_bytes(it: Instruction, where: Computation, module: Module) -> float:
    """Reads of each operand what is looked at, and writes of each result what is new."""
    inside = module.computations[it.called("calls")[0]]
    read = sum(
        min(where.bytes_of((name,)), _bytes_read(inside, place, module))
        for place, name in enumerate(it.operands)
    )
    root = inside.root
    parts = [root] if root.opcode != "tuple" else [inside.instructions[n] for n in root.operands]
    if len(parts) != len(it.arrays):
        return read + it.hbm_bytes
    written = (
        min(array.num_bytes, _bytes_written(part, inside)) if array.in_hbm else 0.0
        for array, part in zip(it.arrays, parts, strict=True)
    )
    return read + sum(written)


def _bytes_read(inside: Computation, place: int, module: Module) -> float:
    """Of a fusion's parameter: the slices taken of it, or all."""
    parameter = next(
        it
        for it in inside.instructions.values()
        if it.opcode == "parameter" and it.operands == (str(place),)
    )
    total, waiting = 0.0, [parameter]
    while waiting:
        for user, at in inside.users.get(waiting.pop().name, ()):
            if user.opcode in ("bitcast", "reshape"):
                waiting.append(user)
            elif user.opcode in SLICES and at == 0:
                total += user.num_bytes
            elif user.opcode == "fusion":
                total += _bytes_read(module.computations[user.called("calls")[0]], at, module)
            elif user.opcode != "dynamic-update-slice" or at != 0:
                return parameter.num_bytes
    return min(total, parameter.num_bytes)


def _bytes_written(part: Instruction, inside: Computation) -> float:
    """Of one result of a fusion: an update in place writes the update alone."""
    while part.opcode in ("bitcast", "reshape"):
        part = inside.instructions[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return inside.instructions[part.operands[1]].num_bytes
    return part.num_bytes
