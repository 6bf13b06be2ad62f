"""Compiled programs as XLA prints them: computations, instructions, loops and device groups."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
COPIES = ("copy", "bitcast", "copy-start", "copy-done")
HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r"\s*([\w\-]+)\(")
PARENTHESIS = re.compile(r"[()]")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result: its bytes, and whether it is in HBM."""

    num_bytes: float
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        operands: names in the same computation; of a parameter its number, of a constant its value.
        attributes: what stands behind the operands, without metadata.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> float:
        return sum(array.num_bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> float:
        return sum(array.num_bytes for array in self.arrays if array.in_hbm)

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that `attribute` ("body", "calls", …) lists."""
        found = re.search(attribute + r"=(\{[^}]*\}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(it for it in self.instructions.values() if it.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """By name, the instructions that take it, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for it in self.instructions.values():
            for place, name in enumerate(it.operands):
                users.setdefault(name, []).append((it, place))
        return users

    def origin(self, name: str) -> Instruction:
        """The instruction that a value comes from, past copies of it."""
        it = self.instructions[name]
        while it.opcode in COPIES:
            it = self.instructions[it.operands[0]]
        return it

    def bytes_of(self, names: tuple[str, ...]) -> float:
        """What the values called `names` take in HBM."""
        return sum(self.instructions[name].hbm_bytes for name in names if name in self.instructions)


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """A compiled program from its text.

    Raises:
        ValueError: if the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if opened and not line.startswith("HloModule"):
                current = computations[opened[2]] = Computation({})
                entry = opened[2] if opened[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # these end a kernel's metadata
            current = None
        elif instruction := _parse_line(line):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("no HLO module: expected the text of a compiled program, with an ENTRY.")
    return Module(computations, entry)


def _parse_line(line: str) -> Instruction | None:
    head = HEAD.match(line)
    if head is None:
        return None
    start = head.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = OPCODE.match(line, stop)
    if opcode is None:
        return None
    end = _closing(line, opcode.end() - 1)
    inside, attributes = line[opcode.end() : end - 1], line[end:]
    is_literal = opcode[1] in ("parameter", "constant")
    if opcode[1] != "while":  # whose trip count may be in its backend_config
        attributes = re.split(r", (?:metadata|backend_config)=", attributes, maxsplit=1)[0]
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        arrays=tuple(_arrays(line[start:stop])),
        operands=(inside.strip(),) if is_literal else tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=attributes,
        is_root=head[1] is not None,
    )


def _closing(line: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in PARENTHESIS.finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(line)


def _arrays(shape: str) -> Iterator[Array]:
    """The arrays of "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[])"; S(n) is memory on the chip."""
    for kind, sizes, layout in ARRAY.findall(shape):
        bits = ITEM_BITS.get(kind, 8 if kind.startswith("f8") else 0)
        dims = [int(size.lstrip("<=")) for size in sizes.split(",") if size]
        yield Array(math.prod(dims) * bits / 8, in_hbm=re.search(r"S\(\d+\)", layout) is None)


def trip_counts(loop: Instruction, where: Computation, module: Module) -> int | None:
    """Turns of a loop in the computation `where`: as XLA says, or where a counter goes up to a
    constant; else None."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called("condition")[0]]
    if condition.root.opcode != "compare" or "direction=LT" not in condition.root.attributes:
        return None
    counter, limit = (condition.origin(name) for name in condition.root.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    place = int(counter.attributes.partition("index=")[2].partition(",")[0])
    start = where.origin(where.origin(loop.operands[0]).operands[place])
    body = module.computations[loop.called("body")[0]]
    step = body.origin(body.root.operands[place])
    sizes = [
        int(it.operands[0])
        for it in map(body.origin, step.operands if step.opcode == "add" else ())
        if it.opcode == "constant"
    ]
    if start.opcode != "constant" or len(sizes) != 1:
        return None
    return math.ceil((int(limit.operands[0]) - int(start.operands[0])) / sizes[0])


def replica_groups(attributes: str) -> list[list[int]]:
    """The groups of devices of a collective: by axes of a mesh, as an iota, listed, or as a
    permute's pairs; [] where there are none.

    Raises:
        ValueError: for groups in a form that is not known here.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes)
    if mesh:
        order = re.fullmatch(
            r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?", mesh[2].strip()
        )
        if order is None or ":" in mesh[3]:
            raise ValueError(f"replica groups of this form are not read: {mesh[0]}.")
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        ids = _iota(order[1] or str(math.prod(sizes.values())), order[2])
        ids = ids.reshape(list(sizes.values()))
        rest = [axis for axis in range(ids.ndim) if axis not in axes]
        group = math.prod(ids.shape[axis] for axis in axes)
        return ids.transpose(rest + axes).reshape(-1, group).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return _iota(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")]).tolist()
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    groups = re.findall(r"\{([\d,]+)\}", listed[1]) if listed else []
    return [[int(n) for n in group.split(",")] for group in groups]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, … in the shape "2,4", its axes then in the order "1,0"."""
    sizes = [int(size) for size in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids
