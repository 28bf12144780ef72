"""Trained models as answers: the hash of the weights in the records, the weights in a folder that git ignores.

Without the folder, as in a fresh clone, a model is trained again when something has to be computed with it, and must
come out the same to the bit; where it does not (another machine, other versions), numbers of two sets of weights would
mix in one table, so that is an error.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bench.engine.answers import Answered
from bench.engine.records import RecordError, content_hash
from bench.engine.store import Answer, Store
from bench.robustness.settings import VERSION, Recipe
from bench.workloads.hashes import tensors_hash
from lipbounds.models.digits_data import DigitsSplit, LabelledImages
from lipbounds.models.digits_vit import DigitsViT
from lipbounds.models.train_digits import train
from lipbounds.models.training import evaluate


@dc.dataclass
class Workshop:
    """Where models come from and answers go.

    Args:
        answers: the file of answers, or what a page shows of it.
        folder: of the weights.
        split: the images; None where nothing is made.
        force: make again what is in the file.
        device: where models are measured and attacked; they are trained on the CPU.
        make: draws the model that is trained.
    """

    answers: Store | Answered
    folder: Path
    split: DigitsSplit | None = None
    force: bool = False
    device: str = "cpu"
    make: Callable[[], nn.Module] = DigitsViT

    @property
    def store(self) -> Store:
        """The file, to write to."""
        assert isinstance(self.answers, Store)
        return self.answers

    @property
    def images(self) -> DigitsSplit:
        """The images, on the device."""
        assert self.split is not None
        return on_device(self.split, self.device)

    def ask(self, question: dict[str, Any], work: Any, rest: Callable[[], Answer] = dict) -> Answer:
        """An answer of this task.

        Args:
            question: what tells the answer from the others of its page.
            work: makes the answer.
            rest: what else the answer depends on.
        """

        def timed() -> Answer:
            start = time.perf_counter()
            answer = work()
            return {**answer, "seconds": time.perf_counter() - start}

        asked = {"task": "robustness", **question}
        shared = {"version": VERSION, "device": self.device}
        return self.answers.ask(asked, timed, rest=lambda: {**shared, **rest()}, force=self.force)

    def trained(self, recipe: Recipe) -> Trained:
        """The model of a recipe: trained now, or known by the hash of its weights.

        Args:
            recipe: how it is trained.
        """
        if recipe.start is not None:
            self.trained(recipe.start)
        answer = self.ask({"what": "train", **recipe.to_dict()}, lambda: self._train(recipe))
        return Trained(recipe, answer["weights"], answer["validation_accuracy"], self)

    def path(self, recipe: Recipe) -> Path:
        """Where the weights of a recipe are kept."""
        return self.folder / f"{recipe.setting}-{recipe.seed}-{content_hash(recipe.to_dict())}.safetensors"

    def load(self, recipe: Recipe, weights: str) -> nn.Module:
        """The model of a recipe, from its file or trained again.

        Args:
            recipe: how it was trained.
            weights: the hash that the records hold.

        Raises:
            RecordError: the weights are others.
        """
        path = self.path(recipe)
        found = self._loaded(path) if path.exists() else None
        if found is None or weights_hash(found) != weights:
            again = self._train(recipe)["weights"]
            if again != weights:
                raise RecordError(
                    f"the weights of {recipe.setting}, seed {recipe.seed}, must have the hash {weights} of the records "
                    f"in {self.store.path}, but training gives {again} here (another machine, other versions or "
                    "threads); pass another --results, or --force to make every answer anew."
                )
            found = self._loaded(path)
            assert found is not None
        return found

    def _loaded(self, path: Path) -> nn.Module | None:
        """None for a file that holds no such model."""
        with torch.device("meta"):  # no random start is drawn
            model = self.make()
        try:
            model.load_state_dict(load_file(path), assign=True)
        except (RuntimeError, OSError, SafetensorError):
            return None
        return model.eval()

    def _train(self, recipe: Recipe) -> Answer:
        from bench.robustness.penalties import loss_of  # its imports take seconds

        history: list[tuple[float, float]] = []
        images = self.split  # on the CPU: images this small leave a GPU idle
        assert images is not None
        steps = {} if recipe.pace is None else {"batch": recipe.pace.batch, "peak_rate": recipe.pace.rate, "last": True}
        model = train(
            images.train,
            images.validation,
            seed=recipe.seed,
            epochs=recipe.epochs,
            console=Console(quiet=True),
            loss=loss_of(recipe),
            weight_decay=recipe.weight_decay,
            after_epoch=lambda accuracy, loss: history.append((round(accuracy, 4), round(loss, 5))),
            make=self.make if recipe.start is None else functools.partial(self._copied, recipe.start),
            **steps,
        )
        path = self.path(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(model.state_dict(), temporary)
        temporary.replace(path)
        accuracy, _ = evaluate(model, images.validation)
        return {"weights": weights_hash(model), "history": history, "validation_accuracy": accuracy}

    def _copied(self, recipe: Recipe) -> nn.Module:
        """The model of a recipe, to be trained on."""
        return copy.deepcopy(self.trained(recipe).model()).to("cpu").requires_grad_()


@dc.dataclass
class Trained:
    """A model that is loaded when something has to be computed with it, and not before.

    Args:
        recipe: how it was trained.
        weights: hash of its weights.
        validation_accuracy: a share.
        workshop: where it comes from.
    """

    recipe: Recipe
    weights: str
    validation_accuracy: float
    workshop: Workshop = dc.field(repr=False)
    _model: nn.Module | None = dc.field(default=None, repr=False)

    def model(self) -> nn.Module:
        """The model, in evaluation mode; its parameters need no gradient."""
        if self._model is None:
            self._model = self.workshop.load(self.recipe, self.weights).to(self.workshop.device).requires_grad_(False)
        return self._model

    def ask(self, question: dict[str, Any], work: Any, rest: Callable[[], Answer] = dict) -> Answer:
        """An answer about this model.

        Args:
            question: what tells the answer from the others about this model.
            work: makes the answer.
            rest: what else the answer depends on, beside the weights.
        """
        shared = {"setting": self.recipe.setting, "seed": self.recipe.seed, "weights": self.weights}
        return self.workshop.ask({**question, **shared}, work, rest)


def on_device(split: DigitsSplit, device: str) -> DigitsSplit:
    """The images on a device.

    Args:
        split: on the CPU.
        device: its name.
    """
    if device == "cpu":
        return split
    parts = {
        field.name: LabelledImages(part.images.to(device), part.labels.to(device), part.indices)
        for field in dc.fields(split)
        for part in [getattr(split, field.name)]
    }
    return DigitsSplit(**parts)


def weights_hash(model: nn.Module) -> str:
    """Content hash of the weights."""
    return tensors_hash(model.state_dict().items())
