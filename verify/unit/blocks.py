"""Small attention blocks for unit tests, each determined by its seed."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

from lipbounds import Attention, get
from lipbounds.testing import extended, oracles
from lipbounds.testing._jacobian import jacobian_parts
from lipbounds.testing.recipes import Recipe, build


def random_block(
    seed: int = 0, *, n: int = 4, dim: int = 6, heads: int = 2, biases: bool = True, **fields: Any
) -> Attention:
    """A Gaussian self-attention block in float64; `fields` replace or add fields of Attention."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = max(1, dim // heads)
    drawn: dict[str, Any] = {
        "x": draw(n, dim),
        "w_q": draw(heads, dim, width),
        "w_k": draw(heads, dim, width),
        "w_v": draw(heads, dim, width),
        "w_o": draw(heads, width, dim),
    }
    if biases:
        drawn |= {"b_q": draw(heads, width), "b_k": draw(heads, width), "b_v": draw(heads, width), "b_o": draw(dim)}
    return Attention(**(drawn | fields))


MEMORY = random_block(3, n=5).x
# Arguments of `random_block`: one block of each kind that has neither rotary positions nor QK-norm.
PLAIN: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "one head": {"heads": 1, "biases": False},
    "three heads": {"heads": 3, "n": 5},
    "one token": {"n": 1},
    "query": {"memory": MEMORY, "moves": "query"},
    "memory": {"memory": MEMORY, "moves": "memory"},
}
NAMED: dict[str, Any] = {"ids": lambda name: name.replace(" ", "-")}  # of parametrized tests


def turns(tokens: int) -> Tensor:
    """Rotary positions of one pair of features, an angle for each token."""
    angles = 0.3 + 0.9 * torch.arange(tokens, dtype=torch.float64).unsqueeze(-1)
    return torch.stack([angles.cos(), angles.sin()], -2)


def turned(queries: int, keys: int | None = None) -> dict[str, Any]:
    """Fields of rotary positions for `random_block`."""
    return {"query_rotation": turns(queries), "key_rotation": turns(queries if keys is None else keys)}


def normed(heads: int, over: str = "head", eps: float = 4.0) -> dict[str, Any]:
    """Fields of QK-norm for `random_block` with heads of width 3."""
    weights = torch.linspace(1.6, 2.4, 3 * heads, dtype=torch.float64).reshape(heads, 3)
    return {"query_norm_weight": weights, "key_norm_weight": weights.flip(0, 1), "norm_eps": eps, "norm_over": over}


def turned_block(moves: str = "self", **fields: Any) -> Attention:
    """Two heads of width 5, grouped keys, biases, a mask where it may be causal; two pairs turned, a feature not."""
    recipe: dict[str, Any] = {
        "seed": 3, "n": 4, "m": None if moves == "self" else 3, "moves": moves, "dim": 3, "heads": 2, "groups": 1,
        "head_dim": 5, "value_dim": 2, "out_dim": 4, "spread": 4.0, "rotary": "random",
        "mask": "causal" if moves == "self" else "none", "biases": frozenset(("b_q", "b_k", "b_v", "b_o")),
    }  # fmt: skip
    return build(Recipe(**(recipe | fields)))


def spectral(matrices: Tensor) -> Tensor:
    """The spectral norm of each matrix."""
    return torch.linalg.matrix_norm(matrices, 2)


def error(computed: Tensor, exact: Any) -> Tensor:
    """|computed - exact|, subtracted before it is rounded.

    Args:
        computed: floats.
        exact: an array of decimals of that shape.
    """
    flat = [float(abs(Decimal(c) - e)) for c, e in zip(computed.flatten().tolist(), exact.reshape(-1), strict=True)]
    return torch.tensor(flat, dtype=torch.float64).reshape(computed.shape)


def true_norm(block: Attention) -> torch.Tensor:
    """The exact local Lipschitz constant of an unbatched block by automatic differentiation and a dense SVD."""
    moving = block.moving_input
    jacobian = torch.func.jacrev(block.function())(moving)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, moving.numel()), 2)


def check_batch_is_its_items(block: Attention, rtol: dict[str, float]) -> None:
    """Values, oracles and methods at a batch of shape (2, 2) are those at its items.

    Args:
        block: with the batch shape (2, 2).
        rtol: relative tolerance by the name of each bound or estimator.
    """
    norms = oracles.jacobian_norm(block)
    for index in ((0, 1), (1, 0)):
        item = oracles.batch_item(block, index)
        assert not item.batch_shape
        torch.testing.assert_close(block.forward()[index], item.forward())
        torch.testing.assert_close(norms[index], oracles.jacobian_norm(item))
        for name, tolerance in rtol.items():
            together, alone = (get(name)(b).value for b in (block, item))
            torch.testing.assert_close(together[index], alone, rtol=tolerance, atol=0)


def check_function(block: Attention, function: Callable[[Tensor], Tensor]) -> float:
    """The block, its products and all its judges against the same function written in another way.

    Args:
        block: without batch dimensions, in float64.
        function: of the moving input.

    Returns:
        the norm of the Jacobian in 60 digits.
    """
    moving = block.moving_input
    expected = function(moving)
    for output in (block.forward(), block.function()(moving), oracles.attention_output(block, moving)):
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    jacobian = torch.func.jacrev(function)(moving).reshape(-1, moving.numel())
    identity = torch.eye(moving.numel()).double()
    by_columns = block.jvp(identity.reshape(-1, *moving.shape)).flatten(1).mT
    by_rows = block.vjp(torch.eye(expected.numel()).double().reshape(-1, *expected.shape)).flatten(1)
    mixing, softmax = jacobian_parts(block, moving)
    for found in (by_columns, by_rows, oracles.jacobian(block), mixing + softmax):
        torch.testing.assert_close(found, jacobian, rtol=1e-11, atol=1e-11)
    exact = float(extended.jacobian_norm_extended(block))
    assert exact == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-12)
    return exact
