r"""Norms of products of block rows of the Jacobian, and the three parts of the differential with all heads: ours.

With M_h = W_V^h W_O^h, u_hi = s W_K^h q_hi, x_hij = P_hij (v_hj - m_hi), m_hi = sum_j P_hij v_hj and Cov_hi(V, K) =
V_h^T J(P_hi) K_h, the differential of the block is, as in bounds/covariance.py and summed over heads,

    dy_i = sum_hj P_hij M_h^T dx_j  +  sum_h s W_O^hT Cov_hi(V, K) W_Q^hT dx_i  +  sum_hj W_O^hT x_hij <u_hi, dx_j>.

Call the three maps T1 (mixing), T2 (query), T3 (key), and J_i the D_out x m D matrix of all that reaches output i.

**Gram blocks** (`sharp`). J J^T is the n x n array of blocks J_i J_k^T, and the norm of an array of blocks is at most
the norm of the matrix of their norms: |sum_ik <a_i, B_ik b_k>| <= sum_ik ||B_ik|| |a_i| |b_k|. So

    L(X)^2 = ||J J^T||  <=  || ( ||J_i J_k^T|| )_ik ||.                                                          (1)

Here all heads, keys and the three parts are summed before a norm is taken; only signs between different outputs are
lost. It is never above || ( sum_j ||J_ij|| ||J_kj|| )_ik || = || ( ||J_ij|| )_ij ||^2, the norm of block norms. The
blocks are made from small factors (lipbounds.derivatives.first.gram_blocks); ||B|| is replaced by the Schatten norm
||B||_S(p) >= ||B||, p = 2, 4, ..., 64 (lipbounds.ops.schatten), which costs at most D^(1/2p). Without products of
different rows, ||J_i J_k^T|| <= ||J_i|| ||J_k||, and

    L(X)^2  <=  sum_i ||J_i||^2,   ||J_i||^2 = ||J_i J_i^T||.                                                    (2)

**Three parts** (`sharp_fast`). L(X) <= ||T1|| + ||T2|| + ||T3||, and with S_hg = W_O^h W_O^gT and Frobenius norms of
Gram blocks, which small Gram matrices give,

    ||T1||^2 <= || ( ||sum_hg (P_h P_g^T)_ik M_h^T M_g||_F )_ik ||,   the square of an entry being
                sum (P_h P_g^T)_ik (P_h' P_g'^T)_ik <M_h^T M_g, M_h'^T M_g'>                                      (3)
    ||T2||    = max_i ||T2_i|| <= max_i ||T2_i||_F                                                                (4)
    ||T3||^2 <= sum_i ||T3_i T3_i^T||_F,   ||T3_i T3_i^T||_F^2 = tr (K_i O_i K_i O_i)                             (5)

with O_i the H m x H m Gram matrix x_hij^T S_hg x_gil of the columns, and K_i = (<u_hi, u_gi>)_hg acting on the heads:
T3_i = sum_h (columns of head h) (x) u_hi, so that the Gram matrix of T3_i is K_i^(1/2) O_i K_i^(1/2). The trace is
evaluated as tr (S C_i S C_i), C_i the array of the d_v x d_v blocks <u_hi, u_gi> sum_j x_hij x_gij^T. Each part is
replaced by its sum over heads where that is smaller, which loses nothing for one head:

    ||T1|| <= sum_h ||P_h|| ||M_h||,   ||T2_i|| <= sum_h s ||W_O^hT Cov_hi W_Q^hT||,
    ||T3|| <= sum_h sqrt( max_j sum_i P_hij |u_hi|^2 ||W_O^hT Cov_hi(V, V) W_O^h|| ),

the last as in bounds/covariance.py: |sum_j P_hij W_O^hT (v_hj - m_hi) c_j|^2 <= ||W_O^hT Cov_hi(V, V) W_O^h|| sum_j
P_hij c_j^2 with c_j = <u_hi, dx_j>, summed over i.

`sharp` is the smaller of `sharp_fast` and (1), or of `sharp_fast` and (2). Size rule, the same for every item of a
batch (lipbounds.derivatives.first.gram_norm): (1) is evaluated up to 2.5e12 multiplications and additions, with the
largest p for which these stay below the limit in GRAM_WORK (p = 8 up to 2e11, 64 up to 5e9); above that (2) up to 1e12,
with p = 8. Still larger blocks get `sharp_fast`: a smallest of fewer proved bounds is proved as well. With queries
alone moving, J_i J_k^T = 0 for i != k, and (1) is max_i ||T2_i||.

Numerics: float64. Rounding of (1) and (2) is that of lipbounds.derivatives.first.gram_blocks, added to every norm of a
block: it costs 1e-7 of the number at most where the factors do not cancel, and the sums over heads take over where they
do. (3), (4) and (5) in lipbounds.derivatives.first.three_parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.gram_norm import gram_norm, has_gram_norm, has_rows_norm, rows_norm
from lipbounds.derivatives.first.three_parts import three_parts
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention


@bound(
    name="sharp",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="norms of Gram blocks of the Jacobian, derived here"),
    supports=("heads", "biases", "mask", "cross"),
    cost="O(n^2 D^2 (D + n)) up to a size, then O(n D^3), then that of sharp_fast",
    version=3,
)
def sharp(block: Attention) -> tuple[Tensor, Terms]:
    """Norm of the matrix of norms of Gram blocks: all heads, keys and parts are summed before a norm is taken."""
    wide = block.double
    mixing, query, key = three_parts(wide)
    parts = mixing + query + key
    terms = {"detail.parts": parts}
    value = parts
    if has_gram_norm(wide):
        terms["detail.gram"] = gram_norm(wide)
        value = torch.minimum(value, terms["detail.gram"])
    elif has_rows_norm(wide):
        terms["detail.rows"] = rows_norm(wide)
        value = torch.minimum(value, terms["detail.rows"])
    value = inflate(value, 8).expand(block.batch_shape)
    return cast_up(value, block.dtype), terms


@bound(
    name="sharp_fast",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="three parts of the differential with all heads, derived here"),
    supports=("heads", "biases", "mask", "cross"),
    cost="O(n D^2 (n + D) + n^2 H^4)",
    version=2,
)
def sharp_fast(block: Attention) -> tuple[Tensor, Terms]:
    """The three parts of the differential with all heads in one, from Gram matrices of heads and keys."""
    mixing, query, key = three_parts(block.double)
    value = inflate(mixing + query + key, 8).expand(block.batch_shape)
    terms = {"detail.mixing": mixing, "detail.query_part": query, "detail.key_part": key}
    return cast_up(value, block.dtype), terms
