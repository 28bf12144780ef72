"""`python -m bench robustness --model NAME --images DIR`: robust accuracy of a classifier that is given."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import profile_of, progress_bar, write_page
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.robustness import classifier_page
from bench.robustness import classifier_task as task
from bench.robustness.classifier import check_numbered, load_classifier
from bench.robustness.folder import read_classes, read_images
from lipbounds.devices import device_named
from lipbounds.errors import InvalidInput


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Attack and measure what is missing.

    Args:
        options: the command line.
        store: the records.

    Raises:
        InvalidInput: the model, the folder or the device is not there, or they do not fit together.
        Unsupported: the model is of an unknown kind.
    """
    if options.model is None or options.images is None:
        raise InvalidInput("--model NAME and --images DIR go together: pass both.")
    device = device_named(options.device)
    profile = task.PROFILES[profile_of(options)]
    loaded = load_classifier(options.model)
    count = profile.images if options.count is None else options.count
    classes = loaded.classes if options.classes is None else read_classes(options.classes)
    given = read_images(options.images, count, settings=loaded.image, classes=classes)
    check_numbered(loaded, given)
    with progress_bar(task.pieces(profile, len(given.names))) as advance:
        data = task.run(store, loaded, given, profile, device=device, force=options.force, advance=advance)
    about = {name: value for name, value in data.items() if name not in ("clean", "robust", "measured")}
    name = re.sub(r"\W+", "_", options.model).strip("_").lower()
    return Showing(keys=store.asked, data={"about": about, "command": _command(options)}, name=name)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page, the numbers and the figure.

    Args:
        found: the answers.
        folder: where the files go.
    """
    data = task.shown(found, task.PROFILES[found.page.data["profile"]])
    data["environments"] = [*map(describe, found.states)]
    name = f"classifier_{found.page.data['name']}"
    text = classifier_page.report(data, found.page.data["command"], f"{name}.png")
    written = write_page(folder, name, text, data)
    return Written(paths=[*written, *classifier_page.draw(data, folder, name)])


def _command(options: argparse.Namespace) -> str:
    words = ["python", "-m", "bench", "robustness", "--model", options.model, "--images", str(options.images)]
    words += ["--device", options.device] if options.device != "cpu" else []
    words += ["--classes", str(options.classes)] if options.classes is not None else []
    words += ["--count", str(options.count)] if options.count is not None else []
    return shlex.join(words + (["--quick"] if options.quick else []))


TASK = Task(
    name="classifier",
    help="robust accuracy of a classifier of your own; the same as robustness with --model and --images",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results", "device", "model", "images", "classes", "count"}),
    versions={"": task.VERSION},
)
