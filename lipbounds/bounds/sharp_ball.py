r"""Sharp bounds on a ball ||X' - X||_F <= eps, ours: all heads jointly, and the truth at the centre plus a deviation.

Notation and suprema over the ball: lipbounds.targets.attention_suprema. With E_hi, Cov_hi the mean and covariance
under row i of head h, S_y the logits' change <y_i, w_hj> + <u_hi, y_j> in the direction y, ~ a deviation from the mean:

    (dF y)_i = sum_h E_hi[ M_h^T y_j + S~_y v~_hj ].

The three parts of it, for all heads at once, om_i and sg_i the roots of the norms of sum_h Cov_hi(w_h), sum_h
Cov_hi(v_h), L_ij(f) the reach of the keys with the factor f (Cauchy-Schwarz over heads and keys together each time):

- mixing, sum_h P_h (x) M_h^T: ||[P_1 ... P_H]|| ||[M_1 ... M_H]||, or both stacked, or sum_h ||P_h|| ||M_h||;
- query part, block diagonal: max_i om_i sg_i;
- key part: |(.)_i| <= sg_i sqrt( sum_j L_ij(1) |y_j|^2 ), so at most sqrt( max_j sum_i sg_i^2 L_ij(1) ).

sharp_ball.direct is their sum over the ball, with ||P'|| <= ||P|| + min( ||max |P' - P| ||_F, eps D ) for all maps side
by side or stacked, and each squared at most the sum over heads of the largest column sums of P'; D >= ||dP||_F: rows dP_hi = J(P_hi) S_a, |J S|^2 <= g_1 S^T J S, so D = max_i om_i sqrt(max_h g_1(P_hi)) +
sqrt( max_j sum_i L_ij(g_1) ).

The second derivative in the directions a and y, S_ay = <a_i, G_h y_j> + <y_i, G_h a_j>:

    (d2F a y)_i = sum_h E_hi[ S~_a M_h^T y_j + S~_y M_h^T a_j + S_ay v~_hj + S~_a S~_y v~_hj ].

Let |a| = |y| = |b| = 1, b for the output. Sums over i and j of c_ij |a_i| |y_j| |b_i| are at most max_ij c_ij.

- map: the first two, by ||dP||_F ||M||; for the part of queries also sum_h E_hi[<a_i, w~> <M_h^T y_j, b_i>] <= om_i |a_i|
  ||M|| |b_i| sqrt( sum_j max_h P_hij |y_j|^2 ):  2 ||M|| ( max_i om_i sqrt(min(max_hj P_hij, max_h g_1)) + sqrt(max_j
  sum_i L_ij(g_1)) ).
- curvature of the logits: sg_i sqrt( sum_h Var_hi <a_i, G_h y_j> ), twice: 2 max_ij sg_i sqrt( min( sum_h pi_hij
  ||G_h||^2, max_h pi_hij ||G||^2 ) ).
- third cumulants, S split into its parts of queries and keys.
  Queries twice: with |<a_i, w~_hj>| <= far_hij, at most max_i K_i(w, far) K_i(v, far), K_i(z, f) the root of the norm of
  sum_h E_hi[f z~ z~^T].
  One of each: sum_h E[<a_i, w~> <u, y_j>~ <v~, b_i>] <= sqrt( sum_h E[<a_i, w~>^2 <v~, b_i>^2] ) sqrt( sum_j L_ij(1)
  |y_j|^2 ): 2 max_ij min( K_i(v, far_w^2), K_i(w, far_v^2) ) sqrt(L_ij(1)).
  Keys twice: with R_hi = max_j far_v, sum_h R_hi sqrt(Var <u, a_j>) sqrt(Var <u, y_j>) <= sqrt( sum_j B_ij |a_j|^2 sum_j
  B_ij |y_j|^2 ), B = L(R); summed over i, by Cauchy-Schwarz: max_j sqrt( sum_i B_ij^2 ).

sharp_ball.deviation: along the segment from X to X' the Jacobian moves by at most the integral of the norm of d2F, so

    sup ||J(X')|| <= ||J(X)|| + sum_k (r_k - r_(k-1)) sup over the ball of radius r_k of ||d2F||,   0 = r_0 < ... < r_K = eps,

with ||J(X)|| from the dense Jacobian where it has at most 2**22 entries (an option), and sharp_ball.direct at radius 0
elsewhere. It tends to the truth as eps -> 0, linearly.

sharp_ball: the least of the two and of Theorem 3 on the ball. Where only the query moves the parts of queries remain,
where only the memory moves those of keys.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Feature, Source
from lipbounds.ops.spectral import root, spectral_norm_upper, vector_norm
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.attention_ball import theorem_3_on_ball
from lipbounds.targets.attention_dense import dense_norm, jacobian_entries
from lipbounds.targets.attention_suprema import (
    Maps,
    Queries,
    Rows,
    Spreads,
    joint_norms,
    key_rows,
    maps_on_ball,
    query_rows,
    reach,
    rounding_of_maps,
    spreads,
    value_rows,
)


SUPPORTS: tuple[Feature, ...] = ("heads", "biases", "mask", "cross")
CLAIM = Claim(kind="proved", scope="ball", norm="l2")
DENSE = 2**22  # entries of the Jacobian of one batch item: 2048 x 2048
SHELLS = (0.5, 1.0)  # r_k / eps


@bound(
    name="sharp_ball.direct",
    claim=CLAIM,
    source=Source(title="lipbounds", statement="three joint parts with suprema over a ball, derived here"),
    supports=SUPPORTS,
    cost="O(H n^2 d^2 + n^2 H^3 + n D^2)",
)
def direct(block: Attention, radius: float) -> tuple[Tensor, Terms]:
    """Mixing, query and key part of all heads jointly, each bounded over the ball."""
    wide = block.double
    parts = _direct(_Ball(wide, _Centre(wide), radius))
    return cast_up(_total(wide, parts), block.dtype), {f"detail.{name}": part for name, part in parts.items()}


@bound(
    name="sharp_ball.deviation",
    claim=CLAIM,
    source=Source(title="lipbounds", statement="norm at the centre and integral of the second derivative, derived here"),
    supports=SUPPORTS,
    cost="O((n D)^3) where the Jacobian is small, O(H n^2 d^2 + n^2 H^3 + n D^2) elsewhere",
)
def deviation(block: Attention, radius: float, *, dense: int = DENSE) -> tuple[Tensor, Terms]:
    """The norm of the Jacobian at the centre plus how far the Jacobian can move over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
        dense: number of entries up to which the Jacobian of a batch item is formed for its norm at the centre.
    """
    wide = block.double
    parts = _deviation(wide, _Centre(wide), radius, dense)
    return cast_up(_total(wide, parts), block.dtype), {f"detail.{name}": part for name, part in parts.items()}


@bound(
    name="sharp_ball",
    claim=CLAIM,
    source=Source(title="lipbounds", statement="least of the bounds on a ball, derived here"),
    supports=SUPPORTS,
    cost="O((n D)^3) where the Jacobian is small, O(H n^2 d^2 + n^2 H^3 + n D^2) elsewhere",
)
def sharp_ball(block: Attention, radius: float, *, dense: int = DENSE) -> tuple[Tensor, Terms]:
    """The least of: centre plus deviation, the three joint parts over the ball, Theorem 3 over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
        dense: number of entries up to which the Jacobian of a batch item is formed for its norm at the centre.
    """
    wide = block.double
    centre = _Centre(wide)
    values = {
        "deviation": _total(wide, _deviation(wide, centre, radius, dense)),
        "direct": _total(wide, _direct(_Ball(wide, centre, radius))),
        "theorem_3": theorem_3_on_ball(wide, radius)[0],
    }
    value = torch.stack([part.nan_to_num(nan=torch.inf, posinf=torch.inf) for part in values.values()]).amin(0)
    return cast_up(value, block.dtype), {f"detail.{name}": part for name, part in values.items()}


def _total(block: Attention, parts: dict[str, Tensor]) -> Float[Tensor, "*batch"]:
    """Their sum; NaN, from infinite factors, says no more than infinity does."""
    value = inflate(torch.stack(torch.broadcast_tensors(*parts.values())).sum(0), len(parts) + 8)
    return torch.where(value.isnan(), torch.inf, value).expand(block.batch_shape)


class _Centre:
    """What does not depend on the radius."""

    def __init__(self, block: Attention) -> None:
        self.keys: Rows | None = key_rows(block) if block.query_moves else None
        self.queries: Queries | None = query_rows(block) if block.memory_moves else None
        self.values: Rows = value_rows(block)
        self.mixing_weights = joint_norms(block.w_v, block.w_o)
        self.zero = torch.zeros_like(block.logits[..., 0, 0, 0])


class _Ball:
    """Suprema over the ball of one radius that several parts share."""

    def __init__(self, block: Attention, centre: _Centre, radius: float) -> None:
        self.block, self.centre, self.radius = block, centre, radius
        self.memory_radius = radius if block.memory_moves else 0.0
        self.query_radius = radius if block.query_moves else 0.0
        self.maps: Maps = maps_on_ball(block, radius)
        self.values: Spreads = spreads(block, centre.values, self.maps, self.memory_radius)
        self.value_spread: Tensor = self.values.plain()
        if centre.keys is not None:
            self.keys: Spreads = spreads(block, centre.keys, self.maps, self.memory_radius)
            self.key_spread: Tensor = self.keys.plain()
        if centre.queries is not None:
            self.plain_reach = self.reach(self.maps.pairs)

    def reach(self, weights: Tensor) -> Float[Tensor, "*batch n m"]:
        assert self.centre.queries is not None  # the memory moves
        return reach(self.centre.queries, self.query_radius, weights)

    def map_change(self) -> tuple[Tensor, Tensor]:
        """||dP||_F over all heads for a unit change: by queries for each row, and by keys."""
        norms = self.maps.softmax_norm
        by_query = by_key = self.centre.zero
        if self.block.query_moves:
            by_query = self.key_spread * root(norms.amax(-2))
        if self.block.memory_moves:
            by_key = root(self.reach(self.maps.pairs * norms.unsqueeze(-1)).sum(-2).amax(-1))
        return by_query, by_key


def _direct(ball: _Ball) -> dict[str, Tensor]:
    mixing = query_part = key_part = ball.centre.zero
    if ball.block.query_moves:
        query_part = (ball.key_spread * ball.value_spread).amax(-1)
    if ball.block.memory_moves:
        mixing = _mixing(ball)
        key_part = root((ball.value_spread.square().unsqueeze(-1) * ball.plain_reach).sum(-2).amax(-1))
    operations = sum(ball.block.logits.shape[-2:]) + 32
    return {name: inflate(part, operations) for name, part in _named(mixing, query_part, key_part).items()}


def _named(mixing: Tensor, query_part: Tensor, key_part: Tensor) -> dict[str, Tensor]:
    return {"mixing": mixing, "query_part": query_part, "key_part": key_part}


def _mixing(ball: _Ball) -> Float[Tensor, "*batch"]:
    """The mixing part over the ball."""
    maps, block = ball.block.probabilities, ball.block
    by_query, by_key = ball.map_change()
    rate = by_key + (by_query.amax(-1) if block.query_moves else by_query)
    lost = _frobenius(rounding_of_maps(block))
    moved = torch.minimum(_frobenius(ball.maps.away), ball.radius * rate + lost) if ball.radius else lost
    by_columns = ball.maps.upper.sum(-2).amax(-1)
    joint = [
        weights * torch.minimum(spectral_norm_upper(together) + moved, root(by_columns.sum(-1)))
        for together, weights in zip(
            (maps.movedim(-3, -2).flatten(-2), maps.flatten(-3, -2)), ball.centre.mixing_weights, strict=True
        )
    ]
    alone = torch.minimum(spectral_norm_upper(maps) + _frobenius_each(ball.maps.away), root(by_columns))
    return torch.minimum(torch.minimum(*joint), (alone * ball.centre.values.change).sum(-1))


def _frobenius_each(entries: Float[Tensor, "*batch heads n m"]) -> Float[Tensor, "*batch heads"]:
    return inflate(vector_norm(entries.flatten(-2)), entries.shape[-2:].numel() + 8)


def _frobenius(entries: Float[Tensor, "*batch heads n m"]) -> Float[Tensor, "*batch"]:
    return inflate(vector_norm(entries.flatten(-3)), entries.shape[-3:].numel() + 8)


def _deviation(block: Attention, centre: _Centre, radius: float, dense: int) -> dict[str, Tensor]:
    if jacobian_entries(block) <= dense:
        norm = dense_norm(block)
    else:
        norm = _total(block, _direct(_Ball(block, centre, 0.0)))
    parts = {"centre": norm}
    before = 0.0
    for share in SHELLS if radius else ():
        here = radius * share
        moved = {name: (here - before) * part for name, part in _second_derivative(_Ball(block, centre, here)).items()}
        parts |= {name: parts.get(name, centre.zero) + inflate(part, 8) for name, part in moved.items()}
        before = here
    return parts


def _second_derivative(ball: _Ball) -> dict[str, Tensor]:
    """The parts of the norm of the second derivative over the ball, rounded up."""
    block, maps = ball.block, ball.maps
    parts: dict[str, Tensor] = {}
    if block.query_moves:
        far = ball.keys.far
        parts["two_queries"] = (ball.keys.weighted(far) * ball.values.weighted(far)).amax(-1)
    if block.memory_moves:
        parts["two_keys"] = root(ball.reach(maps.pairs * _farthest(ball)).square().sum(-2).amax(-1))
        parts["map_by_keys"] = 2 * ball.centre.values.joint_change * ball.map_change()[1]
    if block.moves == "self":
        assert ball.centre.keys is not None
        keys, values = ball.keys, ball.values
        share = torch.minimum(maps.upper.amax(-1).amax(-2), maps.softmax_norm.amax(-2))
        parts["map_by_queries"] = 2 * ball.centre.values.joint_change * (ball.key_spread * root(share)).amax(-1)
        turned = torch.minimum(
            (maps.pairs * keys.rows.change.square()[..., None, None]).sum(-3),
            maps.pairs.amax(-3) * keys.rows.joint_change.square()[..., None, None],
        )
        parts["logits"] = 2 * (ball.value_spread.unsqueeze(-1) * root(turned)).amax((-2, -1))
        crossed = torch.minimum(values.weighted(keys.far.square()), keys.weighted(values.far.square()))
        parts["query_and_key"] = 2 * (crossed.unsqueeze(-1) * root(ball.plain_reach)).amax((-2, -1))
    operations = sum(block.logits.shape[-2:]) + 32
    return {name: inflate(part, operations) for name, part in parts.items()}


def _farthest(ball: _Ball) -> Float[Tensor, "*batch heads n 1"]:
    """Largest distance of the values of visible keys from their mean, over the ball."""
    seen = ball.maps.upper > 0
    return torch.where(seen, ball.values.far, 0.0).amax(-1, keepdim=True)
