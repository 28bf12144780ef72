"""Network: products with the Jacobian of stock modules, the torch settings it touches, its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lipbounds import InvalidInput
from lipbounds.errors import Unsupported
from lipbounds.estimators.exact import exact, exact_norm
from lipbounds.estimators.lanczos import lanczos_lower, lanczos_upper
from lipbounds.estimators.power import power_lower
from lipbounds.targets.network import Network
from verify.unit.blocks import random_block


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class FirstOutput(nn.Module):
    """A transformers model at its embeddings or pixels, as a function of one tensor."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(**{self.argument: x}).last_hidden_state


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "attn_implementation": "sdpa",
}


def bert() -> tuple[nn.Module, tuple[int, ...]]:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=5, **SMALL))
    return FirstOutput(model, "inputs_embeds"), (1, 3, 8)


def vit() -> tuple[nn.Module, tuple[int, ...]]:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(image_size=4, patch_size=2, **SMALL))
    return FirstOutput(model, "pixel_values"), (1, 3, 4, 4)


STOCK: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "encoder layer": lambda: (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), (1, 3, 8)),
    "encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2, enable_nested_tensor=False),
        (1, 3, 8),
    ),
    "multihead": lambda: (SelfAttention(), (1, 3, 8)),
    "bert": bert,
    "vit": vit,
}


def flags() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        torch.backends.mha.get_fastpath_enabled(),
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", STOCK)
def test_stock_modules_work_in_eval_mode(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, shape = STOCK[name]()
    module = module.eval().to(dtype)
    x = torch.randn(shape, dtype=dtype)
    # One reverse pass a row, with the kernels that torch picks itself.
    expected = torch.autograd.functional.jacobian(module, x).reshape(-1, x.numel()).double()
    # Networks run in their own dtype, and the rounding of a float32 pass is about 1e-6.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    basis = torch.eye(x.numel(), dtype=dtype).reshape(-1, *shape)
    before = flags()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            inside = flags()
            network = Network(module, x)
            by_columns = network.jvp(basis).reshape(x.numel(), -1).mT.double()
            cotangent = torch.randn(network.forward().shape, dtype=dtype)
            pulled_back = network.vjp(cotangent).flatten().double()
            assert flags() == inside
        torch.testing.assert_close(by_columns, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(pulled_back, cotangent.flatten().double() @ expected, rtol=0, atol=10 * tolerance)
    assert flags() == before
    truth = float(torch.linalg.matrix_norm(expected, 2))
    assert float(exact_norm(network)) == pytest.approx(truth, rel=tolerance)
    assert float(lanczos_lower(network)[0]) == pytest.approx(truth, rel=tolerance)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_flags_are_restored_when_the_function_fails() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("inside")

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        before = flags()
        with pytest.raises(ArithmeticError, match="inside"):
            Network(broken, torch.ones(2)).forward()
        assert flags() == before


def test_all_estimators_take_a_network_with_batch_dimensions() -> None:
    weights = draw(5, 4)
    x = draw(3, 2, 4)
    network = Network(lambda x: (x @ weights.T).tanh(), x, batch_dims=2)
    slopes = 1 - (x @ weights.T).tanh().square()
    truth = torch.linalg.matrix_norm(slopes[..., None] * weights, 2)
    for value in (
        exact_norm(network),
        lanczos_lower(network)[0],
        lanczos_upper(network)[0],
        power_lower(network, steps=300)[0],
    ):
        torch.testing.assert_close(value, truth, rtol=1e-8, atol=0)
    whole = Network(network.function, x)
    torch.testing.assert_close(exact_norm(whole), truth.max(), rtol=1e-8, atol=0)
    assert network.jvp(draw(7, 3, 2, 4)).shape == (7, 3, 2, 5)
    assert network.vjp(draw(2, 7, 3, 2, 5)).shape == (2, 7, 3, 2, 4)


def test_a_network_and_the_block_it_holds_have_the_same_norm() -> None:
    block = random_block(2, causal=True)
    network = Network(block.function(), block.x)
    torch.testing.assert_close(exact_norm(network), exact(block).value, rtol=1e-9, atol=0)


def test_certificate_of_a_network_is_above_its_norm() -> None:
    weights = draw(150, 120)
    value, terms = lanczos_upper(Network(lambda x: x @ weights.T, draw(120)))
    truth = float(torch.linalg.matrix_norm(weights, 2))
    assert truth <= float(value) <= 1.03 * truth
    assert float(terms["ritz"]) == pytest.approx(truth, rel=1e-6)


def test_network_leaves_buffers_and_weights_alone() -> None:
    module = nn.BatchNorm1d(4)
    Network(module, torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).forward()
    assert int(module.num_batches_tracked or 0) == 0
    assert bool((module.running_mean == 0).all())


def test_a_function_without_slope_has_norm_zero() -> None:
    network = Network(torch.sign, draw(4))
    assert float(exact_norm(network)) == 0
    assert float(lanczos_lower(network)[0]) == 0


class WrongBackward(torch.autograd.Function):
    """2 x with a backward pass that torch cannot follow a second time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * grads[0].detach().clone()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integer input": (lambda: Network(torch.exp, torch.ones(2, dtype=torch.long)), InvalidInput, "floating point"),
    "not a tensor": (lambda: Network(torch.exp, [1.0]), InvalidInput, "one torch tensor, got list"),  # type: ignore[arg-type]
    "nan": (lambda: Network(torch.exp, torch.tensor([1.0, torch.nan])), InvalidInput, "1 of 2 entries"),
    "empty": (lambda: Network(torch.exp, torch.ones(0, 3)), InvalidInput, "not be empty"),
    "batch dims": (lambda: Network(torch.exp, torch.ones(2), batch_dims=2), InvalidInput, "batch_dims=2"),
    "not callable": (lambda: Network(3, torch.ones(2)), InvalidInput, "callable, got int"),  # type: ignore[arg-type]
    "tuple output": (lambda: Network(lambda x: (x,), torch.ones(2)).forward(), InvalidInput, "got tuple"),  # type: ignore[arg-type]
    "nan output": (lambda: Network(torch.log, -torch.ones(2)).forward(), InvalidInput, "output of function"),
    "lost batch": (lambda: Network(torch.sum, torch.ones(2, 3), batch_dims=1).forward(), InvalidInput, "batch dim"),
    "cut off": (lambda: Network(torch.detach, torch.ones(2)).forward(), InvalidInput, "cut off from x"),
    "no second derivative": (lambda: Network(WrongBackward.apply, draw(2)).forward(), Unsupported, "must agree"),
    "tangent shape": (lambda: Network(torch.exp, torch.ones(2)).jvp(torch.ones(3)), InvalidInput, r"\(2,\)"),
    "tangent dtype": (lambda: Network(torch.exp, torch.ones(2)).jvp(draw(2)), InvalidInput, "float32"),
    "tangent nan": (lambda: Network(torch.exp, torch.ones(1)).jvp(torch.tensor([torch.nan])), InvalidInput, "finite"),
    "cotangent shape": (lambda: Network(torch.exp, torch.ones(2)).vjp(torch.ones(1)), InvalidInput, r"\(2,\)"),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
