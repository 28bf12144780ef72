"""How far the output of a block can move when one token alone moves: a lower bound for every token at once.

J_j, the columns of the Jacobian that belong to token j, is J restricted to inputs that are zero at every other token.
Power iteration with J_j^T J_j is that with J^T J in which all but token j is set to zero after each step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators._options import check_steps_and_seed
from lipbounds.rounding import cast_down, gamma, inflate
from lipbounds.targets.attention import Attention


CHUNK_ENTRIES = 2**22  # of the largest tensor made for some of the tokens


@torch.no_grad()
def token_lower(block: Attention, *, steps: int = 20, seed: int = 0) -> Float[Tensor, "*batch moving"]:
    """Lower bound on the norm of the Jacobian with respect to each token of the moving input, in the l2 norm.

    Promise: each value is ||J v|| / ||v|| for a v that is zero at all other tokens, the bounded rounding of J v
    subtracted, hence at most ||J_j||, whatever the iteration did.

    Args:
        block: the attention block.
        steps: applications of J^T J.
        seed: of the random start.

    Raises:
        InvalidInput: `steps` or `seed` is out of range.
    """
    check_steps_and_seed(steps, seed)
    operator = JacobianOperator(block)
    count = block.moving_input.shape[-2]
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, CHUNK_ENTRIES // operator.entries_per_direction)
    found = [_lower(operator, range(i, min(i + chunk, count)), steps, generator) for i in range(0, count, chunk)]
    return cast_down(torch.cat(found).movedim(0, -1), block.dtype)


def _lower(operator: JacobianOperator, tokens: range, steps: int, generator: torch.Generator) -> Tensor:
    """The bounds of some of the tokens, along the first dimension."""
    wide = operator.target
    assert isinstance(wide, Attention)
    count, width = wide.moving_input.shape[-2:]
    lead = (len(tokens), *[1] * len(operator.batch_shape))
    own = torch.eye(count, dtype=torch.float64, device=operator.device)[list(tokens)].view(*lead, count, 1)
    shape = (len(tokens), *operator.batch_shape, count, width)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device=generator.device)
    v = _unit(drawn.to(operator.device) * own)
    for _ in range(steps):
        image = wide.vjp(wide.jvp(v) / operator.scale[..., None, None]) * own
        v = torch.where(_length(image) > 0, _unit(image), v)
    image = wide.jvp(v)
    size = image.shape[-2:].numel()
    error = inflate(_length(Roundoff(wide).jvp(v.abs())), size + 4)
    certain = _length(image) * (1 - 2 * gamma(size + 4)) - error
    return (certain / inflate(_length(v), width + 8)).clamp(min=0)[..., 0, 0]


def _length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True)


def _unit(v: Tensor) -> Tensor:
    """Of length 1; the zero vector is divided by 1."""
    length = _length(v)
    return v / torch.where(length > 0, length, 1.0)
