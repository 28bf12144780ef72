"""No number of the library depends on torch's default dtype or device: constants take both from their inputs."""

from __future__ import annotations

import ast
from pathlib import Path

import lipbounds


LIBRARY = Path(lipbounds.__file__).parent
MODELS = LIBRARY / "models"  # networks to be trained are made in the default dtype, as every torch.nn.Module
KIT = LIBRARY / "testing"  # draws its blocks on the CPU, by construction
INTEGERS = {"arange", "randint", "randperm", "triu_indices", "tril_indices"}  # of integers unless asked otherwise
FACTORIES = INTEGERS | {
    "tensor", "as_tensor", "asarray", "scalar_tensor", "zeros", "ones", "full", "empty", "eye", "linspace", "logspace",
    "rand", "randn", "normal", "range", "hann_window",
}  # fmt: skip


def _lacking(source: str, where: set[str]) -> list[str]:
    """The calls of `torch.NAME` that make a tensor and do not say of which dtype, or where."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        given = {keyword.arg for keyword in node.keywords}
        needed = {"device"} if node.func.attr in INTEGERS else {"dtype", "device"}
        missing = needed & where - given
        if missing:
            found.append(f"line {node.lineno}: torch.{node.func.attr} without {' and '.join(sorted(missing))}")
    return found


def test_every_constant_says_its_dtype_and_device() -> None:
    files = [path for path in LIBRARY.rglob("*.py") if MODELS not in path.parents]
    found: list[str] = []
    for path in files:
        where = {"dtype"} if KIT in path.parents else {"dtype", "device"}
        found += [f"{path.relative_to(LIBRARY)}: {line}" for line in _lacking(path.read_text("utf-8"), where)]
    assert len(files) > 100
    assert not found, "\n".join(found)


def test_a_constant_without_dtype_is_found() -> None:
    both = {"dtype", "device"}
    assert _lacking("torch.tensor(float(n)).double()", both) == ["line 1: torch.tensor without device and dtype"]
    assert _lacking("torch.arange(n)", both) == ["line 1: torch.arange without device"]
    assert not _lacking("torch.eye(n, dtype=x.dtype, device=x.device); torch.zeros_like(x); x.new_zeros(3)", both)
