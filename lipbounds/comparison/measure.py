"""Running a model and evaluating bounds on each of its attention blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from lipbounds.bound_names import BoundModule
from lipbounds.bound_spec import block_in
from lipbounds.capture import capture
from lipbounds.claims import BoundResult
from lipbounds.comparison.ground_truth import truth
from lipbounds.comparison.row import Row
from lipbounds.comparison.table import Comparison
from lipbounds.errors import InvalidInput, UnsupportedAttention
from lipbounds.registry import BoundSpec, get, select
from lipbounds.targets.attention import Attention


SCOPES = ("point", "ball", "change")  # that are about the input at hand
Truth = Literal["auto", "exact", "certificate", "none"]
Progress = Callable[[str, float], None]


def compare(
    model: Any,
    *inputs: Any,
    bounds: Iterable[Any] | None = None,
    truth: str = "auto",
    radii: Sequence[float] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> Comparison:
    """Bounds side by side on each attention block of a model, with the true constant at the point.

    The result prints as a table in which bounds are ranked within their kind, scope and norm, and never across. All
    numbers are about attention blocks with their output projection, without normalisation and residual.

    Args:
        model: a module in evaluation mode; or an `Attention`, or what `lipbounds.capture` found, without inputs.
        *inputs: of the model; it is run once.
        bounds: names or specs, such as `"sharp"` or `lipbounds.bounds.sharp`, about a point, a ball or a change. None:
            all standing proved bounds in l2 at the point and, with radii, on balls and of changes.
        truth: `exact`, `certificate`, `auto` by size (see `lipbounds.truth`), or `none`.
        radii: of the balls, in the l2 norm of the input of a block.
        name: of the model, for people; the class of the model if None.
        progress: told what is being done, and which share is.
        **keywords: keyword inputs of the model.

    Raises:
        InvalidInput: an argument breaks a rule above; a bound needs radii and none are given.
        UnknownBound: there is no bound of such a name.
        Unsupported: no attention is found, or one that `capture` cannot express.
    """
    if isinstance(model, nn.Module):
        with torch.no_grad():
            found: Any = capture(model, *inputs, **keywords)
    elif inputs or keywords:
        raise InvalidInput(f"inputs go with a torch.nn.Module, got {type(model).__name__} and inputs.")
    else:
        found = model if isinstance(model, Sequence) else [model]
    title = name or (type(model).__name__ if isinstance(model, nn.Module) else "attention")
    return compare_runs({"": found}, bounds=bounds, truth=truth, radii=radii, name=title, progress=progress)


def compare_runs(
    runs: Mapping[str, Sequence[Any]],
    *,
    bounds: Iterable[Any] | None = None,
    truth: str = "auto",
    radii: Sequence[float] | None = None,
    name: str,
    progress: Progress | None = None,
) -> Comparison:
    """As `compare`, for several inputs that were captured one by one.

    Args:
        runs: what `capture` found at each input, by the name of the input.
        bounds: as in `compare`.
        truth: as in `compare`.
        radii: as in `compare`.
        name: of the model.
        progress: as in `compare`.

    Raises:
        InvalidInput: as `compare`.
        UnknownBound: as `compare`.
    """
    if truth not in get_args(Truth):
        raise InvalidInput(f"truth must be one of {get_args(Truth)}, got truth={truth!r}.")
    chosen_radii = _radii(radii)
    specs = _specs(bounds, chosen_radii)
    rows: list[Row] = []
    refused: dict[str, str] = {}
    jobs = [(run, place, item) for run, found in runs.items() for place, item in enumerate(found)]
    for number, (run, place, item) in enumerate(jobs):
        block, layer, module = _block(item, place)
        if progress is not None:
            progress(f"layer {layer} {run}".strip(), number / len(jobs))
        rows += _rows(block, specs, truth, chosen_radii, refused, {"input": run, "layer": layer, "module": module})
    return Comparison(model=name, rows=tuple(rows), refused=refused)


def _specs(bounds: Iterable[Any] | None, radii: tuple[float, ...]) -> list[BoundSpec]:
    if bounds is None:
        wanted = SCOPES if radii else ("point",)
        return [spec for spec in select(kind="proved", norm="l2", role="bound") if spec.claim.scope in wanted]
    specs = [_spec(bound) for bound in ([bounds] if isinstance(bounds, str) else bounds)]
    for spec in specs:
        if spec.claim.scope not in SCOPES or spec.target is not Attention:
            raise InvalidInput(
                f"bounds must be about attention, with a scope among {SCOPES}, got {spec!r}; call it by itself."
            )
        if spec.needs_radius and not radii:
            raise InvalidInput(f"{spec.name} is a bound on a {spec.claim.scope}: pass radii=, such as radii=[0.1].")
    return specs


def _spec(bound: Any) -> BoundSpec:
    if isinstance(bound, BoundModule):
        return bound.registered
    if isinstance(bound, BoundSpec):
        return bound
    if not isinstance(bound, str):
        raise InvalidInput(f"bounds must be names or specs, got {type(bound).__name__}; see lipbounds.select().")
    return get(bound)


def _radii(radii: Sequence[float] | None) -> tuple[float, ...]:
    chosen = tuple(sorted(set(radii or ())))
    if not all(0 < radius < float("inf") for radius in chosen):
        raise InvalidInput(f"radii must be finite and above 0, got {list(chosen)}.")
    return chosen


def _block(item: Any, place: int) -> tuple[Attention, int, str]:
    """The block with the number of its call and the name of its module."""
    block = block_in(item)
    if not isinstance(block, Attention):
        raise InvalidInput(
            f"model must be a torch.nn.Module, an Attention or what capture found, got {type(item).__name__}."
        )
    return block.detached, getattr(item, "index", place), getattr(item, "module", "")


def _rows(
    block: Attention,
    specs: Sequence[BoundSpec],
    method: str,
    radii: tuple[float, ...],
    refused: dict[str, str],
    place: dict[str, Any],
) -> list[Row]:
    """The numbers of one block, one row for each bound, radius and batch item."""
    reference = None if method == "none" else _truth(block, method)
    rows = [] if reference is None else _of(reference[0], reference, reference[1], place)
    for spec in specs:
        for radius in radii if spec.needs_radius else (None,):
            begun = time.perf_counter()
            try:
                found = spec(block, radius)
            except UnsupportedAttention as error:
                refused[spec.name] = str(error).partition(";")[0]
                break
            rows += _of(found, reference, time.perf_counter() - begun, place)
    return rows


def _truth(block: Attention, method: str) -> tuple[BoundResult, float]:
    begun = time.perf_counter()
    return truth(block, method=method), time.perf_counter() - begun


def _of(
    found: BoundResult, reference: tuple[BoundResult, float] | None, seconds: float, place: dict[str, Any]
) -> list[Row]:
    values = found.value.double().flatten().tolist()
    unknown = [None] * len(values)
    uppers, lowers = unknown, unknown
    if reference is not None and found.norm == "l2":
        uppers = reference[0].value.double().flatten().tolist()
        lowers = reference[0].terms["lower"].double().flatten().tolist()
    return [
        Row(
            **place,
            item=item,
            bound=found.name,
            kind=found.kind,
            scope=found.scope,
            norm=found.norm,
            radius=found.radius,
            delta=found.delta,
            value=value,
            truth=upper,
            truth_from_below=lower,
            seconds=seconds,
        )
        for item, (value, upper, lower) in enumerate(zip(values, uppers, lowers, strict=True))
    ]
