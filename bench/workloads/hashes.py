"""Content hashes of weights and inputs, which the keys of results hold."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor


VERSIONED = ("torch", "transformers")


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Content hash of named tensors: names, shapes, dtypes and bytes.

    Args:
        tensors: such as `model.state_dict().items()`.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def recipe_hash(**recipe: Any) -> str:
    """Content hash of how weights or an input are drawn, with the versions of what draws them.

    The numbers that come out differ between processors in their last bits; the recipe does not.

    Args:
        **recipe: seeds, shapes and whatever else is chosen, ready for JSON.
    """
    return hashlib.sha256(json.dumps({**recipe, **versions()}, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what draws weights and inputs, without what they were built for."""
    return {name: version(name).partition("+")[0] for name in VERSIONED}
