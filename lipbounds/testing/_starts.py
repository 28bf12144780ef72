"""Where a search starts: the shape of the blocks it looks at, and the instances drawn for it."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from lipbounds.claims import Feature
from lipbounds.errors import InvalidInput
from lipbounds.targets.attention import Attention, Moves
from lipbounds.targets.rms_norm import NORM_OVER, NormOver
from lipbounds.testing._regimes import REGIMES as REGIMES
from lipbounds.testing._regimes import Parameters as Parameters
from lipbounds.testing._regimes import Regime, normal, uniform


Mask = Literal["none", "causal", "padding", "one_visible", "offsets"]
MASKS: tuple[Mask, ...] = ("none", "causal", "padding", "one_visible", "offsets")
SHIFT = "shift"  # displacement of the moving input from the centre of the ball, in units of the radius
NORM_WEIGHTS = ("query_norm_weight", "key_norm_weight")
ANGLES = ("query_angles", "key_angles")  # of rotary positions; in self-attention the first serves both
INSIDE = 1 - 1e-12  # keeps a point on the sphere within the ball after rounding


@dc.dataclass(frozen=True, kw_only=True)
class Setting:
    """The shape and the features of the blocks that one search looks at.

    Args:
        tokens: queries n, in self-attention also keys.
        dim: width D.
        heads: number of heads.
        head_dim: width of queries and keys of a head; dim // heads, at least 1, if None.
        value_dim: width of the values of a head; as `head_dim` if None.
        biases: whether there are query, key and value biases.
        norm_over: QK-norm with free weights over the features of a `head` or of `all_heads`; None for no norm.
        norm_eps: of that norm.
        rotary: whether queries and keys are turned, by free angles; needs heads of width 2.
        mask: `padding` hides the last key, `one_visible` shows each query one key, `offsets` is a free finite bias.
        moves: `self`, or which input of cross-attention moves.
        memory_tokens: keys in cross-attention; one more than the queries if None.
        scale: of the logits; 1/sqrt(head_dim) if None.
        radius: of the ball, or of the tokens in a compact set.
        compact: scale the tokens so that the largest has the norm `radius`: it is in the compact set of that radius.
    """

    tokens: int = 3
    dim: int = 3
    heads: int = 1
    head_dim: int | None = None
    value_dim: int | None = None
    biases: bool = False
    rotary: bool = False
    norm_over: NormOver | None = None
    norm_eps: float = 0.1
    mask: Mask = "none"
    moves: Moves = "self"
    memory_tokens: int | None = None
    scale: float | None = None
    radius: float = 1.0
    compact: bool = False

    def __post_init__(self) -> None:
        sizes = {"tokens": self.tokens, "dim": self.dim, "heads": self.heads, "memory_tokens": self.keys}
        sizes |= {"head_dim": self.head_width, "value_dim": self.value_width}
        for name, size in sizes.items():
            if size < 1:
                raise InvalidInput(f"{name} must be at least 1, got {name}={size}.")
        if self.rotary and self.head_width < 2:
            raise InvalidInput(f"rotary positions need heads of width 2, got {self.head_width}; set head_dim=2.")
        if self.norm_over not in (None, *NORM_OVER) or not 0 < self.norm_eps < math.inf:
            raise InvalidInput(
                f"norm_over must be None or one of {NORM_OVER} and norm_eps positive and finite, got "
                f"norm_over={self.norm_over!r} and norm_eps={self.norm_eps}."
            )
        if self.mask not in MASKS:
            raise InvalidInput(f"mask must be one of {MASKS}, got mask={self.mask!r}.")
        if self.mask == "causal" and self.moves != "self":
            raise InvalidInput(
                "a causal mask needs moves='self'; take mask='padding' or 'offsets' for cross-attention."
            )
        if not 0 < self.radius < math.inf:
            raise InvalidInput(f"radius must be positive and finite, got radius={self.radius}.")

    @property
    def head_width(self) -> int:
        return max(1, self.dim // self.heads) if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        return self.head_width if self.value_dim is None else self.value_dim

    @property
    def keys(self) -> int:
        if self.moves == "self":
            return self.tokens
        return self.tokens + 1 if self.memory_tokens is None else self.memory_tokens

    @property
    def features(self) -> frozenset[Feature]:
        """The features that blocks of this setting have."""
        present: dict[Feature, bool] = {
            "heads": self.heads > 1,
            "biases": self.biases,
            "mask": self.mask != "none",
            "cross": self.moves != "self",
            "rotary": self.rotary,
            "qk_norm": self.norm_over is not None,
        }
        return frozenset(feature for feature, there in present.items() if there)

    def shapes(self, ball: bool) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one instance."""
        heads, dim, width, values = self.heads, self.dim, self.head_width, self.value_width
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.tokens, dim),
            "w_q": (heads, dim, width),
            "w_k": (heads, dim, width),
            "w_v": (heads, dim, values),
            "w_o": (heads, values, dim),
        }
        if self.moves != "self":
            shapes["memory"] = (self.keys, dim)
        if self.biases:
            shapes |= {"b_q": (heads, width), "b_k": (heads, width), "b_v": (heads, values)}
        if self.norm_over is not None:
            shapes |= dict.fromkeys(NORM_WEIGHTS, (heads, width))
        if self.rotary:
            shapes["query_angles"] = (self.tokens, width // 2)
        if self.rotary and self.moves != "self":
            shapes["key_angles"] = (self.keys, width // 2)
        if self.mask == "offsets":
            shapes["offsets"] = (heads, self.tokens, self.keys)
        if ball:
            shapes[SHIFT] = (self.keys if self.moves == "memory" else self.tokens, dim)
        return shapes

    def block(self, parameters: Parameters) -> Attention:
        """The (batched or single) block that the parameters describe."""
        fields: dict[str, Any] = {k: v for k, v in parameters.items() if k not in (SHIFT, "offsets", *ANGLES)}
        if self.compact:
            largest = fields["x"].square().sum(-1, keepdim=True).amax(-2, keepdim=True).clamp(min=1e-280).sqrt()
            fields["x"] = fields["x"] * (self.radius * INSIDE / largest)
        if self.rotary:
            query_angles = parameters["query_angles"]
            for side, angles in (("query", query_angles), ("key", parameters.get("key_angles", query_angles))):
                fields[f"{side}_rotation"] = torch.stack([angles.cos(), angles.sin()], -2)
        if self.norm_over is not None:
            fields |= {"norm_over": self.norm_over, "norm_eps": self.norm_eps}
        bias = parameters.get("offsets")
        hidden = self._hidden_keys()
        if hidden is not None:
            bias = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        return Attention(**fields, scale=self.scale, moves=self.moves, logit_bias=bias, causal=self.mask == "causal")

    def point(self, parameters: Parameters, block: Attention) -> Tensor:
        """The moving input at which the norm is taken: in the ball if there is one, else that of the block."""
        if SHIFT not in parameters:
            return block.moving_input
        shift = parameters[SHIFT]
        length = shift.square().sum((-2, -1), keepdim=True).sqrt()
        return block.moving_input + shift * (self.radius * INSIDE / length.clamp(min=1.0))

    def _hidden_keys(self) -> Tensor | None:
        n, m = self.tokens, self.keys
        if self.mask == "padding" and m > 1:
            return (torch.arange(m) == m - 1).expand(n, m)
        if self.mask == "one_visible":
            return torch.arange(m) != (torch.arange(n) // 2 % m).unsqueeze(-1)  # pairs of queries share their key
        return None


def draw_starts(setting: Setting, count: int, ball: bool, generator: Generator) -> Parameters:
    """`count` starting instances stacked along a first axis, cycling through the regimes."""
    drawn = [_draw(setting, REGIMES[i % len(REGIMES)], ball, generator) for i in range(count)]
    return {name: torch.stack([instance[name] for instance in drawn]) for name in drawn[0]}


def _draw(setting: Setting, regime: Regime, ball: bool, generator: Generator) -> Parameters:
    parameters = {name: normal(generator, *shape) for name, shape in setting.shapes(ball).items()}
    for name in ("w_q", "w_k", "w_v", "w_o"):
        parameters[name] = parameters[name] / math.sqrt(setting.dim)
    parameters["x"] = parameters["x"] * 10 ** uniform(generator, -0.7, 0.7)
    if ball:  # what counts is the radius relative to the tokens: the radius itself is the same for all instances
        parameters["x"] = parameters["x"] * setting.radius * 10 ** uniform(generator, -0.5, 1.5)
        parameters[SHIFT] = parameters[SHIFT] / parameters[SHIFT].norm() * uniform(generator, 0.1, 1.5)
    regime(parameters, generator)
    return parameters
