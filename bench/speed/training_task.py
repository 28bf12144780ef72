"""What penalties add to a training step, for several models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.engine.answers import Shown
from bench.engine.store import Store
from bench.speed.task import place
from bench.speed.training_steps import JASMIN, MODELS, PENALTIES, measured


VERSION = 1  # of what is measured here: raise it when it changes
REPEATS = {"quick": (2, 2.0), "standard": (15, 120.0)}  # at most so many, until so many seconds are spent


def run(
    answers: Store,
    profile: str,
    *,
    device: torch.device,
    force: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> None:
    """Everything that is not in the file yet.

    Args:
        answers: the file.
        profile: of `REPEATS`.
        device: where it runs.
        force: measure again what is in the file.
        advance: called before each model with its name.
    """
    repeats, enough = REPEATS[profile]
    for penalty, name in ((penalty, name) for penalty, each in PENALTIES.items() for name in each.models):
        if profile == "quick" and name != "digits-vit":
            continue
        advance(f"{penalty}, {MODELS[name].title}")
        asked = {"task": "training", "version": VERSION, "model": name, "repeats": repeats, "enough": enough}
        answers.ask(
            asked if penalty == JASMIN else {**asked, "penalty": penalty},
            lambda n=name, p=penalty: measured(n, repeats=repeats, enough=enough, device=device, penalty=p),
            rest=lambda: place(device),
            force=force,
        )


def shown(found: Shown) -> dict[str, Any]:
    """What the table is made of.

    Args:
        found: the answers of a run.
    """
    rows = []
    for row in found.select(task="training"):
        method = row.get("penalty", JASMIN)
        penalty = PENALTIES[method]
        title = MODELS[row["model"]].title + penalty.title
        rows.append({"model": row["model"], "method": method, "title": title, "limit": penalty.limit, "answer": row})
    here = {name: rows[0]["answer"][name] for name in ("device", "hardware", "threads", "torch", "python")}
    return {"place": here, "rows": rows}
