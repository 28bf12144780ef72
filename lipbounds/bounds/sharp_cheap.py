"""A bound at the price of a few forward passes: heads compared by the overlaps of their weights; ours.

    ||T1|| <= the norm of a 2 x 2 matrix (lipbounds.derivatives.first.split_mixing);
    ||T2|| <= max_i sqrt( mix_O(c_i) mix_Q(c_i) ),       c_hi = s min( ||V'^T J(P_hi) K'||_F, g_1(P_hi) ||V'|| ||K'|| );
    ||T3|| <= min( nu_O sqrt( mix_K(y^2) ), sqrt( mix_O(y) mix_K(y) ) ),      y_h = s || diag(a_h) Q'_h ||,
              a_hi = min( g_1(P_hi) ||V'||, sqrt( g_1(P_hi) lambda_max(V'^T J(P_hi) V') ) ).

The value is a bound of ||T1 + T3|| with changes along one direction f apart, plus that of ||T2||. Queries alone moving:
T2 remains; the memory alone: T1 and T3.

| symbol | meaning |
|---|---|
| T1, T2, T3 | mixing, query and key part of the differential, as in bounds/sharp.py |
| W_O^hT = U_O^h L_O^hT, likewise Q, K | basis times square factor (lipbounds.targets.head_factors) |
| V' = V L_O, K' = K L_Q, Q' = Q L_K | values, keys and queries in these bases; V and K centred |
| mix_U(c) | || sum_h c_h U_h U_h^T || (lipbounds.ops.mixture) |
| nu_O | norm of all U_O^h next to each other |

Numerics: float64, what rounding can take off is added by the modules named; no eigenproblem is larger than a head.
Proof: docs/bounds/sharp_cheap.md.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.overlap_parts import OverlapParts
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention


@bound(
    name="sharp_cheap",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="three parts through overlaps of heads, derived here"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(H n^2 (n + d)) beside the attention maps; of the weights once O(H^2 D d^2 + H^3 d^3)",
)
def sharp_cheap(block: Attention) -> tuple[Tensor, Terms]:
    """Three parts of the differential through overlaps of heads, from Gram matrices of keys and values.

    Args:
        block: the attention block.
    """
    parts = OverlapParts(block.double)
    terms = {"detail.query_part": parts.query, "detail.memory_part": parts.joint_memory}
    if block.memory_moves:
        terms |= {"detail.mixing": parts.mixing.norm, "detail.key_part": parts.key}
    return cast_up(parts.cheap, block.dtype), terms
