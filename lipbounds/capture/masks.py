"""The masks of models as the logit bias of an `Attention`: 0 and -inf, finite where the model adds something finite."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.capture.operands import Layout
from lipbounds.errors import Unsupported


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = keep) or an additive one, as an additive one with -inf where a key is hidden.

    Raises:
        Unsupported: the mask is a tensor of a kind that holds its entries in a way of its own.
    """
    mask = _plain(mask)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.to(dtype).masked_fill(most_negative(mask, mask.dtype), -torch.inf)


def most_negative(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Which entries are -inf, or what models write for it: the most negative float, in sums with others.

    Half of it and less is taken as such: its exponential is zero.

    Args:
        mask: additive.
        dtype: of the logits of the model.
    """
    return mask <= torch.finfo(dtype).min / 2


def _plain(mask: Tensor) -> Tensor:
    """The entries of `causal_upper_left` and `causal_lower_right`, whose own are zeros and stand for nothing."""
    if type(mask) in (Tensor, torch.nn.Parameter) and not mask.is_nested and mask.layout == torch.strided:
        return mask
    from torch.nn.attention.bias import CausalBias, CausalVariant  # it loads the compiler of torch, for seconds

    if isinstance(mask, CausalBias):
        offset = mask.seq_len_kv - mask.seq_len_q if mask.variant == CausalVariant.LOWER_RIGHT else 0
        keep = torch.ones(mask.seq_len_q, mask.seq_len_kv, dtype=torch.bool, device=mask.device)
        return keep.tril(offset)
    kind = type(mask).__name__ if mask.layout == torch.strided else mask.layout
    raise Unsupported(
        f"the attention mask must be a plain tensor, causal_upper_left or causal_lower_right, got {kind}; write "
        "its entries into a tensor."
    )


def future(queries: int, keys: int, like: Tensor) -> Tensor:
    """The causal mask of torch: query i sees the keys 0 .. i, counted from the first key."""
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=like.device).triu(1)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)


def for_layout(mask: Tensor, lead: torch.Size, area: tuple[int, int], layout: Layout) -> Tensor | None:
    """An additive mask that broadcasts to the logits of a call, sorted into batch items and heads.

    Args:
        mask: broadcasts to `*lead n m`.
        lead: the leading dimensions of the call.
        area: the number of queries n and of keys m.
        layout: which leading index is which batch item and head.

    Returns:
        A logit bias with no more batch items and heads than differ; None if it is zero throughout.
    """
    if not bool((mask != 0).any()):
        return None
    if not any(size > 1 for size in mask.shape[:-2]):
        return mask.reshape(mask.shape[-2:]).expand(area).clone()
    mask = mask.expand(*lead, *mask.shape[-2:]).reshape(-1, *mask.shape[-2:])[layout.cell]
    if bool((mask == mask[:, :1]).all()):
        mask = mask[:, :1]
    mask = mask.expand(*mask.shape[:2], *area)
    if bool((mask == mask[:1]).all()):
        return mask[0] if mask.shape[1] > 1 else mask[0, 0]
    return mask.reshape(*layout.batch_shape, *mask.shape[1:])
