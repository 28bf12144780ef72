"""A run under way: each question is evaluated once, or its answer taken from the records."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from bench.evaluate import Case, evaluate, question
from bench.machine import environment
from bench.radii import Radius
from bench.records import Record
from bench.store import RecordStore
from lipbounds.registry import BoundSpec


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
    """Evaluates, or takes from the store.

    Args:
        store: where records come from and go to.
        task: name of the task.
        methods: what the environment line declares.
        models: descriptions of the models by name, for the same line.
        force: evaluate what is in the store again, too.
        time_limit: seconds for one evaluation.
        command: the command line, for the environment line.
        outcome: what is counted.
    """

    store: RecordStore
    task: str
    methods: Iterable[BoundSpec]
    models: dict[str, str]
    force: bool
    time_limit: float
    command: str
    outcome: Outcome
    _environment: str = ""

    def answer(self, case: Case, spec: BoundSpec, options: dict[str, Any], radius: Radius | None = None) -> Record:
        """The record of one evaluation, from the store if it is settled there.

        Args:
            case: the block.
            spec: the bound or estimator.
            options: of the bound.
            radius: where its scope has one.
        """
        asked = question(self.task, case, spec, options, None if radius is None else radius.value)
        self.outcome.keys.append(asked.key)
        known = self.store.records.get(asked.key)
        if known is not None and known.settled and not self.force:
            self.outcome.reused += 1
            return known
        record = evaluate(
            asked,
            case.block,
            spec,
            time_limit=self.time_limit,
            environment=self.environment(),
            relative_radius=None if radius is None else radius.relative,
        )
        self.store.append(record)
        self.outcome.evaluated += 1
        return record

    def environment(self) -> str:
        """The id of this run's environment line, written with the first record: a run that adds nothing leaves none."""
        if not self._environment:
            self._environment = self.store.add_environment(
                {
                    "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "command": self.command,
                    "environment": environment(),
                    "methods": {spec.name: declaration(spec) for spec in self.methods},
                    "models": self.models,
                }
            )
        return self._environment


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
