"""The models of a profile on a Ray cluster: each model is trained, measured and attacked by one worker.

The driver alone writes: what a worker answers comes back when its model is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.robustness.processes import Measure, keep, made
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
    shared, waiting, lost = cluster.share(workshop), list(recipes), list[str]()
    while waiting or cluster.busy:
        while waiting and cluster.room:
            recipe = waiting.pop(0)
            cluster.submit(recipe, made, shared, recipe, measure)
        recipe, found = cluster.finished()
        if isinstance(found, Lost):
            lost.append(f"{recipe.setting}, seed {recipe.seed} ({found.reason})")
            continue
        keep(workshop, found)
        yield recipe
    workshop.force = False
    if lost:
        raise ClusterError(
            f"each model must come back from its worker, got none of {'; '.join(lost)}; run the same command again: "
            "all others are in the records."
        )
