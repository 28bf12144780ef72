"""The vision transformer of the studies on images larger than the digits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipbounds.models.digits_vit import CLASSES, Block


class ImageViT(nn.Module):
    """The blocks of the digits ViT for grey images of any side.

    Args:
        side: of the images.
        patch: side of the patches; divides `side`.
        dim: features of a token.
        depth: number of blocks.
    """

    def __init__(self, side: int, patch: int, dim: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, 4, 2 * dim) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, images: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch classes"]:
        """Class logits, read from the class token.

        Args:
            images: grey values in [0, 1].
        """
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])
