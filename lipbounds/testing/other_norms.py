r"""The truth in norms other than the Euclidean one of all entries, and for changes from one input: from below.

Token norms. With J_ij the Jacobian block of output token i by input token j,

    sup { |sum_j J_ij v_j| : |v_j| <= 1 for all j }  =  sup { sum_j |J_ij^T w| : |w| = 1 },

and the norm `token` of J is the largest of these over i. Any w gives a lower bound. `token_mean` of J is `token` of the
transpose, times m / n for m input and n output tokens. `linf` is exact: the largest absolute row sum.

What float64 makes of it is off by at most `slack`: the error of a dense Jacobian in Frobenius norm
(`oracles.truth_slack`), which a sum over N blocks or entries multiplies by at most sqrt(N), and the rounding of the
sums.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Norm
from lipbounds.targets.attention import Attention
from lipbounds.testing import oracles
from lipbounds.testing._jacobian import largest_block_sum


RANDOM_STARTS = 3
SUMS = 1e-13  # relative rounding of a norm of sums of a few hundred entries


def reached_norm(block: Attention, norm: Norm) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """A number the norm of the Jacobian reaches, in float64, and how far rounding can have put it above the norm.

    Args:
        block: the block at its input.
        norm: of input and output.
    """
    if norm == "l2":
        return oracles.jacobian_norm(block), oracles.truth_slack(block)
    dense = oracles.jacobian(block)
    m, n = block.moving_input.shape[-2], block.tokens
    if norm == "linf":
        value = dense.abs().sum(-1).amax(-1)
        return value, dense.shape[-1] ** 0.5 * oracles.truth_slack(block) + SUMS * value
    blocks = dense.unflatten(-1, (m, -1)).unflatten(-3, (n, -1))  # output token, feature, input token, feature
    factor, summed = 1.0, m
    if norm == "token_mean":
        blocks, factor, summed = blocks.movedim((-2, -1), (-4, -3)), m / n, n
    shape = (RANDOM_STARTS, blocks.shape[-4], *blocks.shape[:-4], blocks.shape[-3])
    starts = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dense.device)
    value = factor * largest_block_sum(blocks, starts)
    return value, factor * summed**0.5 * oracles.truth_slack(block) + SUMS * value


def reached_change(
    block: Attention, points: Float[Tensor, "points *batch moving dim"]
) -> tuple[Float[Tensor, " points *batch"], Float[Tensor, " points *batch"]]:
    """|f(y) - f(x)| / |y - x| from the input x of the block to each point y, and what rounding can have added.

    Args:
        block: the block at its input.
        points: none of them x.
    """
    moving = block.moving_input.detach().to(torch.float64).expand(points.shape[1:])
    at = block.double.at(points)
    away = (points - moving).flatten(-2).norm(dim=-1)
    change = oracles.attention_output(at, points) - oracles.attention_output(block, moving)
    quotient = change.flatten(-2).norm(dim=-1) / away
    slack = (_output_slack(at) + _output_slack(block.double)) / away
    return quotient, slack + SUMS * quotient


def _output_slack(block: Attention) -> Float[Tensor, "*batch"]:
    """How far `oracles.attention_output` can be from the exact output, in Frobenius norm.

    By the same formula on absolute values: each logit is off by at most gamma times it, which moves each P_ij by a
    factor within exp of twice that; products and sums cost gamma once more.
    """

    def size(tokens: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        product = tokens.abs().unsqueeze(-3) @ weights.abs()
        return product if bias is None else product + bias.abs().unsqueeze(-2)

    memory = block.x if block.memory is None else block.memory
    operations = block.x.shape[-1] + memory.shape[-1] + memory.shape[-2] + block.w_q.shape[-1]
    operations += block.heads * block.w_v.shape[-1] + 32
    logits = abs(float(block.scale or 0.0)) * (
        size(block.query_input, block.w_q, block.b_q) @ size(memory, block.w_k, block.b_k).mT
    )
    mask = oracles.additive_mask(block)
    hidden = mask.isneginf()
    error = oracles.UNIT * (operations * logits + 4 * torch.where(hidden, 0.0, mask).abs())
    error = torch.where(hidden, 0.0, error).amax(-1, keepdim=True).clamp(max=10.0)
    relative = torch.expm1(4 * error) + operations * oracles.UNIT
    maps = block.logits.softmax(-1) + oracles.SMALLEST
    spread = ((relative * maps) @ size(memory, block.w_v, block.b_v)) @ block.w_o.abs()
    output = spread.sum(-3)
    if block.b_o is not None:
        output = output + 4 * oracles.UNIT * block.b_o.abs().unsqueeze(-2)
    return output.flatten(-2).norm(dim=-1).expand(block.batch_shape)
