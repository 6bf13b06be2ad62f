"""Rooms may import only the rooms before them, and models never torch."""

import ast
import re
from pathlib import Path

import pytest

import meteor_jax

ROOT = Path(meteor_jax.__file__).parent
ORDER = [
    ("types", "config", "progress"),
    ("pruning",),
    ("models",),
    ("parallel", "data"),
    ("checkpoint", "convert"),
    ("experiment",),
    ("training", "inference"),
    ("evaluation",),
    ("reports", "perf", "testing"),
    ("cli",),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))
# They import torch where it is asked for: to read .bin and .pth files, and to be compared with.
LAZY_TORCH = ("convert", "perf")


def imported(path: Path, *, inside_functions: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_rooms_import_only_rooms_before_them():
    wrong = []
    for path in FILES:
        room = room_of(path)
        for name in imported(path) - {"meteor_jax.__version__"}:
            if name.startswith("meteor_jax.") and room != "__init__":
                other = name.split(".")[1]
                if other != room and RANK[other] > RANK[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_torch_and_tensorflow_are_imported_only_where_they_are_asked_for():
    for path in FILES:
        lazy = room_of(path) in LAZY_TORCH
        names = imported(path, inside_functions=not lazy)
        if path.name != "torch_models.py":  # PyTorch's side of a comparison
            assert not {name.split(".")[0] for name in names} & {"torch", "tensorflow"}, path


def test_rooms_that_serve_any_family_name_none():
    """A family is reached through `models.family`; benchmarks of EAGLE against itself aside."""
    own = ("adaptive_prefill.py", "torch_comparison.py", "torch_models.py")
    families = re.compile(r"meteor_jax\.models\.(eagle|encoders|decoders)\b")
    rooms = ("experiment", "convert", "training", "inference", "evaluation", "perf")
    named = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if room_of(path) in rooms and path.name not in own
        for name in imported(path)
        if families.match(name)
    ]
    assert not named, "\n".join(named)


def test_every_room_is_in_the_order():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= set(RANK)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=str)
def test_a_room_has_at_most_twelve_files_and_none_is_longer_than_400_lines(folder):
    files = list(folder.glob("*.py"))
    registry = folder.relative_to(ROOT).as_posix() in ("cli", "pruning/methods")
    assert registry or len(files) <= 12, f"{len(files)} files"
    for path in files:
        length = len(path.read_text().splitlines())
        assert length <= 400, f"{path.relative_to(ROOT)} has {length} lines"
