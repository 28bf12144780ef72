"""Robust accuracy of a classifier that is given, on labelled images from disk, with its constants, bounds and g_1.

One answer for each attack of one batch with one norm and radius, one for each image whose constants are measured: a run
that is killed goes on from there.
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
from bench.engine.answers import Shown
from bench.engine.records import content_hash
from bench.engine.store import Answer, Store
from bench.robustness.attacked import Advance, Subject, attacked, share
from bench.robustness.classifier import LoadedClassifier, check_classes
from bench.robustness.folder import LabelledFolder
from bench.robustness.measures import BINS, LANCZOS, blocks, versions
from bench.workloads.hashes import tensors_hash
from lipbounds.estimators.whole_model import whole_model_constant


VERSION = 1  # of what is computed here: raise it when numbers change
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
    about = {
        **{"model": classifier.name, "classes": classes, "images": len(given.names), "available": given.available},
        **{"shape": list(given.images.shape[1:]), "device": device.type, "names": given.names},
        **({"source": given.source} if given.source else {}),
    }
    shared = {
        "version": VERSION,
        "weights": tensors_hash(classifier.module.state_dict().items()),
        "computes": what_it_computes(classifier),
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
    return {**about, **_numbers(asking, profile, len(given.names))}


def shown(found: Shown, profile: Profile) -> dict[str, Any]:
    """What the page is made of.

    Args:
        found: the answers of a run.
        profile: of the run.
    """
    about = found.page.data["about"]
    asking = Asking(ask=lambda question, work, rest: found.ask(question), name=about["model"])
    return {**about, **_numbers(asking, profile, about["images"])}


def what_it_computes(classifier: LoadedClassifier) -> dict[str, Any]:
    """All that the logits depend on beside weights and images: structure, configuration, preprocessing, software.

    Args:
        classifier: the model.
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
    return {
        "structure": content_hash(repr(classifier.module)),
        "config": content_hash(json.loads(json.dumps(settings, default=str, sort_keys=True))),
        "preprocessing": content_hash(repr(classifier.image)),
        "code": content_hash(sorted(content_hash(path.read_text(encoding="utf-8")) for path in own)),
        "software": {name: version(name).partition("+")[0] for name in PACKAGES if name != "lipbounds"},
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


def _numbers(asking: Asking, profile: Profile, count: int) -> dict[str, Any]:
    asking.advance("accuracy")
    clean = asking.answer({"what": "right"}, lambda: {"right": right(asking.model(), *asking.given()).tolist()})
    measured = [_measured(asking, place) for place in range(min(profile.blocks, count))]
    subject = Subject(
        name=asking.name, model=asking.model, ask=asking.answer, given=asking.given, indices=list(range(count))
    )
    robust = {
        norm: attacked(subject, norm, radii, profile.batch, clean["right"], asking.advance)
        for norm, radii in profile.eps.items()
    }
    return {"clean": share(clean["right"]), "robust": robust, "measured": measured}


def _measured(asking: Asking, place: int) -> dict[str, Any]:
    """Constants and bounds at one image."""
    asking.advance(f"constants at image {place}")
    return asking.answer(
        {"what": "constants", "image": place},
        lambda: _constants(asking.model(), asking.given()[0][place : place + 1].double()),
        lambda: {"bounds": versions(), "bins": BINS, **LANCZOS},
    )


def _constants(model: nn.Module, image: Tensor) -> Answer:
    wide = copy.deepcopy(model).double()
    whole = whole_model_constant(wide, image, **LANCZOS)
    return {"constant": float(whole.value), "reached": float(whole.terms["lower"]), **blocks(wide, image)}
