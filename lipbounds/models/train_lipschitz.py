"""Train the model to be certified: `python -m lipbounds.models.train_lipschitz --seed 0 --output PATH`.

The committed weights come from this command with its defaults, about two minutes on one CPU core. The loss is the
cross-entropy of the logits times `SHARPNESS`: no layer may stretch, so margins in the logits measure distances in the
image, and the factor sets how wide they are asked to be. The weights of the last epoch are kept; the test images are
looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch.nn import functional as F

from lipbounds.models.digits_data import LabelledImages, load_digits_split
from lipbounds.models.lipschitz_vit import WEIGHTS, LipschitzViT, constrain, release
from lipbounds.models.train_digits import BATCH, batches, distorted, evaluate, share_of_peak_rate


EPOCHS = 60
PEAK_LEARNING_RATE = 5e-3
SHARPNESS = 6.0


def train(part: LabelledImages, *, seed: int, epochs: int, sharpness: float, console: Console) -> LipschitzViT:
    """The model after the last epoch.

    Args:
        part: images the gradients come from, distorted at random.
        seed: of the first weights, the order of the images and the distortions.
        epochs: passes over the training images.
        sharpness: factor of the logits in the loss.
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
        for _ in range(epochs):
            for images, labels in batches(part, generator):
                loss = F.cross_entropy(sharpness * model(distorted(images, generator)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress.update(task, advance=1)
    release(model)
    return model.eval()


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
    model = train(split.train, seed=options.seed, epochs=options.epochs, sharpness=options.sharpness, console=console)
    accuracy, _ = evaluate(model, split.test)
    history = {
        "command": f"{parser.prog} --seed {options.seed} --epochs {options.epochs} --sharpness {options.sharpness:g}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "test_accuracy": round(accuracy, 4),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.contiguous() for name, weight in model.state_dict().items()},
        options.output,
        {"training": json.dumps(history)},
    )
    console.print(f"test accuracy {accuracy:.4f}; weights in {options.output}")


if __name__ == "__main__":
    main()
