r"""Products of two moving matrices, Z = X Y for every head: logits from queries and keys, outputs from maps and values.

The remainder is q = dX dY, exactly. With a_X = |C_X h| + |e_X| etc. for rows x_i of X and columns y_o of Y:

- entry: |dx_i . dy_o| <= |dx_i| |dy_o|, and <= sum_d |dX_id| |dY_do|. The part of first order in both is
  h^T A^T B h with A, B the coefficients of x_i and y_o, at most r^2 (||A|| ||B|| + ||A B^T||_F) / 2: for <A h, B h> =
  (|(A' + B') h|^2 - |(A' - B') h|^2) / 4 with A' = A / t, B' = t B, and ||A' + B'||^2 <= ||A'||^2 + ||B'||^2 +
  2 ||A' B'^T||, with t^2 = ||A|| / ||B||. Tokens that are moved by different pixels gain a factor of two.
- row: |dx_i dY| <= |dx_i| ||dY||_F, and <= sum_d |dX_id| |dY_d|.
- all: the root of the sum over heads of (||dX||_F ||dY||_F)^2.

Without the second order t = e_X C_Y h + C_X h e_Y + e_X e_Y, and in each product one factor is of what is left.

Second order: v . B[h, h] = sum v_io (C_X,id h)(C_Y,do h). With e: v . X_s[q, h] = sum v_io ((T_X,id q)(C_Y,do h) +
(C_X,id h)(T_Y,do q)). Beyond: sum v_io e_X,id e_Y,do, entry by entry, or <e_X, v e_Y^T> <= |e_X|_F ||v|| |e_Y|_F for
every head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.compose.taylor.coefficient import TINY, Coefficient, Product, largest_eigenvalue, norm_upper
from lipbounds.compose.taylor.model import CENTRE, INPUT, Range, Ranges, Value, together
from lipbounds.compose.taylor.norms import spectral_upper
from lipbounds.compose.taylor.operation import Operation
from lipbounds.compose.taylor.second import products
from lipbounds.rounding import gamma, inflate, product


NARROW, MANY = 200, 512  # functionals are formed for few products of rows, and that many at once
SUMS = 1 << 20  # more inputs than any network here has


class Bilinear(Operation):
    """Z = X Y for every head.

    Over 150 lines, because its remainder, its forms and what is beyond them share the rows of X and Y.

    Args:
        name: of the operation.
        left: X, `[heads, n, d]`.
        right: Y, `[heads, d, m]`.
    """

    def __init__(self, name: str, left: Value, right: Value) -> None:
        self.name, self.left, self.right = name, left, right
        self._columns = right.arranged(lambda t: t.mT)
        self.heads, self.rows, self.inner = left.centre.shape
        self.cols = right.centre.shape[-1]
        x, y = left.coefficients[CENTRE], right.coefficients[CENTRE]
        terms = self.inner + 2
        by_left = {k: p.times(y, torch.matmul, terms) for k, p in left.coefficients.items() if k != CENTRE}
        by_right = {k: p.times(x, lambda t, c: c @ t, terms) for k, p in right.coefficients.items() if k != CENTRE}
        coefficients = {CENTRE: x.times(y, torch.matmul, terms)} | together(by_left, by_right)
        self.output = self.bent(coefficients).with_outputs(name) if self._both_move else Value(coefficients)
        self._crossed: Tensor | None = None

    def bend(self) -> Coefficient:
        """C_X h C_Y h."""
        return products(self.left.linear, self.right.linear, torch.matmul, self.inner + 2)

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file."""
        left, right = self.left, self.right
        if self.second:
            return self._measure_third(ranges)
        row, row_rest = ranges.linear_and_rest(left, 1)
        col, col_rest = ranges.linear_and_rest(self._columns, 1)
        x, y = ranges.total(left, 0), ranges.total(right, 0)
        first = self._first_order(ranges)
        mixed = row.unsqueeze(-1) * col_rest.unsqueeze(-2) + row_rest.unsqueeze(-1) * (col + col_rest).unsqueeze(-2)
        box = inflate(torch.minimum(first + mixed, x @ y), 2 * self.inner + 16)
        along, whole_x, whole_y = ranges.total(right, 1), ranges.total(left, 2), ranges.total(right, 2)
        rows = torch.minimum(product(row + row_rest, whole_y.unsqueeze(-1)), (x @ along.unsqueeze(-1)).squeeze(-1))
        rows = torch.minimum(inflate(rows, self.inner + 8), norm_upper(box)).flatten(1)
        ball = torch.minimum(norm_upper(rows), norm_upper(inflate(product(whole_x, whole_y), 2)))
        return Range(ball=ball, box=box.flatten(1), groups=rows)

    def _measure_third(self, ranges: Ranges) -> Range:
        """Of t."""
        left, right = self.left, self.right

        def mixed(dims: int, other: Value, other_dims: int, multiply: Product) -> Tensor:
            one, one_rest = ranges.linear_and_rest(left, dims)
            two, two_rest = ranges.linear_and_rest(other, other_dims)
            return multiply(one, two_rest) + multiply(one_rest, two + two_rest)

        lengths = mixed(1, self._columns, 1, lambda x, y: x.unsqueeze(-1) * y.unsqueeze(-2))
        box = torch.minimum(lengths, mixed(0, right, 0, torch.matmul)).nan_to_num(nan=torch.inf)
        box = inflate(box, 2 * self.inner + 16)
        rows = mixed(1, right, 2, lambda x, y: x * y.unsqueeze(-1))
        rows = torch.minimum(rows, mixed(0, right, 1, lambda x, y: (x @ y.unsqueeze(-1)).squeeze(-1)))
        rows = inflate(rows, 2 * self.inner + 16).nan_to_num(nan=torch.inf)
        rows = torch.minimum(rows, norm_upper(box)).flatten(1)
        whole = norm_upper(inflate(mixed(2, right, 2, torch.mul), 8)).nan_to_num(nan=torch.inf)
        return Range(ball=torch.minimum(norm_upper(rows), whole), box=box.flatten(1), groups=rows)

    def _first_order(self, ranges: Ranges) -> Tensor:
        """Bound on |C_x h . C_y h| of each entry."""
        if self._crossed is None:
            a, b = self.left.linear, self._columns.linear
            crossed = torch.einsum("ahid,ahoe->hiode", a.matrix, b.matrix)
            size, other = norm_upper(a.sizes), norm_upper(b.sizes)
            lost = norm_upper(a.error).unsqueeze(-1) * other.unsqueeze(-2)
            lost = lost + size.unsqueeze(-1) * norm_upper(b.error).unsqueeze(-2)
            lost = lost + gamma(len(a.matrix) + 4) * size.unsqueeze(-1) * other.unsqueeze(-2)
            norms = self.left.norms(INPUT, 1).unsqueeze(-1) * self._columns.norms(INPUT, 1).unsqueeze(-2)
            cross = norm_upper(crossed.flatten(-2)) + lost
            self._crossed = inflate(torch.minimum(norms, (norms + cross) / 2), 16)
        return inflate(ranges.per_radius(ranges.radii.square(), self._crossed), 4)

    @property
    def _both_move(self) -> bool:
        """Whether both factors move; otherwise the product is linear, and there is no remainder.

        Coefficients that are exactly 0 keep an error of TINY and what was multiplied to it; nothing else is that small.
        """
        sides = ([part for key, part in v.coefficients.items() if key != CENTRE] for v in (self.left, self.right))
        return all(any(bool(part.matrix.any() | (part.error > 1e-120).any()) for part in side) for side in sides)

    def _folded_right(self, v: Tensor) -> Tensor:
        """The functionals sum_o v_io C_Y,do, [rows, h i d, inputs]."""
        columns = self.right.linear.matrix.permute(1, 3, 2, 0).flatten(2)  # [h, o, d b]
        return self._per_head(v, columns)

    def _folded_left(self, v: Tensor) -> Tensor:
        """The functionals sum_i v_io C_X,id, [rows, h o d, inputs]."""
        columns = self.left.linear.matrix.permute(1, 2, 3, 0).flatten(2)  # [h, i, d a]
        return self._per_head(v.mT, columns)

    def _per_head(self, v: Tensor, columns: Tensor) -> Tensor:
        """v @ columns with one product for each head, the functionals side by side."""
        rows, _, kept, _ = v.shape
        product_ = v.transpose(0, 1).flatten(1, 2) @ columns
        return product_.unflatten(1, (rows, kept)).transpose(0, 1).unflatten(-1, (self.inner, -1)).flatten(1, 3)

    def quadratic(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """See the top of this file."""
        x, y = self.left.linear, self.right.linear
        v = rows.unflatten(1, (self.heads, self.rows, self.cols))
        terms = self.cols + self.heads * self.rows * self.inner + 8
        return x.matrix.flatten(1) @ self._folded_right(v), _lost(v, error, x, y, terms)

    def crossed(self, rows: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """See the top of this file."""
        v = rows.unflatten(1, (self.heads, self.rows, self.cols))
        x, y = self.left.linear, self.right.linear
        terms = self.rows + self.cols + self.heads * self.inner * (self.rows + self.cols) + 8
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if self.left.terms:
            folded = self._folded_right(v)
            for name, part in self.left.terms.items():
                found[name] = part.matrix.flatten(1) @ folded, _lost(v, error, part, y, terms)
        if self.right.terms:
            folded = self._folded_left(v)
            for name, part in self.right.terms.items():
                matrix = part.matrix.mT.flatten(1) @ folded
                lost = _lost(v, error, x, part, terms)
                if name in found:
                    before, more = found[name]
                    matrix, lost = matrix + before, lost + more
                    lost = lost + gamma(2) * norm_upper(matrix.flatten(1))
                found[name] = matrix, inflate(lost, 4)
        return found

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """See the top of this file."""
        v = rows.unflatten(1, (self.heads, self.rows, self.cols))
        entries = (ranges.linear_and_rest(self.left, 0)[1] @ ranges.linear_and_rest(self.right, 0)[1]).flatten(1)
        one = entries @ rows.abs().mT + norm_upper(entries).unsqueeze(-1) * error
        heads = product(ranges.linear_and_rest(self.left, 2)[1], ranges.linear_and_rest(self.right, 2)[1])
        two = heads @ spectral_upper(v).mT + norm_upper(heads).unsqueeze(-1) * error
        return inflate(torch.minimum(one, two), 2 * rows.shape[1] + self.inner + 16).nan_to_num(nan=torch.inf)

    def functional(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor | None:
        """sup |sum_k (X_k h)(Y_k h)| <= r^2 (||X'|| ||Y'|| + ||X' Y'^T||) / 2, Y_k = sum_o v_io C_Y,do, X' and Y' with
        rows scaled against each other by powers of two; and the terms with e entry by entry."""
        count = self.heads * self.rows * self.inner
        if count > NARROW or len(rows) > MANY:
            return None
        v = rows.unflatten(1, (self.heads, self.rows, self.cols))
        x, y = self.left.linear, self.right.linear
        folded = self._folded_right(v)
        lost = torch.einsum("chio,hdo->chid", v.abs(), y.error + gamma(self.cols + 4) * y.sizes)
        lost = inflate(lost + error[:, None, None, None] * norm_upper(y.sizes).unsqueeze(-2), self.cols + 8).flatten(1)
        size, other = x.sizes.flatten(), inflate(norm_upper(folded) + lost, 2)
        scale = torch.exp2(((other + TINY).log2() - (size + TINY).log2()).div(2).round()).clamp(2.0**-200, 2.0**200)
        matrix = x.matrix.flatten(1).mT
        off = x.error.flatten()
        own = self._grams_norm(matrix @ matrix.mT, scale, size, off, size, off).sqrt()
        theirs = self._grams_norm(folded @ folded.mT, 1 / scale, other, lost, other, lost).sqrt()
        crossed = matrix @ folded.mT * scale.unsqueeze(-1) / scale.unsqueeze(-2)
        slack = _frobenius(size * scale, off * scale, other / scale, lost / scale, matrix.shape[1])
        both = inflate((own * theirs + spectral_upper(crossed) + slack) / 2, 16)
        first = 0 * both if self.second else ranges.per_radius(ranges.radii.square(), both)
        x_first, x_rest = (part.flatten(1) for part in ranges.linear_and_rest(self.left, 0))
        y_rest = ranges.linear_and_rest(self.right, 0)[1]
        mixed = ranges.radii.unsqueeze(1) * (x_rest @ other.mT)
        weights = torch.einsum("khid,khdo->khio", x_first.unflatten(1, x.error.shape), y_rest).flatten(1)
        mixed = mixed + weights @ rows.abs().mT + norm_upper(weights).unsqueeze(1) * error
        mixed = inflate(mixed, 2 * count + 2 * self.inner + self.cols + 16)
        return inflate(first + mixed + self.beyond(rows, error, ranges), 4).nan_to_num(nan=torch.inf)

    @staticmethod
    def _grams_norm(gram: Tensor, scale: Tensor, size: Tensor, off: Tensor, other: Tensor, lost: Tensor) -> Tensor:
        """Largest eigenvalue of a Gram matrix with scaled rows, rounded up."""
        scaled = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        slack = _frobenius(size * scale, off * scale, other * scale, lost * scale, SUMS)
        return inflate(largest_eigenvalue(scaled) + slack, 4)


def _frobenius(size: Tensor, off: Tensor, other: Tensor, lost: Tensor, sums: int) -> Tensor:
    """Bound on the Frobenius norm of the error of A B^T, from the sizes and errors of the rows."""
    one, two = norm_upper(size), norm_upper(other)
    total = one * norm_upper(lost) + norm_upper(off) * two + gamma(sums + 4) * one * two
    return inflate(total, 16)


def _lost(v: Tensor, error: Tensor, x: Coefficient, y: Coefficient, terms: int) -> Tensor:
    """Error, in the Frobenius norm, of sum v_io x_id y_do^T for coefficients x and y."""
    total = _total(v, x.error, y.sizes) + _total(v, x.sizes, y.error) + gamma(terms) * _total(v, x.sizes, y.sizes)
    return inflate(total + error * norm_upper((x.sizes @ y.sizes).flatten()), terms + 8)


def _total(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum |v_io| x_id y_do over everything."""
    return torch.einsum("chio,hio->c", v.abs(), x @ y)
