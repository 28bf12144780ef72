"""No module imports one that imports it back, not even in a function or where only the type checker looks."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Set
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PACKAGES = ("lipbounds", "bench", "verify")
# A package that names its public contents for the type checker, and loads them at their first use, is upon these.
NAMES_ITS_CONTENTS = {"lipbounds"}


def modules_of(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of each module below a package, by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    return found


def imported(tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """The modules of `known` that a module imports; of `from package import module`, the module."""
    found = set()
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module is not None:
            for alias in statement.names:
                inner = f"{statement.module}.{alias.name}"
                found.add(inner if inner in known else statement.module)
    return found & set(known)


def circle(modules: dict[str, ast.Module], exempt: Set[str] = frozenset()) -> list[str]:
    """Modules that import each other in a circle, or nothing."""
    graph = {name: imported(tree, modules) - {name} for name, tree in modules.items() if name not in exempt}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    return {name: tree for package in PACKAGES for name, tree in modules_of(ROOT / package).items()}


def test_there_is_no_circle_of_imports(modules: dict[str, ast.Module]) -> None:
    assert circle(modules, NAMES_ITS_CONTENTS) == []


def test_exempt_packages_are_needed(modules: dict[str, ast.Module]) -> None:
    assert circle(modules) != []


@pytest.mark.parametrize("guard", ["", "if TYPE_CHECKING:\n    ", "def f():\n    "])
def test_circles_are_found(guard: str) -> None:
    modules = {"a": "from b import x", "b": "import c", "c": f"{guard}from a import y", "d": "import a"}
    assert set(circle({name: ast.parse(text) for name, text in modules.items()})) == {"a", "b", "c"}
