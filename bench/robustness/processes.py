"""The models of a profile in several processes: each model is trained, measured and attacked in one of them.

Every answer is one write at the end of the file they share, so that a run that is killed goes on as one process would.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.engine.answers import Answers
from bench.robustness.settings import Recipe
from bench.robustness.training import Trained, Workshop


Measure = Callable[[Trained], object]


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
    before, made = workshop.answers, 0
    # Each gets the answers that there are: the file may end in half a line while another writes.
    initial = (workshop, measure, threads)
    with multiprocessing.get_context("spawn").Pool(jobs, _begin, initial) as pool:
        for recipe, count in pool.imap_unordered(_measured, recipes, chunksize=1):
            made += count
            yield recipe
    workshop.answers, workshop.force = Answers(before.path), False
    workshop.answers.made = before.made + made
    workshop.answers.reused = before.reused - made  # each of them is taken once more


_here: tuple[Workshop, Measure] | None = None  # of a process of the pool


def _begin(workshop: Workshop, measure: Measure, threads: int) -> None:
    global _here
    torch.set_num_threads(threads)
    _here = workshop, measure


def _measured(recipe: Recipe) -> tuple[Recipe, int]:
    assert _here is not None
    workshop, measure = _here
    before = workshop.answers.made
    measure(workshop.trained(recipe))
    return recipe, workshop.answers.made - before
