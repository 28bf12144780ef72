"""Every softmax over a product of two activations: each belongs to a captured block, or the result says why not."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lipbounds.capture import operations as ops
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.records import Function, Origin
from lipbounds.capture.refusals import function_name
from lipbounds.capture.replay import MOVES_AND_CASTS, tensors_in


# Behind these lies another function, whose own products are no logits.
MAPS = ops.SOFTMAX | ops.LOG_SOFTMAX | ops.EXP | ops.FUSED_ATTENTION | ops.MULTI_HEAD_ATTENTION
BEHIND = ops.PROJECTION | ops.NORMALIZE | ops.RMS_NORM | ops.SOFTMAX | ops.FUSED_ATTENTION | ops.MULTI_HEAD_ATTENTION


@dc.dataclass(eq=False)
class Site:
    """One softmax.

    Args:
        module: that was running.
        function: that made it, as the user wrote it.
        order: of its call among all calls of attention.
        met: the function that its result was last seen going into.
        done: it belongs to a block, or was reported.
        summed: it is a softmax, or exponentials that went into a sum or a product of matrices; those that state-space
            models take of products do not.
    """

    module: str
    function: str
    order: int
    met: str = ""
    done: bool = False
    summed: bool = False


class Sites:
    """Notes each softmax of a run that is an attention map, by whatever name."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._by_logits: dict[int, Site] = {}
        self._maps: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def hear(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, order: int
    ) -> None:
        """Take note of a call: a softmax, or one that a map goes into.

        Args:
            function: what was called.
            args: its positional arguments.
            kwargs: its keyword arguments.
            result: what it gave.
            order: of a call of attention that would be made now.
        """
        for tensor in tensors_in(args, kwargs) if len(self._maps) else ():
            site = self.of_map(tensor)
            if site is not None:
                site.met = function_name(self._recorder.written or function)
                site.summed = site.summed or function in ops.SUM | ops.ANY_PRODUCT
        if function in ops.SOFTMAX | ops.LOG_SOFTMAX | ops.EXP and isinstance(result, Tensor):
            (logits, *_) = tensors_in(args, kwargs)
            if not over_two_activations(self._recorder.origin(logits)):
                return
            name = function_name(self._recorder.written or function)
            number = self._recorder.number(logits)
            site = self._by_logits.setdefault(number, Site(self._recorder.module, name, order))
            site.summed = site.summed or function not in ops.EXP
            self._maps[result] = site

    def of_map(self, tensor: Tensor) -> Site | None:
        """The softmax that `tensor` is, apart from moves of its entries; None if it is none over two activations."""
        return self._maps.get(self._recorder.trace_back(tensor, MOVES_AND_CASTS)[0])

    def left(self) -> list[Site]:
        """Those that nobody reported, in the order of the run."""
        return [site for site in self._by_logits.values() if not site.done and site.summed]


def over_two_activations(origin: Origin | None) -> bool:
    """Whether a tensor is a product of two activations, apart from what is done entry by entry.

    Scores of which a projection made as many others, as talking heads do, count: products of matrices that hold no map.
    """
    if origin is None:
        return False
    return _finds(origin, BEHIND, _mixes) or _finds(origin, BEHIND - ops.PROJECTION, _scores, origin.size)


def _finds(
    origin: Origin, behind: frozenset[Function], wanted: Callable[[Origin], bool], size: int | None = None
) -> bool:
    """Whether something wanted is among what a tensor was computed from.

    Args:
        origin: of the tensor.
        behind: functions behind which nothing is looked for.
        wanted: tells what is.
        size: the number of entries of all that is looked at; None for any.
    """
    waiting, seen = [origin], {origin}
    while waiting:
        one = waiting.pop()
        if not one.floating or (size is not None and one.size != size):
            continue
        if wanted(one):
            return True
        if one.function in behind:
            continue
        fresh = [parent for parent in one.parents if parent not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return False


def _scores(origin: Origin) -> bool:
    """Whether it is a product of two matrices of activations, neither of them made of a map."""
    if origin.attends or origin.function not in ops.ANY_PRODUCT or origin.activations < 2:
        return False
    return not any(_finds(parent, BEHIND, _is_map) for parent in origin.parents)


def _is_map(origin: Origin) -> bool:
    return origin.function in MAPS


def _mixes(origin: Origin) -> bool:
    if origin.function in ops.ANY_PRODUCT and origin.activations > 1:
        return True
    if origin.function not in ops.SUM | ops.MEAN:
        return False
    return any(parent.function in ops.MULTIPLY and parent.activations > 1 for parent in origin.parents)
