"""A head alone, and what its attention map looks like."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import hand_to_heads
from lipbounds.targets.attention import Attention


# Logits of a head times its width: matrices below are multiplied by other routines in a batch than in a block, and so
# are those of one head by itself; what is handed on would differ in its last bits from what is computed there.
LARGE = 2**12


def heads_alone(block: Attention, start: int = 0, stop: int | None = None) -> Attention:
    """Blocks of one head each, as a batch: the head with its own rows of the output projection, without output bias.

    Where queries and keys of all heads are normalised together, a block keeps all heads and reads the output of one.
    The outputs of all of them add up to that of the block without its output bias. What bounds have found of the heads
    in a large block is not computed again.

    Args:
        block: without batch dimensions.
        start: first head.
        stop: head after the last one; all that are left if None.
    """
    chosen = slice(start, block.heads if stop is None else stop)
    if block.norm_over == "all_heads":
        return _read_alone(block, chosen)
    weights = {name: getattr(block, name)[chosen].unsqueeze(-3) for name in ("w_q", "w_k", "w_v", "w_o")}
    biases = {
        name: None if getattr(block, name) is None else getattr(block, name)[chosen].unsqueeze(-2)
        for name in ("b_q", "b_k", "b_v", "query_norm_weight", "key_norm_weight")
    }
    mask = block.logit_bias
    if mask is not None and mask.dim() == 3 and mask.shape[0] > 1:
        mask = mask[chosen].unsqueeze(-3)
    alone = block.replace(**weights, **biases, b_o=None, logit_bias=mask)
    if len(alone.w_q) > 1 and block.logits.shape[-2:].numel() * block.w_q.shape[-1] >= LARGE:
        hand_to_heads(block, alone, chosen)
    return alone


def _read_alone(block: Attention, chosen: slice) -> Attention:
    """As `heads_alone`: what is normalised together stays together, and the output projection reads one head."""
    read = torch.eye(block.heads, dtype=block.dtype, device=block.device)[chosen]
    names = ("w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "query_norm_weight", "key_norm_weight")
    fields = {name: getattr(block, name) for name in names if getattr(block, name) is not None}
    copies = {name: tensor.expand(len(read), *tensor.shape) for name, tensor in fields.items()}
    return block.replace(**copies, w_o=block.w_o * read[..., None, None], b_o=None)


def mean_entropy(maps: Float[Tensor, "heads n m"]) -> Float[Tensor, " heads"]:
    """Entropy of a row in nats, mean over the rows of each head: 0 if every query sees one key, log m if all alike."""
    return torch.special.entr(maps).sum(-1).mean(-1)


def sinks(maps: Float[Tensor, "heads n m"]) -> tuple[list[int], list[float]]:
    """For each head the key that gets most of the attention, and its share of it, mean over the queries."""
    share, key = maps.mean(-2).max(-1)
    return key.tolist(), share.tolist()
