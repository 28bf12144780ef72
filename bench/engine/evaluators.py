"""Where questions are answered: in this process one by one, or on a cluster many at a time."""

from __future__ import annotations

import dataclasses as dc
import functools
from typing import Any, Protocol

import torch

from bench.engine.evaluate import evaluate, lost
from bench.engine.machine import environment
from bench.engine.records import Question, Record
from bench.engine.schedule import PendingQuestion, RunningChain
from bench.workloads.radii import Multiple
from lipbounds import registry
from lipbounds.cluster import Cluster, ClusterError, Lost, check_device
from lipbounds.targets.attention import Attention
from lipbounds.targets.serialize import detached_copy


CPU = torch.device("cpu")
Answer = tuple[RunningChain, Record, dict[str, Any]]  # with what the environment it was made in says of itself


class Evaluator(Protocol):
    """Takes the questions that chains wait at, and gives back their answers in any order."""

    @property
    def room(self) -> bool:
        """Whether to hand in one more."""
        ...

    @property
    def busy(self) -> bool:
        """Whether there are answers to wait for."""
        ...

    def asked(self, question: Question) -> Question:
        """The question as it is answered here: the device is part of it."""
        ...

    def submit(self, running: RunningChain, asked: PendingQuestion) -> None:
        """Hand in the question that the chain waits at."""
        ...

    def finished(self) -> Answer:
        """Wait for an answer."""
        ...


class Here:
    """In this process, one after the other.

    Args:
        time_limit: seconds for one evaluation.
        device: that evaluates.
    """

    def __init__(self, time_limit: float, device: torch.device) -> None:
        self._time_limit, self._device = time_limit, device
        self._waiting: list[tuple[RunningChain, PendingQuestion]] = []

    @property
    def room(self) -> bool:
        return not self._waiting

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def asked(self, question: Question) -> Question:
        return dc.replace(question, device=self._device.type)

    def submit(self, running: RunningChain, asked: PendingQuestion) -> None:
        self._waiting.append((running, asked))

    def finished(self) -> Answer:
        running, asked = self._waiting.pop()
        case = asked.block.case
        record = evaluate(
            asked.question,
            case.block if self._device.type == "cpu" else case.block.to(self._device),
            asked.method.spec,
            time_limit=self._time_limit,
            radius=asked.method.radius,
            module=case.module,
        )
        return running, record, self._environment

    @functools.cached_property
    def _environment(self) -> dict[str, Any]:
        return environment()


class Remote:
    """On a cluster: a job is one evaluation, so that whatever dies takes no more with it than that.

    Args:
        cluster: where.
        time_limit: seconds for one evaluation.
    """

    def __init__(self, cluster: Cluster, time_limit: float) -> None:
        self._cluster = cluster
        self._time_limit = time_limit

    @property
    def room(self) -> bool:
        return self._cluster.room

    @property
    def busy(self) -> bool:
        return self._cluster.busy

    def asked(self, question: Question) -> Question:
        return dc.replace(question, device=self._cluster.device)

    def submit(self, running: RunningChain, asked: PendingQuestion) -> None:
        block = asked.block
        if block.sent is None:
            block.sent = self._cluster.share(detached_copy(block.case.block))
        given = (asked.question, self._time_limit, asked.method.radius, block.case.module)
        self._cluster.submit((running, asked), answer, block.sent, *given)

    def finished(self) -> Answer:
        (running, asked), found = self._cluster.finished()
        if isinstance(found, Lost):
            case, method = asked.block.case, asked.method
            error = f"no worker came back with it: {found.reason}"
            record = lost(asked.question, case.block, method.spec, error, method.radius, case.module)
            return running, record, _environment()
        return running, *found


def evaluator(cluster: Cluster | None, time_limit: float, device: torch.device = CPU) -> Evaluator:
    """Where evaluations are made.

    Args:
        cluster: None for this process.
        time_limit: seconds for one evaluation.
        device: that evaluates in this process; jobs of a cluster have their own.
    """
    return Here(time_limit, device) if cluster is None else Remote(cluster, time_limit)


def answer(
    block: Attention, question: Question, time_limit: float, radius: Multiple | None, module: str
) -> tuple[Record, dict[str, Any]]:
    """What a worker does: one evaluation; returns the record and what the worker runs on.

    Args:
        block: the block, on the CPU.
        question: what is evaluated there.
        time_limit: seconds for the evaluation.
        radius: of the ball or set, for the scopes that need one.
        module: name of the block, for the tables.

    Raises:
        ClusterError: the worker cannot use the GPU it was given, or has another version of the bound.
    """
    spec = registry.get(question.bound)
    if spec.version != question.bound_version:
        raise ClusterError(
            f"all nodes must have the same bounds, got version {spec.version} of {spec.name} on a worker and "
            f"{question.bound_version} at the driver; install the same package on all."
        )
    check_device(question.device)
    there = block.to(question.device)
    record = evaluate(question, there, spec, time_limit=time_limit, radius=radius, module=module)
    return record, _environment()


@functools.cache
def _environment() -> dict[str, Any]:
    return environment()
