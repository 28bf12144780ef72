"""The attention blocks of a model at its inputs, each loaded when it is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bench.workloads.case import Case
from lipbounds.targets.attention import Attention


def captured(
    name: str,
    model: Callable[[], nn.Module],
    model_hash: str,
    inputs: Iterable[tuple[str, str, Callable[[nn.Module], Any]]],
    layers: Sequence[int],
    **known: Any,
) -> Iterator[Case]:
    """The blocks of a model at inputs of batch size 1, in float64.

    Args:
        name: of the model.
        model: gives it, in evaluation mode.
        model_hash: of its weights.
        inputs: name and content hash of each input, and a function that runs the capture of a model on it.
        layers: numbers of the blocks that are wanted.
        **known: what is known of all blocks: `width` and `block_features`.
    """
    for identity, input_hash, run in inputs:
        # The blocks of one input are captured together, when the first of them is needed.
        blocks = functools.lru_cache(maxsize=1)(functools.partial(_blocks, model, run))
        for layer in layers:
            yield Case(
                model=name,
                model_hash=model_hash,
                input=identity,
                input_hash=input_hash,
                layer=layer,
                load=functools.partial(_block, blocks, layer),
                **known,
            )


@torch.no_grad()
def _blocks(model: Callable[[], nn.Module], run: Callable[[nn.Module], Any]) -> dict[int, Any]:
    return {found.index: found for found in run(model())}


def _block(blocks: Callable[[], dict[int, Any]], layer: int) -> tuple[str, Attention]:
    found = blocks()[layer]
    return found.module, single(found.attention).double


def single(block: Attention) -> Attention:
    """A block with one batch item, without its batch dimension."""
    fields = {"x": 2, "memory": 2, "logit_bias": 3}
    present = {name: (getattr(block, name), dims) for name, dims in fields.items() if getattr(block, name) is not None}
    return block.replace(**{name: tensor.reshape(tensor.shape[-dims:]) for name, (tensor, dims) in present.items()})
