"""Train the model to be certified: `python -m lipbounds.models.train_lipschitz --seed 0 --output PATH`.

The committed weights come from this command with its defaults, about two minutes on one CPU core. The loss is the
cross-entropy of the logits times `SHARPNESS`: no layer may stretch, so margins in the logits measure distances in the
image, and the factor sets how wide they are asked to be. The weights of the last epoch are kept; the test images are
looked at once, at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional as F

from lipbounds.models.digits_data import LabelledImages, load_digits_split
from lipbounds.models.lipschitz_vit import DIGITS, WEIGHTS, LipschitzViT, Shape, constrain, release
from lipbounds.models.training import Loss, evaluate, fit, save_weights


EPOCHS = 60
PEAK_LEARNING_RATE = 5e-3
SHARPNESS = 6.0


def train(
    part: LabelledImages,
    *,
    seed: int,
    epochs: int,
    console: Console,
    loss_of: Callable[[int], Loss],
    shape: Shape = DIGITS,
) -> LipschitzViT:
    """The model after the last epoch.

    Args:
        part: images the gradients come from, distorted at random.
        seed: of the first weights, the order of the images, the distortions, and what the loss draws.
        epochs: passes over the training images.
        console: where the progress goes.
        loss_of: the loss of an epoch, counted from 0.
        shape: of the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LipschitzViT(shape)
    constrain(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LEARNING_RATE)
    fit(model, part, optimizer, loss_of, epochs, torch.Generator().manual_seed(seed), console)
    release(model)
    return model.eval()


def sharp_cross_entropy(sharpness: float) -> Loss:
    """The cross-entropy of the logits times a factor.

    Args:
        sharpness: the factor.
    """
    return lambda model, images, labels, generator: F.cross_entropy(sharpness * model(images), labels)


def main(arguments: list[str] | None = None) -> None:
    """Train, judge on the test images and write the weights with their history."""
    parser = argparse.ArgumentParser(
        prog="python -m lipbounds.models.train_lipschitz", description="Train the model made to be certified."
    )
    parser.add_argument("--seed", type=int, default=0, help="weights, order and distortions (default 0)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the images (default {EPOCHS})")
    parser.add_argument("--sharpness", type=float, default=SHARPNESS, help=f"of the loss (default {SHARPNESS})")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="file to write")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or not options.sharpness > 0:
        parser.error("--epochs must be at least 1 and --sharpness above 0")
    console = Console(stderr=True)
    split = load_digits_split()
    loss = sharp_cross_entropy(options.sharpness)
    model = train(split.train, seed=options.seed, epochs=options.epochs, console=console, loss_of=lambda epoch: loss)
    accuracy, _ = evaluate(model, split.test)
    command = f"{parser.prog} --seed {options.seed} --epochs {options.epochs} --sharpness {options.sharpness:g}"
    save_weights(options.output, model, command, accuracy)
    console.print(f"test accuracy {accuracy:.4f}; weights in {options.output}")


if __name__ == "__main__":
    main()
