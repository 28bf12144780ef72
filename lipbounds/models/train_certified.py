"""Train `certified-vit`: `python -m lipbounds.models.train_certified --seed 0 --output PATH`.

The architecture and its constraints are those of `lipbounds.models.lipschitz_vit`, and the images are moved against the
model while it trains: the fast gradient method (Goodfellow et al. 2015, in l2, with a random start) moves each image by
`REACH` along the gradient of the loss. That asks for margins as wide as REACH times the slope: it shrinks the Jacobian
of the margins where images are, and the norms of at most 1 keep it from growing beside them, so that what is gained at
the point can be proved on a ball. The reach grows over the first `RISE` of the epochs. The weights of the last epoch
are kept; the test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lipbounds.files import write_atomically
from lipbounds.models.digits_data import LabelledImages, load_digits_split
from lipbounds.models.lipschitz_vit import CERTIFIED, LipschitzViT, constrain, release
from lipbounds.models.train_digits import BATCH, batches, distorted, evaluate, share_of_peak_rate
from lipbounds.models.train_lipschitz import PEAK_LEARNING_RATE


EPOCHS = 120
SHARPNESS = 12.0
REACH = 0.6  # l2 norm of the pixels
RISE = 0.3
START = 0.1  # length of the random start, as a share of the reach


def train(
    part: LabelledImages, *, seed: int, epochs: int, sharpness: float, reach: float, console: Console
) -> LipschitzViT:
    """The model after the last epoch.

    Args:
        part: images the gradients come from, distorted at random.
        seed: of the first weights, the order of the images, the distortions and the random starts.
        epochs: passes over the training images.
        sharpness: factor of the logits in the loss.
        reach: how far images are moved against the model, in the l2 norm of the pixels.
        console: where the progress goes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LipschitzViT()
    constrain(model)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(part) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak_rate(step, steps))
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=epochs)
        for epoch in range(epochs):
            now = reach * min(1.0, 0.05 + epoch / (RISE * epochs))
            for images, labels in batches(part, generator):
                with parametrize.cached():
                    seen = moved_against(model, distorted(images, generator), labels, now, sharpness, generator)
                    loss = F.cross_entropy(sharpness * model(seen), labels)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
            progress.update(task, advance=1)
    release(model)
    return model.eval()


def moved_against(
    model: LipschitzViT,
    images: Float[Tensor, "batch 1 8 8"],
    labels: Tensor,
    reach: float,
    sharpness: float,
    generator: torch.Generator,
) -> Float[Tensor, "batch 1 8 8"]:
    """The images one step of the fast gradient method away, from a random start near them.

    Args:
        model: as it is.
        images: in [0, 1]; what comes back may leave it.
        labels: their classes.
        reach: length of the step, in l2.
        sharpness: factor of the logits in the loss.
        generator: of the random start.
    """
    start = START * reach * _unit(torch.randn(images.shape, generator=generator))
    start.requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(sharpness * model(images + start), labels), start)
    return images + reach * _unit(slope)


def _unit(moves: Tensor) -> Tensor:
    return moves / moves.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def main(arguments: list[str] | None = None) -> None:
    """Train, judge on the test images and write the weights with their history."""
    parser = argparse.ArgumentParser(
        prog="python -m lipbounds.models.train_certified", description="Train the model with wide certified radii."
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the images (default {EPOCHS})")
    parser.add_argument("--sharpness", type=float, default=SHARPNESS, help=f"of the loss (default {SHARPNESS:g})")
    parser.add_argument("--reach", type=float, default=REACH, help=f"of the attack, in l2 (default {REACH:g})")
    parser.add_argument("--output", type=Path, default=CERTIFIED, help="file to write")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or not options.sharpness > 0 or not options.reach >= 0:
        parser.error("--epochs must be at least 1, --sharpness above 0 and --reach at least 0")
    console, started = Console(stderr=True), time.process_time()
    split = load_digits_split()
    chosen = {name: getattr(options, name) for name in ("seed", "epochs", "sharpness", "reach")}
    model = train(split.train, **chosen, console=console)
    accuracy, _ = evaluate(model, split.test)
    history = {
        "command": f"{parser.prog} " + " ".join(f"--{name} {value:g}" for name, value in chosen.items()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "core_seconds": round(time.process_time() - started),
        "test_accuracy": round(accuracy, 4),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, save(model.state_dict(), {"training": json.dumps(history)}))
    console.print(f"test accuracy {accuracy:.4f}; weights in {options.output}")


if __name__ == "__main__":
    main()
