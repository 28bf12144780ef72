"""How far the output of a block can move when one token alone moves: a lower bound for every token at once.

J_j, the columns of the Jacobian that belong to token j, is J restricted to inputs that are zero at every other token.
J_j^T J_j is J^T J after which all but token j is set to zero: Lanczos runs with one such operator for each token, all
tokens in one batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.estimators._fused import FusedOperator
from lipbounds.estimators._krylov import largest_ritz_pair
from lipbounds.estimators._options import check_steps_and_seed
from lipbounds.rounding import cast_down, gamma, inflate
from lipbounds.targets.attention import Attention


CHUNK_ENTRIES = 2**22  # of the largest tensor made for some of the tokens


@torch.no_grad()
def token_lower(block: Attention, *, steps: int = 8, seed: int = 0) -> Float[Tensor, "*batch moving"]:
    """Lower bound on the norm of the Jacobian with respect to each token of the moving input, in the l2 norm.

    Promise: each value is ||J v|| / ||v|| for a v that is zero at all other tokens, the bounded rounding of J v
    subtracted, hence at most ||J_j||, whatever the iteration did.

    Args:
        block: the attention block.
        steps: of Lanczos; capped at the number of features.
        seed: of the random starts.

    Raises:
        InvalidInput: `steps` or `seed` is out of range.
    """
    check_steps_and_seed(steps, seed)
    operator = FusedOperator(block)
    count = block.moving_input.shape[-2]
    chunk = max(1, CHUNK_ENTRIES // operator.entries_per_direction)
    found = [_lower(_OneToken(operator, range(i, min(i + chunk, count))), steps, seed) for i in range(0, count, chunk)]
    return cast_down(torch.cat(found).movedim(0, -1), block.dtype)


class _OneToken:
    """J_j^T J_j of some tokens j, each an item of a batch, divided by the square of the operator's scale.

    Args:
        operator: of all tokens.
        tokens: their numbers.
    """

    def __init__(self, operator: FusedOperator, tokens: range) -> None:
        assert isinstance(operator.target, Attention)
        self.operator, self.block, self.tokens = operator, operator.target, tokens
        self.size, self.device = self.block.moving_input.shape[-1], operator.device
        self.batch_shape = torch.Size((len(tokens), *operator.batch_shape))
        own = torch.eye(self.block.moving_input.shape[-2], dtype=torch.float64, device=operator.device)
        self._own = own[list(tokens)].view(len(tokens), *[1] * len(operator.batch_shape), -1, 1)

    def whole(self, v: Float[Tensor, "count *batch size"]) -> Float[Tensor, "count *batch moving size"]:
        """The direction in which token j moves by v_j, and no other token."""
        return v.unsqueeze(-2) * self._own

    def gram(self, v: Float[Tensor, "count *batch size"]) -> Float[Tensor, "count *batch size"]:
        """The product with J_j^T J_j; only the row of token j is multiplied with the weights."""
        if (products := self.operator.products) is not None:
            image = products.after_weights((v.unsqueeze(-2) @ products.weights) * self._own)
            row = (products.before_weights(image) * self._own).sum(-2, keepdim=True) @ products.weights.mT
            return row.squeeze(-2) / self.operator.scale.square()[..., None]
        image = self.operator.vjp(self.operator.jvp(self.whole(v).flatten(-2)))
        return (image.unflatten(-1, self.block.moving_input.shape[-2:]) * self._own).sum(-2)


def _lower(tokens: _OneToken, steps: int, seed: int) -> Float[Tensor, "*batch"]:
    _, vector = largest_ritz_pair(tokens, steps, seed)
    direction = tokens.whole(vector)
    image = tokens.block.jvp(direction)
    size = image.shape[-2:].numel()
    error = inflate(_length(Roundoff(tokens.block).jvp(direction.abs())), size + 4)
    certain = _length(image) * (1 - 2 * gamma(size + 4)) - error
    return (certain / inflate(_length(direction), vector.shape[-1] + 8)).clamp(min=0)


def _length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=(-2, -1))
