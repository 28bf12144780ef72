"""Robust accuracy of a classifier that is given, on labelled images from disk, with its constants, bounds and g_1.

One answer for each attack of one batch with one norm and radius, one for each image whose constants are measured: a run
that is killed goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.images import Norm, right
from bench.engine.answers import Answer, Answers
from bench.engine.machine import describe, environment
from bench.robustness.attacked import Advance, Subject, attacked, share
from bench.robustness.classifier import LoadedClassifier, check_classes
from bench.robustness.folder import LabelledFolder
from bench.robustness.measures import BINS, LANCZOS, blocks, versions
from bench.workloads.models import tensors_hash
from lipbounds.estimators.whole_model import whole_model_constant


VERSION = 1  # of what is computed here: raise it when numbers change


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is done.

    Args:
        images: that are attacked.
        batch: images in one attack, and so in one answer.
        blocks: images at which constants are measured, the first ones.
        eps: radii in each norm, rising.
    """

    images: int
    batch: int
    blocks: int
    eps: dict[Norm, tuple[float, ...]]


PROFILES = {
    "quick": Profile(images=4, batch=4, blocks=1, eps={"l_inf": (4 / 255,)}),
    "standard": Profile(
        images=200,
        batch=50,
        blocks=4,
        eps={"l_inf": (1 / 255, 2 / 255, 4 / 255, 8 / 255), "l2": (0.125, 0.25, 0.5, 1.0)},
    ),
}


def pieces(profile: Profile, count: int) -> int:
    """How often `run` calls `advance`.

    Args:
        profile: how much is done.
        count: of images there are.
    """
    attacks = sum(len(radii) for radii in profile.eps.values()) * -(-count // profile.batch)
    return 1 + min(profile.blocks, count) + attacks


def run(
    answers: Answers,
    classifier: LoadedClassifier,
    given: LabelledFolder,
    profile: Profile,
    *,
    device: torch.device,
    force: bool = False,
    advance: Advance = lambda what: None,
) -> dict[str, Any]:
    """Everything that is not in the file yet; returns what the page is made of.

    Args:
        answers: the file.
        classifier: the model.
        given: the images.
        profile: how much is done.
        device: where it is computed.
        force: make again what is in the file.
        advance: called before each piece of work with its name.

    Raises:
        InvalidInput: the labels do not fit the model.
    """
    classes = check_classes(classifier, given.images, given.labels, given.classes)
    model, images, labels = classifier.module.to(device), given.images.to(device), given.labels.to(device)
    shared = {
        "task": "classifier",
        "version": VERSION,
        "model": classifier.name,
        "weights": tensors_hash(classifier.module.state_dict().items()),
        "data": given.hash(),
        "device": device.type,
    }
    used: set[str] = set()
    here = describe(environment())

    def ask(question: dict[str, Any], work: Callable[[], Answer]) -> Answer:
        def timed() -> Answer:
            start = time.perf_counter()
            answer = work()
            return {**answer, "seconds": time.perf_counter() - start, "environment": here}

        answer = answers.ask({**shared, **question}, timed, force=force)
        used.add(answer["environment"])
        return answer

    advance("accuracy")
    clean = ask({"what": "right"}, lambda: {"right": right(model, images, labels).tolist()})["right"]
    measured = [_measured(ask, model, images, place, advance) for place in range(min(profile.blocks, len(given.names)))]
    subject = Subject(
        name=classifier.name,
        model=lambda: model,
        ask=ask,
        images=images,
        labels=labels,
        indices=list(range(len(given.names))),
    )
    robust = {
        norm: attacked(subject, norm, radii, profile.batch, clean, advance) for norm, radii in profile.eps.items()
    }
    return {
        "model": classifier.name,
        "classes": classes,
        "images": len(given.names),
        "available": given.available,
        "shape": list(given.images.shape[1:]),
        "device": device.type,
        "names": given.names,
        "clean": share(clean),
        "robust": robust,
        "measured": measured,
        "environments": sorted(used),
    }


def _measured(
    ask: Callable[..., Answer], model: nn.Module, images: Tensor, place: int, advance: Advance
) -> dict[str, Any]:
    """Constants and bounds at one image."""
    advance(f"constants at image {place}")
    image = images[place : place + 1].double()
    question = {"what": "constants", "image": place, "bounds": versions(), "bins": BINS, **LANCZOS}
    return ask(question, lambda: _constants(model, image))


def _constants(model: nn.Module, image: Tensor) -> Answer:
    wide = copy.deepcopy(model).double()
    whole = whole_model_constant(wide, image, **LANCZOS)
    return {"constant": float(whole.value), "reached": float(whole.terms["lower"]), **blocks(wide, image)}
