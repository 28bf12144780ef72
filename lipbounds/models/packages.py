"""Checkpoints inside installed Python packages: found without importing them, so that none of their code runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from lipbounds.errors import LipboundsError


FINGERPRINT_TOLERANCE = 1e-3  # relative to the largest value: kernels of float32 differ by less, other weights by more


def package_file(package: str, path: str, *, model: str, install: str, what: str = "the weights") -> Path:
    """A file of an installed package.

    Args:
        package: its import name.
        path: of the file or folder inside the package, with slashes.
        model: what the file holds, for the error.
        install: the command that installs the package.
        what: the file holds of it, for the error.

    Raises:
        LipboundsError: the package is not installed, or has no such file.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # of a package that stands half in sys.modules
        spec = None
    if spec is None or spec.origin is None:
        raise LipboundsError(
            f"{what} of {model} must be installed, got no package {package}; run `{install}`, which installs "
            "the files alone."
        )
    found = Path(spec.origin).parent / path
    if not found.exists():
        raise LipboundsError(f"the package {package} must hold {path}, {what} of {model}, got none; run `{install}`.")
    return found


def check_fingerprint(model: str, output: Tensor, expected: tuple[float, ...]) -> None:
    """Compare the first values of an output at a fixed input with the ones that were stored.

    Args:
        model: its name, for the error.
        output: of the model; its last row is looked at.
        expected: the first values of that row.

    Raises:
        LipboundsError: they differ by more than float32 kernels do: the weights or the architecture are others.
    """
    wanted = torch.tensor(expected, dtype=torch.float64, device=output.device)
    got = output.detach().double().reshape(-1, output.shape[-1])[-1, : len(expected)]
    worst = float((got - wanted).abs().max() / wanted.abs().max())
    if not worst <= FINGERPRINT_TOLERANCE:
        raise LipboundsError(
            f"the output of {model} at a fixed input must be the stored one, got values that differ by {worst:.2g} of "
            "the largest: the installed package holds other weights, or transformers builds another network of them. "
            "Install the version of the package that the docs name."
        )
