"""Files, functions and classes stay short enough to be read at a glance; what is longer says why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
LINES_OF_FILE, LINES_OF_FUNCTION, LINES_OF_CLASS = 330, 60, 150
REASON = "Over 150 lines, because"  # in the docstring of a class
LONGER_FILES = {
    "lipbounds/certify.py": "the certificate with its checks and three methods",
    "lipbounds/compose/joint.py": "one class with the cases of its layers",
    "lipbounds/jasmin.py": "one class that hears of every torch call",
    "lipbounds/kernels/triton_jasmin.py": "kernels that share their loads and masks",
    "lipbounds/targets/_attention_checks.py": "every rule about the fields of a block, each short",
    "lipbounds/targets/attention.py": "one class: fields, forward pass and derivatives of attention",
    "lipbounds/targets/layers.py": "a class for each elementary layer, each short",
}
# A test file is as long as what it tests has properties.
FOLDERS = ("lipbounds", "bench", "verify", "docs", "examples", ".ci")


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def too_long(path: Path, source: str) -> Iterator[str]:
    """What is longer than allowed in a file; docstrings count for a class and not for a function."""
    name = path.relative_to(ROOT).as_posix()
    lines = len(source.splitlines())
    if lines > LINES_OF_FILE and name not in LONGER_FILES and not path.name.startswith(("test_", "capture_zoo")):
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _code_lines(node) > LINES_OF_FUNCTION:
            yield f"{name}: {node.name} has {_code_lines(node)} lines without its docstring"
        if isinstance(node, ast.ClassDef) and REASON not in (ast.get_docstring(node) or ""):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > LINES_OF_CLASS and not path.name.startswith("test_"):
                yield f"{name}: {node.name} has {length} lines, and its docstring does not say '{REASON} ...'"


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function with its signature and without its docstring."""
    first = node.body[0]
    described = isinstance(first, ast.Expr) and ast.get_docstring(node) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if described else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def test_nothing_is_too_long() -> None:
    found = [said for path in sources() for said in too_long(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_files_that_may_be_longer_are() -> None:
    short = [
        name for name in LONGER_FILES if len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= LINES_OF_FILE
    ]
    assert not short, f"take these off the list: {short}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ('def f():\n    """' + "words\n" * 80 + '    """\n' + "    x = 1\n" * 58, None),
        ("class C:\n" + "    x = 1\n" * 150, "C has 151 lines"),
        (f'class C:\n    """One.\n\n    {REASON} it is.\n    """\n' + "    x = 1\n" * 150, None),
        ("x = 1\n" * 331, "331 lines"),
    ],
)
def test_the_rule_tells_long_from_short(source: str, said: str | None) -> None:
    found = "\n".join(too_long(ROOT / "lipbounds" / "made_up.py", source))
    assert found == "" if said is None else said in found
