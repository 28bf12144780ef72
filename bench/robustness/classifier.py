"""Any classifier of images, from its name, as a function from pixels in [0, 1] to logits."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bench.robustness.folder import LabelledFolder
from lipbounds.errors import InvalidInput, LipboundsError
from lipbounds.models.image_input import ImageInput
from lipbounds.models.loading import BUNDLED, load_model, python_path


@dc.dataclass(frozen=True, kw_only=True)
class LoadedClassifier:
    """A classifier and what it takes.

    Args:
        name: what the user typed.
        module: from pixels in [0, 1] to logits, in evaluation mode; its parameters need no gradient.
        image: size and channels of its images; None: any.
        classes: the number of each class by its name, without names that several classes have; empty where the model
            knows no names.
    """

    name: str
    module: nn.Module
    image: ImageInput | None
    classes: Mapping[str, int]


class FromPixels(nn.Module):
    """Normalise pixels, run the model, take the logits: attacks move pixels, in [0, 1].

    Args:
        model: returns logits, or an object with `logits`.
        image: what is subtracted from the pixels and what they are divided by; None: nothing.
    """

    def __init__(self, model: nn.Module, image: ImageInput | None) -> None:
        super().__init__()
        self.model, self.image = model, image

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        found = self.model(images if self.image is None else self.image.normalised(images))
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise InvalidInput(
                "model must return logits of shape (batch, classes), or an object that holds them as `logits`, got "
                f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
            )
        return logits


def load_classifier(name: str, *, trust_remote_code: bool = False) -> LoadedClassifier:
    """The classifier of that name, on the CPU in float32.

    Args:
        name: `digits-vit`, `lipschitz-vit` or `certified-vit`; or a folder with a Hugging Face checkpoint of an image
            classifier, or a name on its hub; or `package.module:attribute`, a module or a function without arguments
            that returns one, which takes pixels in [0, 1].
        trust_remote_code: run the code that comes with a Hugging Face checkpoint.

    Raises:
        InvalidInput: there is no such model, it is damaged, or takes no images.
        Unsupported: it is of an unknown kind, or needs code that comes with it.
    """
    # These import transformers, which takes seconds.
    from lipbounds.models.hub import load_hub_classifier
    from lipbounds.models.image_processor import image_input

    image: ImageInput | None
    labels: dict[str, int] = {}
    if name in BUNDLED or python_path(name):
        loaded = load_model(name)
        if name in BUNDLED and not loaded.classes:
            raise InvalidInput(f"model must classify images, got {name!r}, which has no classes.")
        model, image = loaded.module, loaded.image
        labels = {label: number for number, label in enumerate(loaded.classes)}
    else:
        model = load_hub_classifier(name, trust_remote_code=trust_remote_code)
        image = image_input(name, model, trust_remote_code=trust_remote_code)
        labels = _names(model.config.id2label or {})
    module = FromPixels(model, image).eval().requires_grad_(False)
    return LoadedClassifier(name=name, module=module, image=image, classes=labels)


def _names(id2label: Mapping[Any, str]) -> dict[str, int]:
    """The number of each class by its name; some names of ImageNet stand for two classes, and so for neither."""
    names = list(id2label.values())
    return {name: int(number) for number, name in id2label.items() if names.count(name) == 1}


def check_numbered(classifier: LoadedClassifier, given: LabelledFolder) -> None:
    """Folders called by numbers must be those of all classes; of a subset, nobody knows how it was numbered.

    Args:
        classifier: the model.
        given: the images.

    Raises:
        InvalidInput: there are fewer such folders than classes; the model cannot be run on the images.
    """
    try:
        with torch.no_grad():
            classes = classifier.module(given.images[:1]).shape[1]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        if isinstance(error, LipboundsError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidInput(
            f"{classifier.name} must run on the images, got shape {tuple(given.images.shape[1:])}, on which it raised: "
            f"{reason} The size must be right in its preprocessor_config.json, or in the pictures."
        ) from error
    if given.numbered and given.classes < classes:
        raise InvalidInput(
            f"folders called by numbers must be 0 to {classes - 1}, all classes of {classifier.name}, got "
            f"{given.classes} of them; pass --classes FILE, a JSON object with the number of the class of each folder "
            "by its name."
        )


@torch.no_grad()
def check_classes(classifier: LoadedClassifier, images: Tensor, labels: Tensor, folders: int) -> int:
    """The number of classes of a model, which the labels must be among.

    Args:
        classifier: the model.
        images: at least one.
        labels: their classes.
        folders: number of class folders they come from.

    Raises:
        InvalidInput: there are more folders than classes, or a label beyond them.
    """
    classes = classifier.module(images[:1]).shape[1]
    if folders > classes or int(labels.max()) >= classes:
        raise InvalidInput(
            f"images must have a folder for each of the {classes} classes of {classifier.name} at most, got {folders}."
        )
    return classes
