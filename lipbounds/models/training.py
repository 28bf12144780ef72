"""What the training of the models on digits shares: the loop, the distortions, the schedule, the file of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from lipbounds.files import write_atomically
from lipbounds.models.digits_data import LabelledImages
from lipbounds.models.digits_vit import IMAGE_SIZE


BATCH = 32
WARM_UP = 0.1
# In pixels, and as the entries added to the 2 x 2 matrix of the affine map.
LARGEST_SHIFT = 0.5
LARGEST_STRETCH = 0.15

# The model, distorted images, their labels, and the generator that everything random comes from.
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
Distort = Callable[[Tensor, torch.Generator], Tensor]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of the committed weights; draws nothing."""
    return F.cross_entropy(model(images), labels)


def fit(
    model: nn.Module,
    part: LabelledImages,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Loss],
    epochs: int,
    generator: torch.Generator,
    console: Console,
    *,
    after_epoch: Callable[[], str] = lambda: "training",
    batch: int = BATCH,
    distort: Distort | None = None,
) -> None:
    """Train a model in place.

    Args:
        model: the model.
        part: images the gradients come from, distorted at random.
        optimizer: of the parameters, at the peak learning rate.
        loss_of: the loss of an epoch, counted from 0.
        epochs: passes over the images.
        generator: of the order of the images, the distortions, and what the loss draws.
        console: where the progress goes.
        after_epoch: what the progress bar says next.
        batch: images of a step.
        distort: how images are distorted; None: as `distorted` says.
    """
    distort = distort or distorted
    steps = epochs * -(-len(part) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak_rate(step, steps))
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=epochs)
        for epoch in range(epochs):
            model.train()
            loss = loss_of(epoch)
            for images, labels in batches(part, generator, batch):
                value = loss(model, distort(images, generator), labels, generator)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
            progress.update(task, advance=1, description=after_epoch())


def batches(part: LabelledImages, generator: torch.Generator, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, that many at a time, in random order."""
    for chosen in torch.randperm(len(part), generator=generator).split(size):
        yield part.images[chosen], part.labels[chosen]


def share_of_peak_rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: a straight rise over `WARM_UP` of the steps, then half a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def distorted(
    images: Float[Tensor, "batch 1 side side"], generator: torch.Generator
) -> Float[Tensor, "batch 1 side side"]:
    """Every image under its own small affine map (shift, turn, stretch, shear), black coming in at the edges.

    The largest shift is a sixteenth of the side, as `LARGEST_SHIFT` is of the digits.
    """
    drawn = torch.rand(len(images), 2, 3, generator=generator, device=generator.device)
    uniform = 2 * drawn.to(images.device) - 1
    # affine_grid measures in half image widths, seen from the centre.
    largest = torch.tensor([LARGEST_STRETCH, LARGEST_STRETCH, LARGEST_SHIFT * 2 / IMAGE_SIZE], device=images.device)
    still = torch.eye(2, 3, device=images.device)
    grid = F.affine_grid(still + uniform * largest, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def evaluate(model: nn.Module, part: LabelledImages) -> tuple[float, float]:
    """Accuracy (a share) and mean cross-entropy of the model on a part, in evaluation mode."""
    logits = model.eval()(part.images)
    accuracy = (logits.argmax(-1) == part.labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, part.labels).item()


def save_weights(output: Path, model: nn.Module, command: str, accuracy: float, **more: Any) -> None:
    """Write the weights with how they were made; the file is there whole or not at all.

    Args:
        output: the file.
        model: the model.
        command: that makes the same file.
        accuracy: on the test images.
        **more: what else is to be known of the run.
    """
    history = {
        "command": command,
        **more,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "test_accuracy": round(accuracy, 4),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    # One entry only: safetensors writes several in an order of its own, and the same weights must be the same bytes.
    write_atomically(output, save(weights, {"training": json.dumps(history)}))
