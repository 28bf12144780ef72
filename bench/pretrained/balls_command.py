"""`python -m bench pretrained_balls`: bounds on balls around short inputs of the pretrained models."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import profile_of, progress_bar
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.pages.formatting import figure, table
from bench.pages.page import bullets, page
from bench.pretrained import balls
from bench.pretrained.balls import LOWER, TIME_LIMIT, UPPERS
from lipbounds.files import write_atomically


METHODS = (
    "A block maps the tokens that enter it to its output; its constant on a ball is the largest norm of its Jacobian "
    "in l2 where the tokens moved by at most the radius, in the Frobenius norm. The radius is given over the median "
    "norm of a token. The bounds are proved upper bounds of the constant; reached: the largest norm that ascent "
    f"(`{LOWER}`, four steps, two starts) found in the ball, a lower bound of it. So a ratio of the two says *at "
    "most* how many times a bound is too large. All of it in float64. An evaluation ends after "
    f"{TIME_LIMIT} s of processor time. One short input for each model, and the first, a middle and the last layer: "
    "the time of `sharp_ball` grows quickly with tokens and width."
)


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Answer what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    profile = balls.PROFILES[profile_of(options)]
    with progress_bar(balls.pieces(profile)) as advance:
        balls.run(store, profile, force=options.force, advance=advance)
    return Showing(keys=store.asked)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page; a bound below what ascent reached is wrong.

    Args:
        found: the answers.
        folder: where it goes.
    """
    data = balls.shown(found)
    path = folder / "pretrained_balls.md"
    text = report(data, found.page.data["command"], found.store.path.name, [*map(describe, found.states)])
    write_atomically(path, text.encode())
    return Written(paths=[path], failures=balls.violations(data))


def report(data: dict[str, Any], command: str, records_path: str, environments: Sequence[str]) -> str:
    """The page of results.

    Args:
        data: what `bench.pretrained.balls.shown` returned.
        command: that made it.
        records_path: where the answers are.
        environments: of the runs, a line each.
    """
    parts = [
        "# Balls around inputs of pretrained models",
        bullets(_said(name, of) for name, of in data.items()),
        METHODS,
        bullets(f"{name}: {of['about']}." for name, of in data.items()),
        _table(data),
        f"Made by `{command}` from `{records_path}`; nothing here is written by hand.",
        "## What is refused, or took too long",
        bullets(_refused(data)) or "Nothing.",
        "## Environment",
        bullets(environments),
    ]
    return page(parts)


def _ratio(at: dict[str, Any], bound: str) -> float | None:
    if "value" not in at.get(bound, {}) or "value" not in at.get(LOWER, {}):
        return None
    return at[bound]["value"] / at[LOWER]["value"]


def _said(name: str, of: dict[str, Any]) -> str:
    """The median ratio of each bound at each radius, over layers."""
    cells = []
    for bound in _told(of["balls"].values()):
        by_radius: dict[float, list[float]] = {}
        for (_, relative), at in of["balls"].items():
            if (ratio := _ratio(at, bound)) is not None:
                by_radius.setdefault(relative, []).append(ratio)
        words = ", ".join(f"{figure(median(ratios))} at {relative:g}" for relative, ratios in by_radius.items())
        cells.append(f"`{bound}` {words}")
    return f"**{name}**, proved bound over what ascent reached, median over layers: {'; '.join(cells) or 'none'}."


def _told(balls: Iterable[dict[str, Any]]) -> list[str]:
    """The bounds that have a ratio on some ball."""
    known = [*balls]
    return [bound for bound in UPPERS if any(_ratio(at, bound) is not None for at in known)]


def _table(data: dict[str, Any]) -> str:
    bounds = _told(at for of in data.values() for at in of["balls"].values())
    body = []
    for name, of in data.items():
        for (layer, relative), at in of["balls"].items():
            first = at[LOWER]
            cells = [figure(ratio) if (ratio := _ratio(at, bound)) else "refused" for bound in bounds]
            seconds = [figure(at[bound]["seconds"]) if "value" in at[bound] else "-" for bound in bounds]
            reached = figure(first["value"]) if "value" in first else "refused"
            radius = [f"{relative:g}", figure(first["radius"])]
            body.append([name, layer, first["tokens"], *radius, reached, *cells, *seconds])
    titles = [
        "model",
        "layer",
        "tokens",
        "radius / token",
        "radius",
        "reached",
        *(f"`{bound}` / reached" for bound in bounds),
    ]
    return table([*titles, *(f"`{bound}`, processor s" for bound in bounds)], body)


def _refused(data: dict[str, Any]) -> list[str]:
    """Each reason once, with the models that it stands for."""
    reasons: dict[str, dict[str, None]] = {}
    for name, of in data.items():
        for at in of["balls"].values():
            for answer in at.values():
                if "refused" in answer:
                    reasons.setdefault(answer["refused"], {})[name] = None
    return [f"{', '.join(models)}: {reason.rstrip('.')}." for reason, models in reasons.items()]


TASK = Task(
    name="pretrained_balls",
    help="bounds on balls around short inputs of DINOv2, SmolLM2 and ALBERT, from installed packages",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results"}),
    versions={"": balls.VERSION},
)
