"""Robust accuracy of classifiers that are given, on labelled images, with their constants, bounds and g_1.

One answer for each attack of one batch with one norm and radius, one for each image whose constants are measured: a run
that is killed goes on from there. Each answer is about one model, so a model that was attacked before, alone or next to
others, is not attacked again.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.images import Norm, right
from bench.attacks.ways import Way, version_of
from bench.engine.answers import Shown
from bench.engine.records import RecordError, content_hash
from bench.engine.store import Answer, Store
from bench.robustness.attacked import Advance, Subject, attacked
from bench.robustness.classifier import LoadedClassifier, check_classes
from bench.robustness.folder import LabelledFolder
from bench.robustness.measures import BINS, LANCZOS, blocks, versions
from bench.workloads.hashes import tensors_hash
from lipbounds.errors import LipboundsError
from lipbounds.estimators.whole_model import whole_model_constant


VERSION = 2  # of what is computed here: raise it when numbers change
PACKAGES = ("torch", "transformers", "pyautoattack", "lipbounds")  # their modules have versions; others are read


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
    answers: Store,
    classifier: LoadedClassifier,
    given: LabelledFolder,
    profile: Profile,
    *,
    way: Way | None,
    device: torch.device,
    force: bool = False,
    advance: Advance = lambda what: None,
) -> dict[str, Any]:
    """Answer about one model what is not in the file yet; returns what its page says of it besides.

    Args:
        answers: the file.
        classifier: the model.
        given: the images.
        profile: how much is done.
        way: of AutoAttack; None leaves it out.
        device: where it is computed.
        force: make again what is in the file.
        advance: called before each piece of work with its name.

    Raises:
        InvalidInput: the labels do not fit the model.
    """
    classes = check_classes(classifier, given.images, given.labels, given.classes)
    model, images, labels = classifier.module.to(device), given.images.to(device), given.labels.to(device)
    shared = {
        "version": VERSION,
        "weights": tensors_hash(classifier.module.state_dict().items()),
        "computes": what_it_computes(classifier, way),
        "data": given.hash(),
        "device": device.type,
    }
    asking = Asking(
        ask=lambda question, work, rest: answers.ask(question, work, rest=lambda: {**shared, **rest()}, force=force),
        name=classifier.name,
        model=lambda: model,
        given=lambda: (images, labels),
        advance=advance,
    )
    numbers(asking, profile, len(given.names), way)
    return {
        "model": classifier.name,
        "classes": classes,
        "shape": list(given.images.shape[1:]),
        "attack": None if way is None else {**dc.asdict(way), "name": way.name, "version": version_of(way.package)},
    }


def shown(found: Shown) -> dict[str, Any]:
    """What the page is made of.

    Args:
        found: the answers of a run.

    Raises:
        RecordError: an older version kept the page.
    """
    about = found.page.data["about"]
    if "models" not in about:
        raise RecordError(
            f"{found.store.path} must hold pages of this version, got one of an older version, which knew one model "
            "per page; run its command again with another --results folder."
        )
    profile = Profile(**about["profile"])
    models = []
    for model in about["models"]:
        way = None if model["attack"] is None else _way(model["attack"])
        asking = Asking(ask=lambda question, work, rest: found.ask(question), name=model["model"])
        models.append({**model, **numbers(asking, profile, len(about["names"]), way)})
    return {**about, "models": models}


def _way(said: dict[str, Any]) -> Way:
    return Way(package=said["package"], attacks=tuple(said["attacks"]), targets=said["targets"])


def what_it_computes(classifier: LoadedClassifier, way: Way | None) -> dict[str, Any]:
    """All that the answers depend on beside weights and images: structure, configuration, preprocessing, software.

    Args:
        classifier: the model.
        way: of AutoAttack.
    """
    config: Any = getattr(getattr(classifier.module, "model", None), "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings.pop("_name_or_path", None)
    own = {
        Path(file)
        for part in classifier.module.modules()
        if type(part).__module__.partition(".")[0] not in PACKAGES
        and (file := getattr(sys.modules.get(type(part).__module__), "__file__", None))
    }
    attack = {} if way is None else {"attack": {**dc.asdict(way), "version": version_of(way.package)}}
    return {
        "structure": content_hash(repr(classifier.module)),
        "config": content_hash(json.loads(json.dumps(settings, default=str, sort_keys=True))),
        "preprocessing": content_hash(repr(classifier.image)),
        "code": content_hash(sorted(content_hash(path.read_text(encoding="utf-8")) for path in own)),
        "software": {name: version(name).partition("+")[0] for name in ("torch", "transformers")} | attack,
    }


@dc.dataclass(frozen=True, kw_only=True)
class Asking:
    """How the numbers of a classifier are asked for: of a run, which makes what is missing, or of the records.

    Args:
        ask: gives the answer to a question, from the question, the work that makes it and what else it depends on.
        name: of the model.
        model: gives it.
        given: gives images and labels.
        advance: called before each piece of work with its name.
    """

    ask: Callable[..., Answer]
    name: str
    model: Callable[[], nn.Module] = nn.Identity
    given: Callable[[], tuple[Tensor, Tensor]] = lambda: (torch.empty(0), torch.empty(0))
    advance: Advance = lambda what: None

    def answer(
        self, question: dict[str, Any], work: Callable[[], Answer], rest: Callable[[], dict[str, Any]] = dict
    ) -> Answer:
        """The answer to a question about this model, with the seconds it took.

        Args:
            question: what tells the answer from the others of its page.
            work: makes the answer.
            rest: what else the answer depends on.
        """

        def timed() -> Answer:
            start = time.perf_counter()
            return {**work(), "seconds": time.perf_counter() - start}

        return self.ask({"task": "classifier", "model": self.name, **question}, timed, rest)


def numbers(asking: Asking, profile: Profile, count: int, way: Way | None) -> dict[str, Any]:
    """Which images are right as they are ("clean") and after the attacks ("robust"), and constants ("measured").

    Args:
        asking: of a run or of the records.
        profile: how much is done.
        count: of images.
        way: of AutoAttack.
    """
    asking.advance(f"{asking.name}: accuracy")
    clean = asking.answer({"what": "right"}, lambda: {"right": right(asking.model(), *asking.given()).tolist()})
    measured = [_measured(asking, place) for place in range(min(profile.blocks, count))]
    subject = Subject(
        name=asking.name,
        model=asking.model,
        ask=asking.answer,
        given=asking.given,
        indices=list(range(count)),
        way=way,
    )
    robust = {
        norm: [
            {"eps": eps, **flags}
            for eps, flags in attacked(
                subject, norm, tuple(radii), profile.batch, clean["right"], asking.advance
            ).items()
        ]
        for norm, radii in profile.eps.items()
    }
    return {"clean": clean["right"], "robust": robust, "measured": measured}


def _measured(asking: Asking, place: int) -> dict[str, Any]:
    """Constants and bounds at one image."""
    asking.advance(f"{asking.name}: constants at image {place}")
    return asking.answer(
        {"what": "constants", "image": place},
        lambda: _constants(asking.model(), asking.given()[0][place : place + 1].double()),
        lambda: {"bounds": versions(), "bins": BINS, **LANCZOS},
    )


def _constants(model: nn.Module, image: Tensor) -> Answer:
    """Those of the whole model and of its attention; what cannot be had is refused with its reason."""
    wide = copy.deepcopy(model).double()
    answer: Answer = {"refused": []}
    try:
        with torch.no_grad():
            wide(image)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a model that names a dtype inside
        reason = f"constants, since the model does not run in float64: {str(error).splitlines()[0]}"
        return {"constant": None, "reached": None, "layers": [], "refused": [reason]}
    try:
        whole = whole_model_constant(wide, image, **LANCZOS)
        answer |= {"constant": float(whole.value), "reached": float(whole.terms["lower"])}
    except LipboundsError as error:
        answer |= {"constant": None, "reached": None, "refused": [f"the constant of the whole model: {error}"]}
    try:
        return answer | blocks(wide, image)
    except LipboundsError as error:
        return answer | {"layers": [], "refused": [*answer["refused"], f"attention: {error}"]}
