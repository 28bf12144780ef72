"""`python -m bench [TASK] [OPTIONS]`: measure what is missing, keep it in the records, render pages and figures."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from bench.attacks.images import NORMS, Ball, Norm
from bench.attention.command import TASK as ATTENTION
from bench.balls.command import TASK as BALLS
from bench.certified.command import TASK as CERTIFIED
from bench.claims import quoting
from bench.claims.command import TASK as CLAIMS
from bench.engine.machine import ROOT
from bench.engine.migration import migrate
from bench.engine.options import check_folder, cluster_of, committed, folder_of
from bench.engine.rendering import cores, render
from bench.engine.task import refuse
from bench.gpu import command as gpu
from bench.pretrained.balls_command import TASK as PRETRAINED_BALLS
from bench.pretrained.command import TASK as PRETRAINED
from bench.robustness.classifier_command import TASK as CLASSIFIER
from bench.robustness.command import TASK as ROBUSTNESS
from bench.speed.command import TASK as SPEED
from bench.speed.exporting import export
from bench.speed.scaling_command import TASK as SCALING
from bench.speed.training_command import TASK as TRAINING
from bench.tightness import readme
from bench.tightness.command import TASK as TIGHTNESS
from bench.workloads.models import Model, zoo
from lipbounds.errors import LipboundsError


STALE, MISUSE, INTERRUPTED = 1, 2, 130
TASKS = (
    *(TIGHTNESS, BALLS, CERTIFIED, SPEED, TRAINING, ATTENTION, PRETRAINED, PRETRAINED_BALLS),
    *(ROBUSTNESS, CLASSIFIER, SCALING, CLAIMS),
)
COMMANDS = {
    "all": "measure what is missing of tightness and balls, and render all pages; with --quick, measure all tasks",
    "render": "every page, figure and table of numbers from the records, without models",
    "migrate": "bring records that an older version wrote to the format of this one",
    "readme": "copy the headline table into README.md, and other tables into the pages that quote them",
}
QUOTING = (ROOT / "docs" / "robustness.md", ROOT / "docs" / "attention.md")  # quote tables of results, as the README
SLOW_PAGES = (ATTENTION, BALLS, SPEED)
ALL_QUICK = (CERTIFIED, SPEED, TRAINING, ATTENTION, ROBUSTNESS)  # scaling starts Ray, a classifier has to be given
# What the commands that are no tasks take; `all` takes what the tasks that it measures take in common.
TAKES = {
    "all": TIGHTNESS.takes & BALLS.takes,
    "render": frozenset({"quick", "results"}),
    "migrate": frozenset({"results"}),
    "readme": frozenset({"results", "check", "readme"}),
}
# Options that do not go together, and options that go with another one.
APART = (("quick", "full"), ("ray", "jobs"), ("ray", "device"))
WITH = {"gpus_per_job": "ray", "data": "model", "eps": "model", "weight": "penalty"}


def main(arguments: Sequence[str] | None = None, models: Sequence[Model] | None = None, *, processes: int = 1) -> int:
    """Run and return the exit status: 0, 1 for failures or a stale README, 2 for misuse, 130 after an interrupt.

    Args:
        arguments: the command line; by default that of the process.
        models: by default the whole zoo.
        processes: that `render` forks; more than 1 only where torch has not computed anything yet.
    """
    given = [*sys.argv[1:]] if arguments is None else [*arguments]
    if given[:1] == ["gpu"]:  # it has options of its own
        return gpu.main(given[1:])
    parser = _parser()
    options = parser.parse_args(given)
    if options.task == ROBUSTNESS.name and (options.model or options.images):
        options.task = CLASSIFIER.name
    try:
        refuse(options, parser.parse_args([]), {task.name: task.takes for task in TASKS} | TAKES, APART, WITH)
        check_folder(options.results)
        options.models = zoo() if models is None else models
        with cluster_of(options) as options.cluster:
            return _run(options, processes)
    except (LipboundsError, OSError) as error:  # of the records, the cluster, the disk, or what the user passed
        print(f"bench: {error}", file=sys.stderr)
        return MISUSE
    except KeyboardInterrupt:
        print(
            "\nStopped. Everything finished so far is in the records; run the same command again to go on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED


def _run(options: argparse.Namespace, processes: int) -> int:
    """The status of a task or command."""
    tasks = {task.name: task for task in TASKS}
    if options.task in tasks:
        status = tasks[options.task].run(options)
        if options.pytest_benchmark_json is not None:
            export(folder_of(options) / "speed.json", options.pytest_benchmark_json)
        return status
    if options.task == "readme":
        return _readme(options)
    if options.task == "migrate":
        return max(migrate(task, options.results) for task in TASKS)
    if options.task == "render":
        return max(render(TASKS, options, processes=processes, first=SLOW_PAGES))
    measured = [task for task in TASKS if task.by_default or options.quick]
    measured = [task for task in measured if task.by_default or task in ALL_QUICK]
    return max([task.run(options) if task in measured else task.render(options) for task in TASKS])


def _readme(options: argparse.Namespace) -> int:
    current = readme.update(options.readme, options.results / "tightness.json", check=options.check)
    quoting_pages = (options.readme, *(QUOTING if committed(options) else ()))
    changed = quoting.update(quoting_pages, options.results, check=options.check)
    if options.check and (changed or not current):
        stale = dict.fromkeys([*changed, *([] if current else [options.readme])])
        print(f"{', '.join(map(str, stale))}: stale, run `python -m bench readme`.", file=sys.stderr)
        return STALE
    print(f"{options.readme} {'is current' if current else 'now holds the current table'}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Compare all registered bounds on real models."
    )
    helps = {**COMMANDS, **{task.name: task.help for task in TASKS}, "gpu": gpu.HELP}
    listed = "; ".join(f"{name}: {what}" for name, what in helps.items())
    parser.add_argument("task", nargs="?", default="all", choices=helps, help=listed)

    def add(*flags: str, what: str, **settings: object) -> None:
        name = flags[-1].removeprefix("--").replace("-", "_")
        having = [task.name for task in TASKS if name in task.takes] + [
            command for command, takes in TAKES.items() if name in takes
        ]
        parser.add_argument(*flags, help=f"{what} ({', '.join(having)})", **settings)  # pyright: ignore[reportArgumentType]

    _options_of_runs(add)
    _options_of_yours(add)
    return parser


def _options_of_runs(add: Callable[..., None]) -> None:
    """What a run does: how much, and where it computes and writes."""
    add("--quick", action="store_true", what="few inputs; pages go to DIR/quick, records to the same file")
    add("--full", action="store_true", what="more of everything, hours")
    add("--force", action="store_true", what="make again what is in the records")
    add("--results", type=Path, default=ROOT / "results", metavar="DIR", what="folder of records and pages")
    add("--device", default="cpu", what="cpu, cuda, cuda:1, ...; answers of another kind of device are other answers")
    add(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        what="compute on the Ray cluster at host:port, auto or local; without an address, on the running one or else "
        "on all cores of this machine. Needs the extra `ray`: `pip install -e '.[ray]'`",
    )  # fmt: skip
    add("--gpus-per-job", type=float, default=0.0, metavar="G", what="with --ray: evaluate on GPUs, G for each job")
    add("--jobs", type=_number_of_jobs, default=1, metavar="N", what="models at a time, each in a process")
    add("--time-limit", type=_seconds, default=120.0, metavar="S", what="seconds for one evaluation")


def _options_of_yours(add: Callable[..., None]) -> None:
    """What is measured beside the benchmark's own models, bounds and data, and the options of single tasks."""
    add(
        "--model", action="append", metavar="NAME",
        what="a model of yours: a Hugging Face folder or name, package.module:attribute, a bundled name; repeatable",
    )  # fmt: skip
    add(
        "--bounds", action="append", metavar="PATH",
        what="package.module:ATTRIBUTE of a bound of yours, measured with all others; repeatable; goes with --results",
    )  # fmt: skip
    add(
        "--pytest-benchmark-json", type=Path, metavar="FILE",
        what="also write the times in the format of pytest-benchmark",
    )  # fmt: skip
    add(
        "--train-on", type=Path, metavar="WHERE",
        what="train on images of 28 x 28 pixels in place of the digits: mnist-5k, or a folder with the four IDX files "
        "of MNIST or Fashion-MNIST",
    )  # fmt: skip
    add(
        "--penalty", action="append", metavar="PATH",
        what="package.module:function of a penalty of yours, one more setting of the study; repeatable",
    )  # fmt: skip
    add(
        "--loss", action="append", metavar="PATH",
        what="package.module:function of a training loss of yours, one more setting of the study; repeatable",
    )  # fmt: skip
    add(
        "--weight", action="append", type=_weight, metavar="W",
        what="weights that those of --penalty are chosen from, by default 0.01, 0.1 and 1; repeatable",
    )  # fmt: skip
    add("--data", type=Path, metavar="FILE", what="texts, a tensor, or images as --images takes them, for --model")
    add(
        "--images", type=Path, metavar="DIR",
        what="a folder of pictures for each class of --model, or pictures with the class in their names, or the IDX "
        "files of MNIST or Fashion-MNIST in a folder, or mnist-5k, or `digits`, the bundled test images",
    )  # fmt: skip
    add(
        "--eps", action="append", type=_ball, metavar="NORM:RADIUS",
        what="a radius to attack in, such as l_inf:8/255 or l2:0.5, of pixels in [0, 1]; repeatable",
    )  # fmt: skip
    add(
        "--classes", type=Path, metavar="FILE",
        what="a JSON object with the number of the class of each folder by its name",
    )  # fmt: skip
    add(
        "--deept", type=Path, metavar="DIR",
        what="a folder with the published ViT on MNIST and its radii by DeepT, which is certified too",
    )  # fmt: skip
    add("--count", type=int, metavar="N", what="of images, a sample; by default 200, with --quick 4")
    add("--check", action="store_true", what="exit with 1 if the README is stale, write nothing")
    add("--readme", type=Path, default=ROOT / "README.md", metavar="PATH", what="the README")


def _number_of_jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"--jobs is a number from 1, got {text}")
    return int(text)


def _ball(text: str) -> Ball:
    norm, _, radius = text.partition(":")
    try:
        eps = float(Fraction(radius))
    except (ValueError, ZeroDivisionError, OverflowError):
        eps = 0.0
    known: list[Norm] = [name for name in NORMS if name == norm]
    if not known or not eps > 0:
        raise argparse.ArgumentTypeError(f"--eps must be NORM:RADIUS, such as l_inf:8/255 or l2:0.5, got {text}")
    return Ball(known[0], eps)


def _weight(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"--weight must be a number of at least 0, got {text}")
    return found


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"--time-limit must be above 0, got {text}")
    return found


if __name__ == "__main__":
    sys.exit(main(processes=cores()))
