"""Choosing the weight of a penalty, on validation images alone and with a seed that is not reported.

The rule: among the weights whose validation accuracy is at most one point below that of the reference setting, the one
with the most validation images right under PGD-10 (l_inf); among equals the smallest. If none is that accurate, the one
with the best validation accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.attacks.images import Ball, pgd, right
from bench.engine.store import Answer
from bench.robustness.settings import (
    CHOICE_EPS,
    CHOICE_SEED,
    CHOICE_STEPS,
    CLEAN_LOSS,
    SETTINGS,
    Profile,
    Setting,
)
from bench.robustness.training import Trained, Workshop


Row = dict[str, Any]


def choose(workshop: Workshop, setting: Setting, profile: Profile, advance: Callable[[str], None]) -> dict[str, Any]:
    """The weight of a setting, with what every weight of its grid came to; without a grid its own, if it has one.

    Args:
        workshop: where models come from.
        setting: the setting.
        profile: how much is done.
        advance: called before each piece of work with its name.
    """
    if not setting.grid:
        return {"weight": setting.weight, "rows": []}
    # A reference without a grid, so that it needs no choice itself.
    reference = _row(workshop, SETTINGS[setting.reference], None, profile, advance)
    rows = [_row(workshop, setting, weight, profile, advance) for weight in tried(setting.grid, profile.largest_grid)]
    return {"weight": best(rows, reference["clean"])["weight"], "reference": reference, "rows": rows}


def best(rows: list[Row], reference: float) -> Row:
    """The row that the rule above picks.

    Args:
        rows: with `weight`, `clean` and `robust`, validation accuracies as shares.
        reference: validation accuracy of the reference setting.
    """
    accurate = [row for row in rows if row["clean"] >= reference - CLEAN_LOSS - 1e-12]
    if not accurate:
        return max(rows, key=lambda row: (row["clean"], -row["weight"]))
    return max(accurate, key=lambda row: (row["robust"], -row["weight"]))


def tried(grid: tuple[float, ...], count: int) -> tuple[float, ...]:
    """That many weights from the middle of a grid; all for 0."""
    start = (len(grid) - count) // 2
    return grid if count == 0 or count >= len(grid) else grid[start : start + count]


def _row(
    workshop: Workshop, setting: Setting, weight: float | None, profile: Profile, advance: Callable[[str], None]
) -> Row:
    advance(f"{setting.name}: weight {'-' if weight is None else f'{weight:g}'}")
    model = workshop.trained(profile.recipe(setting, weight, CHOICE_SEED))
    question = {"what": "choice", "norm": "l_inf", "eps": CHOICE_EPS, "steps": CHOICE_STEPS}
    robust = model.ask(question, lambda: _validated(model))["robust"]
    return {"weight": weight, "clean": model.validation_accuracy, "robust": robust}


def _validated(model: Trained) -> Answer:
    part = model.workshop.images.validation
    generator = torch.Generator().manual_seed(CHOICE_SEED)
    found = pgd(
        model.model(), part.images, part.labels, Ball("l_inf", CHOICE_EPS), steps=CHOICE_STEPS, generator=generator
    )
    return {"robust": right(model.model(), found, part.labels).double().mean().item()}
