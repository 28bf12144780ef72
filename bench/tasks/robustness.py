"""Robust accuracy of digits ViTs trained with and without penalties, and their local Lipschitz constants.

Each model is one answer, each attack of one model with one norm and radius on one batch of images is another: a run
that is killed goes on from there. Images are the first ones of the test part, pixels in [0, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.attacks import Norm, autoattack, fgsm, pgd, right, within
from bench.certified_data import Answer
from bench.robustness.choice import choose, tried
from bench.robustness.measures import BINS, LANCZOS, blocks, network_constants, versions
from bench.robustness.settings import SETTINGS, Profile, recipe
from bench.robustness.statistics import worst_case
from bench.robustness.training import Trained, Workshop
from lipbounds.models.digits_data import LabelledImages


PGD_STEPS = 40
ATTACK_SEED = 0
Advance = Callable[[str], None]


def pieces(profile: Profile) -> int:
    """How often `run` calls `advance`."""
    chosen = [SETTINGS[name] for name in profile.settings]
    weights = sum(len(tried(setting.grid, profile.largest_grid)) + 1 for setting in chosen if setting.grid)
    attacks = sum(len(radii) for radii in profile.eps.values()) * -(-profile.images // profile.batch)
    return weights + len(chosen) * len(profile.seeds) * (2 + attacks)


def run(workshop: Workshop, profile: Profile, *, advance: Advance = lambda what: None) -> dict[str, Any]:
    """Everything of a profile that is not in the file yet; returns what the tables are made of.

    Args:
        workshop: where models come from and answers go.
        profile: how much is done.
        advance: called before each piece of work with its name.
    """
    chosen = {name: choose(workshop, SETTINGS[name], profile, advance) for name in profile.settings}
    settings = {
        name: {"title": SETTINGS[name].title, "choice": choice, "models": []} for name, choice in chosen.items()
    }
    # Seed by seed, so that a run that is stopped early leaves whole seeds.
    for seed in profile.seeds:
        for name, choice in chosen.items():
            advance(f"{name}, seed {seed}: training")
            way = recipe(SETTINGS[name], choice["weight"], epochs=profile.epochs, seed=seed)
            model = workshop.trained(way)
            settings[name]["models"].append({"seed": seed, **_measured(model, profile, advance)})
    done = {"images": profile.images, "blocks": profile.blocks, "epochs": profile.epochs, "seeds": list(profile.seeds)}
    return {**done, "settings": settings, "environments": sorted(workshop.used)}


def _measured(model: Trained, profile: Profile, advance: Advance) -> dict[str, Any]:
    """Constants, bounds and robust accuracies of one model."""
    place = f"{model.recipe.setting}, seed {model.recipe.seed}"
    advance(f"{place}: local constants")
    test = model.workshop.split.test
    images = {"images": test.indices[: profile.images].tolist()}
    network = model.ask({"what": "network", **images}, lambda: _network(model, profile.images))
    question = {"what": "blocks", "images": test.indices[: profile.blocks].tolist(), "bins": BINS}
    found = model.ask({**question, "bounds": versions(), **LANCZOS}, lambda: _blocks(model, profile.blocks))
    robust = {norm: _attacked(model, norm, profile, network["right"], advance) for norm in profile.eps}
    return {
        "weights": model.weights,
        "clean": _share(network["right"]),
        "constants": network["constants"],
        "layers": found["layers"],
        "robust": robust,
    }


def _network(model: Trained, count: int) -> Answer:
    test = model.workshop.split.test
    constants, _ = network_constants(_wide(model), test.images[:count].double())
    # Attacks judge in float32, and so does this.
    flags = right(model.model(), test.images[:count], test.labels[:count])
    return {"constants": constants.tolist(), "right": flags.tolist()}


def _blocks(model: Trained, count: int) -> Answer:
    return blocks(_wide(model), model.workshop.split.test.images[:count].double())


def _wide(model: Trained) -> Any:
    """A copy in float64."""
    return copy.deepcopy(model.model()).double()


def _attacked(
    model: Trained, norm: Norm, profile: Profile, clean: list[bool], advance: Advance
) -> list[dict[str, Any]]:
    """Accuracy under each attack and under the worst of all, for each radius of a norm."""
    runs: dict[float, list[list[bool]]] = {}
    rows = []
    for eps in profile.eps[norm]:
        found: dict[str, list[bool]] = {"fgsm": [], "pgd": [], "autoattack": []}
        for start in range(0, profile.images, profile.batch):
            advance(f"{model.recipe.setting}, seed {model.recipe.seed}: {norm} {eps:g}, from image {start}")
            stop = min(start + profile.batch, profile.images)
            before = worst_case(clean[start:stop], {e: [run[start:stop] for run in runs[e]] for e in runs})
            standing = before[max(before)] if before else clean[start:stop]
            for name, flags in _batch(model, norm, eps, range(start, stop), standing).items():
                found[name] += flags
        runs[eps] = list(found.values())
        standing = worst_case(clean, runs)[eps]
        rows.append({"eps": eps, **{name: _share(found[name]) for name in ("fgsm", "pgd")}, "worst": _share(standing)})
    return rows


def _batch(model: Trained, norm: Norm, eps: float, places: range, standing: list[bool]) -> dict[str, list[bool]]:
    """For each attack, the images of a batch that are right after it; AutoAttack sees those that still stand."""
    test = model.workshop.split.test
    asked = {"norm": norm, "eps": eps, "seed": ATTACK_SEED}
    question = {"what": "gradient attacks", "images": test.indices[list(places)].tolist(), "steps": PGD_STEPS}
    given = _chosen(test, list(places))
    first = model.ask({**question, "attack": asked}, lambda: _gradient_attacks(model, given, norm, eps))
    both = zip(standing, first["fgsm"], first["pgd"], strict=True)
    still = [place for place, flags in zip(places, both, strict=True) if all(flags)]
    flags = dict.fromkeys(places, False)
    if still:
        question = {"what": "autoattack", "images": test.indices[still].tolist()}
        chosen = _chosen(test, still)
        last = model.ask({**question, "attack": asked}, lambda: _autoattack(model, chosen, norm, eps))
        flags.update(zip(still, last["right"], strict=True))
    return {"fgsm": first["fgsm"], "pgd": first["pgd"], "autoattack": [flags[place] for place in places]}


def _gradient_attacks(model: Trained, given: tuple[Tensor, Tensor], norm: Norm, eps: float) -> Answer:
    images, labels = given
    generator = torch.Generator().manual_seed(ATTACK_SEED)
    one = fgsm(model.model(), images, labels, norm, eps)
    many = pgd(model.model(), images, labels, norm, eps, steps=PGD_STEPS, generator=generator)
    return {
        "fgsm": right(model.model(), one, labels).tolist(),
        "pgd": right(model.model(), many, labels).tolist(),
    }


def _autoattack(model: Trained, given: tuple[Tensor, Tensor], norm: Norm, eps: float) -> Answer:
    images, labels = given
    found = autoattack(model.model(), images, labels, norm, eps, seed=ATTACK_SEED)
    moved = within(images, found.double() - images.double(), norm, eps)
    return {"right": right(model.model(), moved, labels).tolist()}


def _chosen(part: LabelledImages, places: list[int]) -> tuple[Tensor, Tensor]:
    return part.images[places], part.labels[places]


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)
