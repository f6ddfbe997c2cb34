"""Imports go down only, never sideways on floor 4, no cycles, no file without a noun."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "medlore"
FLOORS = {
    "errors": -1, "extras": 0, "files": 0, "assets": 0,
    "linalg": 1, "weightfiles": 1,
    "ranks": 2,
    "layers": 3,
    "data": 4, "models": 4, "losses": 4, "metrics": 4,
    "runs": 5,
    "training": 6, "inspecting": 6,
    "pages": 7,
    "tuning": 8, "segmenting": 8, "decomposing": 8,
    "studies": 9, "demo": 9,
    "commands": 10, "cli": 11, "__main__": 12,
}  # fmt: skip
MODULES = sorted(SOURCE.rglob("*.py"))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "medlore" and len(parts) > 1 else None


def imports_of(path: Path) -> set[str]:
    """Modules of medlore that a file imports anywhere, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" if node.module == "medlore" else node.module for alias in node.names}
    return {name for name in found if name == "medlore" or name.startswith("medlore.")}


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    room = room_of(module_of(path))
    if room is None:  # the package's own door lists names of every floor and loads them on first use
        return
    assert room in FLOORS, f"{room} has no floor: add it to FLOORS and to the tree in the README"
    for imported in imports_of(path):
        other = room_of(imported)
        if other in (None, room) or other == "__version__":
            continue
        assert FLOORS[other] < FLOORS[room], f"{module_of(path)} (floor {FLOORS[room]}) imports {imported} (floor {FLOORS[other]})"


def test_no_cycles() -> None:
    graph = {module_of(p): set(imports_of(p)) for p in MODULES if p != SOURCE / "__init__.py"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, (*trail, name))
        done.add(name)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_files_are_nouns_of_readable_size(path: Path) -> None:
    assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 430, f"{path.name} does not read in one sitting"


@pytest.mark.parametrize("path", [p for p in MODULES if "linalg" in p.parts], ids=module_of)
def test_ground_floor_needs_torch_numpy_scipy_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    allowed = {
        "torch",
        "numpy",
        "scipy",
        "threadpoolctl",
        "medlore",
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "math",
        "typing",
        "enum",
        "functools",
        "itertools",
    }
    assert roots <= allowed, f"{path.name} imports {sorted(roots - allowed)}"
