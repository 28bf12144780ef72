"""Blocks at which sharp bounds are equal to the truth, so that nothing but rounding is left to hide a fault behind.

One feature a token, W_K = W_Q and W_O = W_V^T, so no product of norms loses anything. Two kinds:

- one key: Y = X W_V W_O, whose norm is ||W_V|| ||W_O||, the mixing term of every bound;
- half: one query at 0 sees two keys a and -a, so p = (1/2, 1/2), and the query moves. The norm of the Jacobian is
  s (1/4) (2 |a| ||W_V||) (2 |a| |W_K W_Q^T|) ||W_O||, which is s ||V|| (1/2) ||K W_Q^T|| ||W_O||, the query term with
  g_1 = 1/2. With rotary positions all tokens are turned by the same angle: R^T R is c^2 + s^2 times the identity, so
  that |W_K W_Q^T| has this factor, and so have ||R W_Q^T|| ||K|| together, whatever the rounding of c and s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lipbounds.claims import FEATURES, Feature
from lipbounds.targets.attention import Attention


WIDTHS = st.integers(1, 8)
SEEDS = st.integers(0, 2**24)
# Evenly: it is in the short dtypes that rounding is largest.
DTYPES = st.sampled_from((torch.float64, torch.float32, torch.bfloat16))


@st.composite
def tight_blocks(
    draw: Callable[..., Any], features: Iterable[Feature] = tuple(FEATURES), *, dtype: torch.dtype | None = None
) -> Attention:
    """Blocks of one head, without biases and masks, at which Theorem 3 and its sharper forms are equalities.

    Args:
        draw: given by Hypothesis.
        features: what the blocks may have; without `cross` they have one key.
        dtype: the only dtype; None for all.
    """
    half = "cross" in features and draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kind = draw(DTYPES) if dtype is None else dtype

    def gaussian(width: int) -> Tensor:
        return torch.randn(1, 1, width, generator=generator, dtype=torch.float64).to(kind)

    shared, values, token = gaussian(draw(WIDTHS)), gaussian(draw(WIDTHS)), gaussian(1)[0]
    weights: dict[str, Any] = {"w_q": shared, "w_k": shared, "w_v": values, "w_o": values.mT.contiguous()}
    width, tokens = shared.shape[-1], 2 if half else 1
    if "rotary" in features and width % 2 == 0 and draw(st.booleans()):  # of all features: others keep the factor 1
        angle = 3 * torch.randn((), generator=generator, dtype=torch.float64)
        turn = torch.stack([angle.cos(), angle.sin()]).to(kind).unsqueeze(-1).expand(tokens, 2, width // 2)
        weights |= {"query_rotation": turn[:1], "key_rotation": turn}
    if not half:
        return Attention(x=token, **weights)
    return Attention(x=torch.zeros_like(token), memory=torch.cat([token, -token]), moves="query", **weights)
