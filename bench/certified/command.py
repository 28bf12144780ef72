"""`python -m bench certified`: certified radii beside an attack, and bounds of whole models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.certified import figure, instances, tables
from bench.certified import task as certified
from bench.certified.models import OF_THE_FOLDER
from bench.certified.radii import RADIUS_VERSION
from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import QUICK, STANDARD, profile_of, progress_bar, write_page
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old
from lipbounds.devices import device_named


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Answer what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    profile = certified.PROFILES[profile_of(options)]
    device, peer = device_named(options.device), options.deept
    with progress_bar(certified.pieces(profile, peer)) as advance:
        certified.run(store, profile, device=device, force=options.force, peer=peer, advance=advance)
    kept = [] if peer is not None else of_the_folder(store, QUICK if options.quick else STANDARD)
    return Showing(keys=[*store.asked, *kept])


def of_the_folder(store: Store, page: str) -> list[str]:
    """Keys of what a page shows of the model in the folder of `--deept`: a run without the folder leaves it there.

    Args:
        store: the records.
        page: its name there.
    """
    shown = store.pages.get(page)
    keys = [] if shown is None else [key for key in shown.keys if store.entries[key].flat.get("model") in OF_THE_FOLDER]
    if keys:
        print(
            f"{' and '.join(OF_THE_FOLDER[:2])} are shown as they were measured before; give --deept DIR to measure "
            "what they lack.",
            file=sys.stderr,
        )
    return keys


def pages(found: Shown, folder: Path) -> Written:
    """Write the page, the numbers and the figure; an image that fell inside its certified radius is wrong.

    Args:
        found: the answers.
        folder: where the files go.
    """
    data = certified.shown(found)
    machines = "\n- ".join(map(describe, found.states))
    written = write_page(folder, "certified", tables.report(data, found.page.data["command"], machines), data)
    listed = instances.write(data, folder)
    return Written(paths=[*written, listed, *figure.draw(data, folder)], failures=certified.violations(data))


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed: what certified.json holds.

    Args:
        old: the file.
    """
    place, shared = old.named_by_page(), ("task", "version", "model", "weights", "what")
    asked = {
        "certificate": (*shared, "attention", "image"),
        "attack": (*shared, "radius", "images", "seed"),
        "whole": (*shared, "attention", *certified.LANCZOS),
    }
    numbers = old.numbers()
    rows = [row for model in numbers.get("models", {}).values() for part in model.values() for row in part]
    listed = {row["key"]: None for row in [*rows, *numbers.get("whole", {}).values()]}
    keys = {}
    for line in sorted(old.lines, key=lambda line: line["key"] in listed):  # of equal questions the last one counts
        more = {"device": "cpu"}
        if line["what"] == "whole":
            more["weights"], more["input_hash"] = certified.raw_hashes(line["model"])
        keys[line["key"]] = old.split(line, asked[line["what"]], place, **more).key
    return Showing(keys=[keys[key] for key in listed])


TASK = Task(
    name="certified",
    help="certified radii beside an attack, and bounds of whole models",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "full", "force", "results", "device", "deept"}),
    versions={
        "": certified.VERSION,
        "radius": RADIUS_VERSION,
        "whole": certified.WHOLE_VERSION,
        "constant": certified.CONSTANT_VERSION,
        "formed": certified.FORMED_VERSION,
    },
    migrate=migrated,
)
