"""AutoAttack on tokens or embeddings of shape (batch, n, d), whose entries have no range of their own.

pyautoattack takes images only: four dimensions, entries in [0, 1], and it clamps to that range without a word. So
tokens are mapped there by one factor and one offset for all entries, which multiplies l_inf and l2 distances alike by
that factor. The range is wider than that of the tokens by eps on both sides: no point of the ball is cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bench.attacks.images import NORMS, Ball, autoattack, within
from lipbounds.errors import InvalidInput


def attack_tokens(
    model: nn.Module,
    tokens: Float[Tensor, "batch n d"],
    labels: Int[Tensor, " batch"],
    ball: Ball,
    *,
    seed: int,
) -> Float[Tensor, "batch n d"]:
    """The tokens that AutoAttack-standard ends with, in the ball around the given ones in their own coordinates.

    Args:
        model: from tokens to at least ten logits.
        tokens: one sequence per item.
        labels: the right classes.
        ball: around each item, in the norm of all its entries together.
        seed: of all that is random.

    Raises:
        InvalidInput: not three dimensions; a token that is not finite; an unknown norm; a radius not above 0, or so
            small compared with the tokens that it is lost in their rounding; fewer than ten classes.
    """
    _check(tokens, ball)
    low, high = float(tokens.min()) - ball.eps, float(tokens.max()) + ball.eps
    as_images = TokensAsImages(model, low, high - low)
    # In float64 the way to [0, 1] and back costs nothing that float32 tokens would notice.
    images = ((tokens.double() - low) / (high - low)).to(tokens.dtype).unsqueeze(1).clamp(0, 1)
    moved = autoattack(as_images, images, labels, Ball(ball.norm, ball.eps / (high - low)), seed=seed)
    change = (moved.double() - images.double()).squeeze(1) * (high - low)
    return within(tokens, change, ball)


class TokensAsImages(nn.Module):
    """A model of tokens that takes images in [0, 1] instead.

    Args:
        model: from tokens to logits.
        low: the entry that becomes 0.
        scale: the distance to the entry that becomes 1.
    """

    def __init__(self, model: nn.Module, low: float, scale: float) -> None:
        super().__init__()
        self.model, self.low, self.scale = model, low, scale

    def forward(self, images: Float[Tensor, "batch 1 n d"]) -> Any:
        """The logits of the tokens that the images stand for.

        Args:
            images: in [0, 1].
        """
        return self.model(self.low + self.scale * images.squeeze(1))


def _check(tokens: Tensor, ball: Ball) -> None:
    norm, eps = ball.norm, ball.eps
    if tokens.dim() != 3:
        raise InvalidInput(f"tokens must have the shape (batch, n, d), got {tuple(tokens.shape)}.")
    if not bool(tokens.isfinite().all()):
        raise InvalidInput("tokens must be finite, got an entry that is not.")
    if norm not in NORMS:
        raise InvalidInput(f"norm must be one of {sorted(NORMS)}, got {norm=}.")
    if not eps > float(tokens.abs().max()) * 8 * torch.finfo(tokens.dtype).eps:
        raise InvalidInput(
            f"eps must be above 0 and above the rounding of the tokens in {tokens.dtype}, got {eps=} with entries up "
            f"to {float(tokens.abs().max()):g}; use a wider dtype."
        )
