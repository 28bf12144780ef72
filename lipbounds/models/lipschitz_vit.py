"""A small vision transformer for 8x8 digits that is made to be certified, and its committed weights.

Every linear map has a spectral norm of at most 1, features are centred instead of normalised (a linear map of norm 1),
the logits of attention are small, and all tokens side by side are classified: no layer stretches or turns much.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipbounds.errors import InvalidInput
from lipbounds.models.digits_vit import CLASSES, PATCH_SIZE, PATCHES


DIM, DEPTH, HEADS, MLP_DIM = 32, 2, 4, 64
WEIGHTS = Path(__file__).parent / "weights" / "lipschitz_vit.safetensors"
CERTIFIED = WEIGHTS.with_name("certified_vit.safetensors")  # of lipbounds.models.train_certified


class AtMostOne(nn.Module):
    """W / max(1, ||W||), the spectral norm by a singular value decomposition."""

    def forward(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """The weight that is used.

        Args:
            weight: the one that is trained.
        """
        return weight / torch.linalg.matrix_norm(weight, 2).clamp(min=1)


class Centre(nn.Module):
    """Every token without the mean of its features."""

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The centred tokens.

        Args:
            tokens: tokens.
        """
        return tokens - tokens.mean(-1, keepdim=True)


class GentleAttention(nn.Module):
    """Multi-head self-attention with the scale 1 / head dimension, without biases of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, DIM, bias=False)
        self.key = nn.Linear(DIM, DIM, bias=False)
        self.value = nn.Linear(DIM, DIM)
        self.output = nn.Linear(DIM, DIM)

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The sum over heads of attention, in the dimension of the tokens.

        Args:
            tokens: tokens.
        """
        query, key, value = (
            layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=HEADS / DIM)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class LipschitzBlock(nn.Module):
    """Attention, then an MLP, each on centred tokens and with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = Centre()
        self.attention = GentleAttention()
        self.mlp = nn.Sequential(nn.Linear(DIM, MLP_DIM), nn.GELU(), nn.Linear(MLP_DIM, DIM))

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The tokens after both residual steps.

        Args:
            tokens: tokens.
        """
        tokens = tokens + self.attention(self.centre(tokens))
        return tokens + self.mlp(self.centre(tokens))


class LipschitzViT(nn.Module):
    """Vision transformer with 16 tokens of dimension 32 and 2 blocks of 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(PATCH_SIZE * PATCH_SIZE, DIM)
        self.positions = nn.Parameter(0.1 * torch.randn(1, PATCHES, DIM))
        self.blocks = nn.Sequential(*(LipschitzBlock() for _ in range(DEPTH)))
        self.head = nn.Linear(PATCHES * DIM, CLASSES)

    def forward(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 10"]:
        """Class logits, read from all tokens side by side.

        Args:
            images: grey values in [0, 1].
        """
        windows = images.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
        patches = windows.reshape(len(images), PATCHES, PATCH_SIZE * PATCH_SIZE)
        tokens = self.patch_embedding(patches) + self.positions
        return self.head(self.blocks(tokens).flatten(1))


def constrain(model: LipschitzViT) -> None:
    """Keep the spectral norm of every linear map at 1 at most while training.

    Args:
        model: changed in place.
    """
    for module in [*model.modules()]:
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", AtMostOne())


def release(model: LipschitzViT) -> None:
    """Replace the constraints by the weights they give.

    Args:
        model: changed in place.
    """
    for module in [*model.modules()]:
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def load_lipschitz_vit(path: str | Path = WEIGHTS) -> LipschitzViT:
    """The trained model, in float32 on the CPU and in evaluation mode.

    Args:
        path: weights as `python -m lipbounds.models.train_lipschitz` writes them; by default the committed ones.

    Raises:
        InvalidInput: there is no such file, or it holds the weights of another model.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise InvalidInput(
            f"path must be a file of LipschitzViT weights, got path='{path}', which is not there; "
            "run `python -m lipbounds.models.train_lipschitz --output PATH` to make one."
        )
    with torch.device("meta"):
        model = LipschitzViT()
    weights, expected = load_file(path), model.state_dict()
    if {name: tuple(w.shape) for name, w in weights.items()} != {n: tuple(w.shape) for n, w in expected.items()}:
        raise InvalidInput(
            f"path must hold the {len(expected)} tensors of LipschitzViT in their shapes, got path='{path}' with "
            "others; make them with `python -m lipbounds.models.train_lipschitz`."
        )
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_certified_vit() -> LipschitzViT:
    """The committed weights of `lipbounds.models.train_certified`: the same architecture, trained against an attack."""
    return load_lipschitz_vit(CERTIFIED)
