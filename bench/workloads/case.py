"""One attention block of one model at one input: where a bound is evaluated."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property

from lipbounds.claims import Feature
from lipbounds.targets.attention import Attention


DTYPE = "float64"  # of all blocks


@dc.dataclass(kw_only=True, eq=False)
class Case:
    """One attention block of one model at one input; captured when something has to be computed with it.

    Args:
        model: name of the model.
        model_hash: content hash of its weights, or of the recipe of weights that are drawn.
        input: name of the input.
        input_hash: content hash of the raw input, or of the recipe of an input that is drawn.
        layer: number of the block among those of the model, from 0.
        load: gives the name of the module, or what else tells the blocks apart, and the block, without batch
            dimensions, in float64.
        width: number of entries of a token, of the input and the output alike; 0 where the block has to tell.
        block_features: features of the block; None where the block has to tell.
        known_tokens: number of tokens, where records have it; 0 where the block has to tell.
    """

    model: str
    model_hash: str
    input: str
    input_hash: str
    layer: int
    load: Callable[[], tuple[str, Attention]]
    width: int = 0
    block_features: frozenset[Feature] | None = None
    known_tokens: int = 0

    @cached_property
    def _loaded(self) -> tuple[str, Attention]:
        return self.load()

    @property
    def block(self) -> Attention:
        """The block."""
        return self._loaded[1]

    @property
    def module(self) -> str:
        """The name of its module."""
        return self._loaded[0]

    @property
    def features(self) -> frozenset[Feature]:
        """The features of the block."""
        return self.block.features if self.block_features is None else self.block_features

    @property
    def size(self) -> int:
        """The larger side of the Jacobian: the number of entries of the input or of the output."""
        if self.known_tokens and self.width:
            return self.known_tokens * self.width
        return max(self.numbers, self.block.tokens * self.block.w_o.shape[-1])

    @property
    def numbers(self) -> int:
        """Number of entries of the input."""
        return self.known_tokens * self.width if self.known_tokens and self.width else self.block.moving_input.numel()

    def release(self) -> None:
        """Forget the block; it is captured again if it is needed once more."""
        self.__dict__.pop("_loaded", None)
