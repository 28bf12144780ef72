r"""A lower bound on g . h + h^T M h over the ball |h| <= r, for a symmetric M known up to an error.

With H = 2 M, any mu >= 0 with A = H + mu I positive semidefinite, and any y, for |h| <= r

    g . h + h^T H h / 2 >= g . h + h^T A h / 2 - mu r^2 / 2
                        = (h - y)^T A (h - y) / 2 + (g + A y) . h - y^T A y / 2 - mu r^2 / 2
                        >= - |g + A y| r - y^T A y / 2 - mu r^2 / 2.

y solves A y = -g nearly, and mu is where |y| = r (the dual of the trust-region problem, which has no gap): their errors
only weaken the bound. That A is positive semidefinite is verified: the smallest eigenvalue of H is bounded from below
by a Cholesky factorisation (lipbounds.ops.verified_norm).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.coefficient import TINY, norm_upper
from lipbounds.ops.verified_norm import verified_eigenvalue
from lipbounds.rounding import gamma, inflate


BISECTIONS = 60


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
        side = slopes.shape[1]
        eigenvalues, vectors = torch.linalg.eigh(self._matrices)
        self._eigenvalues, self._vectors = eigenvalues, vectors
        self._rotated = torch.einsum("cab,ca->cb", vectors, slopes)
        # The largest eigenvalue of size I - H, which is positive semidefinite, gives the smallest one of H.
        identity = torch.eye(side, dtype=slopes.dtype, device=slopes.device)
        shift = self._size * (1 + gamma(4)) + TINY
        flipped = shift[:, None, None] * identity - self._matrices
        largest = verified_eigenvalue(flipped) + gamma(4) * shift
        self._lowest = shift - inflate(largest, 4) - gamma(8) * shift

    def lower(self, radii: Float[Tensor, " radii"]) -> Float[Tensor, "radii rows"]:
        """Lower bounds over the balls.

        Args:
            radii: of the balls.
        """
        return torch.stack([self._lower(radius) for radius in radii])

    def _lower(self, radius: Tensor) -> Tensor:
        mu = self._multiplier(radius)
        y = -torch.einsum("cab,cb->ca", self._vectors, self._rotated / (self._eigenvalues + mu[:, None]))
        y = torch.where(y.isfinite().all(1, keepdim=True), y, 0.0)
        mu = torch.maximum(mu, (-self._lowest).clamp(min=0) * (1 + gamma(4)))
        image = torch.einsum("cab,cb->ca", self._matrices, y) + mu[:, None] * y
        length = norm_upper(y)
        lost = 2 * gamma(y.shape[1] + 16) * (self._size + mu) * length
        residual = norm_upper(self._slopes + image) + lost + gamma(4) * norm_upper(self._slopes)
        curved = (y * image).sum(1).abs() + 2 * lost * length
        loss = residual * radius + curved / 2 + mu * radius.square() / 2
        loss = loss + self._slope_error * radius + self._matrix_error * radius.square() / 2
        return -inflate(loss, 32).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _multiplier(self, radius: Tensor) -> Tensor:
        """mu with |y| = radius, by bisection in logarithms above the smallest admissible one; 0 where y is inside."""
        lowest = (-self._lowest).clamp(min=0)
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
