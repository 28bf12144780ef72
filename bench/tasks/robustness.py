"""Robust accuracy of digits ViTs trained with and without penalties, and their local Lipschitz constants.

Each model is one answer, each attack of one model with one norm and radius on one batch of images is another: a run
that is killed goes on from there. Images are the first ones of the test part, pixels in [0, 1].
"""

from __future__ import annotations

import copy
from typing import Any

from bench.attacks import right
from bench.certified_data import Answer
from bench.robustness.attacked import Advance, Subject, attacked, share
from bench.robustness.choice import choose, tried
from bench.robustness.measures import BINS, LANCZOS, blocks, network_constants, versions
from bench.robustness.settings import SETTINGS, Profile, recipe
from bench.robustness.training import Trained, Workshop


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
    subject = Subject(
        name=place,
        model=model.model,
        ask=model.ask,
        images=test.images,
        labels=test.labels,
        indices=test.indices.tolist(),
    )
    robust = {
        norm: attacked(subject, norm, radii, profile.batch, network["right"], advance)
        for norm, radii in profile.eps.items()
    }
    return {
        "weights": model.weights,
        "clean": share(network["right"]),
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
