"""A run under way: each question is evaluated once, or its answer taken from the records."""

from __future__ import annotations

import dataclasses as dc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bench.engine.evaluate import question
from bench.engine.evaluators import Evaluator
from bench.engine.records import Record
from bench.engine.schedule import Chain, PendingQuestion, RunningChain, chains_at
from bench.engine.store import Store
from bench.engine.succession import following
from bench.workloads.case import Case
from lipbounds.registry import NOT_COVERED, BoundSpec


@dc.dataclass
class Outcome:
    """What a run did.

    Args:
        keys: of all records that belong to the run, evaluated now or found.
        evaluated: number of evaluations made now.
        reused: number of records found.
        problems: models that could not be loaded or captured to the end, with the reason.
    """

    keys: list[str] = dc.field(default_factory=list)
    evaluated: int = 0
    reused: int = 0
    problems: dict[str, str] = dc.field(default_factory=dict)


@dc.dataclass
class Session:
    """Evaluates, or takes from the store. It alone writes there, wherever evaluations are made.

    Args:
        store: where records come from and go to.
        task: name of the task.
        methods: what the environment line declares.
        models: descriptions of the models by name, for the same line.
        force: evaluate what is in the store again, too.
        evaluator: where evaluations are made.
    """

    store: Store
    task: str
    methods: Iterable[BoundSpec]
    models: dict[str, str]
    force: bool
    evaluator: Evaluator
    outcome: Outcome = dc.field(default_factory=Outcome)

    def run(
        self, blocks: Iterable[tuple[Case, Sequence[Chain]]], done: Callable[[Case], None] = lambda case: None
    ) -> None:
        """Answer every question of every chain; the keys of the outcome are in the order of the chains.

        Args:
            blocks: with what is asked at each; taken one by one, as there is room.
            done: called when all chains of a block have ended.
        """
        begun: list[RunningChain] = []
        waiting = self._waiting(blocks, begun, done)
        going_on: deque[RunningChain] = deque()
        while True:
            while self.evaluator.room and (running := going_on.popleft() if going_on else next(waiting, None)):
                assert running.asked is not None
                self.evaluator.submit(running, running.asked)
            if not self.evaluator.busy:
                break
            running, record, state = self.evaluator.finished()
            record = dc.replace(record, environment=self._environment(state))
            self.store.append(record)
            self.outcome.evaluated += 1
            if self._step(running, record, done):
                going_on.append(running)
        self.outcome.keys += [key for running in begun for key in running.keys]

    def _waiting(
        self, blocks: Iterable[tuple[Case, Sequence[Chain]]], begun: list[RunningChain], done: Callable[[Case], None]
    ) -> Iterator[RunningChain]:
        """The chains that wait for an evaluation; those that need none are walked to their end on the way."""
        for case, chains in blocks:
            for running in chains_at(case, chains):
                begun.append(running)
                if self._step(running, None, done):
                    yield running

    def _step(self, running: RunningChain, record: Record | None, done: Callable[[Case], None]) -> bool:
        """Go on to the next question without a settled answer; False at the end of the chain."""
        while (method := running.next(record)) is not None:
            asked = question(self.task, running.block.case, method.spec, method.options, method.radius)
            asked = self.evaluator.asked(asked)
            running.keys.append(asked.key)
            known = self.store.record(asked.key)
            if known is None and (known := following(self.store, asked)) is not None:
                self.store.append(known)
            if (
                known is None
                or self.force
                or not known.settled
                or _now_supported(known, method.spec, running.block.case)
            ):
                running.asked = PendingQuestion(asked, running.block, method)
                return True
            self.outcome.reused += 1
            record = known
        if not running.block.left:
            done(running.block.case)
            running.block.case.release()
        return False

    def _environment(self, state: dict[str, Any]) -> str:
        methods = {spec.name: declaration(spec) for spec in self.methods}
        return self.store.environment_of(state, methods=methods, models=self.models)


def _now_supported(known: Record, spec: BoundSpec, case: Case) -> bool:
    """Whether a block was refused for a feature that the bound has come to support since."""
    return known.status == "unsupported" and NOT_COVERED in known.error and case.features <= spec.supports


def declaration(spec: BoundSpec) -> dict[str, Any]:
    """What a table says about a method, as it stands in the environment line."""
    return {
        "role": spec.role,
        "version": spec.version,
        "kind": spec.claim.kind,
        "scope": spec.claim.scope,
        "norm": spec.claim.norm,
        "summary": spec.summary,
        "source": str(spec.source),
        "cost": spec.cost,
        "target": spec.target.__name__,
    }
