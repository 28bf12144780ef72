"""The sharp bound as a penalty in training: an estimate of `sharp_cheap` at layers and inputs drawn at each step.

`sharp_estimate` is the formula of `sharp_cheap` in the dtype of the block, without rounding and with norms as found: no
bound, as a penalty need not be one. The bound itself has a gradient, too: `lipbounds.bounds.sharp_cheap(block,
grad=True)`, in float64, at many times the price. Each step takes the mean over layers and inputs that are drawn with
equal probability, which is an unbiased estimate of the mean over all, as the loss of a batch is of that of a data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipbounds.capture.run import capture
from lipbounds.derivatives.first.sharp_estimate import sharp_estimate as sharp_estimate
from lipbounds.errors import InvalidInput
from lipbounds.targets._attention_checks import TRAILING
from lipbounds.targets.attention import Attention


Call = tuple[tuple[Any, ...], dict[str, Any]]


class SharpPenalty:
    """Mean of `sharp_estimate` over some attention layers and inputs, drawn anew whenever the `with` block is entered.

        with SharpPenalty(layer.attention for layer in model.layers) as reg:
            loss = task_loss(model(inputs), targets) + weight * reg.penalty()

    It is an estimate and no bound. The layers that were drawn run once more, in evaluation mode, at the inputs that
    they had in the model; its gradient reaches their weights and all that came before them.

    Args:
        modules: each with one attention block that `lipbounds.capture` finds, and whose first argument is its input.
        layers: how many of them are drawn.
        inputs: how many inputs of the batch are drawn; None for all. A layer runs at these alone where its first
            argument is its only one with an axis of the batch, which comes first; else at all, and they are drawn from
            what it had.
        generator: that draws; None for the default one.

    Raises:
        InvalidInput: there are no modules, or fewer than `layers`, or a number is below 1.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        layers: int = 1,
        inputs: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.modules = list(modules)
        if not 1 <= layers <= len(self.modules):
            raise InvalidInput(f"layers must be from 1 to the number of modules, {len(self.modules)}, got {layers=}.")
        if inputs is not None and inputs < 1:
            raise InvalidInput(f"inputs must be at least 1 or None, got {inputs=}.")
        self.layers, self.inputs, self.generator = layers, inputs, generator
        self._place = torch.device("cpu") if generator is None else generator.device
        self.drawn: list[int] = []
        self._calls: dict[int, Call] = {}
        self._measuring = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> SharpPenalty:
        self._calls = {}
        self.drawn = self._order(len(self.modules))[: self.layers].tolist()
        for index in self.drawn:
            hook = partial(self._keep, index)
            self._handles.append(self.modules[index].register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls = {}
        while self._handles:
            self._handles.pop().remove()

    def penalty(self) -> Float[Tensor, ""]:
        """The mean over the layers and inputs that were drawn, at the last forward pass of the model.

        Raises:
            InvalidInput: a layer that was drawn did not run, or has not exactly one attention block.
            Unsupported: its attention is none that `sharp_estimate` takes.
        """
        self._measuring = True  # the layers run again below, at inputs that are no call of the model
        try:
            found = [self._of_layer(index) for index in self.drawn]
        finally:
            self._measuring = False
        return torch.stack(found).mean()

    def _keep(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if not self._measuring:
            self._calls[index] = (args, kwargs)

    def _of_layer(self, index: int) -> Float[Tensor, ""]:
        if index not in self._calls:
            raise InvalidInput(
                f"modules[{index}] must run inside the `with` block before penalty() is called; run the model first, "
                "and give modules of that model."
            )
        call = self._calls[index]
        few = self._drawn_from(*call)
        block = self._block(index, *(few or call))
        # As many tokens as inputs were drawn: the first axis was that of the tokens.
        if few is not None and block.tokens == self.inputs:
            few, block = None, self._block(index, *call)
        return sharp_estimate(block if few else self._drawn_of(block)).mean()

    def _block(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attention:
        with _evaluated(self.modules[index]) as module:
            blocks = list(capture(module, *args, **kwargs))
        if len(blocks) != 1:
            raise InvalidInput(f"modules[{index}] must have one attention block, got {len(blocks)}; give each its own.")
        return blocks[0].attention

    def _order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator, device=self._place)

    def _drawn_from(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call with some of the inputs alone; None where all are wanted, or which axis they have is not certain.

        Beside the first argument a tensor as long as the batch may be a mask of as many tokens, and one that is a
        multiple of it a mask of all heads and inputs; only the block that is captured tells.
        """
        given = [*args, *kwargs.values()]
        first = next((each for each in given if isinstance(each, Tensor)), None)
        if self.inputs is None or first is None or first.dim() < 3 or self.inputs >= len(first):
            return None
        beside = [each for each in _tensors(given) if each is not first and each.dim()]
        if self.inputs == first.shape[1] or any(len(each) and len(each) % len(first) == 0 for each in beside):
            return None
        rows = self._order(len(first))[: self.inputs].to(first.device)

        def some(value: Any) -> Any:
            return first[rows] if value is first else value

        return tuple(some(each) for each in args), {name: some(each) for name, each in kwargs.items()}

    def _drawn_of(self, block: Attention) -> Attention:
        """The block at some of its inputs."""
        shape = block.batch_shape
        if self.inputs is None or not shape or self.inputs >= shape[0]:
            return block
        rows = self._order(shape[0])[: self.inputs].to(block.device)
        fields = {name: getattr(block, name) for name in TRAILING}
        leading = {name: value.shape[: -TRAILING[name]] for name, value in fields.items() if value is not None}
        batched = [name for name, own in leading.items() if len(own) == len(shape) and own[0] == shape[0]]
        return block.replace(**{name: fields[name][rows] for name in batched})


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the values, and in tuples, lists and dictionaries among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode, and each part as it was afterwards."""
    parts = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield module
    finally:
        for part in parts:
            part.training = True
