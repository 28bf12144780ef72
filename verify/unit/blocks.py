"""Small attention blocks for unit tests, each determined by its seed."""

from __future__ import annotations

from typing import Any

import torch

from lipbounds import Attention


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


def true_norm(block: Attention) -> torch.Tensor:
    """The exact local Lipschitz constant of an unbatched block by automatic differentiation and a dense SVD."""
    moving = block.moving_input
    jacobian = torch.func.jacrev(block.function())(moving)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, moving.numel()), 2)
