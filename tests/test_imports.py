"""Rooms may import only the rooms before them, and models never torch."""

import ast
from pathlib import Path

import pytest

import meteor_jax

ROOT = Path(meteor_jax.__file__).parent
ORDER = [
    ("types", "config", "chips"),
    ("pruning",),
    ("models",),
    ("parallel", "distributed", "checkpoint", "data", "convert"),
    ("training", "inference"),
    ("evaluation",),
    ("tools",),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path, *, inside_functions: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_before_it(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = imported(path)
    # Only reading .bin and .pth files, and the comparison with it, need torch: the functions that
    # do it ask for it.
    lazy = parts[0] == "convert" or parts == ("tools", "bench_torch")
    looked_at = imported(path, inside_functions=False) if lazy else names
    if parts != ("tools", "bench_torch_models"):  # PyTorch's side of the comparison
        assert not any(name.split(".")[0] in ("torch", "tensorflow") for name in looked_at)
    if parts == ("__init__",):
        return
    for name in names - {"meteor_jax.__version__"}:
        if name.startswith("meteor_jax."):
            room = name.split(".")[1]
            assert room == parts[0] or RANK[room] <= RANK[parts[0]], f"{path.name} imports {name}"


def test_every_room_is_in_the_order():
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES} - {"__init__"}
    assert rooms == set(RANK) & rooms
