"""Wrong softmax norms inside a right formula: wrong versions of lipbounds.ops.softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import ROUNDING, Formula, Part, RowNorm, g_1, largest, logit_error, norm, sorted_rows


def _with(softmax: Part, block: Attention) -> Tensor:
    return Formula(softmax=softmax)(block)


def _rows(row_norm: RowNorm, block: Attention) -> Tensor:
    return _with(largest(row_norm), block)


def _unmasked(block: Attention) -> Tensor:
    return block.scale_value * block.queries @ block.keys.mT


@planted()
def second_entry_left_out(block: Attention) -> Tensor:
    """g_1 without p_(2): p_(1) (1 - p_(1))."""
    return _rows(lambda p: p[..., 0] * p[..., 1:].sum(-1), block)


@planted()
def third_entry_for_second(block: Attention) -> Tensor:
    """g_1 with p_(3) in place of p_(2), an index off by one."""
    return _rows(lambda p: p[..., 0] * (p[..., 1:].sum(-1) + p[..., 2]), block)


@planted()
def second_eigenvalue(block: Attention) -> Tensor:
    """g_2, which bounds the second eigenvalue, in place of g_1."""
    return _rows(lambda p: p[..., 1] * (p[..., 0] + p[..., 2:].sum(-1) + p[..., 2]), block)


@planted(subtle=True)
def invented_sharpening(block: Attention) -> Tensor:
    """g_1 less p_(2) p_(3) (p_(1) - p_(2)) / 4: right for up to two keys and for uniform rows."""
    return _rows(lambda p: g_1(p) - p[..., 1] * p[..., 2] * (p[..., 0] - p[..., 1]) / 4, block)


@planted()
def mean_eigenvalue(block: Attention) -> Tensor:
    """The trace of J(p) over its rank: the mean eigenvalue for the largest."""
    return _rows(lambda p: (p * (1 - p)).sum(-1) / max(p.shape[-1] - 3, 1), block)


@planted()
def frobenius_over_rank(block: Attention) -> Tensor:
    """||J(p)||_F over the root of its rank, a lower bound of the norm."""

    def row_norm(p: Tensor) -> Tensor:
        jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        return torch.linalg.matrix_norm(jacobian) / max(p.shape[-1] - 3, 1) ** 0.5

    return _rows(row_norm, block)


@planted()
def largest_entry_of_jacobian(block: Attention) -> Tensor:
    """The largest entry of |J(p)| in place of its spectral norm."""
    return _rows(lambda p: (p * (1 - p)).amax(-1), block)


@planted()
def mean_over_rows(block: Attention) -> Tensor:
    """The mean of g_1 over the rows in place of the maximum."""
    return _with(lambda b: g_1(sorted_rows(b.logits)).mean(-1) * (4 * logit_error(b)).exp(), block)


@planted()
def last_row_only(block: Attention) -> Tensor:
    """g_1 of the last query alone, as when decoding."""
    return _with(lambda b: g_1(sorted_rows(b.logits))[..., -1] * (4 * logit_error(b)).exp(), block)


@planted()
def mean_map_of_heads(block: Attention) -> Tensor:
    """g_1 of the attention map averaged over the heads, as attention maps are often shown."""

    def part(b: Attention) -> Tensor:
        mean = b.probabilities.mean(-3, keepdim=True).sort(-1, descending=True).values
        padded = torch.cat([mean, mean.new_zeros(*mean.shape[:-1], 2)], -1)
        return g_1(padded).amax(-1).expand(b.logits.shape[:-2])

    return _with(part, block)


@planted()
def softmax_over_queries(block: Attention) -> Tensor:
    """Softmax along the wrong axis: over the queries of each key."""
    return _with(largest(g_1, of=lambda b: b.logits.mT.nan_to_num(neginf=-1e30)), block)


@planted(subtle=True)
def cancellation(block: Attention) -> Tensor:
    """1 - p_(1) by subtraction: 0 where the row is one-hot to all digits."""
    return _rows(lambda p: p[..., 0] * ((1 - p[..., 0]) + p[..., 1] * (p[..., 0] < 1)), block)


@planted(subtle=True)
def float32_softmax(block: Attention) -> Tensor:
    """Softmax in float32 inside a float64 bound, with the tail summed."""
    return _with(lambda b: g_1(sorted_rows(b.logits.float())).double().amax(-1) * (1 + ROUNDING), block)


@planted(subtle=True)
def short_accumulation(block: Attention) -> Tensor:
    """The tail of a row summed in float32 and not rounded upwards."""

    def row_norm(p: Tensor) -> Tensor:
        tail = torch.zeros_like(p[..., 0]).float()
        for index in range(1, p.shape[-1]):
            tail = tail + p[..., index].float()
        return p[..., 0] * (tail.double() * (1 - 2.0**-22) + p[..., 1])

    return _rows(row_norm, block)


@planted()
def hidden_keys_at_zero(block: Attention) -> Tensor:
    """Hidden keys get the logit 0 in place of -inf."""
    return _with(largest(g_1, of=lambda b: torch.where(b.logits.isneginf(), 0.0, b.logits)), block)


@planted()
def before_masking(block: Attention) -> Tensor:
    """g_1 of the attention map before masks and position biases are added."""
    return _with(largest(g_1, of=_unmasked), block)


@planted()
def hidden_keys_at_minus_ten(block: Attention) -> Tensor:
    """Hidden keys get the logit -10, which is not enough where all logits are low."""
    return _with(largest(g_1, of=lambda b: torch.where(b.logits.isneginf(), -10.0, b.logits)), block)


@planted()
def unscaled_logits(block: Attention) -> Tensor:
    """The softmax of Q K^T without the scale."""
    return _with(largest(g_1, of=lambda b: b.logits + (1 - b.scale_value) * b.queries @ b.keys.mT), block)


@planted()
def default_scale(block: Attention) -> Tensor:
    """The scale given is ignored: 1/sqrt(d) is used for the softmax and outside of it."""
    own = block.w_q.shape[-1] ** -0.5
    logits = lambda b: b.logits + (own - b.scale_value) * b.queries @ b.keys.mT  # noqa: E731
    return Formula(softmax=largest(g_1, of=logits), scale=lambda b: own)(block)


@planted()
def powers_of_two(block: Attention) -> Tensor:
    """A softmax with powers of 2 whose logits were not divided by log 2."""
    return _with(largest(g_1, of=lambda b: b.logits * math.log(2)), block)


@planted(subtle=True)
def slightly_below_one_half(block: Attention) -> Tensor:
    """g_1 clamped at 0.499: wrong for rows close to (1/2, 1/2) only."""
    return _with(lambda b: largest(g_1)(b).clamp(max=0.499), block)


@planted()
def three_keys_only(block: Attention) -> Tensor:
    """g_1 of the three largest entries of a row, the rest of the tail dropped."""
    return _rows(lambda p: p[..., 0] * (p[..., 1:3].sum(-1) + p[..., 1]), block)


@planted()
def without_query_bias_in_the_map(block: Attention) -> Tensor:
    """The attention map of the queries without their bias."""

    def logits(b: Attention) -> Tensor:
        shift = 0.0 if b.b_q is None else b.scale_value * b.b_q.unsqueeze(-2) @ b.keys.mT
        return b.logits - shift

    return _with(largest(g_1, of=logits), block)


@planted(subtle=True)
def softmax_norm_detached(block: Attention) -> Tensor:
    """Right number, wrong gradient: the softmax norm is detached."""
    return _with(lambda b: largest(g_1)(b).detach(), block)


@planted(subtle=True)
def values_to_six_digits(block: Attention) -> Tensor:
    """||V|| to six digits, rounded down."""
    return Formula(values=lambda b: norm(*b.value_factors) * (1 - 1e-6))(block)
