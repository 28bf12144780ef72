"""What the task `speed` measures: shapes of blocks, targets, and how much of it in each profile."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch

from lipbounds.targets.attention import Attention


SEED = 0


@dc.dataclass(frozen=True, kw_only=True)
class Shape:
    """A random attention block.

    Args:
        tokens: n.
        width: D.
        heads: H, of width D/H each.
        batch: number of inputs.
        dtype: of all tensors.
        biases: whether queries, keys and values have them.
    """

    tokens: int = 64
    width: int = 64
    heads: int = 2
    batch: int = 1
    dtype: str = "float32"
    biases: bool = False

    def block(self, device: torch.device) -> Attention:
        """Gaussian tokens of unit entries and weights that keep that size, the same every time.

        Args:
            device: where its tensors are.
        """
        generator = torch.Generator().manual_seed(SEED)
        inner = self.width // self.heads

        def draw(*size: int, scale: float) -> torch.Tensor:
            drawn = scale * torch.randn(size, generator=generator)
            return drawn.to(device, getattr(torch, self.dtype))

        names = ("w_q", "w_k", "w_v")
        weights = {name: draw(self.heads, self.width, inner, scale=self.width**-0.5) for name in names}
        if self.biases:
            weights |= {f"b_{name[-1]}": draw(self.heads, inner, scale=0.1) for name in names}
        leading = (self.batch,) if self.batch > 1 else ()
        return Attention(
            x=draw(*leading, self.tokens, self.width, scale=1.0),
            w_o=draw(self.heads, inner, self.width, scale=self.width**-0.5),
            **weights,  # pyright: ignore[reportArgumentType]
        )


VIT = Shape(tokens=197, width=768, heads=12, biases=True)
WIDE_VIT = dc.replace(VIT, dtype="float64")
AXES: dict[str, tuple[Shape, tuple[Any, ...]]] = {
    "tokens": (Shape(), (64, 256, 512, 1024, 2048, 4096)),
    "width": (Shape(heads=4), (64, 128, 256, 512)),
    "heads": (Shape(width=256), (1, 4, 16)),
    "batch": (Shape(), (1, 4, 16)),
    "dtype": (Shape(), ("float32", "float64", "bfloat16")),
}


@dc.dataclass(frozen=True, kw_only=True)
class Target:
    """What a method may cost on a block of ViT-B/16.

    Args:
        title: what is measured, in words.
        method: name of the bound.
        limit: largest ratio that meets the target; None where there is none.
        options: of the bound.
        shape: of the block.
        kept: whether the norms of the weights are kept from the call before.
    """

    title: str
    method: str
    limit: float | None = None
    options: dict[str, Any] = dc.field(default_factory=dict)
    shape: Shape = VIT
    kept: bool = True


TARGETS = (
    Target(title="Theorem 3 with biases", method="yudin2025.biased", limit=1.8),
    Target(title="the same, weights met for the first time", method="yudin2025.biased", kept=False),
    Target(title="the same, in units of a forward pass in float64", method="yudin2025.biased", shape=WIDE_VIT),
    Target(title="Theorem 3 on a ball", method="yudin2025_ball.biased", limit=3.5),
    Target(
        title="Lanczos certificate, 60 steps",
        method="lanczos_certificate",
        options={"steps": 60, "delta": 1e-9},
    ),
    Target(
        title="the same a posteriori, within 10 %",
        method="lanczos_posterior",
        limit=100.0,
        options={"within": 1.1, "delta": 1e-9},
    ),
    Target(title="sharp, cheap form", method="sharp_cheap", limit=4.0),
    Target(title="sharp, fast form", method="sharp_fast", limit=12.0),
    Target(title="sharp on a ball", method="sharp_ball", limit=5.0),
)
JASMIN_LIMIT = 1.1
SHARP_LIMIT = 1.3
LONG = ("yudin2025.biased", "yudin2025.biased_exact", "centred.products", "covariance.trace", "yudin2025_ball.biased")
LONGEST = (16_384, 32_768, 65_536, 131_072)  # on CUDA


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is measured.

    Args:
        axes: how many values of each axis.
        methods: names; None for all.
        limit: a method that took longer than that, in seconds, is not measured at the next value of the axis.
        patience: the same for the methods in `LONG`, against the number of tokens.
        stop: seconds after which a call is given up.
        streaming: lengths of the maps that are never stored.
        pareto: seconds of the cost of the repeats of each bound at the four blocks of bench/speed/pareto.py; 0 leaves
            them out.
        enough: seconds of the cost of the repeats of one size.
        repeats: of each size, at most.
        targets: seconds likewise for the block of ViT-B/16 and a training step; 0 leaves them out.
    """

    axes: dict[str, int]
    methods: tuple[str, ...] | None
    limit: float
    patience: float
    stop: float
    enough: float
    repeats: int
    targets: float
    streaming: tuple[int, ...]
    pareto: float = 0.0


PROFILES = {
    "standard": Profile(
        axes={"tokens": 6, "width": 4, "heads": 3, "batch": 3, "dtype": 3},
        methods=None,
        limit=0.25,
        patience=2.0,
        stop=120.0,
        enough=0.2,
        repeats=5,
        targets=6.0,
        pareto=1.0,
        streaming=(1024, 4096),
    ),
    "quick": Profile(
        axes={"tokens": 3, "batch": 2},
        methods=("yudin2025.biased", "centred.products", "sharp_fast"),
        limit=0.2,
        patience=0.2,
        stop=20.0,
        enough=0.1,
        repeats=3,
        targets=0.0,
        streaming=(512,),
    ),
}
