"""What a bound claims on many instances at once, and how its claims change: batched or not, differentiable or not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lipbounds.registry import BoundSpec
from lipbounds.testing._starts import Parameters, Setting


SMALLEST = 1e-300
PROBE = 1e-5  # finite-difference step that checks the gradient of a bound
NUDGE = 1e-3  # finite-difference step that replaces it
DIRECTIONS = 4  # random directions of that difference, where a bound takes batches


class Claims:
    """Values of one bound on a batch of instances, in the first of four ways in which the bound works.

    In turn: all at once with gradients, all at once without (a bound written in numpy raises where they are recorded),
    then one by one with and without. NaN stands for an instance that the bound refuses.
    """

    def __init__(self, spec: BoundSpec, setting: Setting) -> None:
        self.spec = spec
        self.setting = setting
        self.ways = [self._together, self._together_detached, self._one_by_one, self._one_by_one_detached]
        self.refusal: Exception | None = None

    @property
    def one_by_one(self) -> bool:
        """Whether the bound cannot take batches."""
        return self.ways[0] not in (self._together, self._together_detached)

    def values(self, parameters: Parameters) -> Float[Tensor, " count"]:
        """The claimed norms, differentiable where the bound is.

        Args:
            parameters: instances along the first axis.
        """
        fewest = torch.full_like(parameters["x"][:, 0, 0], torch.nan)
        for index, way in enumerate(self.ways):
            values = way(parameters)
            if not bool(values.isnan().any()):
                self.ways = self.ways[index:]
                return values
            if values.isnan().sum() < fewest.isnan().sum():
                fewest = values
        return fewest

    def _together(self, parameters: Parameters) -> Tensor:
        try:
            return self._value(parameters)
        except Exception as error:  # anything at all: the bound is a stranger's code
            self.refusal = error
            return parameters["x"].new_full((len(parameters["x"]),), torch.nan)

    def _one_by_one(self, parameters: Parameters) -> Tensor:
        values = []
        for i in range(len(parameters["x"])):
            try:
                values.append(self._value({name: tensor[i] for name, tensor in parameters.items()}))
            except Exception as error:
                self.refusal = error
                values.append(parameters["x"].new_full((), torch.nan))
        return torch.stack(values)

    def _together_detached(self, parameters: Parameters) -> Tensor:
        return self._together(_detached(parameters))

    def _one_by_one_detached(self, parameters: Parameters) -> Tensor:
        return self._one_by_one(_detached(parameters))

    def _value(self, parameters: Parameters) -> Tensor:
        radius = (self.setting.radius,) if self.spec.needs_radius else ()
        return self.spec(self.setting.block(parameters), *radius, grad=True).value.to(torch.float64)

    def log_values(self, parameters: Parameters) -> Float[Tensor, " count"]:
        """Logarithms of the claimed norms; a claim of 0 counts as the smallest number."""
        return self.values(parameters).clamp(min=SMALLEST).log()


def _detached(parameters: Parameters) -> Parameters:
    return {name: tensor.detach() for name, tensor in parameters.items()}


def random_signs(parameters: Parameters, generator: Generator) -> Parameters:
    """A direction of plus and minus ones in all parameters."""
    return {
        name: torch.randint(2, tensor.shape, generator=generator).to(torch.float64) * 2 - 1
        for name, tensor in parameters.items()
    }


def moved(parameters: Parameters, direction: Parameters, step: float) -> Parameters:
    """Parameters plus step times direction."""
    return {name: tensor.detach() + step * direction[name] for name, tensor in parameters.items()}


def along(gradient: Parameters, direction: Parameters) -> Float[Tensor, " count"]:
    """Inner product of gradient and direction for each instance."""
    products = [(slope * direction[name]).reshape(len(slope), -1).sum(-1) for name, slope in gradient.items()]
    return torch.stack(products).sum(0)
