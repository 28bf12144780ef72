r"""A lower bound on g . h + h^T M h over the ball |h| <= r, for a symmetric M known up to an error.

With H = 2 M, any mu >= 0 with A = H + mu I positive semidefinite, and any y, for |h| <= r

    g . h + h^T H h / 2 >= g . h + h^T A h / 2 - mu r^2 / 2
                        = (h - y)^T A (h - y) / 2 + (g + A y) . h - y^T A y / 2 - mu r^2 / 2
                        >= - |g + A y| r - y^T A y / 2 - mu r^2 / 2.

y solves A y = -g nearly, in a Krylov space, and mu is where |y| = r (the dual of the trust-region problem, which has no
gap): their errors only weaken the bound. That A is positive semidefinite is verified by a Cholesky factorisation.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.ball import Ball
from lipbounds.compose.taylor.coefficient import TINY, norm_upper
from lipbounds.ops.eigen import eigen, try_cholesky
from lipbounds.rounding import gamma, inflate


BISECTIONS, TRIES, STEPS = 60, 60, 24


class Quadratic:
    """g . h + h^T M h for several rows at once.

    Args:
        slopes: g.
        matrices: M; only the symmetric part counts.
        slope_error: of each g, in l2.
        matrix_error: of each M, in the Frobenius norm.
    """

    def __init__(
        self,
        slopes: Float[Tensor, "rows inputs"],
        matrices: Float[Tensor, "rows inputs inputs"],
        slope_error: Float[Tensor, " rows"],
        matrix_error: Float[Tensor, " rows"],
    ) -> None:
        self._slopes, self._matrices = slopes, matrices + matrices.mT
        self._size = norm_upper(self._matrices.flatten(1))
        # Twice the error of M, and the rounding of the sum.
        self._matrix_error = inflate(2 * matrix_error + gamma(2) * self._size, 8)
        self._slope_error = slope_error
        basis = _krylov(self._matrices, slopes, min(slopes.shape[1], STEPS))
        small = basis.mT @ self._matrices @ basis
        self._eigenvalues, vectors = eigen((small + small.mT) / 2)
        self._vectors = basis @ vectors
        self._rotated = torch.einsum("cab,ca->cb", self._vectors, slopes)

    @cached_property
    def _lowest(self) -> Tensor:
        """Verified lower bound on the smallest eigenvalue of each H, at most 0.

        If the Cholesky factorisation of H + s I runs to its end, H + s I + D is positive semidefinite with
        ||D|| <= gamma(n+1) / (1 - gamma(n+1)) trace(H + s I) (Higham 2002, Theorem 10.3).
        """
        side = self._matrices.shape[-1]
        identity = torch.eye(side, dtype=self._matrices.dtype, device=self._matrices.device)
        largest = self._eigenvalues.abs().amax(1)
        room = 1e-10 if self._vectors.shape[-1] == side else 0.01  # a smaller Krylov space sees the ends nearly
        shift = (-self._eigenvalues[:, 0]).clamp(min=0) + room * largest + 1e-12 * self._size + TINY
        for _ in range(TRIES):
            shifted = self._matrices + shift[:, None, None] * identity
            failed = ~try_cholesky(shifted)[1]
            if not bool(failed.any()):
                trace = shifted.diagonal(dim1=-2, dim2=-1).sum(-1).abs()
                return -inflate(shift + 2 * gamma(side + 4) * trace + gamma(4) * (shift + self._size), 8)
            shift = torch.where(failed, 2 * shift, shift)
        return -torch.inf * torch.ones_like(shift)

    def lower(self, radii: Float[Tensor, " radii"], ball: Ball | None = None) -> Float[Tensor, "radii rows"]:
        """Lower bounds over the balls.

        Args:
            radii: of the balls.
            ball: their shape; None: Euclidean.
        """
        if ball is not None:
            return self._lower_dual(radii.unsqueeze(1), ball)
        return torch.stack([self._lower(radius) for radius in radii])

    def _lower_dual(self, radii: Tensor, ball: Ball) -> Tensor:
        """- r |g|_dual - r^2 (what h^T H h / 2 can be below 0 for |h|_p <= 1).

        That is at most R^2 |lambda_min(H)| / 2, R the Euclidean radius of the unit ball, and half the sum of the
        |H_ij| (p = infinity) or half the largest (p = 1).
        """
        wide = ball.euclidean(torch.ones_like(radii[:1, 0])).square()
        sizes = self._matrices.abs()
        side = sizes.shape[-1]
        # The error of H is in the Frobenius norm, so the sum of its entries is at most N of it, which R^2 covers.
        entries = inflate(sizes.sum((-2, -1)), side * side) if ball.norm == "l_inf" else sizes.amax((-2, -1))
        bent = inflate(torch.minimum(-self._lowest * wide, entries) + self._matrix_error * wide, 8) / 2
        steep = inflate(ball.dual(self._slopes) + ball.dual_error(self._slope_error), 4)
        return -inflate(radii * steep + radii.square() * bent, 8).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def smallest_at(self, radius: Float[Tensor, ""], ball: Ball | None = None) -> Float[Tensor, "rows inputs"]:
        """Where each row is nearly smallest in the ball; finite, but neither exactly there nor exactly inside.

        Args:
            radius: of the ball.
            ball: its shape; None: Euclidean. For others the second order is left out.
        """
        if ball is not None:
            return -radius * ball.steepest(self._slopes)
        return self._nearly_smallest(self._multiplier(radius, self._eigenvalues[:, 0].clamp(max=0)))

    def _nearly_smallest(self, mu: Tensor) -> Tensor:
        y = -torch.einsum("cab,cb->ca", self._vectors, self._rotated / (self._eigenvalues + mu[:, None]))
        return torch.where(y.isfinite().all(1, keepdim=True), y, 0.0)

    def _lower(self, radius: Tensor) -> Tensor:
        mu = self._multiplier(radius, self._lowest)
        y = self._nearly_smallest(mu)
        mu = torch.maximum(mu, (-self._lowest).clamp(min=0) * (1 + gamma(4)))
        image = torch.einsum("cab,cb->ca", self._matrices, y) + mu[:, None] * y
        length = norm_upper(y)
        lost = 2 * gamma(y.shape[1] + 16) * (self._size + mu) * length
        residual = norm_upper(self._slopes + image) + lost + gamma(4) * norm_upper(self._slopes)
        curved = (y * image).sum(1).abs() + 2 * lost * length
        loss = residual * radius + curved / 2 + mu * radius.square() / 2
        loss = loss + self._slope_error * radius + self._matrix_error * radius.square() / 2
        return -inflate(loss, 32).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _multiplier(self, radius: Tensor, smallest: Tensor) -> Tensor:
        """mu with |y| = radius, by bisection in logarithms above the smallest admissible one; 0 where y is inside.

        Args:
            radius: of the ball.
            smallest: eigenvalue of each H, at most 0.
        """
        lowest = (-smallest).clamp(min=0)
        size = self._rotated.norm(dim=1)
        low = lowest + 1e-12 * self._size + TINY
        high = lowest + size / radius + self._size + TINY

        def long(mu: Tensor) -> Tensor:
            return (self._rotated / (self._eigenvalues + mu[:, None])).norm(dim=1) > radius

        inside = ~long(low)
        for _ in range(BISECTIONS):
            middle = (low.log() / 2 + high.log() / 2).exp()
            too_long = long(middle)
            low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
        return torch.where(inside, lowest + 1e-12 * self._size, high)


def _krylov(
    matrices: Float[Tensor, "rows side side"], starts: Float[Tensor, "rows side"], steps: int
) -> Float[Tensor, "rows side steps"]:
    """Orthonormal bases of the Krylov spaces, in which the trust-region problem is solved (Gould et al. 1999).

    Args:
        matrices: symmetric.
        starts: first vectors.
        steps: how many vectors.
    """
    vector = starts / (starts.norm(dim=1, keepdim=True) + TINY)
    found = [vector]
    for _ in range(steps - 1):
        vector = torch.einsum("cab,cb->ca", matrices, vector)
        basis = torch.stack(found, 2)
        for _ in range(2):  # twice is enough for orthogonality
            vector = vector - (basis @ (basis.mT @ vector.unsqueeze(-1))).squeeze(-1)
        vector = vector / (vector.norm(dim=1, keepdim=True) + TINY)
        found.append(vector)
    return torch.stack(found, 2)
