"""A vision transformer for 28 x 28 digits that is made to be certified, and its committed weights.

The architecture is that of `lipbounds.models.lipschitz_vit`. Of each patch of 7 x 7 pixels a first linear map leaves a
few numbers, so that Taylor models have as many columns as all patches together have numbers, not 784 (see
lipbounds.compose.taylor.narrow).
"""

from __future__ import annotations

from lipbounds.models.lipschitz_vit import WEIGHTS as DIGITS_WEIGHTS
from lipbounds.models.lipschitz_vit import LipschitzViT, Shape, load_lipschitz_vit


SHAPE = Shape(side=28, patch=7, directions=6, dim=32, depth=1, heads=4, mlp_dim=64, gain=2.0, logit_gain=0.5)
WEIGHTS = DIGITS_WEIGHTS.with_name("certified_mnist_vit.safetensors")  # of lipbounds.models.train_certified_mnist


def load_certified_mnist_vit() -> LipschitzViT:
    """The committed weights of `lipbounds.models.train_certified_mnist`, in float32 on the CPU, in evaluation mode."""
    return load_lipschitz_vit(WEIGHTS, SHAPE)
