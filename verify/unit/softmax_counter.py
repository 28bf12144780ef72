"""Counts the attention maps of a run below torch's own functions, sharing nothing with capture.

At this level few operations are left: whatever a model writes, a product of two tensors is `bmm`, `mm`, `baddbmm`,
`addmm` or `mul`. What is known is kept for each piece of memory, so that views and changes in place need no rules:
whether it was computed from the inputs, whether a product of two such tensors went into it since the last projection
by constants, and whether it is a product of two matrices, neither of them made of a map, of which projections made as
many numbers (scores may be projected, as in talking heads). A softmax over one of these is an attention map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "linear", "_mkl_linear")
SOFTMAXES = ("_softmax", "_safe_softmax", "_log_softmax")
BOTH = ("mul", "dot", "mv", "addcmul")  # of two activations, a product like any other


class SoftmaxCounter(TorchDispatchMode):
    """Counts softmaxes over products of two activations.

    Args:
        inputs: of the model.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._kept: list[Any] = []  # so that no memory is used again
        self._active: set[int] = set()
        self._bilinear: set[int] = set()
        self._scores: set[int] = set()
        self._maps: set[int] = set()
        self._exponentials: dict[int, int] = {}  # and of what; summed, or multiplied as matrices, they are a softmax
        self._exponents: set[int] = set()
        for tensor in inputs:
            self._active.add(self._memory(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [self._memory(tensor) for tensor in _tensors((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")  # in place or not
        active = {memory for memory in given if memory in self._active}
        marks = {"bilinear": self._bilinear, "scores": self._scores, "maps": self._maps}
        found = {mark for mark, marked in marks.items() if not marked.isdisjoint(given)}
        if name in ("sum", *PRODUCTS):
            exponents = {self._exponentials[memory] for memory in given if memory in self._exponentials}
            self.count += len(exponents - self._exponents)  # written twice it is one softmax
            self._exponents |= exponents
        if name in PRODUCTS:
            several = sum(memory in self._active for memory in given) > 1
            found = found - {"bilinear", "maps"} | ({"bilinear"} if several else set())
            if several:
                mixed = not self._maps.isdisjoint(given)
                found = found - {"scores"} | (set() if mixed else {"scores"})
            else:
                found |= set() if self._maps.isdisjoint(given) else {"maps"}
                if result.numel() not in {t.numel() for t in _tensors(args) if self._memory(t) in self._scores}:
                    found.discard("scores")
        elif name in BOTH and sum(memory in self._active for memory in given) > 1:
            found.add("bilinear")
        elif "scaled_dot_product" in name:
            self.count += len(active) > 0
            found = set()
        elif name in SOFTMAXES:
            self.count += bool(found & {"bilinear", "scores"})
            found = {"maps"}
        elif name == "exp" and found & {"bilinear", "scores"}:
            for tensor in _tensors(result):
                self._exponentials[self._memory(tensor)] = given[0]
            found = {"maps"}
        for tensor in _tensors(result):
            memory = self._memory(tensor)
            if active:
                self._active.add(memory)
            for mark in found:
                marks[mark].add(memory)
        return result

    def _memory(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        return storage._cdata


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Tensor) -> int:
    """How many attention maps `model` computes for these inputs.

    Args:
        model: in evaluation.
        *inputs: its inputs.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel that hides what it does
    try:
        with SoftmaxCounter(inputs) as counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.count


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []
