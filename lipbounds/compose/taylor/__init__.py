"""Certificates from Taylor models: the network itself is propagated, not norms of its layers.

One file an idea: `coefficient` (floats with their rounding), `model` (c + C h + remainders), the operations
(`bilinear`, `softmax`, `pointwise`, `normalization`), `network` (the walk through the layers), `quadratic`, `crossed`
`margin`, and `radius` (the search).
"""

from __future__ import annotations

from lipbounds.compose.taylor.margin import TaylorMargin as TaylorMargin
from lipbounds.compose.taylor.radius import taylor_radius as taylor_radius
