"""What is measured at test images: local Lipschitz constants, bounds of blocks, and g_1 of attention rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bench.engine.store import Answer
from lipbounds import registry
from lipbounds.capture import capture
from lipbounds.estimators.lanczos import lanczos_upper
from lipbounds.ops.softmax import g_upper_from_logits


BOUNDS = ("yudin2025.biased", "sharp_fast")
LANCZOS = {"delta": 1e-9, "steps": 60, "seed": 0}
BINS = 25  # of g_1, from 0 to 1/2


def versions() -> dict[str, int]:
    """Those of the bounds, which the answers depend on."""
    return {name: registry.get(name).version for name in BOUNDS}


def network_constants(
    model: nn.Module, images: Float[Tensor, "batch channels *rest"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch classes"]]:
    """Spectral norm of the Jacobian of the logits with respect to each image, and the logits; as computed in float64.

    Args:
        model: in float64; treats the images of a batch alone.
        images: in float64.
    """
    moving = images.detach().requires_grad_()
    logits = model(moving)
    rows = [torch.autograd.grad(logits[:, c].sum(), moving, retain_graph=True)[0] for c in range(logits.shape[1])]
    jacobians = torch.stack([row.flatten(1) for row in rows], 1)
    return torch.linalg.matrix_norm(jacobians, ord=2), logits.detach()


@torch.no_grad()
def blocks(model: nn.Module, images: Float[Tensor, "batch channels *rest"]) -> Answer:
    """For each attention block: its constant at each image, two bounds of it, and g_1 of its rows.

    Args:
        model: in float64.
        images: in float64.
    """
    layers: list[dict[str, Any]] = []
    for found in capture(model, images):
        block = found.attention
        # g_1 lies in [0, 1/2]; the one rounded up may be above by a rounding.
        g_1 = g_upper_from_logits(block.logits).clamp(max=0.5)
        layers.append(
            {
                "module": found.module,
                "constant": lanczos_upper(block, **LANCZOS)[0].tolist(),
                **{name: registry.get(name)(block).value.tolist() for name in BOUNDS},
                "g_1_mean": float(g_1.mean()),
                "g_1_largest": float(g_1.amax(-1).mean()),
                "g_1_counts": torch.histc(g_1.flatten(), BINS, 0.0, 0.5).long().tolist(),
            }
        )
    return {"layers": layers}
