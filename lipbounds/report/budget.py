"""Which layers get the costly bounds: the most fragile ones, as far as a fixed number of operations goes.

`sharp` and `sharp_ball` are the tightest proved bounds, and take seconds to minutes a layer. A report has a budget for
each input, in floating-point operations, so that the same report comes out on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lipbounds.bounds.sharp import sharp_work
from lipbounds.bounds.sharp_ball import sharp_ball_work
from lipbounds.registry import get
from lipbounds.report.evaluation import Plan, Stage, costly_stages, is_large
from lipbounds.report.layer import LayerWork
from lipbounds.targets.attention import Attention


WORK: dict[str, Callable[[Attention], int]] = {"sharp": sharp_work, "sharp_ball": sharp_ball_work}
BUDGET = 5e10  # floating-point operations: two to three seconds of one core in float64
LARGEST = 2.5e11  # of the most fragile layer for `sharp`, which the sentence at the top names


def within_budget(layers: Sequence[LayerWork], plan: Plan) -> list[tuple[LayerWork, Stage]]:
    """The costly stages of the layers of one input, in the order in which they are to be computed.

    What is left out is noted in the layer.

    Args:
        layers: with the numbers of the cheap stages.
        plan: what is wanted.
    """
    order = sorted(layers, key=lambda layer: -layer.size)
    left, sharp, sharp_ball = BUDGET, set[LayerWork](), set[LayerWork]()
    for layer in order if plan.sharp else ():
        if _work("sharp", layer) <= (left if sharp else LARGEST):
            sharp.add(layer)
            left -= _work("sharp", layer)
    for layer in order if plan.sharp_ball and plan.radii else ():
        if not any(map(is_large, layer.items)) and _work("sharp_ball", layer) <= max(left, 0):
            sharp_ball.add(layer)
            left -= _work("sharp_ball", layer)
    chosen: list[tuple[LayerWork, Stage]] = []
    for layer in order:
        stages = costly_stages(plan, sharp=layer in sharp, sharp_ball=layer in sharp_ball, direct=layer is order[0])
        chosen += [(layer, stage) for stage in stages]
        if plan.sharp and layer not in sharp:
            layer.note(_left_out("sharp", "bound at a point", layer))
        if plan.sharp_ball and plan.radii and layer not in sharp_ball:
            layer.note(_left_out("sharp_ball", "bound on a ball", layer))
    names = [stage.name for stage in costly_stages(plan)]
    return sorted(chosen, key=lambda job: names.index(job[1].name))  # the smallest ball of all layers first


def _work(name: str, layer: LayerWork) -> int:
    """Operations of a costly bound; none where it does not cover the block, which its stage then says."""
    return sum(WORK[name](item) for item in layer.items if not get(name).missing_features(item))


def _left_out(name: str, what: str, layer: LayerWork) -> str:
    if not _work(name, layer):  # a block too large for the differentials that are counted
        long = "it takes half a minute or more at a block of this size"
        return f"{name}, the tightest proved {what}, was left out: {long}; --bounds {name} computes it"
    return (
        f"{name}, the tightest proved {what}, was left out: it takes {_work(name, layer):.1e} floating-point "
        f"operations here, and the layers of an input share {BUDGET:.0e}, the most fragile first; --bounds {name} "
        "computes it"
    )
