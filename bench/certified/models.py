"""The classifiers whose radii are certified, as torch models and as networks, with their images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.certified.classifier import Classifier
from bench.certified.mnist import load_mnist, some_test_images
from lipbounds.errors import InvalidInput
from lipbounds.models.certified_mnist_vit import load_certified_mnist_vit
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import load_digits_vit
from lipbounds.models.lipschitz_vit import load_certified_vit, load_lipschitz_vit
from lipbounds.targets.layers import Sequence


MNIST, MNIST_3, CERTIFIED_MNIST = "mnist-vit", "mnist-vit-3", "certified-mnist-vit"
PEERS = {MNIST: 1, MNIST_3: 3}  # ViTs on MNIST from the folder of DeepT, by their number of layers
OF_THE_FOLDER = (CERTIFIED_MNIST, *PEERS)  # those whose images, or weights too, are in that folder
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "certified-vit": load_certified_vit,
    "lipschitz-vit": load_lipschitz_vit,
    "digits-vit": load_digits_vit,
}


def load(name: str, device: torch.device, peer: Path | None = None) -> Classifier:
    """A classifier by its name.

    Args:
        name: in `CLASSIFIERS`, or in `OF_THE_FOLDER`.
        device: where the model and the images are.
        peer: the folder of the ViTs on MNIST, and of its test images.

    Raises:
        InvalidInput: one of `OF_THE_FOLDER` without a folder.
    """
    if name in OF_THE_FOLDER:
        if peer is None:
            raise InvalidInput(f"{name} needs the folder with the test images of MNIST; pass --deept FOLDER.")
        if name in PEERS:
            return load_mnist(peer, device, PEERS[name])
        model, (images, labels, indices) = load_certified_mnist_vit(), some_test_images(peer)
    else:
        model, split = CLASSIFIERS[name](), load_digits_split().test
        images, labels, indices = split.images, split.labels, split.indices.tolist()
    model = model.to(device)
    images = images.to(device)
    return Classifier(
        model=model,
        network=lambda: as_network(name, model, images[:2]),
        images=images,
        labels=labels.to(device),
        indices=indices,
    )


def as_network(name: str, model: nn.Module, images: Tensor) -> Sequence:
    """A classifier as a network.

    Args:
        name: of a classifier whose weights are in this package.
        model: the classifier.
        images: a few, to check the network with.
    """
    # Adapters import transformers, which takes seconds.
    from lipbounds.adapters.digits_vit import digits_vit_network
    from lipbounds.adapters.lipschitz_vit import lipschitz_vit_network

    adapters: dict[str, Callable[[Any, Tensor], Sequence]] = {
        "certified-vit": lipschitz_vit_network,
        CERTIFIED_MNIST: lipschitz_vit_network,
        "lipschitz-vit": lipschitz_vit_network,
        "digits-vit": digits_vit_network,
    }
    return adapters[name](model, images)
