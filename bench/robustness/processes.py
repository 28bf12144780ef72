"""The models of a profile in several processes: each model is trained, measured and attacked in one of them.

This process alone writes: what another one answers comes back when its model is done.
"""

from __future__ import annotations

import dataclasses as dc
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.engine.store import Store
from bench.engine.store_file import Entry
from bench.robustness.settings import Recipe
from bench.robustness.training import Trained, Workshop


Measure = Callable[[Trained], object]
Made = list[tuple[Entry, dict[str, Any]]]  # with what the environment line says


def answered(workshop: Workshop, recipes: Sequence[Recipe], measure: Measure, jobs: int) -> Iterator[Recipe]:
    """Make all answers about these models that are missing; yields each model whose answers are complete.

    Args:
        workshop: where models come from and answers go; at the end it holds all of them, and makes none of them anew.
        recipes: of the models.
        measure: asks everything that is to be known of a model; sent to the processes, so a function of a module or a
            partial of one.
        jobs: number of processes; they share the threads that this one has.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    initial = (workshop, measure, threads)
    with multiprocessing.get_context("spawn").Pool(jobs, _begin, initial) as pool:
        for recipe, found in pool.imap_unordered(_measured, recipes, chunksize=1):
            keep(workshop, found)
            yield recipe
    workshop.force = False


def keep(workshop: Workshop, found: Iterable[tuple[Entry, dict[str, Any]]]) -> None:
    """Write what another process made.

    Args:
        workshop: where answers go.
        found: entries, each with what its environment line says there.
    """
    for entry, line in found:
        workshop.store.adopt(entry, line)


def made(workshop: Workshop, recipe: Recipe, measure: Measure) -> Made:
    """In another process: the answers about one model that the first one does not have.

    Args:
        workshop: with the answers that there are.
        recipe: of the model.
        measure: asks everything that is to be known of it.
    """
    before = workshop.store.entries
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "answers.jsonl") as answers:
        answers.know(workshop.store)
        measure(dc.replace(workshop, answers=answers).trained(recipe))
        new = [entry for key, entry in answers.entries.items() if entry is not before.get(key)]
        return [(entry, answers.environments[entry.environment]) for entry in new]


_here: tuple[Workshop, Measure] | None = None  # of a process of the pool


def _begin(workshop: Workshop, measure: Measure, threads: int) -> None:
    global _here
    torch.set_num_threads(threads)
    _here = workshop, measure


def _measured(recipe: Recipe) -> tuple[Recipe, Made]:
    assert _here is not None
    workshop, measure = _here
    return recipe, made(workshop, recipe, measure)
