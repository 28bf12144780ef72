"""A small vision transformer that is made to be certified, and its committed weights for 8x8 digits.

Every linear map has a spectral norm of at most `Shape.gain` or, of queries and keys, `Shape.logit_gain`, both 1 for
digits; features are centred instead of normalised (a linear map of norm 1); the logits of attention are small; all
tokens side by side are classified. So no layer stretches or turns much.
"""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipbounds.errors import InvalidInput
from lipbounds.models.digits_vit import CLASSES, IMAGE_SIZE, PATCH_SIZE


WEIGHTS = Path(__file__).parent / "weights" / "lipschitz_vit.safetensors"
CERTIFIED = WEIGHTS.with_name("certified_vit.safetensors")  # of lipbounds.models.train_certified


@dc.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model.

    Args:
        side: of the square images, in pixels.
        patch: side of the square patches, which do not overlap.
        directions: numbers that a first linear map leaves of each patch; None: there is no such map.
        dim: of the tokens.
        depth: number of blocks.
        heads: of each attention.
        mlp_dim: of the inner features of each MLP.
        gain: largest spectral norm of the linear maps. With more than 1, layers bend more, which larger images need.
        logit_gain: the same of queries and keys: what a ball does to softmax costs most of a certified radius.
    """

    side: int
    patch: int
    directions: int | None = None
    dim: int
    depth: int
    heads: int
    mlp_dim: int
    gain: float = 1.0
    logit_gain: float = 1.0

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return (self.side // self.patch) ** 2


DIGITS = Shape(side=IMAGE_SIZE, patch=PATCH_SIZE, dim=32, depth=2, heads=4, mlp_dim=64)
# With norms of at most 1 the model is nearly linear, and attacks in training cost it accuracy; a second block that may
# bend as much costs more of the certified radii than it gains.
BENDING = dc.replace(DIGITS, depth=1, gain=1.4, logit_gain=0.5)  # of lipbounds.models.train_certified


class AtMost(nn.Module):
    """W / max(1, ||W|| / c), the spectral norm by a singular value decomposition.

    Args:
        largest: c, what the norm is at most.
    """

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """The weight that is used.

        Args:
            weight: the one that is trained.
        """
        return weight / (torch.linalg.matrix_norm(weight, 2) / self.largest).clamp(min=1)


class Centre(nn.Module):
    """Every token without the mean of its features."""

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The centred tokens.

        Args:
            tokens: tokens.
        """
        return tokens - tokens.mean(-1, keepdim=True)


class GentleAttention(nn.Module):
    """Multi-head self-attention with the scale 1 / head dimension, without biases of queries and keys.

    Args:
        shape: of the model.
    """

    def __init__(self, shape: Shape = DIGITS) -> None:
        super().__init__()
        self.heads, dim = shape.heads, shape.dim
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The sum over heads of attention, in the dimension of the tokens.

        Args:
            tokens: tokens.
        """
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.heads / tokens.shape[-1])
        return self.output(mixed.transpose(1, 2).flatten(-2))


class LipschitzBlock(nn.Module):
    """Attention, then an MLP, each on centred tokens and with a residual connection.

    Args:
        shape: of the model.
    """

    def __init__(self, shape: Shape = DIGITS) -> None:
        super().__init__()
        self.centre = Centre()
        self.attention = GentleAttention(shape)
        self.mlp = nn.Sequential(nn.Linear(shape.dim, shape.mlp_dim), nn.GELU(), nn.Linear(shape.mlp_dim, shape.dim))

    def forward(self, tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The tokens after both residual steps.

        Args:
            tokens: tokens.
        """
        tokens = tokens + self.attention(self.centre(tokens))
        return tokens + self.mlp(self.centre(tokens))


class LipschitzViT(nn.Module):
    """Vision transformer that classifies all tokens side by side; for digits, 16 tokens and 2 blocks.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: Shape = DIGITS) -> None:
        super().__init__()
        self.shape, features = shape, shape.patch**2
        self.directions = None
        if shape.directions is not None:
            self.directions = nn.Linear(features, shape.directions, bias=False)
            features = shape.directions
        self.patch_embedding = nn.Linear(features, shape.dim)
        self.positions = nn.Parameter(0.1 * torch.randn(1, shape.tokens, shape.dim))
        self.blocks = nn.Sequential(*(LipschitzBlock(shape) for _ in range(shape.depth)))
        self.head = nn.Linear(shape.tokens * shape.dim, CLASSES)

    def forward(self, images: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch 10"]:
        """Class logits, read from all tokens side by side.

        Args:
            images: grey values in [0, 1].
        """
        patches = self.patches(images)
        return self.behind(patches if self.directions is None else self.directions(patches))

    def patches(self, images: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch n pixels"]:
        """The pixels of each patch.

        Args:
            images: of the side of the shape.
        """
        size = self.shape.patch
        windows = images.unfold(2, size, size).unfold(3, size, size)
        return windows.reshape(len(images), self.shape.tokens, size * size)

    def behind(self, patches: Float[Tensor, "batch n features"]) -> Float[Tensor, "batch 10"]:
        """Class logits from what the first linear map leaves of each patch, or from its pixels if there is no such map.

        Args:
            patches: as `directions` gives them.
        """
        tokens = self.patch_embedding(patches) + self.positions
        return self.head(self.blocks(tokens).flatten(1))


def constrain(model: LipschitzViT) -> None:
    """Keep the spectral norm of every linear map within the gains of the model's shape while training.

    Args:
        model: changed in place.
    """
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear):
            of_logits = name.endswith((".query", ".key"))
            largest = model.shape.logit_gain if of_logits else model.shape.gain
            parametrize.register_parametrization(module, "weight", AtMost(largest))


def release(model: LipschitzViT) -> None:
    """Replace the constraints by the weights they give.

    Args:
        model: changed in place.
    """
    for module in [*model.modules()]:
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def load_lipschitz_vit(path: str | Path = WEIGHTS, shape: Shape = DIGITS) -> LipschitzViT:
    """The trained model, in float32 on the CPU and in evaluation mode.

    Args:
        path: weights as `python -m lipbounds.models.train_lipschitz` writes them; by default the committed ones.
        shape: of the model with these weights.

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
        model = LipschitzViT(shape)
    weights, expected = load_file(path), model.state_dict()
    if {name: tuple(w.shape) for name, w in weights.items()} != {n: tuple(w.shape) for n, w in expected.items()}:
        raise InvalidInput(
            f"path must hold the {len(expected)} tensors of LipschitzViT in their shapes, got path='{path}' with "
            "others; make them with `python -m lipbounds.models.train_lipschitz`."
        )
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_certified_vit() -> LipschitzViT:
    """The committed weights of `lipbounds.models.train_certified`: one block, trained against an attack."""
    return load_lipschitz_vit(CERTIFIED, BENDING)
