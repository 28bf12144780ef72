"""The pretend accelerator behaves as one: it refuses what CUDA refuses, and sees what the host waits for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipbounds.testing import pretend_device, synchronisations


DEVICE = pretend_device()


def on_device(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


X, ROW = on_device(3, 4), on_device(4, seed=1)
HERE = torch.ones(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device=DEVICE),
        lambda: torch.tensor([1.0, 2.0], device="pretend"),
        lambda: torch.as_tensor([1.0], device="pretend:0"),
        lambda: torch.arange(3, device=DEVICE),
        lambda: torch.eye(2, device=X.device),
        lambda: torch.linspace(0, 1, 3, device=DEVICE),
        lambda: torch.tril_indices(2, 2, device=DEVICE),
        lambda: torch.randn(2, device=DEVICE),
        lambda: X.new_zeros(2),
        lambda: torch.ones_like(X),
        lambda: torch.ones(2).to(DEVICE),
        lambda: X.mT[1:].contiguous(),
        lambda: X.softmax(-1) @ X.mT,
        lambda: X + torch.tensor(1.0),
        lambda: X[torch.tensor([0, 2])],
        lambda: torch.func.jacrev(torch.sin)(ROW),
        lambda: torch.func.vmap(lambda row: row / row.sum())(X),
        lambda: torch.func.jvp(torch.exp, (X,), (X,))[1],
        lambda: F.scaled_dot_product_attention(X[None, None], X[None, None], X[None, None]),
        lambda: nn.Linear(4, 2).to(DEVICE).weight.detach(),
        lambda: copy.deepcopy(nn.Linear(4, 2).to(DEVICE)).bias.detach(),
    ],
)  # fmt: skip
def test_tensors_stay_on_the_device(make: Callable[[], Tensor]) -> None:
    made = make()
    assert made.device == DEVICE
    assert made.cpu().shape == made.shape


def test_numbers_are_those_of_the_cpu() -> None:
    here = X.cpu()
    assert here.device.type == "cpu"
    assert torch.equal((X.mT @ X).softmax(0).cpu(), (here.mT @ here).softmax(0))
    assert X.tolist() == here.tolist()
    assert [float(X[0, 0]), bool(X[0, 0] > 0), X[0, 0].item()] == [float(here[0, 0]), bool(here[0, 0] > 0), here[0, 0]]
    changed, expected = X.clone(), here.clone()
    for each in (changed, expected):
        each[0] = 0
        each[:, 1] += 5
        each[each > 1] = 1.0
        each.mT[2].mul_(2)
    assert torch.equal(changed.cpu(), expected)


def test_modules_move_and_change_their_dtype() -> None:
    model = nn.Linear(4, 2).to(DEVICE).double()
    assert model.weight.dtype == model(X).dtype == torch.float64
    assert model.cpu().weight.device.type == "cpu"
    weight = on_device(2, 2)
    weight.data = X
    assert torch.equal(weight.cpu(), X.cpu())


def test_backward_puts_gradients_on_the_device() -> None:
    there, here = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()
    here.load_state_dict(there.state_dict())
    there.to(DEVICE)
    there(X).square().sum().backward()
    here(X.cpu()).square().sum().backward()
    assert there.weight.grad is not None
    assert there.weight.grad.device == DEVICE
    torch.testing.assert_close(there.weight.grad.cpu(), here.weight.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: X + HERE, RuntimeError, "same device.*in add"),
        (lambda: X @ HERE.mT, RuntimeError, "same device"),
        (lambda: torch.cat([X, HERE]), RuntimeError, "same device"),
        (lambda: torch.stack([X[0, 0], torch.tensor(1.0).double()]), RuntimeError, "same device"),
        (lambda: HERE * X[0, 0], RuntimeError, "same device"),
        (lambda: torch.where(X > 0, X, HERE), RuntimeError, "same device"),
        (lambda: HERE.clone().add_(X), RuntimeError, "same device"),
        (lambda: torch.tensor(1.0).double().add_(X[0, 0]), RuntimeError, "changes one on cpu"),
        (lambda: torch.randn(2, device=DEVICE, generator=torch.Generator()), RuntimeError, "generator"),
        (lambda: X.long() @ X.long().mT, RuntimeError, "no such kernel"),
        (lambda: X.numpy(), TypeError, "can't convert"),
        (lambda: HERE[X > 0], RuntimeError, "indices should be"),
    ],
)
def test_what_cuda_refuses_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (lambda: (X @ X.mT).softmax(-1).sum(), []),
        (lambda: X.masked_fill(X > 0, 1.0), []),
        (lambda: torch.where(X > 0, X, 0.0), []),
        (lambda: X[0, 0] * 2 + torch.tensor(1.0), []),
        (lambda: torch.full((2,), 3.0, device=DEVICE), []),
        (lambda: X.item() if X.numel() == 1 else X.sum().item(), ["scalar"]),
        (lambda: bool((X > 0).any()), ["scalar"]),
        (lambda: float(X[0, 0]) + int(X[0, 1]), ["scalar", "scalar"]),
        (lambda: f"{X[0, 0]:.3f}", ["scalar"]),
        (lambda: torch.equal(X, X), ["scalar"]),
        (lambda: torch.allclose(X, X), ["scalar"]),
        (lambda: X.tolist(), ["to host"]),
        (lambda: X.cpu(), ["to host"]),
        (lambda: HERE.to(DEVICE), ["to device"]),
        (lambda: HERE.to(DEVICE, non_blocking=True), []),
        (lambda: torch.tensor(1.0, device=DEVICE), ["to device"]),
        (lambda: X[torch.tensor([1])], ["to device"]),
        (lambda: X[X > 0], ["size"]),
        (lambda: X.nonzero(), ["size"]),
        (lambda: X.unique(), ["size"]),
        (lambda: torch.linalg.eigvalsh(X.mT @ X), ["status"]),
        (lambda: torch.linalg.svdvals(X), ["status"]),
        (lambda: torch.linalg.inv(X.mT @ X + torch.eye(4, device=DEVICE)), ["status"]),
        (lambda: torch.linalg.cholesky_ex(X.mT @ X), []),
    ],
)
def test_what_the_host_waits_for_is_seen(call: Callable[[], Any], kinds: list[str]) -> None:
    with synchronisations() as seen:
        call()
    call()  # after the context: not seen
    assert [each.kind for each in seen] == kinds
    assert all(each.where.rpartition(":")[0] == __file__ for each in seen)
