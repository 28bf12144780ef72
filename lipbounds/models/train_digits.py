"""Train the digits model: `python -m lipbounds.models.train_digits --seed 0 --output digits_vit.safetensors`.

The committed weights come from this command with its defaults. The weights of the epoch that is best on the validation
images are kept; the test images are looked at once, at the end. The same seed gives the same weights on the same
machine with the same versions and number of threads; elsewhere sums round in another order and the weights differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from lipbounds.files import write_atomically
from lipbounds.models.digits_data import LabelledImages, load_digits_split
from lipbounds.models.digits_vit import IMAGE_SIZE, DigitsViT


BATCH = 32
EPOCHS = 60
PEAK_LEARNING_RATE = 1e-3
WARM_UP = 0.1
WEIGHT_DECAY = 0.05
# In pixels, and as the entries added to the 2 x 2 matrix of the affine map.
LARGEST_SHIFT = 0.5
LARGEST_STRETCH = 0.15

# The model, distorted images, their labels, and the generator that everything random comes from.
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of the committed weights; draws nothing."""
    return F.cross_entropy(model(images), labels)


def train(
    train_part: LabelledImages,
    validation_part: LabelledImages,
    *,
    seed: int,
    epochs: int,
    console: Console,
    loss: Loss = cross_entropy,
    weight_decay: float = WEIGHT_DECAY,
    after_epoch: Callable[[float, float], None] = lambda accuracy, validation_loss: None,
) -> DigitsViT:
    """The model of the epoch with the best validation accuracy (among equals: the lowest validation loss).

    The caller's random state is left as it was.

    Args:
        train_part: images the gradients come from, distorted at random.
        validation_part: images the epoch is chosen with.
        seed: of the first weights, the order of the images, the distortions, and what the loss draws.
        epochs: passes over the training images.
        console: where the progress goes.
        loss: what is minimised; it may add penalties or move the images.
        weight_decay: of AdamW: every step also shrinks the weights by the learning rate times this.
        after_epoch: called with the validation accuracy and loss of each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsViT()
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(train_part) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak_rate(step, steps))
    best, best_score = copy.deepcopy(model.state_dict()), (-1.0, 0.0)
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=epochs)
        for _ in range(epochs):
            model.train()
            for images, labels in batches(train_part, generator):
                value = loss(model, distorted(images, generator), labels, generator)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
            accuracy, validation_loss = evaluate(model, validation_part)
            after_epoch(accuracy, validation_loss)
            if (accuracy, -validation_loss) > best_score:
                best, best_score = copy.deepcopy(model.state_dict()), (accuracy, -validation_loss)
            shown = f"validation accuracy {accuracy:.4f}, best {best_score[0]:.4f}"
            progress.update(task, advance=1, description=shown)
    model.load_state_dict(best)
    return model.eval()


def batches(part: LabelledImages, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, `BATCH` at a time, in random order."""
    for chosen in torch.randperm(len(part), generator=generator).split(BATCH):
        yield part.images[chosen], part.labels[chosen]


def share_of_peak_rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: a straight rise over `WARM_UP` of the steps, then half a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def distorted(images: Float[Tensor, "batch 1 8 8"], generator: torch.Generator) -> Float[Tensor, "batch 1 8 8"]:
    """Every image under its own small affine map (shift, turn, stretch, shear), black coming in at the edges."""
    uniform = 2 * torch.rand(len(images), 2, 3, generator=generator) - 1
    # affine_grid measures in half image widths, seen from the centre.
    largest = torch.tensor([LARGEST_STRETCH, LARGEST_STRETCH, LARGEST_SHIFT * 2 / IMAGE_SIZE])
    grid = F.affine_grid(torch.eye(2, 3) + uniform * largest, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def evaluate(model: nn.Module, part: LabelledImages) -> tuple[float, float]:
    """Accuracy (a share) and mean cross-entropy of the model on a part, in evaluation mode."""
    logits = model.eval()(part.images)
    accuracy = (logits.argmax(-1) == part.labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, part.labels).item()


def train_and_save(output: Path, *, seed: int = 0, epochs: int = EPOCHS, console: Console) -> float:
    """Train, judge on the test images, write the weights with their history, and return the test accuracy.

    Args:
        output: the file to write; it is there whole or not at all.
        seed: of the first weights, the order of the images and the distortions.
        epochs: passes over the training images.
        console: where the progress goes.
    """
    split = load_digits_split()
    model = train(split.train, split.validation, seed=seed, epochs=epochs, console=console)
    accuracy, _ = evaluate(model, split.test)
    history = {
        "command": f"python -m lipbounds.models.train_digits --seed {seed} --epochs {epochs}",
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "test_accuracy": round(accuracy, 4),
    }
    # One entry only: safetensors writes several in an order of its own, and the same weights must be the same bytes.
    write_atomically(output, save(model.state_dict(), {"training": json.dumps(history)}))
    return accuracy


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m lipbounds.models.train_digits", description="Train the digits ViT."
    )
    parser.add_argument("--seed", type=int, default=0, help="weights, order and distortions (default 0)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the images (default {EPOCHS})")
    parser.add_argument("--output", type=Path, default=Path("digits_vit.safetensors"), help="file to write")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    console = Console(stderr=True)
    accuracy = train_and_save(options.output, seed=options.seed, epochs=options.epochs, console=console)
    console.print(f"test accuracy {accuracy:.4f}; weights in {options.output}")


if __name__ == "__main__":
    main()
