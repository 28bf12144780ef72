"""Train the digits model: `python -m lipbounds.models.train_digits --seed 0 --output digits_vit.safetensors`.

The committed weights come from this command with its defaults. The weights of the epoch that is best on the validation
images are kept; the test images are looked at once, at the end. The same seed gives the same weights on the same
machine with the same versions and number of threads; elsewhere sums round in another order and the weights differ.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from lipbounds.models.digits_data import LabelledImages, load_digits_split
from lipbounds.models.digits_vit import DigitsViT
from lipbounds.models.training import BATCH, Loss, cross_entropy, evaluate, fit, save_weights


EPOCHS = 60
PEAK_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05


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
    make: Callable[[], nn.Module] = DigitsViT,
    batch: int = BATCH,
    peak_rate: float = PEAK_LEARNING_RATE,
    last: bool = False,
) -> nn.Module:
    """The model of the epoch with the best validation accuracy (among equals: the lowest validation loss), or the last.

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
        make: draws the model that is trained, from torch's global generator.
        batch: images of a step.
        peak_rate: the learning rate where it is largest.
        last: keep the weights of the last epoch: where a penalty is added to a model that is trained already, those of
            the best accuracy would be those of the first steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=weight_decay)
    best, best_score = copy.deepcopy(model.state_dict()), (-1.0, 0.0)

    def judge() -> str:
        nonlocal best, best_score
        accuracy, validation_loss = evaluate(model, validation_part)
        after_epoch(accuracy, validation_loss)
        if (accuracy, -validation_loss) > best_score:
            best, best_score = copy.deepcopy(model.state_dict()), (accuracy, -validation_loss)
        return f"validation accuracy {accuracy:.4f}, best {best_score[0]:.4f}"

    fit(model, train_part, optimizer, lambda epoch: loss, epochs, generator, console, after_epoch=judge, batch=batch)
    if not last:
        model.load_state_dict(best)
    return model.eval()


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
    command = f"python -m lipbounds.models.train_digits --seed {seed} --epochs {epochs}"
    save_weights(output, model, command, accuracy, seed=seed)
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
