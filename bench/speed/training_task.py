"""What JaSMin adds to a training step, for several models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.engine.answers import Answers
from bench.speed.plan import JASMIN_LIMIT
from bench.speed.task import place
from bench.speed.training_steps import MODELS, measured


VERSION = 1  # of what is measured here: raise it when it changes
REPEATS = {"quick": (2, 2.0), "standard": (15, 120.0)}  # at most so many, until so many seconds are spent


def run(
    answers: Answers,
    profile: str,
    *,
    device: torch.device,
    force: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Everything that is not in the file yet; returns what the table is made of.

    Args:
        answers: the file.
        profile: of `REPEATS`.
        device: where it runs.
        force: measure again what is in the file.
        advance: called before each model with its name.
    """
    repeats, enough = REPEATS[profile]
    here = place(device)
    rows = []
    for name, trained in MODELS.items():
        if profile == "quick" and name != "digits-vit":
            continue
        advance(trained.title)
        asked = {"task": "training", "version": VERSION, "model": name, "repeats": repeats, "enough": enough, **here}
        answer = answers.ask(
            asked, lambda n=name: measured(n, repeats=repeats, enough=enough, device=device), force=force
        )
        rows.append({"model": name, "title": trained.title, "limit": JASMIN_LIMIT, "answer": answer})
    return {"place": here, "rows": rows}
