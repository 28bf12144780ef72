r"""The softmax of moving logits.

Logits S + d, d = C h + e; only differences of d within a row count. Over the ball |d_l - d_j| <= rho_jl, log-odds
radii, with the first-order part r |C_l - C_j| exact. Along S + t d, 0 <= t <= 1, the map P_t has

    P_t,j <= up_j = 1 / (1 + sum_l!=j exp(S_l - S_j - rho_jl)).

With mu_t the mean of d and w_t its variance under P_t,

    q = int (1 - t) P_t * ((d - mu_t)^2 - w_t) dt,        int (1 - t) dt = 1/2.

- |d_j - mu_t| <= D_j = max of sum_l p_l rho_jl over 0 <= p <= up, sum p = 1: the largest first.
- w_t <= w: the least of (largest rho / 2)^2; the max of sum_j p_j a_j^2 over the same p, a_j >= |d_j - mu_0|; and
  (r ||diag(up)^(1/2) C|| + (max of sum p_j W_j^2)^(1/2))^2, W >= |e|, C and e without their means under P.
- entry: |q_j| <= up_j max(D_j^2, w) / 2, and <= up_j + P_j a_j. Row: the l2 norm is at most the l1 norm, at most w
  (E |x^2 - w| <= 2 w).
- all rows: |q|_2^2 <= sum of w_row^2 <= max w_row * sum of w_row, and the sum of variances is bounded as a whole:
  (r ||diag(up)^(1/2) C|| + ...)^2 with the rows of all queries in one matrix.

sum_j q_j = 0 in every row, so the columns of T start as those of I - P 1^T: later ones are differences to a mean.

Second order, C centred: v . B[h, h] = 1/2 sum_j P_j (v_j - v . P) (C_j h)^2, and v . X_s[q, h] =
sum_j P_j (v_j - v . P) (T_j q)(C_j h). Beyond: with x = d - mu_t,

    d^3/dt^3 v . P_t = E_t[(v - E_t v) x^3] - 3 E_t[(v - E_t v) x] w_t,       int (1 - t)^2 / 2 dt = 1/6,

|v_j - E_t v| <= V_j by the same maximum as D_j; and 1/2 sum_j P_j (v_j - v . P) e_j^2, term by term or with the largest
factor and |e|^2.

Without the second order, entry by entry with x = d - mu_t,

    t_j = P_j ((C_j h) e_j - E[(C h) e]) + P_j (e_j^2 - E[e^2]) / 2
          + int (1 - t)^2 / 2 P_t,j (x_j^3 - 3 x_j w_t - E_t x^3) dt.

With s and s_e the deviations of C h and e under P, E|(C h) e| <= s s_e, |E_t x^3| <= D w, E_t |x|^3 <= D w (D the
largest D_j) and E_t |x| <= w^(1/2):

- entry: P_j (U_j W_j + s s_e) + P_j max(W_j^2, s_e^2) / 2 + up_j (D_j^3 + 3 D_j w + D w) / 6.
- row: 2 s s_e + s_e^2 + (2 D w + 3 w^(3/2)) / 6, and never more than |q| + |B| <= |q| + s^2.
- all rows: the first two parts as they are; the third is a factor of w^(1/2), whose squares are bounded as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.compose.taylor.ball import Ball
from lipbounds.compose.taylor.coefficient import Coefficient, largest_eigenvalue, norm_upper, weighted_product
from lipbounds.compose.taylor.model import CENTRE, Range, Ranges, Value
from lipbounds.compose.taylor.movement import Movement, row_error
from lipbounds.compose.taylor.operation import Operation
from lipbounds.compose.taylor.second import products
from lipbounds.ops._rows import SMALLEST_NORMAL
from lipbounds.ops.capped_mean import largest_mean
from lipbounds.rounding import EXP_ULPS, UNIT_ROUNDOFF, gamma, inflate


NARROW, MANY = 200, 512  # functionals are formed of few entries, and that many at once


class Softmax(Operation):
    """P = softmax(S) of every row.

    Over 150 lines, because it is one operation, and its bounds share what is known of its map.

    Args:
        name: of the operation.
        logits: S, `[heads, n, m]`, finite.
        visible: which keys a query sees; None: all.
    """

    def __init__(self, name: str, logits: Value, visible: Tensor | None) -> None:
        self.name = name
        centre = logits.centre
        self._visible = torch.ones_like(centre, dtype=torch.bool) if visible is None else visible.expand_as(centre)
        self._logits = centre.masked_fill(~self._visible, -torch.inf)
        self._logit_error = logits.centre_error
        probabilities = self._logits.softmax(-1)
        # e^(2 eta) - 1 <= 4 eta for 2 eta <= 1. The exponent S_j - max S is rounded, by 745 u at most: else exp is 0.
        roundings = centre.shape[-1] + 4 * EXP_ULPS + 1024
        moved = 4 * row_error(self._logits, self._logit_error) + roundings * UNIT_ROUNDOFF
        moved = torch.where(moved < 1, moved, torch.inf)
        spread = (probabilities * moved).nan_to_num(nan=torch.inf) + SMALLEST_NORMAL
        self.map = Coefficient(probabilities.unsqueeze(0), inflate(spread, 8).clamp(max=1) * self._visible)
        moving = Value(
            {k: p.arranged(lambda t: t * self._visible) for k, p in logits.coefficients.items() if k != CENTRE}
        )
        self.centred = moving.each(self._centred)
        coefficients = {k: p.times(self.map, torch.mul, 2) for k, p in self.centred.coefficients.items()}
        output = self.bent({CENTRE: self.map} | coefficients)
        self.output = output.with_term(name, self._columns()) if output.moves else output
        self._grams: tuple[Tensor, Tensor] | None = None

    def _centred(self, part: Coefficient) -> Coefficient:
        """Rows without their mean under the map."""
        length = part.error.shape[-1]
        weighted = part.times(self.map, torch.mul, 2)
        mean = weighted.summed(_sums, _sums, length)
        return part.plus(Coefficient(-mean.matrix, mean.error))

    def _columns(self) -> Coefficient:
        """I - P 1^T of every row; exact but for the rounding of 1 - P_j."""
        shape = self._logits.shape
        count, length = shape[:-1].numel(), shape[-1]
        rows = self.map.matrix[0].reshape(count, length)
        columns = rows.new_zeros(count, length, count, length)
        index = torch.arange(count, device=rows.device)
        own = torch.eye(length, dtype=rows.dtype, device=rows.device) - rows.unsqueeze(-2)
        columns[index, :, index, :] = own
        error = torch.full_like(self._logits, 2 * UNIT_ROUNDOFF)
        return Coefficient(columns.reshape(-1, *shape), error)

    def bend(self) -> Coefficient:
        """P ((C h)^2 - E[(C h)^2]) / 2."""
        part = self.centred.linear
        square = self._centred(products(part, part, torch.mul, 2)).times(self.map, torch.mul, 2)
        return Coefficient(square.matrix / 2, square.error / 2)

    # -- over the balls ---------------------------------------------------------------------------------------------

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file."""
        moved = self._movement(ranges)
        ranges.notes[self.name] = moved
        box = moved.upper * torch.maximum(moved.deviation.square(), moved.variance.unsqueeze(-1)) / 2
        # P_t,j - P_j is between -P_j and up_j - P_j.
        most = moved.upper + self.map.sizes * (moved.first + moved.rest)
        box = torch.minimum(inflate(box, 8).nan_to_num(nan=torch.inf), inflate(most, 4))
        rows = torch.minimum(norm_upper(box), moved.variance).flatten(1)
        energy = self._energy(ranges, moved)
        if self.second:
            return self._measure_third(moved, box, rows.unflatten(1, moved.variance.shape[1:]), energy)
        ball = torch.minimum(norm_upper(rows), inflate((moved.variance.flatten(1).amax(1) * energy).sqrt(), 4))
        return Range(ball=ball.nan_to_num(nan=torch.inf), box=box.flatten(1), groups=rows)

    def _measure_third(self, moved: Movement, box: Tensor, rows: Tensor, energy: Tensor) -> Range:
        """Of t.

        Args:
            moved: the rows over the balls.
            box: on the entries of q.
            rows: on the l2 norms of its rows.
            energy: on the sum of the variances of all rows.
        """
        sizes, rest, own = self.map.sizes, moved.rest, moved.own
        other = inflate((sizes * rest.square()).sum(-1).sqrt(), rest.shape[-1] + 8)
        both, squares = (own * other).unsqueeze(-1), other.square().unsqueeze(-1)
        variance, largest = moved.variance.unsqueeze(-1), moved.deviation.amax(-1, keepdim=True)
        second = sizes * (moved.first * rest + both + torch.maximum(rest.square(), squares) / 2)
        cubes = moved.deviation * (moved.deviation.square() + 3 * variance) + largest * variance
        entries = inflate(second + moved.upper * cubes / 6, 24).nan_to_num(nan=torch.inf)
        bent = sizes * torch.maximum(moved.first, own.unsqueeze(-1)).square() / 2
        entries = torch.minimum(entries, inflate(box + bent, 8))
        root = moved.variance.sqrt()
        middle, factor = (
            inflate(2 * own * other + other.square(), 8),
            (2 * largest.squeeze(-1) * root + 3 * root**2) / 6,
        )
        whole = inflate(middle + factor * root, 16).nan_to_num(nan=torch.inf)
        whole = torch.minimum(torch.minimum(whole, norm_upper(entries)), inflate(rows + own.square(), 4)).flatten(1)
        shared = norm_upper(middle.flatten(1)) + factor.flatten(1).amax(1) * energy.sqrt()
        ball = torch.minimum(norm_upper(whole), inflate(shared, 16).nan_to_num(nan=torch.inf))
        return Range(ball=ball, box=entries.flatten(1), groups=whole)

    def _gram(self) -> tuple[Tensor, Tensor]:
        """Gram matrices of the rows of C, centred, and their error, [heads, n, m, m]."""
        if self._grams is None:
            part = self.centred.linear
            gram = torch.einsum("ahij,ahil->hijl", part.matrix, part.matrix)
            sizes, off = part.sizes, part.error + gamma(len(part.matrix) + 4) * part.sizes
            error = sizes.unsqueeze(-1) * off.unsqueeze(-2)
            self._grams = gram, inflate(error + error.mT, 4)
        return self._grams

    def _movement(self, ranges: Ranges) -> Movement:
        first, rest = ranges.linear_and_rest(self.centred, 0)
        odds = self._odds(ranges, first, rest)
        upper = self._upper(odds)
        change = inflate(first + rest, 2)
        deviation = torch.minimum(largest_mean(odds, upper.unsqueeze(-2)), odds.amax(-1))
        variance = torch.minimum((odds.amax((-2, -1)) / 2).square(), largest_mean(change.square(), upper))
        gram, error = self._gram()
        root = upper.sqrt()
        weighted = root.unsqueeze(-1) * gram * root.unsqueeze(-2)
        weighted_error = norm_upper((root.unsqueeze(-1) * error * root.unsqueeze(-2)).flatten(-2))
        own = largest_eigenvalue(weighted) + inflate(weighted_error, 8)
        linear = inflate(ranges.radii[:, None, None] * own.sqrt(), 8)
        spread = linear + largest_mean(rest.square(), upper).sqrt()
        variance = inflate(torch.minimum(variance, spread.square()), 16)
        return Movement(first, rest, upper, inflate(deviation, 4), variance.nan_to_num(nan=torch.inf), linear)

    def _odds(self, ranges: Ranges, first: Tensor, rest: Tensor) -> Tensor:
        """rho, [radii, heads, n, m, m]."""
        gram, error = self._gram()
        own = gram.diagonal(dim1=-2, dim2=-1)
        square = own.unsqueeze(-1) + own.unsqueeze(-2) - 2 * gram
        off = error.diagonal(dim1=-2, dim2=-1)
        lost = off.unsqueeze(-1) + off.unsqueeze(-2) + 2 * error + gamma(8) * (own.unsqueeze(-1) + own.unsqueeze(-2))
        apart = inflate((square.clamp(min=0) + 2 * lost).sqrt(), 8)
        linear = ranges.per_radius(ranges.radii, apart)
        linear = torch.minimum(linear, first.unsqueeze(-1) + first.unsqueeze(-2))
        if ranges.ball is not None:
            linear = torch.minimum(linear, ranges.per_radius(ranges.own, self._apart(ranges.ball)))
        both = self._visible.unsqueeze(-1) & self._visible.unsqueeze(-2)
        both = both & ~torch.eye(both.shape[-1], dtype=torch.bool, device=both.device)
        odds = inflate(linear + rest.unsqueeze(-1) + rest.unsqueeze(-2), 4)
        return torch.where(both, odds.nan_to_num(nan=torch.inf), 0.0)

    def _apart(self, ball: Ball) -> Tensor:
        """Dual norms of C_j - C_l, [heads, n, m, m]."""
        part = self.centred.linear
        rows = part.matrix.movedim(0, -1)
        found = [ball.dual(rows - rows[..., [j], :]) for j in range(rows.shape[-2])]
        off = part.error + 2 * UNIT_ROUNDOFF * part.sizes
        return inflate(torch.stack(found, -1) + ball.dual_error(off.unsqueeze(-1) + off.unsqueeze(-2)), 8)

    def _upper(self, odds: Tensor) -> Tensor:
        """up, from the logits as computed and their error."""
        finite = self._logits.masked_fill(~self._visible, 0.0)
        apart = finite.unsqueeze(-2) - finite.unsqueeze(-1)  # S_l - S_j at [j, l]
        off = self._logit_error.unsqueeze(-1) + self._logit_error.unsqueeze(-2)
        off = 2 * off + 8 * UNIT_ROUNDOFF * (finite.abs().unsqueeze(-1) + finite.abs().unsqueeze(-2) + odds)
        others = (apart - odds - off).exp()
        length = others.shape[-1]
        keep = self._visible.unsqueeze(-2) & ~torch.eye(length, dtype=torch.bool, device=odds.device)
        total = 1 + torch.where(keep, others, 0.0).sum(-1)
        upper = inflate(1 / total, length + 4 * EXP_ULPS + 8) + SMALLEST_NORMAL
        return torch.where(self._visible, upper.nan_to_num(nan=1.0).clamp(max=1), 0.0)

    def _energy(self, ranges: Ranges, moved: Movement) -> Tensor:
        """Bound on the sum of the variances of all rows."""
        part = self.centred.linear
        flat, count = part.matrix.flatten(1), part.matrix.shape[0]
        weights = moved.upper.flatten(1)
        if count <= flat.shape[1]:
            gram = torch.einsum("ax,kx,bx->kab", flat, weights, flat)
        else:
            scaled = flat * weights.sqrt().unsqueeze(1)
            gram = scaled.mT @ scaled
        off = part.error + gamma(flat.shape[1] + count + 16) * part.sizes
        lost = 2 * (weights @ (part.sizes * off).flatten())
        linear = ranges.radii * (largest_eigenvalue(gram) + inflate(lost, flat.shape[1] + 8)).sqrt()
        rest = largest_mean(moved.rest.square(), moved.upper).flatten(1).sum(1).sqrt()
        return inflate((linear + rest).square(), flat.shape[1] + 16)

    # -- of functionals ---------------------------------------------------------------------------------------------

    def _functionals(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """v without its mean under the map, with the error of every entry of it, [rows, heads, n, m] and [rows]."""
        v = rows.unflatten(1, self._logits.shape)
        mean = (v * self.map.matrix[0]).sum(-1, keepdim=True)
        largest = v.abs().amax((-3, -2, -1))
        off = self.map.error.sum(-1).amax() + gamma(v.shape[-1] + 8)
        return v - mean, inflate(2 * error + 2 * off * largest, 8)

    def quadratic(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """See the top of this file."""
        v, off = self._functionals(rows, error)
        part, map_ = self.centred.linear, self.map
        weights = (v * map_.matrix[0] / 2).flatten(1)
        weight_error = (v.abs() * map_.error + off[:, None, None, None] * map_.sizes).flatten(1) / 2
        return weighted_product(part, part, weights, weight_error)

    def crossed(self, rows: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """See the top of this file."""
        v, off = self._functionals(rows, error)
        part, map_ = self.centred.linear, self.map
        weights = (v * map_.matrix[0]).flatten(1)
        weight_error = (v.abs() * map_.error + off[:, None, None, None] * map_.sizes).flatten(1)
        return {
            name: weighted_product(other, part, weights, weight_error) for name, other in self.centred.terms.items()
        }

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """See the top of this file."""
        moved: Movement = ranges.notes[self.name]
        v, off = self._functionals(rows, error)
        size = v.abs() + off[:, None, None, None]
        squares = torch.einsum("khij,chij->kc", self.map.sizes * moved.rest.square() / 2, size)
        whole = ranges.linear_and_rest(self.centred, 3)[1].square()[:, None] * (size * self.map.sizes / 2).flatten(
            1
        ).amax(1)
        apart = (v.unsqueeze(-1) - v.unsqueeze(-2)).abs() + 2 * off[:, None, None, None, None]
        third = torch.stack([self._third(moved, k, size, apart) for k in range(len(ranges.radii))])
        total = torch.minimum(squares, whole) + third
        return inflate(total, 4 * v[0].numel() + 32).nan_to_num(nan=torch.inf)

    def functional(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor | None:
        """From the quadratic form, and the terms with e entry by entry.

        1/2 sum_j w_j (C_j h)^2, with w = P (v - v . P), lies between -r^2 ||w_-^(1/2) C||^2 / 2 and
        r^2 ||w_+^(1/2) C||^2 / 2.
        """
        if rows.shape[1] > NARROW or len(rows) > MANY:
            return None
        moved: Movement = ranges.notes[self.name]
        v, off = self._functionals(rows, error)
        part, map_ = self.centred.linear, self.map
        weights = (v * map_.matrix[0]).flatten(1)
        weight_error = (v.abs() * map_.error + off[:, None, None, None] * map_.sizes).flatten(1)
        flat, sizes = part.matrix.flatten(1).mT, part.sizes.flatten()
        gram = flat @ flat.mT
        slack = (weights.abs() * (2 * part.error.flatten() * sizes + gamma(flat.shape[1] + 8) * sizes.square())).sum(1)
        slack = inflate(slack + weight_error @ sizes.square(), flat.shape[0] + 16)
        norms = torch.zeros_like(error)
        for sign in (1, -1):
            root = (sign * weights).clamp(min=0).sqrt()
            norms = torch.maximum(norms, largest_eigenvalue(gram * root.unsqueeze(-1) * root.unsqueeze(-2)))
        first = ranges.per_radius(ranges.radii.square(), inflate((norms + slack) / 2, 4)) * (not self.second)
        size = (v.abs() + off[:, None, None, None]).flatten(1)
        mixed = (map_.sizes * moved.first * moved.rest).flatten(1) @ size.mT
        return inflate(first + mixed + self.beyond(rows, error, ranges), 2 * rows.shape[1] + 8).nan_to_num(
            nan=torch.inf
        )

    def _third(self, moved: Movement, k: int, size: Tensor, apart: Tensor) -> Tensor:
        """1/6 of the bound on the third derivative, summed over rows: one number for each functional."""
        upper, deviation, variance = moved.upper[k], moved.deviation[k], moved.variance[k]
        spread = torch.minimum(largest_mean(apart, upper.unsqueeze(-2)), apart.amax(-1))  # V
        cube = torch.minimum((upper * deviation**3 * spread).sum(-1), spread.amax(-1) * deviation.amax(-1) * variance)
        deviations = (largest_mean(size.square(), upper) * variance).sqrt()
        slope = torch.minimum((upper * deviation * spread).sum(-1), deviations)
        return inflate((cube + 3 * variance * slope) / 6, 2 * upper.shape[-1] + 32).sum((-2, -1))


def _sums(rows: Tensor) -> Tensor:
    """The sum of each row in every place of it."""
    return rows.sum(-1, keepdim=True).expand_as(rows)
