"""The models of a profile on a Ray cluster: each model is trained, measured and attacked by one worker.

The driver alone writes: what a worker answers comes back when its model is done.
"""

from __future__ import annotations

import dataclasses as dc
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.engine.answers import Answer, Answers
from bench.robustness.processes import Measure
from bench.robustness.settings import Recipe
from bench.robustness.training import Workshop
from lipbounds.cluster import Cluster, ClusterError, Lost


def answered_on(cluster: Cluster, workshop: Workshop, recipes: Sequence[Recipe], measure: Measure) -> Iterator[Recipe]:
    """Make all answers about these models that are missing; yields each model whose answers are complete.

    Args:
        cluster: where models are trained and attacked.
        workshop: where answers go; at the end it holds all of them, and makes none of them anew. Weights go to its
            folder on the worker, which nodes may share.
        recipes: of the models.
        measure: asks everything that is to be known of a model; a function of a module or a partial of one.

    Raises:
        ClusterError: the worker of a model died at each of its tries; all other models are done by then.
    """
    shared, waiting, lost, made = cluster.share(workshop), list(recipes), list[str](), 0
    while waiting or cluster.busy:
        while waiting and cluster.room:
            recipe = waiting.pop(0)
            cluster.submit(recipe, _made, shared, recipe, measure)
        recipe, found = cluster.finished()
        if isinstance(found, Lost):
            lost.append(f"{recipe.setting}, seed {recipe.seed} ({found.reason})")
            continue
        for answer in found:
            workshop.answers.keep(answer)
        made += len(found)
        yield recipe
    workshop.force = False
    workshop.answers.reused -= made  # each of them is taken once more
    if lost:
        raise ClusterError(
            f"each model must come back from its worker, got none of {'; '.join(lost)}; run the same command again: "
            "all others are in the records."
        )


def _made(workshop: Workshop, recipe: Recipe, measure: Measure) -> list[Answer]:
    """On a worker: the answers about one model that the driver does not have."""
    before = workshop.answers.found
    with tempfile.TemporaryDirectory() as folder:
        answers = Answers(Path(folder) / "answers.jsonl")
        answers.found = dict(before)
        # The environment is that of this worker.
        here = dc.replace(workshop, answers=answers, _environment="")
        measure(here.trained(recipe))
    return [answer for key, answer in answers.found.items() if answer is not before.get(key)]
