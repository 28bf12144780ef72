"""QK-norm: the steps that divide queries or keys by their root mean square, recognised one by one.

    x.pow(2) -> .mean(-1, keepdim=True) -> + eps -> rsqrt -> times x [-> times a weight of one dimension]

(the square also as x * x, the inverse root also as a root that x is divided by) or `F.rms_norm`. The first four are
steps of the kind `statistic`, the products of the kind `normalise`. From what was normalised on, the steps are followed
as though it had been projected; from the projection to the norm, entries may only be moved.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.provenance import Provenance
from lipbounds.capture.replay import Kind, Step


FreshStep = Callable[[Tensor], Step | None]
Refuse = Callable[[str], NoReturn]


@dc.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Norm:
    """An RMSNorm of what one projection made, feature by feature.

    Args:
        weight: of each output feature of the projection.
        group: of each output feature, the smallest one that is normalised together with it.
        size: the number of features that are normalised together.
        eps: added to the mean square.
        dtypes: in which it was computed.
        constants: the model's own tensors that the weight was read from.
    """

    weight: Tensor
    group: Tensor
    size: int
    eps: float
    dtypes: tuple[torch.dtype, ...]
    constants: tuple[Tensor, ...]


def norm_kind(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    fresh_step: FreshStep,
    projected: Callable[[Tensor], Tensor | None],
) -> tuple[Kind | None, Tensor | None]:
    """The kind of a call that is a step of a norm, and the tensor that is followed; None twice for other calls.

    Args:
        function: what was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        tensors: those among the arguments.
        fresh_step: the step that made a tensor.
        projected: the result of a projection that a tensor was made of by linear steps, or None.
    """
    first = tensors[0]
    if _is_square(function, args, kwargs, tensors) and projected(first) is not None:
        return "statistic", first
    if function in ops.MEAN | ops.ADD | ops.INVERSE_ROOT | ops.ROOT | ops.SQUARE | ops.RECIPROCAL and len(tensors) == 1:
        made = fresh_step(first)
        return ("statistic", first) if made is not None and made.kind == "statistic" else (None, None)
    if function in ops.RMS_NORM and projected(first) is not None:
        return "normalise", first
    if function in ops.MULTIPLY | ops.DIVIDE and len(tensors) == 2:
        divides = function in ops.DIVIDE
        for source, other in (tensors,) if divides else (tensors, tensors[::-1]):
            weighs = not divides and _weighs(source, other, fresh_step)
            if weighs or _normalises(source, other, divides, fresh_step):
                return "normalise", source
    return None, None


def _is_square(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> bool:
    """`square(x)`, `pow(x, 2)` or `x * x`."""
    if function in ops.MULTIPLY:
        return len(tensors) == 2 and tensors[0] is tensors[1]
    return function in ops.SQUARE and len(tensors) == 1 and _exponent(args, kwargs) == 2


def _exponent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent", 2)
    return float(exponent) if isinstance(exponent, Real) else None


def _normalises(source: Tensor, other: Tensor, divides: bool, fresh_step: FreshStep) -> bool:
    """Whether `other` is 1 / sqrt(mean of the squares of `source` + eps), or the root itself if it divides."""
    statistics = _statistics(other, divides, fresh_step)
    return bool(statistics) and statistics[0].source is source


def _statistics(tensor: Tensor, divides: bool, fresh_step: FreshStep) -> list[Step]:
    """The steps that made a root mean square, the inverse unless it divides; none if `tensor` is no such."""
    chain: list[Step] = []
    step = fresh_step(tensor)
    while step is not None and step.kind == "statistic":
        chain.insert(0, step)
        step = fresh_step(step.source)
    if len(chain) < 4 or chain[1].function not in ops.MEAN or chain[2].function not in ops.ADD:
        return []
    powers = [_power(step) for step in chain[3:]]
    total = 1.0
    for power in powers:
        total *= power or 0.0
    square = _is_square(chain[0].function, chain[0].args, chain[0].kwargs, [t for t, _ in chain[0].versions])
    in_order = square and total == (0.5 if divides else -0.5)
    return chain if in_order and _over_last(chain[1]) and _added(chain[2]) is not None else []


def _power(step: Step) -> float | None:
    """The exponent that a step raises to; None for another step."""
    if step.function in ops.INVERSE_ROOT:
        return -0.5
    if step.function in ops.ROOT:
        return 0.5
    if step.function in ops.SQUARE:
        return _exponent(step.args, step.kwargs)
    numbers = [value for value in step.args if isinstance(value, Real)]
    return -1.0 if step.function in ops.RECIPROCAL and all(number == 1 for number in numbers) else None


def _over_last(mean: Step) -> bool:
    """Whether a mean is over the last dimension, which it keeps."""
    dim = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    kept = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    dtype = mean.kwargs.get("dtype", mean.source.dtype)
    return bool(kept) and dim in (-1, mean.source.dim() - 1) and dtype == mean.source.dtype


def _added(add: Step) -> float | None:
    """The number that was added; None if it was something else."""
    numbers = [value for value in (*add.args, *add.kwargs.values()) if isinstance(value, Real)]
    return float(numbers[0]) if len(numbers) == 1 and "alpha" not in add.kwargs else None


def _weighs(source: Tensor, other: Tensor, fresh_step: FreshStep) -> bool:
    """Whether `source` was normalised, apart from casts, and `other` holds one number a feature."""
    step = fresh_step(source)
    while step is not None and step.kind in ("same", "cast"):
        step = fresh_step(step.source)
    fits = other.dim() == 1 and source.shape[-1:] == other.shape and source.dim() > 1
    return fits and step is not None and step.kind == "normalise"


def norm_of(recorder: Provenance, root: Tensor) -> tuple[Tensor, list[Step]] | None:
    """What was projected and then normalised to `root`, and the steps from there; None if `root` was not.

    Args:
        recorder: of the run.
        root: a tensor.
    """
    step = recorder.fresh_step(root)
    if step is None or step.kind != "normalise":
        return None
    return recorder.trace_back(root, ("reindex", "same", "cast", "normalise"))


@dc.dataclass(eq=False, slots=True)
class _Entries:
    """Of each entry of a tensor on the way: its feature and token, and from the norm on its group and weight."""

    features: Tensor
    rows: Tensor
    group: Tensor | None = None
    weight: Tensor | None = None

    def moved(self, step: Step) -> _Entries:
        tables = (self.features, self.rows, self.group, self.weight)
        return _Entries(*(None if table is None else step.again(table) for table in tables))  # pyright: ignore


def read_norm(
    chain: list[Step], features: Tensor, rows: Tensor, fresh_step: FreshStep, refuse: Refuse
) -> tuple[Norm, Tensor, Tensor]:
    """The norm among the steps, and feature and token of each entry of its result.

    Args:
        chain: from the projection to the last step of the norm.
        features: for each entry of the result of the projection, the number of its feature.
        rows: for each entry, the number of its token.
        fresh_step: the step that made a tensor.
        refuse: raises, given what must hold.
    """
    entries, eps, size = _Entries(features, rows), None, 0
    constants: list[Tensor] = []
    for step in chain:
        if step.kind == "reindex":
            entries = entries.moved(step)
        elif step.kind == "normalise":
            weights, own_eps = _weights_and_eps(step, fresh_step, refuse)
            if own_eps is not None:
                if eps is not None:
                    refuse("they must be normalised once")
                eps, size = own_eps, step.shape[-1]
                groups = torch.arange(step.shape[:-1].numel(), device=features.device).view(*step.shape[:-1], 1)
                entries.group = groups.expand(step.shape).contiguous()
                entries.weight = torch.ones(step.shape, dtype=torch.float64, device=features.device)
            for weight in weights:
                assert entries.weight is not None  # what has a weight was normalised before
                entries.weight = entries.weight * weight.to(torch.float64)
            constants += weights
    assert eps is not None  # the last step is of the norm
    assert entries.group is not None
    assert entries.weight is not None
    norm = Norm(
        weight=_by_feature(entries.weight, entries.features, refuse),
        group=_by_feature(_first_features(entries, refuse), entries.features, refuse),
        size=size,
        eps=eps,
        dtypes=tuple({step.dtype for step in chain}),
        constants=tuple(constants),
    )
    return norm, entries.features, entries.rows


def _weights_and_eps(step: Step, fresh_step: FreshStep, refuse: Refuse) -> tuple[list[Tensor], float | None]:
    """The weights of a step of the kind `normalise`, and its eps; None if it does nothing but weigh."""
    if step.function in ops.RMS_NORM:
        names = ("input", "normalized_shape", "weight", "eps")
        given = dict(zip(names, step.args, strict=False)) | step.kwargs
        eps, short = given.get("eps"), step.source.dtype not in (torch.float32, torch.float64)
        if len(given["normalized_shape"]) != 1 or (eps is None and short):
            refuse("rms_norm must be over one dimension, in short dtypes with eps given")
        eps = torch.finfo(step.source.dtype).eps if eps is None else float(eps)
        return [] if given.get("weight") is None else [given["weight"]], eps
    (other,) = step.others
    statistics = _statistics(other, step.function in ops.DIVIDE, fresh_step)
    if not statistics and other.dim() != 1:
        refuse("their mean square must not be changed in place")
    return ([], _added(statistics[2])) if statistics else ([other], None)


def _first_features(entries: _Entries, refuse: Refuse) -> Tensor:
    """For each entry the smallest feature that is normalised together with it."""
    group, rows, features = (t.flatten() for t in (entries.group, entries.rows, entries.features) if t is not None)

    def least(values: Tensor) -> Tensor:
        start = torch.full((int(group.max()) + 1,), int(values.max()), dtype=values.dtype, device=values.device)
        return start.scatter_reduce(0, group, values, "amin")[group]

    if not bool((least(rows) == rows).all()):
        refuse("the features of one token must be normalised together, got those of several")
    return least(features).view(entries.features.shape)


def _by_feature(values: Tensor, features: Tensor, refuse: Refuse) -> Tensor:
    """One value a feature, the same for all tokens."""
    places = torch.arange(features.numel(), device=features.device)
    last = places.new_zeros(int(features.max()) + 1).scatter(0, features.flatten(), places)
    found = values.flatten()[last]
    if not bool((found[features] == values).all()):
        refuse("each feature must be normalised with the same features, and weighed by the same number, in all tokens")
    return found
