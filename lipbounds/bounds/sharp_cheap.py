r"""A bound at the price of a few forward passes: heads compared by the overlaps of their weights; ours.

The differential of a block has three parts, T1 (mixing), T2 (query) and T3 (key), as in bounds/sharp.py. The weights of
each head are written as W_O^hT = U_O^h L_O^hT, W_Q^h = U_Q^h L_Q^hT, W_K^h = U_K^h L_K^hT with small square factors L
(lipbounds.targets.head_factors), and V' = V L_O, K' = K L_Q, Q' = Q L_K, V and K centred (which J 1 = 0 allows). With
mix_U(c) = || sum_h c_h U_h U_h^T || (lipbounds.ops.mixture),

    ||T1|| <= the norm of a 2 x 2 matrix (lipbounds.derivatives.first.split_mixing);
    ||T2|| <= max_i sqrt( mix_O(c_i) mix_Q(c_i) ),       c_hi = s min( ||V'^T J(P_hi) K'||_F, g_1(P_hi) ||V'|| ||K'|| );
    ||T3|| <= min( nu_O sqrt( mix_K(y^2) ), sqrt( mix_O(y) mix_K(y) ) ),      y_h = s || diag(a_h) Q'_h ||,
              a_hi = min( g_1(P_hi) ||V'||, sqrt( g_1(P_hi) lambda_max(V'^T J(P_hi) V') ) ).

Proof. T2_i = sum_h s U_O^h (V'^T J_hi K') U_Q^hT is block diagonal in i: ops/mixture.py with a_h = c_hi and w = c. T3:
row i is sum_h U_O^h z_hi, z_hi = V'^T J_hi (<u_hi, dx_j>)_j, u_hi = s W_K^h q_hi, and ||V'^T J|| <= ||V'^T J^(1/2)||
||J^(1/2)||, so |z_hi| <= a_hi |dX u_hi|. For any w_h > 0, |sum_h U_O^h z_hi|^2 <= mix_O(w) sum_h |z_hi|^2 / w_h, and

    sum_hi a_hi^2 |dX u_hi|^2 / w_h  =  s^2 sum_j sum_h |diag(a_h) Q'_h U_K^hT dx_j|^2 / w_h
                                     <=  sum_j sum_h (y_h^2 / w_h) |U_K^hT dx_j|^2  <=  mix_K(y^2 / w) |dX|^2;

w = 1 and w = y are the two that are taken. Together: on dX = f z^T, z_hi = <u_hi, z> V'^T J_hi f, so there a_hi may be
replaced by |V'^T J_hi f|, which is small where f is nearly constant on what a row attends to. With t_f and t3_f the
norms of T1 and T3 on such dX, t_r of T1 on those orthogonal to them,

    ||T1 + T3||^2 <= (t_f + t3_f)^2 + (t_r + ||T3||)^2,      and the value is min( that, ||T1|| + ||T3|| ) + ||T2||.

Rotary positions: R_i W_Q^hT stands for W_Q^hT, L_Q is diagonal and commutes with R_i, so in T2 R_i U_Q^hT stands for
U_Q^hT, |R_i U_Q^hT dx| <= rho |U_Q^hT dx|; in T3 R_j W_K^hT likewise, for each j. QK-norm: T_i W_Q^hT and T_j W_K^hT,
with L = 1 and the largest norm of T for rho (lipbounds.derivatives.token_maps). T3 then has no part along f of its own.

Queries alone moving: T2 remains; the memory alone: T1 and T3.

Numerics: float64, what rounding can take off is added by the modules named; no eigenproblem is larger than a head.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.overlap_parts import OverlapParts
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention


@bound(
    name="sharp_cheap",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="three parts through overlaps of heads, derived here"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(H n^2 (n + d)) beside the attention maps; of the weights once O(H^2 D d^2 + H^3 d^3)",
)
def sharp_cheap(block: Attention) -> tuple[Tensor, Terms]:
    """Three parts of the differential through overlaps of heads, from Gram matrices of keys and values."""
    parts = OverlapParts(block.double)
    memory, terms = parts.nothing, {}
    if block.memory_moves:
        memory = parts.memory(parts.mixing.norm, parts.key)
        terms = {"detail.mixing": parts.mixing.norm, "detail.key_part": parts.key}
    value = inflate(memory + parts.query, 8).expand(block.batch_shape)
    return cast_up(value, block.dtype), {"detail.query_part": parts.query, "detail.memory_part": memory, **terms}
