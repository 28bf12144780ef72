"""Robust accuracy of digits ViTs trained with and without penalties, and their local Lipschitz constants.

Each model is one answer, each attack of one model with one norm and radius on one batch of images is another: a run
that is killed goes on from there. Images are the first ones of the test part, pixels in [0, 1].
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from bench.attacks.images import Ball, pgd, right
from bench.attacks.ways import STANDARD, Way
from bench.engine.store import Answer
from bench.robustness.attacked import ATTACK_SEED, Advance, Subject, attacked, share, shares
from bench.robustness.choice import choose, tried
from bench.robustness.measures import BINS, LANCZOS, blocks, network_constants, versions
from bench.robustness.on_cluster import answered_on
from bench.robustness.processes import answered
from bench.robustness.settings import Profile
from bench.robustness.training import Trained, Workshop
from lipbounds.cluster import Cluster


def pieces(profile: Profile) -> int:
    """How often `run` calls `advance`."""
    chosen = profile.chosen
    weights = sum(len(tried(setting.grid, profile.largest_grid)) + 1 for setting in chosen if setting.grid)
    models = ((setting.name, seed) for setting in chosen for seed in profile.seeds)
    return weights + sum(_pieces_of_a_model(profile, *model) for model in models)


def run(
    workshop: Workshop,
    profile: Profile,
    *,
    jobs: int = 1,
    cluster: Cluster | None = None,
    advance: Advance = lambda what: None,
) -> dict[str, Any]:
    """Everything of a profile that is not in the file yet; returns what the tables are made of.

    Args:
        workshop: where models come from and answers go.
        profile: how much is done.
        jobs: models at a time, each in a process of its own; 1 for all in this one. Weights are chosen in this one.
        cluster: where models are trained and attacked instead.
        advance: called with the name of each piece of work: before it, or when all those of a model are done elsewhere.
    """
    known = {setting.name: setting for setting in profile.chosen}
    chosen = {name: choose(workshop, setting, profile, advance) for name, setting in known.items()}
    settings = {name: {"title": known[name].title, "choice": choice, "models": []} for name, choice in chosen.items()}
    # Seed by seed, so that a run that is stopped early leaves whole seeds.
    ways = [
        profile.recipe(known[name], choice["weight"], seed) for seed in profile.seeds for name, choice in chosen.items()
    ]
    if cluster is not None or jobs > 1:
        for way in ways:
            if way.start is not None:
                workshop.trained(way.start)
        measure = partial(_everything, profile=profile, advance=_quietly)
        elsewhere = (
            answered_on(cluster, workshop, ways, measure) if cluster else answered(workshop, ways, measure, jobs)
        )
        for way in elsewhere:
            for _ in range(_pieces_of_a_model(profile, way.setting, way.seed)):
                advance(f"{way.setting}, seed {way.seed}")
        advance = _quietly
    for way in ways:
        advance(f"{way.setting}, seed {way.seed}: training")
        model = workshop.trained(way)
        settings[way.setting]["models"].append({"seed": way.seed, **_measured(model, profile, advance)})
    # What costs most comes last: a run that is stopped early leaves that out.
    for work in (_under_autoattack, _under_standard):
        for way in ways:
            (found,) = (each for each in settings[way.setting]["models"] if each["seed"] == way.seed)
            found.update(work(workshop.trained(way), profile, advance))
    done = {"images": profile.images, "blocks": profile.blocks, "epochs": profile.epochs, "seeds": list(profile.seeds)}
    if profile.weak_steps:
        done["weak_steps"] = profile.weak_steps
    if profile.way != STANDARD:
        done |= {
            "attack": profile.way.name if profile.way else "",
            "standard_seeds": sorted({seed for _, seed in profile.standard}),
        }
    if profile.tuning_epochs:
        done["tuning_epochs"] = profile.tuning_epochs
    return {**done, "settings": settings}


def _pieces_of_a_model(profile: Profile, setting: str, seed: int) -> int:
    attacks = sum(len(radii) for radii in profile.eps.values()) * -(-profile.images // profile.batch)
    return 2 + attacks * (1 + (profile.way is not None) + ((setting, seed) in profile.standard))


def _quietly(what: str) -> None:
    """Advance nothing."""


def _everything(model: Trained, profile: Profile, advance: Advance) -> dict[str, Any]:
    return {
        **_measured(model, profile, advance),
        **_under_autoattack(model, profile, advance),
        **_under_standard(model, profile, advance),
    }


def _measured(model: Trained, profile: Profile, advance: Advance) -> dict[str, Any]:
    """Constants, bounds and accuracies under FGSM and PGD of one model."""
    place = f"{model.recipe.setting}, seed {model.recipe.seed}"
    advance(f"{place}: local constants")

    network = _network_of(model, profile)
    found = model.ask(
        {"what": "blocks"},
        lambda: _blocks(model, profile.blocks),
        rest=lambda: {**_images(model, profile.blocks), "bins": BINS, "bounds": versions(), **LANCZOS},
    )
    return {
        "weights": model.weights,
        "clean": share(network["right"]),
        "constants": network["constants"],
        "layers": found["layers"],
        "robust": _robust(model, profile, None, advance),
        **({"weak": _weak(model, profile, network["images"])} if profile.weak_steps else {}),
    }


def _images(model: Trained, count: int) -> dict[str, Any]:
    return {"images": model.workshop.images.test.indices[:count].tolist()}


def _network_of(model: Trained, profile: Profile) -> Answer:
    return model.ask(
        {"what": "network"},
        lambda: _network(model, profile.images),
        rest=lambda: _images(model, profile.images),
    )


def _under_autoattack(model: Trained, profile: Profile, advance: Advance) -> dict[str, Any]:
    """Robust accuracies under what attacks every model."""
    return {} if profile.way is None else {"robust": _robust(model, profile, profile.way, advance)}


def _under_standard(model: Trained, profile: Profile, advance: Advance) -> dict[str, Any]:
    """Robust accuracies under all of AutoAttack-standard, for the models that it attacks beside."""
    if (model.recipe.setting, model.recipe.seed) not in profile.standard:
        return {}
    return {"standard": _robust(model, profile, STANDARD, advance)}


def _robust(model: Trained, profile: Profile, way: Way | None, advance: Advance) -> dict[str, list[dict[str, float]]]:
    """For each norm and radius, accuracy under each attack and the worst of all."""
    network = _network_of(model, profile)

    def ask(question: dict[str, Any], work: Any) -> Answer:
        if question["what"] == "autoattack" and way is not None and way != STANDARD:
            question = {**question, "attacks": [*way.attacks]}
        return model.ask(question, work)

    subject = Subject(
        name=f"{model.recipe.setting}, seed {model.recipe.seed}",
        model=model.model,
        ask=ask,
        given=lambda: (model.workshop.images.test.images, model.workshop.images.test.labels),
        indices=network["images"],
        way=way,
    )
    return {
        norm: shares(attacked(subject, norm, radii, profile.batch, network["right"], advance))
        for norm, radii in profile.eps.items()
    }


def _weak(model: Trained, profile: Profile, images: list[int]) -> dict[str, list[float]]:
    """Accuracy under PGD of few steps, for each norm and radius: what other reports give in place of the worst case."""
    found: dict[str, list[float]] = {}
    for norm, radii in profile.eps.items():
        for eps in radii:
            asked = {"norm": norm, "eps": eps, "seed": ATTACK_SEED}
            question = {"what": "weak attack", "images": images, "steps": profile.weak_steps, "attack": asked}
            work = partial(_weakly_attacked, model, len(images), Ball(norm, eps), profile.weak_steps)
            found.setdefault(norm, []).append(share(model.ask(question, work)["right"]))
    return found


def _weakly_attacked(model: Trained, count: int, ball: Ball, steps: int) -> Answer:
    test = model.workshop.images.test
    images, labels = test.images[:count], test.labels[:count]
    generator = torch.Generator().manual_seed(ATTACK_SEED)
    moved = pgd(model.model(), images, labels, ball, steps=steps, generator=generator)
    return {"right": right(model.model(), moved, labels).tolist()}


def _network(model: Trained, count: int) -> Answer:
    test = model.workshop.images.test
    constants, _ = network_constants(_wide(model), test.images[:count].double())
    # Attacks judge in float32, and so does this.
    flags = right(model.model(), test.images[:count], test.labels[:count])
    return {"constants": constants.tolist(), "right": flags.tolist()}


def _blocks(model: Trained, count: int) -> Answer:
    return blocks(_wide(model), model.workshop.images.test.images[:count].double())


def _wide(model: Trained) -> Any:
    """A copy in float64."""
    return copy.deepcopy(model.model()).double()
