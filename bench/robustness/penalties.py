"""The penalties that are added to the cross-entropy, each a mean over what it looks at, and so of like size.

Each takes the model, the images and a generator, and returns the logits, of which the cross-entropy is taken, with the
penalty: most see both in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attacks.images import Ball, pgd
from bench.robustness.own import function_of
from bench.robustness.settings import Recipe
from lipbounds import registry
from lipbounds.capture import capture
from lipbounds.jasmin import JaSMin
from lipbounds.models.digits_vit import SelfAttention
from lipbounds.models.training import Loss, cross_entropy


Penalty = Callable[[nn.Module, Tensor, torch.Generator], tuple[Tensor, Tensor]]
SHARP_IMAGES = 2  # of a batch: the bound of a block costs many times what the block costs


def jasmin(model: nn.Module, images: Tensor, generator: torch.Generator, *, k: int) -> tuple[Tensor, Tensor]:
    """JaSMin with its defaults (lipbounds.jasmin): the largest row, the mean over heads, images and layers."""
    with JaSMin(model, k=k) as watched:
        logits = model(images)
    return logits, watched.penalty()


def spectral(model: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean spectral norm of W_Q, W_K and W_V over all layers, from their singular values.

    Like SpecFormer (Hu et al. 2024, arXiv 2402.03317), which penalises the largest singular values of these three
    matrices by power iteration; how it weighs them was not available to us.
    """
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    weights = torch.stack([part.weight for layer in layers for part in (layer.query, layer.key, layer.value)])
    return model(images), torch.linalg.matrix_norm(weights, ord=2).mean()


def jacobian(model: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half the squared Frobenius norm of the Jacobian of the logits, from one random projection an image.

    As Hoffman, Roberts and Yaida 2019 (arXiv 1908.02729) do, recollected: for u uniform on the sphere of R^C,
    C |J^T u|^2 is |J|_F^2 in the mean.
    """
    moving = images.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        logits = model(moving)
    drawn = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=generator.device)
    direction = F.normalize(drawn.to(logits.device), dim=-1)
    (row,) = torch.autograd.grad((logits * direction).sum(), moving, create_graph=True)
    return logits, logits.shape[-1] / 2 * row.flatten(1).square().sum(1).mean()


def sharp(model: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean logarithm of `sharp_fast`, a bound of the local Lipschitz constant, over blocks and the first images."""
    bound = registry.get("sharp_fast")
    values = [bound(found.attention, grad=True).value.log().mean() for found in capture(model, images[:SHARP_IMAGES])]
    return model(images), torch.stack(values).mean()


PENALTIES: dict[str, Penalty] = {
    "jasmin": partial(jasmin, k=10),
    "jasmin-0": partial(jasmin, k=0),
    "spectral": spectral,
    "jacobian": jacobian,
    "sharp": sharp,
}


def loss_of(recipe: Recipe) -> Loss:
    """What is minimised: the cross-entropy of the images, moved by the adversary if there is one, and the penalty.

    Args:
        recipe: how the model is trained.
    """

    if recipe.loss:
        return function_of(recipe.loss)
    penalise = PENALTIES.get(recipe.penalty)
    if recipe.penalty and penalise is None:
        penalise = function_of(recipe.penalty)

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        if recipe.adversary is not None:
            images = moved(model, images, labels, recipe, generator)
        if penalise is None:
            return cross_entropy(model, images, labels, generator)
        logits, penalty = penalise(model, images, generator)
        return F.cross_entropy(logits, labels) + recipe.weight * penalty

    return loss


def moved(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """The images where the adversary of the recipe takes them.

    Args:
        model: as it stands.
        images: distorted ones; interpolation may leave them outside of [0, 1] by a rounding.
        labels: the right classes.
        recipe: of which the adversary is taken.
        generator: of the random start.
    """
    adversary = recipe.adversary
    assert adversary is not None
    return pgd(
        model,
        images.clamp(0, 1),
        labels,
        Ball(adversary.norm, adversary.eps),
        steps=adversary.steps,
        generator=generator,
    )
