r"""Logarithm of g_k, p_(k) (1 - p_(k) + p_(k+1)), with gradients that stay finite: what a penalty is made of.

These are values to the nearest float and no bounds; `lipbounds.ops.softmax` has the bounds. With S the logits of a row
and L = log sum exp S,

    log p_(k) = S_(k) - L,
    log(1 - p_(1) + p_(2)) = log( sum_{j != argmax} exp S_j + exp S_(2) ) - L,
    log(1 - p_(k) + p_(k+1)) = log1p( p_(k+1) - p_(k) )                        for k >= 2, where p_(k) <= 1/2.

So nothing cancels, a nearly one-hot row keeps its digits, and log g_1 falls linearly in the logits where g_1
underflows. Where entries tie, the gradient is that of one of the orders, which is a one-sided derivative.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lipbounds.devices import is_transformed


try:
    import numpy
except ImportError:  # torch works without it
    numpy = None


def log_g_1(logits: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """log g_1 of softmax(logits) for each row; -inf, with gradient 0, where at most one key is visible.

    Args:
        logits: float32 or float64; -inf marks a masked key.
    """
    top, index, _ = _largest(logits, 2)
    single = top[..., 1].isneginf()
    # Rows with one visible key are replaced by zeros, so that no inf - inf reaches the gradient of the others.
    safe, top = (torch.where(single.unsqueeze(-1), 0.0, table) for table in (logits, top))
    return torch.where(single, -torch.inf, _log_g_1(safe, top, index, safe.logsumexp(-1)))


def log_g_ratio(logits: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch"]:
    """log(g_1 / g_k) of softmax(logits) for each row, >= 0; k counts no further than the visible keys.

    Args:
        logits: float32 or float64; -inf marks a masked key.
        k: at least 1; a row that sees fewer keys takes the number it sees, and 0 if it sees one or none.
    """
    top, index, visible = _largest(logits, k + 1)
    rank = visible.sum(-1, keepdim=True).clamp(min=1, max=k) - 1
    single = rank[..., 0] == 0
    safe, top = (torch.where(single.unsqueeze(-1), 0.0, table) for table in (logits, top))
    total = safe.logsumexp(-1)
    here, after = (_at(top, rank + step) for step in (0, 1))
    log_p = here - total
    log_g_k = log_p + torch.log1p((after - total).exp() - log_p.exp())
    return torch.where(single, 0.0, _log_g_1(safe, top, index, total) - log_g_k)


@torch.no_grad()
def scores(logits: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch"]:
    """`log_g_1` for k = 0, else `log_g_ratio`, without gradients and in fewer passes; overwrites the logits.

    Args:
        logits: float32 or float64, not used by anyone else; -inf marks a masked key.
        k: 0 or a rank.
    """
    top, entries, place = _split(logits, max(k, 1) + 1)
    if _all_are_visible(top):
        log_g, log_total = _log_g_1_of_sorted(top[0], top[1], entries, place)
        if k == 0:
            return log_g
        here, after = (top[k - 1 + step] - top[0] - log_total for step in (0, 1))
        found = log_g - here - torch.log1p(after.exp() - here.exp())
        return found if k > 1 else torch.zeros_like(found)
    visible = ~top.isneginf()
    single = ~visible[1]
    log_g, log_total = _log_g_1_of_sorted(top[0], top[1].masked_fill(single, 0.0), entries, place)
    if k == 0:
        return log_g.masked_fill(single, -torch.inf)
    rank = visible.sum(0, keepdim=True).clamp(min=1, max=k) - 1
    here, after = (top.gather(0, rank + step)[0] - top[0] - log_total for step in (0, 1))
    return (log_g - here - torch.log1p(after.exp() - here.exp())).masked_fill(rank[0] == 0, 0.0)


def _all_are_visible(top: Tensor) -> bool:
    """Whether no row needs the care that hidden keys take: asked on a CPU alone, elsewhere the host would wait."""
    return top.device.type == "cpu" and not is_transformed(top) and bool((top[-1] > -torch.inf).all())


def _log_g_1_of_sorted(
    first: Tensor, second: Tensor, entries: Tensor, place: Tensor
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """log g_1, and log sum exp less the largest logit; overwrites the entries."""
    # Relative to the second largest and without the largest, weights neither cancel nor underflow in one-hot rows.
    weights = entries.sub_(second.unsqueeze(-1)).exp_()
    others = weights.scatter(-1, place, 0.0).sum(-1)
    gap = second - first
    log_total = (gap + others.log()).exp().log1p()
    return gap + others.log1p() - 2 * log_total, log_total


def _log_g_1(logits: Tensor, top: Tensor, index: Tensor, total: Tensor) -> Tensor:
    """log g_1 of rows that see at least two keys, from their largest logits, where these are, and log sum exp."""
    others = torch.logaddexp(logits.scatter(-1, index[..., :1], -torch.inf).logsumexp(-1), top[..., 1])
    return (top[..., 0] - total) + (others - total)


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Bool[Tensor, "*batch count"]]:
    """The largest logits padded with -inf, where they are, and which of them belong to visible keys."""
    kept = min(count, logits.shape[-1])
    values, index = logits.topk(kept, dim=-1)
    values = torch.cat([values, values.new_full((*values.shape[:-1], count - kept), -torch.inf)], -1)
    return values, index, ~values.isneginf()


def _split(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logits padded with -inf, one rank after another; all of them, and where the largest of a row is.

    On a CPU the sort of NumPy uses wide vectors: it orders whole rows in a fraction of the time in which topk picks a
    few of their entries.
    """
    if not (numpy and logits.device.type == "cpu" and type(logits) is Tensor and not is_transformed(logits)):
        top, index, _ = _largest(logits, count)
        return top.movedim(-1, 0), logits, index[..., :1]
    ordered = torch.from_numpy(numpy.sort(logits.numpy(), axis=-1))
    keys = logits.shape[-1]
    top = ordered.movedim(-1, 0)[max(keys - count, 0) :].flip(0)
    top = torch.cat([top, top.new_full((max(count - keys, 0), *top.shape[1:]), -torch.inf)])
    return top, ordered, torch.full_like(top[0], keys - 1, dtype=torch.int64).unsqueeze(-1)


def _at(top: Tensor, rank: Tensor) -> Tensor:
    return top.gather(-1, rank)[..., 0]
