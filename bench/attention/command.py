"""`python -m bench attention`: attention maps beside local constants and attacks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.attention import figures, tables
from bench.attention import task as attention
from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import profile_of, progress_bar
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written, file_of
from bench.engine.version_1 import Old
from bench.workloads.models import drawn_hashes
from lipbounds.devices import device_named
from lipbounds.files import write_atomically


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Answer what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    profile = attention.PROFILES[profile_of(options)]
    known = file_of(options.results, "tightness").entries
    device = device_named(options.device)
    with progress_bar(attention.pieces(profile)) as advance:
        attention.run(store, profile, known, device=device, force=options.force, advance=advance)
    return Showing(keys=store.asked)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page and the figures; a bound below what it bounds, or a certified image that fell, is wrong.

    Args:
        found: the answers.
        folder: where the files go.
    """
    data = attention.shown(found, attention.PROFILES[found.page.data["profile"]])
    machines = "\n- ".join(map(describe, found.states))
    text = tables.report(data, found.page.data["command"], found.store.path.name, machines)
    write_atomically(folder / "attention.md", text.encode())
    certificates = file_of(found.store.path.parent, "certified").entries.values()
    failures = attention.violations(data, [entry.flat for entry in certificates])
    return Written(paths=[folder / "attention.md", *figures.draw(data, folder)], failures=failures)


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed: the last answer to each question of the standard profile.

    Args:
        old: the file.
    """
    place, shared = old.named_by_page(), ("task", "version", "model", "weights", "what")
    of_input = (*shared, "input", "input_hash")
    asked = {
        "attack": (*shared, "norm", "images", "seed", "effort"),
        "slopes": (*shared, "images"),
        "blocks": (*of_input, "bounds", "rows"),
        "examples": of_input,
    }
    drawn = drawn_hashes()
    inputs = attention.PROFILES["standard"].inputs
    shown = {(name, cases[0].input) for name, count in inputs.items() for cases in attention.by_input(name, count)}
    keys: dict[tuple[Any, ...], str] = {}
    for line in old.lines:
        more = {"device": "cpu"}
        if (found := drawn.get((line["model"], line.get("input", "")))) is not None:
            more["weights"], more["input_hash"] = found
        entry = old.split(line, asked[line["what"]], place, **more)
        if line["what"] == "blocks" and (line["model"], line["input"]) not in shown:
            continue
        keys[tuple(str(line.get(name)) for name in ("what", "model", "input", "norm", "images"))] = entry.key
    return Showing(keys=keys.values())


TASK = Task(
    name="attention",
    help="attention maps beside local constants and attacks",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results", "device"}),
    versions={"": attention.VERSION},
    migrate=migrated,
)
