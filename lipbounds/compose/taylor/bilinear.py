r"""Products of two moving matrices, Z = X Y for every head: logits from queries and keys, outputs from maps and values.

The remainder is q = dX dY, exactly. With a_X = |C_X h| + |e_X| etc. for rows x_i of X and columns y_o of Y:

- entry: |dx_i . dy_o| <= |dx_i| |dy_o|, and <= sum_d |dX_id| |dY_do|. The part of first order in both is h^T A^T B h with
  A, B the coefficients of x_i and y_o, at most r^2 (||A|| ||B|| + ||A B^T||_F) / 2: for <A h, B h> =
  (|(A' + B') h|^2 - |(A' - B') h|^2) / 4 with A' = A / t, B' = t B, and ||A' + B'||^2 <= ||A'||^2 + ||B'||^2 +
  2 ||A' B'^T||, with t^2 = ||A|| / ||B||. Tokens that are moved by different pixels gain a factor of two.
- row: |dx_i dY| <= |dx_i| ||dY||_F, and <= sum_d |dX_id| |dY_d|.
- all: the root of the sum over heads of (||dX||_F ||dY||_F)^2.

Second order: v . B[h, h] = sum v_io (C_X,id h)(C_Y,do h). With e: v . X_s[q, h] = sum v_io ((T_X,id q)(C_Y,do h) +
(C_X,id h)(T_Y,do q)). Beyond: sum v_io e_X,id e_Y,do, entry by entry, or <e_X, v e_Y^T> <= |e_X|_F ||v|| |e_Y|_F for
every head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.compose.taylor.coefficient import Coefficient, exact, norm_upper
from lipbounds.compose.taylor.model import CENTRE, INPUT, Range, Ranges, Value, spectral_upper, together
from lipbounds.compose.taylor.operation import Operation
from lipbounds.rounding import gamma, inflate, product


class Bilinear(Operation):
    """Z = X Y for every head.

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
        x, y = left.parts[CENTRE], right.parts[CENTRE]
        terms = self.inner + 2
        by_left = {k: p.times(y, torch.matmul, terms) for k, p in left.parts.items() if k != CENTRE}
        by_right = {k: p.times(x, lambda t, c: c @ t, terms) for k, p in right.parts.items() if k != CENTRE}
        parts = {CENTRE: x.times(y, torch.matmul, terms)} | together(by_left, by_right)
        shape = parts[CENTRE].error.shape
        identity = torch.eye(shape.numel(), dtype=x.matrix.dtype, device=x.matrix.device).reshape(-1, *shape)
        self.output = Value(parts).with_term(name, exact(identity))
        self._crossed: Tensor | None = None

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file."""
        left, right = self.left, self.right
        row, row_rest = ranges.reach(left, 1)
        col, col_rest = ranges.reach(self._columns, 1)
        x, y = ranges.total(left, 0), ranges.total(right, 0)
        first = self._first_order(ranges)
        mixed = row.unsqueeze(-1) * col_rest.unsqueeze(-2) + row_rest.unsqueeze(-1) * (col + col_rest).unsqueeze(-2)
        box = inflate(torch.minimum(first + mixed, x @ y), 2 * self.inner + 16)
        along, whole_x, whole_y = ranges.total(right, 1), ranges.total(left, 2), ranges.total(right, 2)
        rows = torch.minimum(product(row + row_rest, whole_y.unsqueeze(-1)), (x @ along.unsqueeze(-1)).squeeze(-1))
        rows = torch.minimum(inflate(rows, self.inner + 8), norm_upper(box)).flatten(1)
        ball = torch.minimum(norm_upper(rows), norm_upper(inflate(product(whole_x, whole_y), 2)))
        return Range(ball=ball, box=box.flatten(1), groups=rows)

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

    def _folded(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The functionals by head, sum_o v_io C_Y,do and sum_i v_io C_X,id."""
        v = rows.unflatten(1, (self.heads, self.rows, self.cols))
        by_row = torch.einsum("chio,bhdo->cbhid", v, self.right.linear.matrix)
        by_col = torch.einsum("chio,ahid->cahdo", v, self.left.linear.matrix)
        return v, by_row, by_col

    def quadratic(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """See the top of this file."""
        x, y = self.left.linear, self.right.linear
        v, by_row, _ = self._folded(rows)
        matrices = torch.einsum("ahid,cbhid->cab", x.matrix, by_row)
        terms = self.cols + self.heads * self.rows * self.inner + 8
        return matrices, _lost(v, error, x, y, terms)

    def crossed(self, rows: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """See the top of this file."""
        v, by_row, by_col = self._folded(rows)
        x, y = self.left.linear, self.right.linear
        found: dict[str, tuple[Tensor, Tensor]] = {}
        terms = self.cols + self.rows + self.heads * self.rows * self.inner + self.heads * self.inner * self.cols + 8
        for name in dict.fromkeys([*self.left.terms, *self.right.terms]):
            matrix, lost = rows.new_zeros(()), torch.zeros_like(error)
            for part, other, folded, equation in (
                (self.left.parts.get(name), y, by_row, "shid,cbhid->csb"),
                (self.right.parts.get(name), x, by_col, "shdo,cbhdo->csb"),
            ):
                if part is not None:
                    matrix = matrix + torch.einsum(equation, part.matrix, folded)
                    pair = (part, other) if part is self.left.parts.get(name) else (other, part)
                    lost = lost + _lost(v, error, *pair, terms)
            found[name] = matrix, inflate(lost, 8)
        return found

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """See the top of this file."""
        v = rows.unflatten(1, (self.heads, self.rows, self.cols))
        entries = (ranges.reach(self.left, 0)[1] @ ranges.reach(self.right, 0)[1]).flatten(1)
        one = entries @ rows.abs().mT + norm_upper(entries).unsqueeze(-1) * error
        heads = product(ranges.reach(self.left, 2)[1], ranges.reach(self.right, 2)[1])
        two = heads @ spectral_upper(v).mT + norm_upper(heads).unsqueeze(-1) * error
        return inflate(torch.minimum(one, two), 2 * rows.shape[1] + self.inner + 16).nan_to_num(nan=torch.inf)


def _lost(v: Tensor, error: Tensor, x: Coefficient, y: Coefficient, terms: int) -> Tensor:
    """Error, in the Frobenius norm, of sum v_io x_id y_do^T for coefficients x and y."""
    spread = _total(v, x.error, y.sizes) + _total(v, x.sizes, y.error) + gamma(terms) * _total(v, x.sizes, y.sizes)
    return inflate(spread + error * norm_upper((x.sizes @ y.sizes).flatten()), terms + 8)


def _total(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum |v_io| x_id y_do over everything."""
    return torch.einsum("chio,hio->c", v.abs(), x @ y)
