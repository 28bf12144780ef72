r"""Bounds of whole networks from bounds of their layers, at a point and on a ball, and where the product grows.

The constant of a sequence is at most the product of the constants of its parts, each over the inputs that can reach it;
that of skip + body is at most the sum. The inputs that can reach a part lie in a ball around its own input at x, with a
Frobenius radius that has grown by the bound of everything before it, and each token within a radius of its own.

What is better than products and sums of norms:

- Layers that act on tokens one by one have block diagonal Jacobians. Runs of them (normalisation, feed-forward with its
  residual, normalisation) are kept as matrices a token with a deviation (`lipbounds.ops.enclosure`): at a point the
  norm is that of the exact product, on a ball the deviation is added. The norm of the run is the largest of a token.
- W2 diag(f') W1: with slopes in m +- w over the ball (`lipbounds.ops.activations`), the centre is W2 diag(m) W1 and the
  deviation ||W2 diag(w)^1/2|| ||diag(w)^1/2 W1||, for diag(w) = diag(w)^1/2 S diag(w)^1/2 with |S| <= 1.
- A normalisation before attention is split into z and the scale and shift, which go into the weights of the attention
  with the centring: z has mean 0, so I - 1 1^T / D may stand before every weight. The attention bound then sees
  the norms of C diag(gamma) W, and not max|gamma| times those of W.
- The output of a normalisation lies on a sphere of radius sqrt(D): no token moves further than 2 sqrt(D).
- The mean of n tokens whose Jacobians have norms L_i has (sum_i L_i^2)^1/2 / n.

Windows of an image: |unfold(x)|^2 counts every pixel as often as it is in a window, at most c = ceil(size / stride)
times along each axis, so the norm is at most sqrt(c), and 1 where windows do not overlap. Then a convolution followed
by nothing else has the exact norm of its matrix.

Numerics: float64, every bound of a layer rounded up. On a ball, the rounding of the forward pass is part of the radii
(lipbounds.compose.running_error): a bound holds over the inputs that reach a layer in real arithmetic. What folding
does to weights is in the bound of the layer (lipbounds.compose.folding). At a point, the input of each layer, as
computed in float64, counts as exact, as `lipbounds.targets.network.Network` takes the arithmetic of its function.
"""

from __future__ import annotations

from lipbounds.compose.network import NetworkBound as NetworkBound
from lipbounds.compose.network import network_bound as network_bound
from lipbounds.compose.propagated_set import LayerBound as LayerBound
from lipbounds.lazy import submodules


__getattr__ = submodules(__name__)
