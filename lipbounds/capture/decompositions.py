"""Calls that consist of others, written as these, so that the recorder has few kinds of steps to follow.

Each takes the recorder and the arguments of the call, and returns its result, or NotImplemented for arguments that it
does not take apart: then the call is run as it is.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.provenance import Provenance


Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Runner(Provenance, ABC):
    """The records of a run that is going on, to which further calls can be added."""

    @abstractmethod
    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run and record one part of a call."""

    @abstractmethod
    def add_constant(self, tensor: Tensor) -> None:
        """Take note of a tensor made of parameters outside the run."""


def _bound(names: tuple[str, ...], args: Args, kwargs: Kwargs) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


# -- einsum ---------------------------------------------------------------------------------------------------------


def _einsum(recorder: Runner, args: Args, kwargs: Kwargs) -> Any:
    """As matrix products, from left to right."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = [*operands[0]]
    if kwargs or not isinstance(equation, str) or not all(isinstance(operand, Tensor) for operand in operands):
        return NotImplemented
    terms = _terms(equation, operands)
    if terms is None or len(operands) < 2:
        return NotImplemented
    *sides, output = terms
    left, tensor = sides[0], operands[0]
    for number, (right, other) in enumerate(zip(sides[1:], operands[1:], strict=True), start=2):
        kept = set(output).union(*sides[number:])
        left, tensor = _contracted(recorder, left, tensor, right, other, kept)
    return _moved(recorder, tensor, left, output)


def _terms(equation: str, operands: list[Tensor]) -> list[str] | None:
    """One letter a dimension, of each operand and of the result; None for diagonals and sums over one operand alone."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    sides = inputs.split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    dots = max(
        (len(t.shape) - len(side) + 3 for side, t in zip(sides, operands, strict=False) if "..." in side), default=0
    )
    if len(sides) != len(operands) or dots > len(unused):
        return None
    extra = "".join(unused[:dots])
    full = []
    for side, operand in zip(sides, operands, strict=True):
        count = operand.dim() - len(side) + 3
        full.append(side.replace("...", extra[dots - count :] if count > 0 else ""))
    if not arrow:
        letters = "".join(full)
        output = "..." + "".join(sorted(letter for letter in set(letters) - set(extra) if letters.count(letter) == 1))
    full.append(output.replace("...", extra))
    sizes: dict[str, set[int]] = {}
    for side, operand in zip(full, operands, strict=False):
        if len(side) != operand.dim() or len(set(side)) != len(side):
            return None
        for letter, size in zip(side, operand.shape, strict=True):
            sizes.setdefault(letter, set()).add(size)
    alone = [letter for letter in sizes if letter not in full[-1] and sum(letter in side for side in full) < 2]
    return None if alone or any(len(size) > 1 for size in sizes.values()) else full


def _contracted(
    recorder: Runner, left: str, tensor: Tensor, right: str, other: Tensor, kept: set[str]
) -> tuple[str, Tensor]:
    """The sum over what the two have in common and nobody else needs."""
    if recorder.is_constant(tensor) and not recorder.is_constant(other):  # tokens left, weights right
        left, tensor, right, other = right, other, left, tensor
    both = [letter for letter in left if letter in right]
    batch, summed = [c for c in both if c in kept], [c for c in both if c not in kept]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    if not summed:
        return _spread(recorder, left, tensor, right, other)
    size = dict(zip(left + right, (*tensor.shape, *other.shape), strict=True))
    fold = batch or recorder.is_constant(other) is False
    first = _moved(recorder, tensor, left, [*batch, *rows, *summed])
    lead = [size[c] for c in batch]
    row_sizes = [size[c] for c in rows]
    first = _shaped(
        recorder, first, [*lead, *([_count(row_sizes)] if fold else row_sizes), _count([size[c] for c in summed])]
    )
    second = _moved(recorder, other, right, [*batch, *summed, *columns])
    column_sizes = [size[c] for c in columns]
    second = _shaped(recorder, second, [*lead, _count([size[c] for c in summed]), _count(column_sizes)])
    if first.dim() < 2:
        first = recorder.call(torch.unsqueeze, first, 0)
    result = recorder.call(torch.matmul, first, second)
    result = _shaped(recorder, result, [*lead, *row_sizes, *column_sizes])
    return "".join([*batch, *rows, *columns]), result


def _spread(recorder: Runner, left: str, tensor: Tensor, right: str, other: Tensor) -> tuple[str, Tensor]:
    """A product without a sum."""
    result = [*left, *(c for c in right if c not in left)]

    def spread(term: str, one: Tensor) -> Tensor:
        present = [c for c in result if c in term]
        one = _moved(recorder, one, term, present)
        return _shaped(recorder, one, [one.shape[present.index(c)] if c in term else 1 for c in result])

    return "".join(result), recorder.call(torch.mul, spread(left, tensor), spread(right, other))


def _moved(recorder: Runner, tensor: Tensor, given: str, wanted: Any) -> Tensor:
    order = [given.index(letter) for letter in wanted]
    return tensor if order == sorted(order) else recorder.call(torch.permute, tensor, tuple(order))


def _shaped(recorder: Runner, tensor: Tensor, shape: list[int]) -> Tensor:
    return tensor if list(tensor.shape) == shape else recorder.call(torch.reshape, tensor, tuple(shape))


def _count(sizes: list[int]) -> int:
    return torch.Size(sizes).numel()


# -- products with something added, sums with a factor --------------------------------------------------------------


def _baddbmm(recorder: Runner, args: Args, kwargs: Kwargs) -> Any:
    added, left, right = _bound(("input", "batch1", "batch2"), args, kwargs)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    product = recorder.call(torch.bmm, left, right)
    if not recorder.is_score(product) or (recorder.is_constant(right) and right.dim() == 2):
        return NotImplemented
    product = product if alpha == 1 else recorder.call(torch.mul, product, alpha)
    if beta == 0:
        return product
    added = added if beta == 1 else recorder.call(torch.mul, added, beta)
    return recorder.call(torch.add, product, added)


def _sum_with_factor(function: Callable[..., Any]) -> Callable[..., Any]:
    def parts(recorder: Runner, args: Args, kwargs: Kwargs) -> Any:
        alpha = kwargs.get("alpha")
        if not isinstance(alpha, Real) or len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
            return NotImplemented
        return recorder.call(function, args[0], recorder.call(torch.mul, args[1], alpha))

    return parts


def _batch_norm(recorder: Runner, args: Args, kwargs: Kwargs) -> Any:
    """In evaluation, a factor and a summand a channel."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    tensor, mean, variance, weight, bias, training, _, eps = _bound(names, args, kwargs)
    constants = [one for one in (mean, variance, weight, bias) if one is not None]
    if training or mean is None or variance is None or recorder.projected(tensor) is None:
        return NotImplemented
    if not all(map(recorder.is_constant, constants)):
        return NotImplemented
    factor = torch.rsqrt(variance + (1e-5 if eps is None else eps))
    factor = factor if weight is None else factor * weight
    added = -mean * factor if bias is None else bias - mean * factor
    factor, added = (one.view(-1, *[1] * (tensor.dim() - 2)) if tensor.dim() > 2 else one for one in (factor, added))
    recorder.add_constant(factor)
    recorder.add_constant(added)
    return recorder.call(torch.add, recorder.call(torch.mul, tensor, factor), added)


# -- softmax written out --------------------------------------------------------------------------------------------


def _exp(recorder: Runner, args: Args, kwargs: Kwargs) -> Any:
    """The exponential of a logarithmic softmax is a softmax."""
    if len(args) != 1 or kwargs:
        return NotImplemented
    step = recorder.fresh_step(args[0])
    if step is None or step.function not in ops.LOG_SOFTMAX:
        return NotImplemented
    return recorder.call(torch.softmax, step.source, softmax_dim(step.args, step.kwargs))


def _quotient(recorder: Runner, args: Args, kwargs: Kwargs) -> Any:
    """exp(s) / sum of exp(s) is a softmax."""
    if len(args) != 2 or kwargs or not all(isinstance(arg, Tensor) for arg in args):
        return NotImplemented
    over, total = args
    step = recorder.fresh_step(over)
    root, chain = recorder.trace_back(total, ("reindex", "same"))
    below = recorder.fresh_step(root)
    if step is None or below is None or step.function not in ops.EXP or below.function not in ops.SUM:
        return NotImplemented
    names = ("input", "dim", "keepdim")
    _, dim, kept = _bound(names, below.args, below.kwargs)
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if (
        recorder.number(below.source) != recorder.number(over)
        or not isinstance(dim, int)
        or len(chain) > (0 if kept else 1)
    ):
        return NotImplemented
    wanted = list(over.shape)
    wanted[dim] = 1
    if list(total.shape) != wanted or (not kept and dim % over.dim() != over.dim() - 1):
        return NotImplemented
    return recorder.call(torch.softmax, step.source, dim)


def softmax_dim(args: Args, kwargs: Kwargs) -> Any:
    """The dimension of a softmax."""
    return kwargs.get("dim", args[1] if len(args) > 1 else None)


def _product(recorder: Runner, args: Args, kwargs: Kwargs) -> Any:
    """Values times an attention map, as the transposed product."""
    if len(args) != 2 or kwargs or not all(isinstance(arg, Tensor) and arg.dim() >= 2 for arg in args):
        return NotImplemented
    left, right = args
    if recorder.is_map(left) or not recorder.is_map(right):
        return NotImplemented
    transposed = recorder.call(torch.matmul, *(recorder.call(torch.transpose, one, -2, -1) for one in (right, left)))
    return recorder.call(torch.transpose, transposed, -2, -1)


# -- what is written in place ---------------------------------------------------------------------------------------


def set_entries(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of `tensor` with some entries replaced: what an assignment to these leaves behind."""
    result = tensor.clone()
    result[index] = value
    return result


Form = Callable[[Tensor], tuple[Callable[..., Any], Args, Kwargs]]


def functional_form(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Form | None:
    """For what the first argument was, the call that computes what is written over it; None if there is no such."""
    if func is torch.Tensor.__setitem__:
        return lambda past: (set_entries, (past, *args[1:]), kwargs)
    if func is torch.Tensor.copy_ and isinstance(args[1], Tensor) and args[1].shape == args[0].shape:
        return lambda past: (torch.Tensor.to, (args[1], past.dtype), {})
    if kwargs.get("out") is not None or func not in ops.IN_PLACE:
        return None
    return lambda past: (ops.IN_PLACE[func], (past, *args[1:]), kwargs)


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(ops.EINSUM, _einsum),
    **{function: _baddbmm for function in (torch.baddbmm, torch.Tensor.baddbmm)},
    **{function: _sum_with_factor(torch.add) for function in (torch.add, torch.Tensor.add)},
    **{function: _sum_with_factor(torch.sub) for function in (torch.sub, torch.Tensor.sub)},
    F.batch_norm: _batch_norm,
    **dict.fromkeys(ops.EXP, _exp),
    **dict.fromkeys(ops.DIVIDE, _quotient),
    **dict.fromkeys(ops.PRODUCT, _product),
}
