"""Running a model, and computing every number of a report within a limit of time."""

from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipbounds import __version__
from lipbounds.capture import Captured, CapturedAttention, capture
from lipbounds.cluster import Cluster
from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.report.budget import within_budget
from lipbounds.report.deadline import Deadline, TimeUp
from lipbounds.report.evaluation import Plan, cheap_stages, costly_stages, plan
from lipbounds.report.jobs import Progress, run_jobs
from lipbounds.report.layer import LayerWork
from lipbounds.report.maps import with_maps
from lipbounds.report.patches import Picture, picture_of
from lipbounds.report.schema import InputReport, ModelReport, SkippedReport
from lipbounds.targets.attention import Attention


GRACE = 5.0  # seconds: a run of the model that is nearly done is better done


@dc.dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a model is run on once.

    Args:
        name: for people, such as the text.
        args: of the model, with batch size 1.
        kwargs: of the model, with batch size 1.
        labels: one per token; numbers are shown where the count of tokens is another.
        picture: the image behind the input, of shape (channels, height, width) with values in [0, 1]; the page shows
            its patches where the number of tokens tells which they are.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dc.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    picture: Tensor | None = None


def measure(
    model: nn.Module,
    inputs: Sequence[ModelInput] | Tensor,
    *,
    name: str | None = None,
    bounds: Sequence[str] = (),
    radii: Sequence[float] | None = None,
    layers: Sequence[int] = (),
    delta: float = 1e-9,
    seed: int = 0,
    max_seconds: float | None = None,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """The numbers of a report on the attention of a model: proved, probable and lower bounds, layer by layer.

    All are local Lipschitz constants in the l2 norm (of all entries of a block's input and output), of the attention
    block with its output projection, without normalisation and residual. They are evaluated in float64 on the weights
    as they are.

    Args:
        model: in evaluation mode.
        inputs: what it is run on; the items of a tensor are run one by one.
        name: of the model, for people.
        bounds: names of proved bounds, at the point or on a ball; the default ones take the place of a scope of which
            none is named.
        radii: of the balls, in the l2 norm of the input of a block.
        layers: numbers of the blocks wanted; all if empty.
        delta: with which each probable bound may fail.
        seed: of all random starts.
        max_seconds: after which the computation ends (on a cluster, nothing new is begun); the report names what is
            missing. A run of the model is ended five seconds later, or when the torch call ends that it is in by then.
        cluster: where the numbers are computed, from `lipbounds.cluster.connect`; None for this process.
        progress: told what is being done, and which share is.

    Raises:
        InvalidInput: an argument breaks a rule above; the first run of the model had not ended in time.
        Unsupported: no attention is found that `capture` can express; what it cannot is left out, and listed.
        ClusterError: the cluster cannot run the jobs.
    """
    wanted = plan(bounds=bounds, radii=radii, delta=delta, seed=seed)
    if max_seconds is not None and not max_seconds > 0:
        raise InvalidInput(f"max_seconds must be above 0, got {max_seconds=}; leave it out for no limit.")
    runs, start = _runs(inputs), time.monotonic()
    tell = progress or (lambda what, share: None)
    captured: list[_CapturedRun] = []
    for number, run in enumerate(runs):
        tell("running the model", 0.02 * number / len(runs))
        captured.append(_run(model, run, layers, start, max_seconds, first=not captured))
    work = [run.layers for run in captured]
    order = _compute(work, wanted, cluster, max_seconds, lambda what, share: tell(what, 0.02 + 0.98 * share), start)
    reports = with_maps(tuple(run.report(order) for run in captured), [run.blocks for run in captured])
    return _report(model, name, seed, reports)


def _compute(
    work: Sequence[Sequence[LayerWork]],
    wanted: Plan,
    cluster: Cluster | None,
    max_seconds: float | None,
    tell: Progress,
    start: float,
) -> list[str]:
    """Compute the numbers of all layers: first what is cheap, which says who gets what is not; returns the stages."""
    order = [*cheap_stages(), *costly_stages(wanted)]
    rounds = [
        lambda: [(layer, stage) for stage in cheap_stages() for layers in work for layer in layers],
        lambda: [job for layers in work for job in within_budget(layers, wanted)],
    ]
    total = sum(stage.share for stage in order) * sum(map(len, work))
    run_jobs(rounds, total, wanted, cluster, max_seconds, tell, start)
    return [stage.name for stage in order]


@dc.dataclass(frozen=True, kw_only=True)
class _CapturedRun:
    """One run of the model: the layers that are measured, and what capture left out."""

    name: str
    found: Captured
    layers: list[LayerWork]
    picture: Picture | None

    @property
    def blocks(self) -> list[Attention]:
        """Those that the layers of its report are about."""
        return [item for layer in self.layers for item in layer.items]

    def report(self, order: Sequence[str]) -> InputReport:
        skipped = [SkippedReport(layer=one.index, module=one.module, reason=one.reason) for one in self.found.skipped]
        return InputReport(
            name=self.name,
            layers=tuple(part for layer in self.layers for part in layer.reports(order)),
            skipped=tuple(skipped),
            warnings=self.found.warnings,
            picture=self.picture,
        )


def _run(
    model: nn.Module, run: ModelInput, layers: Sequence[int], start: float, max_seconds: float | None, *, first: bool
) -> _CapturedRun:
    """Run the model at one input, unless the time is up."""
    end = None if max_seconds is None else start + max_seconds + GRACE
    try:
        with torch.no_grad(), Deadline(end):
            found = capture(model, *run.args, on_unsupported="skip", **run.kwargs)
        chosen = _chosen(found, layers)
    except TimeUp:
        found, chosen = _not_run(max_seconds or 0.0, first=first), []
    picture = None if run.picture is None else picture_of(run.picture)
    work = [LayerWork(one, run.labels, picture) for one in chosen]
    return _CapturedRun(name=run.name, found=found, layers=work, picture=picture)


def _report(model: nn.Module, name: str | None, seed: int, inputs: tuple[InputReport, ...]) -> ModelReport:
    parameter = next(iter(model.parameters()), torch.zeros((), dtype=torch.get_default_dtype(), device="cpu"))
    return ModelReport(
        model=name or type(model).__name__,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        seed=seed,
        lipbounds=__version__,
        torch=torch.__version__,
        inputs=inputs,
    )


def _not_run(max_seconds: float, *, first: bool) -> Captured:
    """What is known of an input at which the model was not run to its end."""
    if first:
        raise InvalidInput(
            f"max_seconds must leave time to run the model, got {max_seconds=}, in which the first run did not end; "
            "raise it, or take a smaller input."
        )
    late = f"the model was not run to its end at this input: the limit of {max_seconds:g} seconds was reached"
    return Captured([], warnings=[late])


def _runs(inputs: Sequence[ModelInput] | Tensor) -> list[ModelInput]:
    if isinstance(inputs, Tensor):
        if inputs.dim() < 2 or not len(inputs):
            raise InvalidInput(
                f"inputs must be a tensor with a batch dimension of at least one item, got shape "
                f"{tuple(inputs.shape)}; add one with inputs[None]."
            )
        return [ModelInput(name=f"input {i + 1}", args=(inputs[i : i + 1],)) for i in range(len(inputs))]
    if not inputs or not all(isinstance(one, ModelInput) for one in inputs):
        raise InvalidInput("inputs must be a tensor or a non-empty sequence of ModelInput, got something else.")
    return list(inputs)


def _chosen(found: Captured, layers: Sequence[int]) -> list[CapturedAttention]:
    skipped = list(found.skipped)
    if len(found) == 0:
        more = f" ({len(skipped) - 1} others: see lipbounds.capture)" if len(skipped) > 1 else ""
        raise Unsupported(f"{skipped[0].reason}{more}")
    indices = {one.index for one in found} | {one.index for one in skipped}
    missing = sorted(set(layers) - indices)
    if missing:
        raise InvalidInput(f"layers must be among 0 to {len(indices) - 1}, the attention calls found, got {missing}.")
    for one in found.skipped:
        if one.index in layers:
            raise Unsupported(one.reason)
    return [one for one in found if not layers or one.index in layers]
