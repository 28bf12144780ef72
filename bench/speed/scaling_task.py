"""Time of the same evaluations in this process, and on Ray with one job at a time, two, and so on up to the cores.

Everything counts that happens from the first question to the last record on disk; Ray's start and the first round,
in which workers import torch, are told apart.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.engine.evaluators import evaluator
from bench.engine.schedule import Method, single
from bench.engine.session import Session
from bench.engine.store import Store
from bench.workloads.case import Case
from bench.workloads.models import zoo
from bench.workloads.radii import multiples
from lipbounds import registry
from lipbounds.cluster import Cluster, connect


MODEL, BLOCKS = "minilm", 12
METHODS = ("sharp_fast", "covariance.exact", "yudin2025.biased", "yudin2025_ball.biased", "lanczos")
REPEATS = 3
VERSION = 1  # of what is measured here


def run(
    *,
    cores: int,
    blocks: int = BLOCKS,
    repeats: int = REPEATS,
    time_limit: float = 120.0,
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure, with the serial runs spread between the others.

    Args:
        cores: how many jobs at a time at most.
        blocks: of MiniLM at its first inputs.
        repeats: rounds of each kind.
        time_limit: seconds for one evaluation.
        advance: called before each kind of round with its name.
    """
    model = next(each for each in zoo() if each.name == MODEL)
    cases = [*itertools.islice(model.cases(model.inputs), blocks)]
    serial: list[dict[str, float]] = []
    rows = []
    for workers in range(1, cores + 1):
        advance("serial")
        serial += [_round(cases, None, time_limit) for _ in range(repeats)]
        advance(f"Ray, {workers} at a time")
        began = time.perf_counter()
        with connect("local", cores=workers) as cluster:
            start = time.perf_counter() - began
            first = _round(cases, cluster, time_limit)["seconds"]
            rounds = [_round(cases, cluster, time_limit) for _ in range(repeats)]
        rows.append({"workers": workers, "start": start, "first": first, "rounds": rounds})
    alone = median(each["seconds"] for each in serial)
    for row in rows:
        row["seconds"] = median(each["seconds"] for each in row["rounds"])
        row["speed_up"] = alone / row["seconds"]
        row["efficiency"] = row["speed_up"] / row["workers"]
    return {
        "model": MODEL,
        "blocks": len(cases),
        "evaluations": len(cases) * len(_methods(cases[0])),
        "serial": {"seconds": alone, "rounds": serial},
        "rows": rows,
    }


def _round(cases: Sequence[Case], cluster: Cluster | None, time_limit: float) -> dict[str, float]:
    """Seconds of all evaluations into an empty file, and how many processes wanted to run meanwhile."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "records.jsonl") as store:
        session = Session(
            store=store, task="scaling", methods=[], models={}, force=False,
            evaluator=evaluator(cluster, time_limit),
        )  # fmt: skip
        began = time.perf_counter()
        session.run((case, [*map(single, _methods(case))]) for case in cases)
        seconds = time.perf_counter() - began
        failed = [record.error for entry in store.entries.values() if (record := entry.record).status != "ok"]
        if failed:
            raise RuntimeError(f"every evaluation must succeed to be timed, got {failed[0]}")
    return {"seconds": seconds, "load": os.getloadavg()[0]}


def _methods(case: Case) -> list[Method]:
    """The same ones at each block, those on a ball at its first radius."""
    specs = [registry.get(name) for name in METHODS]
    return [Method(spec, {}, multiples(spec.claim.scope)[0]) for spec in specs]
