"""What users hand over in place of tensors: converted with the numbers kept, or refused in one clear sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lipbounds import Attention, InvalidInput
from lipbounds.certify import certify
from lipbounds.compose.constant import proved_constant
from lipbounds.compose.network import network_bound
from lipbounds.estimators.whole_model import whole_model_constant
from lipbounds.smoothing import certify_smoothed
from lipbounds.targets.given import given_tensor
from lipbounds.targets.layers import Flatten, Linear, Sequence
from lipbounds.targets.network import Network


pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")
WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double()
NETWORK = Sequence((Flatten(), Linear(WEIGHT, None)))
IMAGES = torch.tensor([[[0.1, 0.2]], [[-0.3, 0.1]]]).double()
LABELS = torch.tensor([0, 1])
TRUTH = [0.22, 0.1]  # |3 x + 4 y| / 5, the distance to the plane between the classes


def both(x: Any, labels: Any) -> tuple[Any, Any]:
    """Radii of the classifier, and of the smoothed one from few draws."""
    smoothed = certify_smoothed(lambda z: z.flatten(1) @ WEIGHT.T.to(z.dtype), x, labels, sigma=0.25, samples=100)
    return certify(NETWORK, x, labels, method="product").radius.tolist(), smoothed.radius.tolist()


@pytest.mark.parametrize(
    ("x", "labels"),
    [
        (IMAGES.numpy(), LABELS.numpy()),
        (IMAGES.numpy(), LABELS.numpy().astype("uint8")),
        (IMAGES.tolist(), LABELS.tolist()),
        ([*IMAGES], (0, 1)),
        ([*IMAGES.numpy()], [np.int64(0), np.int64(1)]),
    ],
    ids=["arrays", "bytes", "lists", "list of tensors", "list of arrays"],
)
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy")
def test_arrays_and_lists_give_the_numbers_of_tensors(x: Any, labels: Any) -> None:
    found = both(x, labels)
    assert found == both(IMAGES, LABELS)
    assert found[0] == pytest.approx(TRUTH, rel=1e-6)


def test_lists_keep_their_digits_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert (
            given_tensor("x", [0.1]).item()
            == given_tensor("x", (torch.tensor(0.1, dtype=torch.float64),)).item()
            == 0.1
        )
    finally:
        torch.set_default_dtype(torch.float32)


# What is called, and what the message says.
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: certify(NETWORK, None, LABELS), "x must be a tensor, a NumPy array or a list of numbers"),
    "ragged": (lambda: certify(NETWORK, [[0.1], [0.1, 0.2]], LABELS), "x must be a tensor, a NumPy array or a"),
    "texts": (lambda: certify(NETWORK, IMAGES, ["cat", "dog"]), "labels must be a tensor, a NumPy array or a"),
    "sparse": (lambda: certify(NETWORK, IMAGES.to_sparse(), LABELS), "plain tensor .*, got one of layout"),
    "meta": (lambda: certify(NETWORK, IMAGES.to("meta"), LABELS), "plain tensor .*, got one without numbers"),
    "a number": (lambda: certify(NETWORK, 0.1, [0]), "got a single number"),
    "one image": (
        lambda: certify(Sequence((Linear(WEIGHT, None),)), IMAGES[0], [0]),
        r"got \(1, 2\); .* \(x\[None\] for one input\)",
    ),
    "halves": (lambda: certify(NETWORK, IMAGES, [0.0, 1.0]), "labels must be one integer an input, got torch.fl"),
    "module": (lambda: certify(nn.Linear(2, 2), IMAGES, LABELS), "made of layers .* pass a torch module as model="),
    "shape": (lambda: certify(NETWORK, torch.zeros(2, 5), LABELS), r"network must run on x, .*\(2, 5\)"),
    "bound at a shape": (lambda: network_bound(NETWORK, torch.zeros(2, 1, 5), 0.1), r"network must run on x, .* 5\)"),
    "constant at a shape": (lambda: proved_constant(NETWORK, torch.zeros(2, 1, 5)), r"network must run on x, .* 5\)"),
    "constant at nothing": (lambda: proved_constant(NETWORK, IMAGES[:0]), "at least one"),
    "block": (
        lambda: Attention(
            x=torch.eye(2).to_sparse(), w_q=WEIGHT[None], w_k=WEIGHT[None], w_v=WEIGHT[None], w_o=WEIGHT[None]
        ),
        "x must be a plain tensor",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_inputs_are_refused(name: str) -> None:
    call, message = ODD[name]
    with pytest.raises(InvalidInput, match=message):
        call()


MODEL = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
VECTOR = torch.tensor([0.3, -0.2, 0.5]).double()


def causal(x: Tensor) -> Tensor:
    return x.cumsum(0)


@pytest.mark.parametrize("function", [MODEL, nn.Softmax(-1), causal, lambda x: x.flip(0) ** 2, lambda x: x - x.mean()])
def test_a_vector_without_batch_dimension_is_one_point_or_refused(function: Any) -> None:
    with pytest.raises(InvalidInput, match=r"3 items .* outputs that depend on other items; give x a batch dimension"):
        whole_model_constant(function, VECTOR)
    truth = torch.linalg.matrix_norm(torch.func.jacrev(function)(VECTOR), 2).item()
    assert whole_model_constant(function, VECTOR, batch_dims=0).value.item() == pytest.approx(truth, rel=1e-6)


def test_items_of_their_own_are_no_mixture() -> None:
    together = whole_model_constant(MODEL, torch.stack([VECTOR, 2 * VECTOR])).value
    alone = torch.stack([whole_model_constant(MODEL, scale * VECTOR[None]).value[0] for scale in (1, 2)])
    torch.testing.assert_close(together, alone)
    assert whole_model_constant(torch.tanh, VECTOR).value.tolist() == pytest.approx(
        (1 - VECTOR.tanh().square()).tolist(), rel=1e-6
    )
    assert whole_model_constant(MODEL, VECTOR[None].tolist()).value.item() == pytest.approx(
        together[0].item(), rel=1e-9
    )


def test_a_vector_for_a_model_that_changes_its_width() -> None:
    with pytest.raises(InvalidInput, match=r"batch dimensions \(3,\) of x, got shape \(2,\); give x a batch dimension"):
        whole_model_constant(nn.Linear(3, 2), VECTOR)


def test_normalisation_over_the_batch_is_a_mixture() -> None:
    norm = nn.BatchNorm1d(3)
    network = Network(norm, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), batch_dims=1)
    with pytest.raises(InvalidInput, match=r"or call model.eval\(\)"):
        network.forward()


@pytest.mark.parametrize("x", [IMAGES.numpy(), IMAGES.tolist(), [*IMAGES]], ids=["array", "list", "list of tensors"])
def test_networks_are_bounded_at_what_is_no_tensor(x: Any) -> None:
    assert proved_constant(NETWORK, x).value.tolist() == proved_constant(NETWORK, IMAGES).value.tolist()
    assert network_bound(NETWORK, x, 0.1).value.tolist() == network_bound(NETWORK, IMAGES, 0.1).value.tolist()
