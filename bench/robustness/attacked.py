"""Attacks of a classifier, one answer each: FGSM and PGD-40, then AutoAttack on the images that stood up to them."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bench.attacks.images import Ball, Norm, autoattack, fgsm, pgd, right, within
from bench.attacks.ways import STANDARD, Way
from bench.engine.store import Answer
from bench.robustness.statistics import worst_case


PGD_STEPS = 40
ATTACK_SEED = 0
Advance = Callable[[str], None]
# For each radius of a norm, which images are right after FGSM, after PGD, and after every attack up to that radius.
Standing = dict[float, dict[str, list[bool]]]


@dc.dataclass(frozen=True, kw_only=True)
class Subject:
    """A classifier under attack.

    Args:
        name: for the progress bar.
        model: gives the classifier when something has to be computed with it.
        ask: gives the answer to a question about it, made by the function if it is new.
        given: gives the images, in [0, 1], and their right classes when something has to be computed with them.
        indices: what the images are called in questions.
        way: of AutoAttack; None leaves it out.
    """

    name: str
    model: Callable[[], nn.Module]
    ask: Callable[[dict[str, Any], Callable[[], Answer]], Answer]
    given: Callable[[], tuple[Float[Tensor, "n channels height width"], Int[Tensor, " n"]]]
    indices: list[int]
    way: Way | None = STANDARD

    def some(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """Images and labels at these places."""
        images, labels = self.given()
        return images[places], labels[places]


def attacked(
    subject: Subject, norm: Norm, radii: tuple[float, ...], batch: int, clean: list[bool], advance: Advance
) -> Standing:
    """Which images are right after each attack, and after every one of that radius or a smaller one ("worst").

    Args:
        subject: the classifier and its images.
        norm: of the balls.
        radii: of the balls, rising.
        batch: images in one attack, and so in one answer.
        clean: which images are classified right as they are.
        advance: called before each piece of work with its name.
    """
    runs: dict[float, list[list[bool]]] = {}
    result: Standing = {}
    for eps in radii:
        found: dict[str, list[bool]] = {"fgsm": [], "pgd": [], "autoattack": []}
        for start in range(0, len(clean), batch):
            advance(f"{subject.name}: {norm} {eps:g}, from image {start}")
            stop = min(start + batch, len(clean))
            before = worst_case(clean[start:stop], {e: [run[start:stop] for run in runs[e]] for e in runs})
            standing = before[max(before)] if before else clean[start:stop]
            for name, flags in _batch(subject, norm, eps, range(start, stop), standing).items():
                found[name] += flags
        runs[eps] = list(found.values())
        result[eps] = {"fgsm": found["fgsm"], "pgd": found["pgd"], "worst": worst_case(clean, runs)[eps]}
    return result


def shares(standing: Standing) -> list[dict[str, float]]:
    """Accuracy under each attack and under the worst of all, for each radius.

    Args:
        standing: which images are right.
    """
    return [
        {"eps": eps, **{attack: share(flags) for attack, flags in found.items()}} for eps, found in standing.items()
    ]


def share(flags: list[bool]) -> float:
    """Of those that are true."""
    return sum(flags) / len(flags)


def _batch(subject: Subject, norm: Norm, eps: float, places: range, standing: list[bool]) -> dict[str, list[bool]]:
    """For each attack, the images of a batch that are right after it; AutoAttack sees those that still stand."""
    asked, ball = {"norm": norm, "eps": eps, "seed": ATTACK_SEED}, Ball(norm, eps)
    names = [subject.indices[place] for place in places]
    question = {"what": "gradient attacks", "images": names, "steps": PGD_STEPS}
    first = subject.ask({**question, "attack": asked}, lambda: _gradient_attacks(subject, list(places), ball))
    both = zip(standing, first["fgsm"], first["pgd"], strict=True)
    still = [place for place, flags in zip(places, both, strict=True) if all(flags)]
    flags = {place: subject.way is None and place in still for place in places}
    if still and subject.way is not None:
        question = {"what": "autoattack", "images": [subject.indices[place] for place in still]}
        last = subject.ask({**question, "attack": asked}, lambda: _autoattack(subject, still, ball))
        flags.update(zip(still, last["right"], strict=True))
    return {"fgsm": first["fgsm"], "pgd": first["pgd"], "autoattack": [flags[place] for place in places]}


def _gradient_attacks(subject: Subject, places: list[int], ball: Ball) -> Answer:
    images, labels = subject.some(places)
    model = subject.model()
    generator = torch.Generator().manual_seed(ATTACK_SEED)
    one = fgsm(model, images, labels, ball)
    many = pgd(model, images, labels, ball, steps=PGD_STEPS, generator=generator)
    return {"fgsm": right(model, one, labels).tolist(), "pgd": right(model, many, labels).tolist()}


def _autoattack(subject: Subject, places: list[int], ball: Ball) -> Answer:
    images, labels = subject.some(places)
    model = subject.model()
    assert subject.way is not None
    found = autoattack(model, images, labels, ball, seed=ATTACK_SEED, way=subject.way)
    moved = within(images, found.double() - images.double(), ball)
    return {"right": right(model, moved, labels).tolist()}
