"""`python -m bench robustness --model NAME ... --images DIR`: robust accuracy of classifiers that are given."""

from __future__ import annotations

import argparse
import dataclasses as dc
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from bench.attacks.images import Ball, check_ball
from bench.attacks.ways import way_for
from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import keep_apart, profile_of, progress_bar, write_page
from bench.engine.records import content_hash
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.robustness import classifier_page
from bench.robustness import classifier_task as task
from bench.robustness.classifier import LoadedClassifier, check_classes, check_numbered, load_classifier
from bench.robustness.classifier_summary import radius_words, summarised
from bench.robustness.folder import LabelledFolder, read_classes, read_images
from lipbounds.devices import device_named
from lipbounds.errors import InvalidInput


LONGEST_NAME = 100  # of a page


def prepare(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before the records are opened.

    Args:
        options: the command line.

    Raises:
        InvalidInput: no other folder than that of the repository is named; an option is missing.
    """
    if not options.model or options.images is None:
        raise InvalidInput(
            "--model NAME and --images DIR go together: pass both; `--images digits` are the test digits of this "
            "package."
        )
    twice = [name for name in dict.fromkeys(options.model) if options.model.count(name) > 1]
    if twice:
        raise InvalidInput(f"--model must name each model once, got {twice[0]!r} several times.")
    keep_apart(options, "--model")


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Attack and measure what is missing.

    Args:
        options: the command line.
        store: the records.

    Raises:
        InvalidInput: a model, the images or the device are not there, or they do not fit together.
        Unsupported: a model is of an unknown kind.
    """
    device = device_named(options.device)
    profile = _profile(options)
    loaded = [load_classifier(name) for name in options.model]
    given = [_images(options, each, profile.images) for each in loaded]
    unlike = check_alike(loaded, given)
    for norm, radii in profile.eps.items():
        for eps in radii:
            check_ball(given[0].images, Ball(norm, eps))
    models = []
    with progress_bar(len(loaded) * task.pieces(profile, len(given[0].names))) as advance:
        for model, images in zip(loaded, given, strict=True):
            way = way_for(check_classes(model, images.images, images.labels, images.classes))
            models.append(
                task.run(store, model, images, profile, way=way, device=device, force=options.force, advance=advance)
            )
    about = {
        **{
            "models": models,
            "profile": dc.asdict(profile),
            "source": given[0].source or f"`{options.images}`",
            "unlike": unlike,
        },
        **{"names": given[0].names, "available": given[0].available, "device": device.type},
    }
    return Showing(
        keys=store.asked, data={"about": about, "command": _command(options)}, name=_page_name(options.model)
    )


def pages(found: Shown, folder: Path) -> Written:
    """Write the page, the numbers and the figure.

    Args:
        found: the answers.
        folder: where the files go.
    """
    data = task.shown(found)
    data["environments"] = [*map(describe, found.states)]
    summary = summarised(data)
    name = f"classifier_{found.page.data['name']}"
    text = classifier_page.report(data, summary, found.page.data["command"], f"{name}.png")
    written = write_page(folder, name, text, {**data, "summary": summary})
    return Written(paths=[*written, *classifier_page.draw(summary, data, folder, name)])


def check_alike(loaded: Sequence[LoadedClassifier], given: Sequence[LabelledFolder]) -> str:
    """What the page says where models are given other pixels of the same pictures; empty where they are the same.

    Args:
        loaded: the models.
        given: the images of each.

    Raises:
        InvalidInput: the images are of several sizes, in which one radius is several things.
    """
    first, unlike = given[0], []
    for model, images in zip(loaded[1:], given[1:], strict=True):
        ours, theirs = (" x ".join(map(str, each.images.shape[1:])) for each in (images, first))
        if ours != theirs:
            raise InvalidInput(
                f"models that are compared must take images of one size, got {theirs} for {loaded[0].name!r} and "
                f"{ours} for {model.name!r}: a radius is not the same in both. Run them one by one, or resize in the "
                "model."
            )
        if not images.images.equal(first.images):
            unlike.append(model.name.replace("`", ""))
    if not unlike:
        return ""
    return (
        f"The image processor of {', '.join(f'`{name}`' for name in unlike)} makes other pixels of the same pictures "
        "than that of the first model."
    )


def _images(options: argparse.Namespace, model: LoadedClassifier, count: int) -> LabelledFolder:
    classes = model.classes if options.classes is None else read_classes(options.classes)
    given = read_images(options.images, count, settings=model.image, classes=classes)
    check_numbered(model, given)
    return given


def _profile(options: argparse.Namespace) -> task.Profile:
    """That of the options, with their own number of images and radii."""
    profile = task.PROFILES[profile_of(options)]
    if options.count is not None:
        profile = dc.replace(profile, images=options.count)
    if options.eps:
        norms = dict.fromkeys(ball.norm for ball in options.eps)
        radii = {norm: tuple(sorted({ball.eps for ball in options.eps if ball.norm == norm})) for norm in norms}
        profile = dc.replace(profile, eps=radii)
    return profile


def _page_name(models: Sequence[str]) -> str:
    words = [re.sub(r"\W+", "_", name).strip("_").lower() for name in models]
    name = "-".join(words)
    if len(name) <= LONGEST_NAME and len(set(words)) == len(words):
        return name
    return f"{words[0][:LONGEST_NAME]}-and-{len(words) - 1}-more-{content_hash([*models])[:6]}"


def _command(options: argparse.Namespace) -> str:
    words = ["python", "-m", "bench", "robustness"]
    words += [word for name in options.model for word in ("--model", name)]
    words += ["--images", str(options.images)]
    words += [word for ball in options.eps or () for word in ("--eps", ball_words(ball))]
    words += ["--device", options.device] if options.device != "cpu" else []
    words += ["--classes", str(options.classes)] if options.classes is not None else []
    words += ["--count", str(options.count)] if options.count is not None else []
    return shlex.join(words + (["--quick"] if options.quick else []))


def ball_words(ball: Ball) -> str:
    """A ball as `--eps` takes it, without loss.

    Args:
        ball: the ball.
    """
    words = radius_words(ball.norm, ball.eps)
    return f"{ball.norm}:{words if '/' in words else repr(ball.eps)}"


TASK = Task(
    name="classifier",
    help="robust accuracy of classifiers of your own; the same as robustness with --model and --images",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results", "device", "model", "images", "classes", "count", "eps"}),
    versions={"": task.VERSION},
    prepare=prepare,
)
