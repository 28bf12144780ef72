"""Bounds of whole networks from bounds of their layers, at a point and on a ball, and where the product grows.

The constant of a sequence is at most the product of the constants of its parts, each over the inputs that can reach it;
that of skip + body is at most the sum. The inputs that can reach a part lie in a ball around its own input at x, with a
Frobenius radius that has grown by the bound of everything before it, and each token within a radius of its own. Runs of
layers that act on tokens one by one are bounded as one matrix per token (lipbounds.ops.enclosure).

The rules that are better than products and sums, with their proofs: docs/functions.md, section 9.

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
