"""`python -m bench robustness --model NAME --images DIR`: robust accuracy of a classifier that is given."""

from __future__ import annotations

import argparse
import re
import shlex

from bench.engine.answers import Answers
from bench.engine.options import finish, folder_of, progress_bar, write_page
from bench.robustness import classifier_page
from bench.robustness import classifier_task as task
from bench.robustness.classifier import check_numbered, load_classifier
from bench.robustness.folder import read_classes, read_folder
from lipbounds.devices import device_named
from lipbounds.errors import InvalidInput


def run(options: argparse.Namespace) -> int:
    """Attack and measure what is missing, write the page, the numbers and the figure.

    Args:
        options: the command line.

    Raises:
        InvalidInput: the model, the folder or the device is not there, or they do not fit together.
        Unsupported: the model is of an unknown kind.
    """
    if options.model is None or options.images is None:
        raise InvalidInput("--model NAME and --images DIR go together: pass both.")
    device = device_named(options.device)
    profile = task.PROFILES["quick" if options.quick else "standard"]
    loaded = load_classifier(options.model)
    count = profile.images if options.count is None else options.count
    classes = loaded.classes if options.classes is None else read_classes(options.classes)
    given = read_folder(options.images, count, settings=loaded.image, classes=classes)
    check_numbered(loaded, given)
    answers = Answers(options.results / "classifier.jsonl")
    with progress_bar(task.pieces(profile, len(given.names))) as advance:
        data = task.run(answers, loaded, given, profile, device=device, force=options.force, advance=advance)
    folder = folder_of(options)
    folder.mkdir(parents=True, exist_ok=True)
    name = "classifier_" + re.sub(r"\W+", "_", options.model).strip("_").lower()
    written = write_page(folder, name, classifier_page.report(data, _command(options), f"{name}.png"), data)
    return finish(answers, [*written, *classifier_page.draw(data, folder, name)])


def _command(options: argparse.Namespace) -> str:
    words = ["python", "-m", "bench", "robustness", "--model", options.model, "--images", str(options.images)]
    words += ["--device", options.device] if options.device != "cpu" else []
    words += ["--classes", str(options.classes)] if options.classes is not None else []
    words += ["--count", str(options.count)] if options.count is not None else []
    return shlex.join(words + (["--quick"] if options.quick else []))
