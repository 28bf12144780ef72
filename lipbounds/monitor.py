"""The constants of the attention layers of a model while it is trained."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lipbounds.capture import capture
from lipbounds.errors import InvalidInput
from lipbounds.registry import BoundSpec, get


BOUND = "sharp_fast"
LOWER_STEPS = 15  # of power iteration: close from below within a few per cent, at the cost of as many passes


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class LayerConstants:
    """What is known of one attention layer at one training step; the largest over the batch items.

    Args:
        step: of the training.
        layer: the number of the attention call, from 0.
        module: that made the call.
        lower: a lower bound of the local Lipschitz constant in l2, at the inputs that are watched.
        upper: a proved bound of the same; None at steps where it was not computed.
        bound: the name of that bound.
    """

    step: int
    layer: int
    module: str
    lower: float
    upper: float | None
    bound: str


class LipschitzMonitor:
    """Follows the local Lipschitz constants of the attention layers of a model while it is trained.

        monitor = LipschitzMonitor(model, images[:4], every=10, upper_every=100)
        for step, batch in enumerate(loader):
            ...
            monitor.step(step)
        monitor.history  # LayerConstants of all steps; monitor.last of the latest one

    The model is run on inputs of its own, in evaluation mode and without gradients, so that the numbers of all steps
    are about the same points; its mode and the random state of training are as before afterwards. Every number is about
    one attention block with its output projection, at those inputs, in l2: a lower bound at each step that is watched,
    and a proved upper bound at some of them. The constants of other inputs may be larger.

    It is also a callback for the Trainer of Hugging Face: `Trainer(..., callbacks=[monitor.callback()])`.

    Args:
        model: the model that is trained.
        *inputs: a small batch that it is run on.
        every: steps from one measurement to the next.
        upper_every: steps from one upper bound to the next; a multiple of `every`. None: no upper bound.
        bound: the name of the upper bound; proved, at a point, in l2.
        tell: called with the list of `LayerConstants` of each measurement, such as a logger.
        **keywords: keyword inputs of the model.

    Raises:
        InvalidInput: a number of steps is below 1; `upper_every` is no multiple of `every`; a bound of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        *inputs: Any,
        every: int = 1,
        upper_every: int | None = 100,
        bound: str | BoundSpec = BOUND,
        tell: Callable[[list[LayerConstants]], None] | None = None,
        **keywords: Any,
    ) -> None:
        spec = get(bound) if isinstance(bound, str) else bound
        if (spec.claim.kind, spec.claim.scope, spec.claim.norm) != ("proved", "point", "l2"):
            raise InvalidInput(f"bound must be proved, at a point and in l2, got {spec!r}.")
        if every < 1 or (upper_every is not None and (upper_every < 1 or upper_every % every)):
            raise InvalidInput(
                f"every must be at least 1 and upper_every a multiple of it, got {every=} and {upper_every=}."
            )
        self.model, self.inputs, self.keywords = model, inputs, keywords
        self.every, self.upper_every, self.spec, self.tell = every, upper_every, spec, tell
        self.history: list[LayerConstants] = []

    @property
    def last(self) -> list[LayerConstants]:
        """The constants of the latest measurement; empty before the first."""
        return [one for one in self.history if one.step == self.history[-1].step]

    def step(self, step: int) -> list[LayerConstants]:
        """Measure, if this step is one that is watched; call it after the optimiser.

        Args:
            step: the number of the training step, from 0.

        Returns:
            The constants of each layer; empty at a step that is not watched.

        Raises:
            Unsupported: no attention is found, or one that `capture` cannot express.
        """
        if step % self.every:
            return []
        with_upper = self.upper_every is not None and step % self.upper_every == 0
        found = self.measure(step, with_upper=with_upper)
        self.history += found
        if self.tell is not None:
            self.tell(found)
        return found

    def measure(self, step: int = 0, *, with_upper: bool = True) -> list[LayerConstants]:
        """The constants of each layer as the model is now, without keeping them.

        Args:
            step: the number they are given.
            with_upper: compute the upper bound, too.

        Raises:
            Unsupported: no attention is found, or one that `capture` cannot express.
        """
        with _as_before(self.model), torch.no_grad():
            self.model.eval()
            blocks = capture(self.model, *self.inputs, **self.keywords)
            lower = get("power_iteration")
            return [
                LayerConstants(
                    step=step,
                    layer=block.index,
                    module=block.module,
                    lower=float(lower(block, steps=LOWER_STEPS).value.max()),
                    upper=float(self.spec(block).value.max()) if with_upper else None,
                    bound=self.spec.name,
                )
                for block in blocks
            ]

    def callback(self) -> Any:
        """A `transformers.TrainerCallback` that measures at the end of steps and adds the numbers to the logs.

        The largest constant of each measurement is logged as `lipschitz/lower` and `lipschitz/upper`.
        """
        from transformers import TrainerCallback

        monitor = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                monitor.step(state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if logs is not None and monitor.history:
                    logs |= monitor.summary()

        return Callback()

    def summary(self) -> dict[str, float]:
        """The largest constants of the latest measurement, for loggers; empty before the first."""
        last = self.last if self.history else []
        uppers = [one.upper for one in last if one.upper is not None]
        found = {"lipschitz/lower": max(one.lower for one in last)} if last else {}
        return found | ({"lipschitz/upper": max(uppers)} if uppers else {})


@contextmanager
def _as_before(model: nn.Module) -> Any:
    """The mode of every module, and the random state, are afterwards what they were."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
