"""The stages of all layers as jobs: one after the other in this process, or on a cluster many at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lipbounds.cluster import Cluster, Lost
from lipbounds.report.evaluation import Plan, Stage, compute
from lipbounds.report.layer import LayerWork
from lipbounds.targets.serialize import detached_copy


Progress = Callable[[str, float], None]
Job = tuple[LayerWork, Stage]


def run_jobs(
    jobs: Sequence[Job], plan: Plan, cluster: Cluster | None, max_seconds: float | None, tell: Progress
) -> None:
    """Do the jobs in their order until the time is up; the layers keep what is found.

    Args:
        jobs: a layer and a stage each.
        plan: what is wanted.
        cluster: None for this process.
        max_seconds: after which nothing new is begun, or handed out.
        tell: told what is being done, and which share is.
    """
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    total, done = sum(stage.share for _, stage in jobs), 0.0
    for layer, stage in jobs:
        if cluster is not None:
            while not cluster.room:
                done += _take_one(cluster, done / total, tell)
        tell(f"layer {layer.found.index}: {stage.name}", done / total)
        if deadline is not None and time.monotonic() > deadline:
            layer.leave_out(stage, f"the limit of {max_seconds:g} seconds was reached")
            done += stage.share
        elif cluster is None:
            layer.take(stage, compute(layer.items, stage, plan))
            done += stage.share
        else:
            _hand_out(cluster, layer, stage, plan)
    while cluster is not None and cluster.busy:
        done += _take_one(cluster, done / total, tell)


def _hand_out(cluster: Cluster, layer: LayerWork, stage: Stage, plan: Plan) -> None:
    if layer.sent is None:
        layer.sent = cluster.share([detached_copy(item) for item in layer.items])
    cluster.submit((layer, stage), compute, layer.sent, stage, plan, cluster.device)


def _take_one(cluster: Cluster, share: float, tell: Progress) -> float:
    """Wait for a job; returns its share of the work."""
    (layer, stage), found = cluster.finished()
    if isinstance(found, Lost):
        layer.leave_out(stage, f"no worker came back with it: {found.reason}")
    else:
        layer.take(stage, found)
    tell(f"layer {layer.found.index}: {stage.name}", share)
    return stage.share
