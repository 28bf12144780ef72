"""Running a model once to capture its attention blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lipbounds.capture.blocks import Captured, CrossMoves
from lipbounds.capture.collector import Collector, OnUnsupported
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import transform_error
from lipbounds.capture.repeat import check_repeats
from lipbounds.capture.replay import tensors_in
from lipbounds.errors import InvalidInput, Unsupported


def capture(
    model: nn.Module,
    *args: Any,
    cross_moves: CrossMoves = "query",
    on_unsupported: OnUnsupported = "raise",
    check: bool = False,
    **kwargs: Any,
) -> Captured:
    """The attention blocks of `model` at the given inputs, complete with weights, in the order of their calls.

    The model is run once. Each block is recomputed from what was captured and compared with what the model computed.
    Attention is found in calls of `scaled_dot_product_attention`, in `nn.MultiheadAttention` (also inside
    `nn.TransformerEncoderLayer`) and where it is written out as `softmax(scale * q @ k.T + mask) @ v`. Self-attention
    is told from cross-attention by the values: queries, keys and values projected from equal tokens. Rotary positions
    and QK-norm are read off the steps between projection and attention, in whatever layout these have. A captured block
    ends with its output projection; a bias that is added in a separate call afterwards is not part of it.

    Args:
        model: any module whose forward method is plain torch; in eval mode.
        *args: its inputs. A batch gives blocks with batch dimensions.
        cross_moves: the input that the Lipschitz constant of cross-attention is about, the other one being fixed.
        on_unsupported: `raise` for the first attention that `Attention` cannot express, or `skip` such attention and
            list it, with reasons, in `skipped` of the result.
        check: also run the model twice more, at the same input and at one a little beside: each block must be what the
            model computes there too (lipbounds.capture.repeat). It takes three times as long.
        **kwargs: its keyword inputs.

    Returns:
        One entry a call. Tensors carry gradients if gradients are enabled where this is called; the model's own
        tensors are copied.

    Raises:
        Unsupported: a block that `Attention` cannot express, such as one with capped logits, or no block at all; with
            `check=True`, a block that is not what the model computes when it is run again.
        InvalidInput: dropout that is active; a query that sees no key; inference mode.
    """
    _check(model, cross_moves, on_unsupported)
    recorder = Recorder(model)
    collector = Collector(recorder, cross_moves, on_unsupported)
    for tensor in tensors_in(args, kwargs):
        recorder.origin(tensor)
    try:
        with _watched(model, recorder, collector):
            model(*args, **kwargs)
    except Exception as error:
        if type(error).__module__.startswith("torch._dynamo"):  # flex_attention compiles what it runs
            raise transform_error(next(iter(recorder.just_left), ""), error.__traceback__) from error
        raise
    found = collector.result()
    if check:
        again = functools.partial(capture, model, cross_moves=cross_moves, on_unsupported=on_unsupported)
        check_repeats(found, again, model, args, kwargs)
    return found


def _check(model: nn.Module, cross_moves: str, on_unsupported: str) -> None:
    """Refuse options that are none, and compiled modules, whose calls are not seen."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model must be a torch.nn.Module, got {type(model).__name__}; wrap the function in one.")
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise InvalidInput("model must not be compiled, got one made by torch.compile; pass the module it was made of.")
    if torch.is_inference_mode_enabled():
        raise InvalidInput("capture cannot follow tensors under torch.inference_mode(); use torch.no_grad() instead.")
    if cross_moves not in ("query", "memory"):
        raise InvalidInput(f"cross_moves must be 'query' or 'memory', got {cross_moves=}.")
    if on_unsupported not in ("raise", "skip"):
        raise InvalidInput(f"on_unsupported must be 'raise' or 'skip', got {on_unsupported=}.")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(
                f"the model must be plain torch, but its module {name!r} was made by torch.jit.script or trace, whose "
                "calls are not seen; put the module it was made of in its place."
            )


@contextmanager
def _watched(model: nn.Module, recorder: Recorder, collector: Collector) -> Iterator[None]:
    """Record what happens inside, with the fused encoder layer of torch, which hides its attention call, turned off."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    handles = recorder.watch(model, collector.left_module)
    recorder.listener = collector
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with recorder:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
