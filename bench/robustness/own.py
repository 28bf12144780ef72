"""Penalties and losses of a user, by the paths of their functions, as settings of the study.

The contract, which `checked` tries on a few images before anything is trained:

- a penalty is called as `penalty(model, images, generator)` and returns `(logits, penalty)`: the logits of these
  images, of which the cross-entropy is taken, and a tensor with one number, which is added to it times the weight;
- a loss is called as `loss(model, images, labels, generator)` and returns a tensor with one number, all that is
  minimised.

Images are of shape (batch, 1, 8, 8), float32, in [0, 1] up to a rounding; what is random comes from the generator.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.engine.records import content_hash
from bench.robustness.settings import Setting
from lipbounds.errors import InvalidInput
from lipbounds.imports import import_object
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import load_digits_vit


WEIGHTS = (0.01, 0.1, 1.0)
TRIED = 4  # images


def penalty_setting(path: str, weights: Sequence[float] = ()) -> Setting:
    """A penalty of a user as a setting, whose weight is chosen as that of all others.

    Args:
        path: `package.module:function`.
        weights: to choose from; by default 0.01, 0.1 and 1.

    Raises:
        InvalidInput: there is no such function, or it breaks the contract.
    """
    grid = tuple(sorted(set(weights))) or WEIGHTS
    return checked(Setting(name=_name(path), title=path, penalty=path, grid=grid, code=_code(path)))


def loss_setting(path: str) -> Setting:
    """A loss of a user as a setting, without a weight.

    Args:
        path: `package.module:function`.

    Raises:
        InvalidInput: there is no such function, or it breaks the contract.
    """
    return checked(Setting(name=_name(path), title=path, loss=path, code=_code(path)))


def function_of(path: str) -> Callable[..., Any]:
    """The function of a path.

    Args:
        path: `package.module:function`.

    Raises:
        InvalidInput: there is none.
    """
    found = import_object(path, "a penalty or a loss")
    if not callable(found):
        raise InvalidInput(f"{path} must be a function, got {type(found).__name__}.")
    return found


def checked(setting: Setting) -> Setting:
    """The setting, once its function has been called on a few images and has kept the contract.

    Args:
        setting: with the penalty or the loss of a user.

    Raises:
        InvalidInput: it raised, returned something else, or what it returned is not finite or has no gradient.
    """
    path = setting.penalty or setting.loss
    function = function_of(path)
    model, part = copy.deepcopy(load_digits_vit()).train(), load_digits_split().train
    images, labels = part.images[:TRIED], part.labels[:TRIED]
    given = (images,) if setting.penalty else (images, labels)
    called = f"{path}(model, {'images' if setting.penalty else 'images, labels'}, generator)"
    try:
        found = function(model, *given, torch.Generator().manual_seed(0))
    except Exception as error:  # the function is the user's, and so is what it raises
        raise InvalidInput(
            f"{called} must return {_returns(setting)}, but it raised {type(error).__name__}: {error}."
        ) from error
    value = found
    if setting.penalty:
        logits, value = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (TRIED, 10):
            raise InvalidInput(f"{called} must return {_returns(setting)}, got {_kind(found)}.")
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise InvalidInput(f"{called} must return {_returns(setting)}, got {_kind(found)}.")
    if not value.requires_grad:
        raise InvalidInput(f"{called} must return a number that depends on the weights, got one without a gradient.")
    gradients = torch.autograd.grad(value, [*model.parameters()], allow_unused=True)
    finite = all(bool(each.isfinite().all()) for each in (value, *gradients) if each is not None)
    if all(each is None for each in gradients) or not finite:
        raise InvalidInput(
            f"{called} must return a finite number with finite gradients by the weights, got "
            f"{float(value.detach()):g}{'' if finite else ', or a gradient that is not finite'}."
        )
    return setting


def _returns(setting: Setting) -> str:
    one = "a tensor with one number"
    return f"the pair (logits of shape ({TRIED}, 10), {one})" if setting.penalty else one


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__


def _name(path: str) -> str:
    return re.sub(r"\W+", "-", path).strip("-").lower()


def _code(path: str) -> str:
    """Hash of the file in which the function lies: after an edit it is another setting, and trained again."""
    function = inspect.unwrap(function_of(path))
    file = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    return content_hash([path, Path(file).read_text(encoding="utf-8") if file else ""])
