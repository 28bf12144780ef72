"""A model from what a user types: a bundled name, a Hugging Face folder or name, or the path of a Python object."""

from __future__ import annotations

import dataclasses as dc
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.imports import import_object
from lipbounds.models.image_input import ImageInput


InputKind = Literal["text", "image", "tensor"]


@dc.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model and how it is fed.

    Args:
        name: what the user typed. It may hold any characters: escape it where that matters.
        module: in evaluation mode.
        kind: of its input: a text to be tokenized, an image, or any other tensor.
        tokenizer: of a text model, called as `tokenizer(text, return_tensors="pt")`; None for the others. Of a
            checkpoint without one it raises InvalidInput when it is called: the model still takes token ids.
        image: what the images look like; None for the others.
        classes: what the outputs of a bundled classifier stand for, in order; empty for all others.
    """

    name: str
    module: nn.Module
    kind: InputKind
    tokenizer: Callable[..., Any] | None = None
    image: ImageInput | None = None
    classes: tuple[str, ...] = ()


def load_model(name: str, *, trust_remote_code: bool = False) -> LoadedModel:
    """The model of that name, on the CPU and in evaluation mode.

    Weights are read as safetensors, or else as pickles with `weights_only=True`, which runs no code. A Python path runs
    the code it names.

    Args:
        name: `digits-vit`, `lipschitz-vit`, `certified-vit`, `certified-mnist-vit`, `minilm`, `dinov2-s`,
            `smollm2-135m` or `albert-rxn`; or a folder with a Hugging Face checkpoint, or a name on its hub; or
            `package.module:attribute`, where a module or a function without arguments that returns one lies.
        trust_remote_code: run the code that comes with a Hugging Face checkpoint.

    Raises:
        InvalidInput: there is no such model, or it is damaged.
        Unsupported: it is of an unknown kind, or needs code that comes with it.
    """
    if name in BUNDLED:
        return BUNDLED[name]()
    if python_path(name):
        return _from_python(name)
    try:
        return _from_hub(name, trust_remote_code)
    except InvalidInput as error:
        near = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.6)
        if not near:
            raise
        raise InvalidInput(f"did you mean the bundled model {near[0]!r}? {error}") from error


def python_path(name: str) -> bool:
    """Whether a name is that of a Python object: a folder that is there is none, whatever its name.

    Args:
        name: what the user typed.
    """
    return ":" in name and not Path(name).exists()


def _digits_vit() -> LoadedModel:
    from lipbounds.models.digits_vit import load_digits_vit

    return LoadedModel(name="digits-vit", module=load_digits_vit(), kind="image", image=_DIGIT, classes=_DIGITS)


def _lipschitz_vit() -> LoadedModel:
    from lipbounds.models.lipschitz_vit import load_lipschitz_vit

    return LoadedModel(name="lipschitz-vit", module=load_lipschitz_vit(), kind="image", image=_DIGIT, classes=_DIGITS)


def _certified_vit() -> LoadedModel:
    from lipbounds.models.lipschitz_vit import load_certified_vit

    return LoadedModel(name="certified-vit", module=load_certified_vit(), kind="image", image=_DIGIT, classes=_DIGITS)


def _certified_mnist_vit() -> LoadedModel:
    from lipbounds.models.certified_mnist_vit import SHAPE, load_certified_mnist_vit

    image = ImageInput(channels=1, height=SHAPE.side, width=SHAPE.side)
    module = load_certified_mnist_vit()
    return LoadedModel(name="certified-mnist-vit", module=module, kind="image", image=image, classes=_DIGITS)


def _minilm() -> LoadedModel:
    from lipbounds.models.minilm import load_minilm

    model, tokenizer = load_minilm()
    return LoadedModel(name="minilm", module=model, kind="text", tokenizer=tokenizer)


def _dinov2_s() -> LoadedModel:
    from lipbounds.models.dinov2 import IMAGE, load_dinov2

    return LoadedModel(name="dinov2-s", module=load_dinov2(), kind="image", image=IMAGE)


def _smollm2() -> LoadedModel:
    from lipbounds.models.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    return LoadedModel(name="smollm2-135m", module=model, kind="text", tokenizer=tokenizer)


def _albert_rxn() -> LoadedModel:
    from lipbounds.models.albert_rxn import load_albert_rxn

    model, tokenizer = load_albert_rxn()
    return LoadedModel(name="albert-rxn", module=model, kind="text", tokenizer=tokenizer)


_DIGITS = tuple("0123456789")
_DIGIT = ImageInput(channels=1, height=8, width=8)
BUNDLED: dict[str, Callable[[], LoadedModel]] = {
    "digits-vit": _digits_vit,
    "lipschitz-vit": _lipschitz_vit,
    "certified-vit": _certified_vit,
    "certified-mnist-vit": _certified_mnist_vit,
    "minilm": _minilm,
    "dinov2-s": _dinov2_s,
    "smollm2-135m": _smollm2,
    "albert-rxn": _albert_rxn,
}


def _from_python(path: str) -> LoadedModel:
    found = import_object(path, "a model in Python")
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:  # the function is the user's, and so is what it raises
            raise InvalidInput(
                f"{path} must be a function that returns a torch.nn.Module when called without arguments, but it "
                f"raised {type(error).__name__}: {error}."
            ) from error
    if not isinstance(found, nn.Module):
        raise InvalidInput(
            f"{path} must be a torch.nn.Module, or a function without arguments that returns one, got "
            f"{type(found).__name__}."
        )
    return LoadedModel(name=path, module=found.eval(), kind="tensor")


def _from_hub(name: str, trust_remote_code: bool) -> LoadedModel:
    from lipbounds.models.hub import load_hub_model, load_hub_tokenizer
    from lipbounds.models.image_processor import image_input

    model = load_hub_model(name, trust_remote_code=trust_remote_code)
    towers = hasattr(model, "text_model") and hasattr(model, "vision_model")
    if model.config.is_encoder_decoder or towers:
        what, part = ("a text and an image", "text_model") if towers else ("inputs for both of its halves", "encoder")
        raise Unsupported(
            f"name must be a model of one input, got {name!r} ({type(model).__name__}), which takes {what}; write a "
            f"function that returns one part, such as its `{part}`, and pass `package.module:function`."
        )
    if model.main_input_name == "input_ids":
        try:
            tokenizer = load_hub_tokenizer(name, trust_remote_code=trust_remote_code)
        except InvalidInput as error:
            tokenizer = _without_tokenizer(str(error))
        return LoadedModel(name=name, module=model, kind="text", tokenizer=tokenizer)
    if model.main_input_name == "pixel_values" and hasattr(model.config, "image_size"):
        image = image_input(name, model, trust_remote_code=trust_remote_code)
        return LoadedModel(name=name, module=model, kind="image", image=image)
    return LoadedModel(name=name, module=model, kind="tensor")


def _without_tokenizer(reason: str) -> Callable[..., Any]:
    """What stands for a tokenizer that cannot be loaded: token ids need none, so only a text is refused."""

    def refuse(*texts: Any, **options: Any) -> Any:
        raise InvalidInput(f"{reason} Or pass token ids in a tensor: `--data FILE`.")

    return refuse
