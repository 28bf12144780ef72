"""The stages of all layers as jobs: one after the other in this process, or on a cluster many at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lipbounds.cluster import Cluster, Lost
from lipbounds.report.evaluation import Plan, Stage, compute
from lipbounds.report.layer import LayerWork
from lipbounds.report.worker import Worker
from lipbounds.targets.serialize import detached_copy


Progress = Callable[[str, float], None]
Job = tuple[LayerWork, Stage]
Round = Callable[[], Sequence[Job]]


def run_jobs(
    rounds: Sequence[Round],
    total: float,
    plan: Plan,
    cluster: Cluster | None,
    max_seconds: float | None,
    tell: Progress,
    start: float | None = None,
) -> None:
    """Do the jobs in their order until the time is up; the layers keep what is found.

    Args:
        rounds: each gives its jobs, a layer and a stage each, once all numbers of the round before are there.
        total: of the shares of all jobs, at most.
        plan: what is wanted.
        cluster: None for this process.
        max_seconds: after which nothing new is begun, or handed out, and what runs in this process is ended.
        tell: told what is being done, and which share is.
        start: of the time, on the clock of `time.monotonic`; now if None.
    """
    start = time.monotonic() if start is None else start
    deadline = None if max_seconds is None else start + max_seconds
    # What must end in time runs in a process of its own; on a cluster others wait for it.
    timed = deadline is not None and cluster is None and time.monotonic() < deadline
    worker = Worker(deadline) if timed and deadline is not None else None
    try:
        late, done = f"the limit of {max_seconds or 0:g} seconds was reached", 0.0
        for jobs in rounds:
            done = _run(
                jobs(), plan, cluster, worker, deadline, late, lambda what, sum_: tell(what, sum_ / total), done
            )
    finally:
        if worker is not None:
            worker.close()


def _run(
    jobs: Sequence[Job],
    plan: Plan,
    cluster: Cluster | None,
    worker: Worker | None,
    deadline: float | None,
    late: str,
    tell: Progress,
    done: float,
) -> float:
    """One round; returns the shares that are done after it."""
    for layer, stage in jobs:
        if cluster is not None:
            while not cluster.room:
                done += _take_one(cluster, done, tell)
        tell(f"layer {layer.found.index}: {stage.name}", done)
        if deadline is not None and time.monotonic() > deadline:
            layer.leave_out(stage, late)
            done += stage.share
        elif worker is not None:
            found, whole = worker.compute(layer.items, stage, plan)
            if not whole:
                found.notes.append(f"{stage.name}: not {'finished' if found.items else 'computed'}, {late}")
            layer.take(stage, found)
            done += stage.share
        elif cluster is None:
            layer.take(stage, compute(layer.items, stage, plan))
            done += stage.share
        else:
            _hand_out(cluster, layer, stage, plan)
    while cluster is not None and cluster.busy:
        done += _take_one(cluster, done, tell)
    return done


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
