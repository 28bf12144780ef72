"""One attention block of one model at one input: where a bound is evaluated."""

from __future__ import annotations

import dataclasses as dc

from lipbounds.targets.attention import Attention


@dc.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention block of one model at one input.

    Args:
        model: name of the model.
        model_hash: content hash of its weights.
        input: name of the input.
        input_hash: content hash of the input.
        layer: number of the block among those of the model, from 0.
        module: qualified name of the module, or what else tells the blocks apart.
        block: the block, without batch dimensions, in the dtype to be bounded in.
    """

    model: str
    model_hash: str
    input: str
    input_hash: str
    layer: int
    module: str
    block: Attention
