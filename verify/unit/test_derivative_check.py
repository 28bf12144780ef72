"""Functions whose gradient is not their derivative are refused; ordinary models are not, whatever their dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lipbounds.errors import Unsupported
from lipbounds.estimators.whole_model import whole_model_constant
from lipbounds.targets.derivative_check import check_derivative
from lipbounds.targets.module_copy import module_copy
from lipbounds.targets.network import Network


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return -0.1 * grads[0]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class Hooked(nn.Module):
    """A layer that scales the gradient which flows through it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: 0.01 * gradient)
        return y


class ModuleHook(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.Tanh())
        self[0].register_full_backward_hook(lambda _module, grads, _outputs: (2 * grads[0],))


class OneItem(nn.Module):
    """Wrong for the second item of a batch alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[0] * x[0], x[1] * x[1].detach()])


class Apply(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x))


def frozen_half(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        gate = x.sigmoid()
    return x * gate


WRONG: dict[str, Callable[[], nn.Module]] = {
    "gradient reversal": lambda: Apply(lambda x: Reversed.apply(x.tanh())),
    "detach on a factor": lambda: Apply(lambda x: x * x.detach()),
    "no_grad on a part": lambda: Apply(frozen_half),
    "hook on a tensor": Hooked,
    "hook on a module": ModuleHook,
    "one item of the batch": OneItem,
    "rounding": lambda: Apply(lambda x: StraightThrough.apply(8 * x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_gradient_that_is_no_derivative_is_refused(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = WRONG[name]().to(dtype).eval()
    x = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]], dtype=dtype)
    with pytest.raises(Unsupported, match="must be the derivative"):
        whole_model_constant(module, x)
    if name != "rounding" or dtype == torch.float64:  # where all moves of float32 cross many steps, or none at all
        with pytest.raises(Unsupported, match="must be the derivative"):
            Network(module, x, batch_dims=1).forward()


def active_dropout(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x, 0.5)  # training=True is its default, whatever the module says


@pytest.mark.parametrize("name", ["module", "function", "noise"])
def test_two_runs_that_differ_are_refused(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)
    function = {
        "module": Apply(active_dropout),
        "function": active_dropout,
        "noise": lambda z: z + 1e-6 * torch.randn_like(z),
    }[name]
    with pytest.raises(Unsupported, match="same output whenever"):
        whole_model_constant(function, x)
    with pytest.raises(Unsupported, match="same output whenever"):
        Network(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)).double(), x).forward()


class KeepsMaps(nn.Module):
    """Keeps results that gradients flow through, and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(6, 6), torch.full((6,), 2.0)
        self.maps: dict[str, list[torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(x).tanh()
        self.maps["all"] = [*self.maps.get("all", []), self.last]
        return self.last * self.factor


def pruned() -> nn.Module:
    module = nn.Linear(6, 6)
    prune.l1_unstructured(module, "weight", 0.3)
    return module


COPIED: dict[str, Callable[[], nn.Module]] = {
    "keeps maps": KeepsMaps,
    "weight norm": lambda: weight_norm(nn.Linear(6, 6)),
    "spectral norm": lambda: spectral_norm(nn.Linear(6, 6)),
    "parametrised weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "parametrised spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COPIED)
def test_models_that_deepcopy_refuses_are_measured(name: str) -> None:
    torch.manual_seed(0)
    module, x = COPIED[name](), torch.randn(1, 6)
    module(x)  # as in training: weights and maps with a gradient hang on the module now
    module.eval()
    jacobian = torch.autograd.functional.jacobian(module, x).reshape(-1, 6).double()
    result = whole_model_constant(module, x)
    assert float(result.value) == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-5)
    assert bool(result.details["derivative_checked"].all())
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_a_module_that_cannot_be_copied_is_named() -> None:
    module = nn.Linear(3, 3)
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(Unsupported, match=r"got Linear, which raised TypeError: cannot pickle.*pass a function"):
        whole_model_constant(module, torch.ones(1, 3))


def test_rms_norm_without_eps_is_measured_as_the_model_runs_it() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.RMSNorm(8, elementwise_affine=False))
    with torch.no_grad():
        module[0].weight.mul_(1e-3)
    x = 1e-3 * torch.randn(1, 8)
    eps, weight = torch.finfo(torch.float32).eps, module[0].weight.detach().double()
    jacobian = torch.autograd.functional.jacobian(
        lambda z: nn.functional.rms_norm(z @ weight.mT, (8,), eps=eps), x.double()
    )
    truth = float(torch.linalg.matrix_norm(jacobian.reshape(8, 8), 2))
    assert float(whole_model_constant(module, x).value) == pytest.approx(truth, rel=1e-9)
    assert module[1].eps is None


class OtherInDouble(nn.Module):
    """A function of its own in each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (100.0 if x.dtype == torch.float64 else 1.0)


class OnlySingle(nn.Module):
    """Makes a constant of its own dtype, which a copy in float64 does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ torch.ones(3, 3)


def test_a_module_that_is_another_function_in_float64_is_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3)
    with pytest.raises(Unsupported, match="layers whose function changes with the dtype"):
        whole_model_constant(OtherInDouble(), x)
    assert float(whole_model_constant(OtherInDouble().double(), x.double()).value[0]) > 0
    with pytest.raises(Unsupported, match="must run on x in float64, got RuntimeError"):
        whole_model_constant(OnlySingle(), x)


def network(depth: int, act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), *(part for _ in range(depth) for part in (act(), nn.Linear(64, 64))))


ORDINARY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu, wide": (lambda: nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 5)), (2, 16)),
    "relu, deep": (lambda: network(12, nn.ReLU), (2, 16)),
    "leaky": (lambda: network(3, nn.LeakyReLU), (2, 16)),
    "hardswish": (lambda: network(3, nn.Hardswish), (2, 16)),
    "pools": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 3),
            nn.AdaptiveMaxPool2d(1),
        ),
        (2, 3, 12, 12),
    ),
    "norms": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4), nn.ReLU(), nn.GroupNorm(2, 4)),
        (2, 3, 9),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        (2, 4, 16),
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_not_refused(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = ORDINARY[name]
    module = make().to(dtype).eval()
    inputs = {
        "random": torch.randn(shape),
        "zero": torch.zeros(shape),  # kinks of pools, and no size to measure a step by
        "flat": torch.full(shape, 0.5),
        "large": 100 * torch.randn(shape),
        "small": 1e-4 * torch.randn(shape),
    }
    wide, own = module_copy(module, torch.float64), module_copy(module)
    for kind, x in inputs.items():
        given = Network(wide, x.to(dtype).double(), batch_dims=1)
        if dtype == torch.float64:
            assert bool(given.derivative_checked.all()) or kind in ("zero", "flat"), kind
        else:
            v = torch.randn(shape)
            check_derivative(own, x.to(dtype), v, given.jvp(v.double()), batch_dims=1)


def test_what_cannot_be_told_is_said() -> None:
    """At the kink of |x| the gradient is that of neither side."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert Network(torch.relu, x, batch_dims=1).derivative_checked.tolist() == [False, True]
    result = whole_model_constant(torch.relu, x)
    assert result.details["derivative_checked"].tolist() == [False, True]
