"""Train `certified-vit`: `python -m lipbounds.models.train_certified --seed 0 --output PATH`.

The architecture is that of `lipbounds.models.lipschitz_vit` with one block and norms of up to 1.4 (`BENDING`), and the
images are moved against the model while it trains: the fast gradient method (Goodfellow et al. 2015, in l2, with a
random start) moves each image by `REACH` along the gradient of the loss. That asks for margins as wide as REACH times
the slope: it shrinks the Jacobian of the margins where images are, and the small norms keep it from growing beside
them, so that what is gained at the point can be proved on a ball. The reach grows over the first `RISE` of the epochs.
The weights of the last epoch are kept; the test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipbounds.models.digits_data import LabelledImages, load_digits_split
from lipbounds.models.lipschitz_vit import BENDING, CERTIFIED
from lipbounds.models.train_lipschitz import train
from lipbounds.models.training import Loss, evaluate, save_weights


EPOCHS = 120
SHARPNESS = 12.0
REACH = 0.6  # l2 norm of the pixels
RISE = 0.3
START = 0.1  # length of the random start, as a share of the radius


def loss_under_attack(*, sharpness: float, radius: float, epochs: int) -> Callable[[int], Loss]:
    """The loss of each epoch: the cross-entropy of the logits times a factor, at images moved against the model.

    Args:
        sharpness: the factor.
        radius: how far images are moved once the rise is over, in the l2 norm of the pixels.
        epochs: of the whole training.
    """

    def of(epoch: int) -> Loss:
        now = radius * min(1.0, 0.05 + epoch / (RISE * epochs))

        def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            with parametrize.cached():
                moved = moved_against(model, images, labels, now, sharpness, generator)
                return F.cross_entropy(sharpness * model(moved), labels)

        return loss

    return of


def moved_against(
    model: nn.Module,
    images: Float[Tensor, "batch 1 height width"],
    labels: Tensor,
    radius: float,
    sharpness: float,
    generator: torch.Generator,
) -> Float[Tensor, "batch 1 height width"]:
    """The images one step of the fast gradient method away, from a random start near them.

    Args:
        model: as it is.
        images: in [0, 1]; what comes back may leave it.
        labels: their classes.
        radius: length of the step, in l2.
        sharpness: factor of the logits in the loss.
        generator: of the random start.
    """
    start = START * radius * _unit(torch.randn(images.shape, generator=generator))
    start.requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(sharpness * model(images + start), labels), start)
    return images + radius * _unit(slope)


def _unit(moves: Tensor) -> Tensor:
    return moves / moves.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def train_from_command(
    arguments: list[str] | None,
    *,
    name: str,
    description: str,
    epochs: int,
    reach: float,
    output: Path,
    parts: Callable[[], tuple[LabelledImages, LabelledImages]],
    judged: str,
    trained: Callable[..., nn.Module],
) -> None:
    """Parse the options of a command, train against the attack, judge, and write the weights with their history.

    Args:
        arguments: of the command line; None for those of the process.
        name: of the module that is run.
        description: of the command.
        epochs: by default.
        reach: radius of the attack by default, in the l2 norm of the pixels.
        output: file to write by default.
        parts: makes the images to train on and those to judge with.
        judged: what the latter are, for the reader of the accuracy.
        trained: makes the model from the images, as `lipbounds.models.train_lipschitz.train` does.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"passes over the images (default {epochs})")
    parser.add_argument("--sharpness", type=float, default=SHARPNESS, help=f"of the loss (default {SHARPNESS:g})")
    parser.add_argument("--reach", type=float, default=reach, help=f"radius of the attack, in l2 (default {reach:g})")
    parser.add_argument("--output", type=Path, default=output, help="file to write")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or not options.sharpness > 0 or not options.reach >= 0:
        parser.error("--epochs must be at least 1, --sharpness above 0 and --reach at least 0")
    console, started = Console(stderr=True), time.process_time()
    part, others = parts()
    chosen = {option: getattr(options, option) for option in ("seed", "epochs", "sharpness", "reach")}
    losses = loss_under_attack(sharpness=options.sharpness, radius=options.reach, epochs=options.epochs)
    model = trained(part, seed=options.seed, epochs=options.epochs, console=console, loss_of=losses)
    accuracy, _ = evaluate(model, others)
    command = f"{parser.prog} " + " ".join(f"--{option} {value:g}" for option, value in chosen.items())
    save_weights(options.output, model, command, accuracy, core_seconds=round(time.process_time() - started))
    console.print(f"accuracy on the {judged} {accuracy:.4f}; weights in {options.output}")


def main(arguments: list[str] | None = None) -> None:
    """Train, judge on the test images and write the weights with their history."""

    def parts() -> tuple[LabelledImages, LabelledImages]:
        split = load_digits_split()
        return split.train, split.test

    train_from_command(
        arguments,
        name="lipbounds.models.train_certified",
        description="Train the model with wide certified radii.",
        epochs=EPOCHS,
        reach=REACH,
        output=CERTIFIED,
        parts=parts,
        judged="test images",
        trained=functools.partial(train, shape=BENDING),
    )


if __name__ == "__main__":
    main()
