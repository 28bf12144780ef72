"""Castin, Ablin, Peyre 2024: How Smooth Is Attention? (ICML 2024, arXiv 2312.14820).

| paper | here |
|---|---|
| tokens x_i, |x_i| <= R | rows of `block.x`, `radius` |
| A = s W_Q W_K^T, V of a head | `scale * w_q[h] @ w_k[h].T`, `w_v[h]` |

Bounds on the set of inputs whose tokens all have norm at most R, with r = ||A|| R^2:

    general:  sqrt(3) ||V|| ( r^2 (4 n + 1) + n )^(1/2)      triangle (ours):  ||V|| ( sqrt(n) + r (1 + sqrt(n)) )
    mean_field:  ||V|| (1 + 3 r) e^(2 r)                     mean_field_finite (ours):  ||V|| ( e^r + r + r e^r )

The last two need logits without masks and biases. Of the paper only the abstract was read; each constant is derived
again on docs/bounds/castin2024.md, and the promise rests on that. Heads (ours): ||W_O|| sqrt(sum_h L_h^2).

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
        r = inflate(abs(wide.scale_value) * product_norm_upper(wide.w_q, wide.w_k.mT) * radius * radius, 4)
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
