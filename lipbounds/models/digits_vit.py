"""A small vision transformer for 8x8 digits, and its committed weights.

Separate query, key and value layers with biases and a fixed number of tokens make it the smallest real model that has
every part a bound must handle: a class token, positions, several heads, layer normalisation, an MLP and residuals.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lipbounds.errors import InvalidInput


IMAGE_SIZE = 8
PATCH_SIZE = 2
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
DIM = 64
DEPTH = 4
HEADS = 4
MLP_DIM = 2 * DIM
CLASSES = 10
WEIGHTS = Path(__file__).parent / "weights" / "digits_vit.safetensors"


class SelfAttention(nn.Module):
    """Multi-head self-attention with the scale 1/sqrt(head dimension) and no mask."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The sum over heads of attention, in the dimension of the tokens."""
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """One pre-normalised transformer block: attention, then an MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The tokens after both residual steps."""
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.mlp(self.norm_mlp(tokens))


class DigitsViT(nn.Module):
    """Vision transformer with 17 tokens of dimension 64, 4 blocks of 4 heads: 136 138 parameters.

    The random start comes from torch's global generator, as for every module of torch; `load_digits_vit` gives the
    trained one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(PATCH_SIZE * PATCH_SIZE, DIM)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + PATCHES, DIM))
        self.blocks = nn.Sequential(*(Block(DIM, HEADS, MLP_DIM) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 10"]:
        """Class logits, read from the class token.

        Args:
            images: grey values in [0, 1].
        """
        return self.head(self.norm(self.blocks(self.embed(images)))[:, 0])

    def embed(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 17 64"]:
        """The tokens that enter the first block: the class token, then the patches row by row.

        Args:
            images: grey values in [0, 1].
        """
        # (batch, 1, patch row, patch column, PATCH_SIZE, PATCH_SIZE)
        windows = images.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
        patches = self.patch_embedding(windows.reshape(len(images), PATCHES, PATCH_SIZE * PATCH_SIZE))
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions


def load_digits_vit(path: str | Path = WEIGHTS) -> DigitsViT:
    """The trained model, in float32 on the CPU and in evaluation mode.

    Args:
        path: weights as `python -m lipbounds.models.train_digits` writes them; by default the committed ones.

    Raises:
        InvalidInput: there is no such file, or it holds the weights of another model.
    """
    # Imported here, so that the model itself needs nothing but torch.
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise InvalidInput(
            f"path must be a file of DigitsViT weights, got path='{path}', which is not there; "
            "run `python -m lipbounds.models.train_digits --output PATH` to make one."
        )
    # On the meta device no random start is drawn, so the caller's random state is left as it was.
    with torch.device("meta"):
        model = DigitsViT()
    weights = load_file(path)
    expected = model.state_dict()
    wrong = sorted(
        name
        for name in weights.keys() | expected.keys()
        if name not in weights or name not in expected or weights[name].shape != expected[name].shape
    )
    if wrong:
        raise InvalidInput(
            f"path must hold the {len(expected)} tensors of DigitsViT, got path='{path}' with {len(wrong)} missing, "
            "unknown or of another shape, "
            f"such as {wrong[0]}; make them with `python -m lipbounds.models.train_digits`."
        )
    model.load_state_dict(weights, assign=True)
    return model.eval()
