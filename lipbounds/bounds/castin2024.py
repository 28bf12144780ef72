r"""Castin, Ablin, Peyre 2024: How Smooth Is Attention? (ICML 2024, arXiv 2312.14820).

Bounds on the set of inputs whose tokens all have norm at most R. Of the paper only the abstract was read here (a bound
that grows like sqrt(n) on compact sets, one that does not depend on n for the mean-field version); the constants are
recollected, and each is derived below, so the promise rests on this page.

| paper | here |
|---|---|
| tokens x_i, |x_i| <= R | rows of `block.x`, `radius` |
| A = s W_Q W_K^T, V of a head | `scale * w_q[h] @ w_k[h].T`, `w_v[h]` |

With m_i = sum_j P_ij x_j and C_i = sum_j P_ij (x_j - m_i)(x_j - m_i)^T, and a change v_i of token i,

    dy_i = V^T [ sum_j P_ij v_j  +  C_i A^T v_i  +  sum_j P_ij (x_j - m_i) <A^T x_i, v_j> ].

Write r = ||A|| R^2, and c for the largest column sum of P, so that ||P||^2 <= c (rows sum to 1).

- First part: at most sqrt(c). Second: block diagonal, ||C_i|| <= R^2, so at most r. Third: by Cauchy-Schwarz its row i
  is at most ||C_i||^{1/2} ( sum_j P_ij <A^T x_i, v_j>^2 )^{1/2}; the squares sum to at most R^2 (||A|| R)^2 c, so it is
  at most r sqrt(c). With c <= n:       triangle (ours):  ||V|| ( sqrt(n) + r (1 + sqrt(n)) ).
- (a + b + c)^2 <= 3 (a^2 + b^2 + c^2) in place of the triangle inequality, and |x_j - m_i| <= 2 R in place of the
  standard deviation, which costs a factor 4:  general:  sqrt(3) ||V|| ( r^2 (4 n + 1) + n )^{1/2}.
  It holds for any mask and logit bias, for the three parts are those of any row-stochastic P.
- Without masks and biases of the logits |S_ij| <= r, so P_ij <= e^{2 r}/n and c <= e^{2 r}:
                                        finite mean field (ours):  ||V|| ( e^r + r + r e^r ).
  The mean-field constant for W_2, ||V|| (1 + 3 r) e^{2 r}, is larger:    mean_field.

Heads (ours): ||W_O|| sqrt(sum_h L_h^2).

Numerics: float64; norms of the weights rounded up, everything after them is a few operations on non-negative numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Feature, Source
from lipbounds.derivatives.norms import combine_heads
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper
from lipbounds.registry import BoundSpec, bound
from lipbounds.rounding import cast_up, inflate, product
from lipbounds.targets.attention import Attention


Formula = Callable[[Float[Tensor, "*weights heads"], int], Float[Tensor, "*weights heads"]]
PAPER, AUTHORS = "How Smooth Is Attention?", "Castin, Ablin, Peyre"
OPERATIONS = 32  # roundings of the longest formula, an exponential of r among them


def _general(r: Tensor, n: int) -> Tensor:
    return (3 * (r.square() * (4 * n + 1) + n)).sqrt()


def _triangle(r: Tensor, n: int) -> Tensor:
    return n**0.5 + r * (1 + n**0.5)


def _mean_field(r: Tensor, n: int) -> Tensor:
    return (1 + 3 * r) * _exp_upper(2 * r)


def _mean_field_finite(r: Tensor, n: int) -> Tensor:
    return r + (1 + r) * _exp_upper(r)


def _exp_upper(exponent: Tensor) -> Tensor:
    """exp of a number that is itself rounded: an absolute error of the exponent is a relative one of the result."""
    return (exponent * (1 + 2.0**-48)).exp()


def _declare(name: str, formula: Formula, statement: str, supports: tuple[Feature, ...]) -> BoundSpec:
    def compute(block: Attention, radius: float) -> Tensor:
        wide = block.double
        r = inflate(abs(wide.scale_value) * product_norm_upper(wide.w_q, wide.w_k.mT) * radius**2, 4)
        heads = product(spectral_norm_upper(wide.w_v), formula(r, wide.tokens))
        value = combine_heads(wide, heads.expand(*wide.batch_shape, wide.heads))
        return cast_up(inflate(value, OPERATIONS), block.dtype)

    compute.__doc__ = statement
    compute.__qualname__ = name
    return bound(
        name=f"castin2024.{name}",
        claim=Claim(kind="proved", scope="compact", norm="l2"),
        source=Source(title=PAPER, authors=AUTHORS, year=2024, arxiv="2312.14820", statement=statement),
        supports=supports,
        cost="O(H D d^2)",
    )(compute)


general = _declare(
    "general", _general, "sqrt(n) bound on a compact set, recollected and derived again", ("heads", "mask")
)
triangle = _declare("triangle", _triangle, "the same parts by the triangle inequality, ours", ("heads", "mask"))
mean_field = _declare("mean_field", _mean_field, "mean-field bound, recollected and derived again", ("heads",))
mean_field_finite = _declare("mean_field_finite", _mean_field_finite, "mean-field idea at n tokens, ours", ("heads",))
