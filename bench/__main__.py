"""`python -m bench [TASK] [--quick|--full] [--force] [--ray]`: measure what is missing, write tables and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.attention import command as attention
from bench.balls import command as balls
from bench.certified import command as certified
from bench.engine.answers import NotAnswered
from bench.engine.machine import ROOT
from bench.engine.options import cluster_of
from bench.robustness import classifier_command as classifier
from bench.robustness import command as robustness
from bench.speed import command as speed
from bench.speed import scaling_command as scaling
from bench.speed import training_command as training
from bench.tightness import command as tightness
from bench.tightness import readme
from bench.workloads.models import Model, zoo
from lipbounds.errors import LipboundsError


STALE, MISUSE, INTERRUPTED = 1, 2, 130
# Minutes to hours from nothing: the task `all` writes their pages anew from the records that there are.
LONG: dict[str, Callable[..., int]] = {
    "certified": certified.run,
    "speed": speed.run,
    "training": training.run,
    "attention": attention.run,
    "robustness": robustness.run,
}
WITH_FULL = ("certified", "robustness")
WITH_RAY = ("all", "tightness", "balls", "robustness")
TASKS = {
    "all": "tightness and balls, and the pages of the others from the records; with --quick, all of them",
    "tightness": "tables and figures of tightness",
    "balls": "curves over the radius of a ball",
    "certified": "certified radii beside an attack, and bounds of whole models",
    "speed": "time and memory beside a forward pass",
    "training": "what JaSMin adds to a training step",
    "attention": "attention maps beside local constants and attacks",
    "robustness": "robust accuracy of models trained with and without penalties",
    "scaling": "time of the same evaluations with Ray and without",
    "readme": "copy the headline table into README.md",
}


def main(arguments: Sequence[str] | None = None, models: Sequence[Model] | None = None) -> int:
    """Run and return the exit status: 0, 1 for failures or a stale README, 2 for misuse, 130 after an interrupt.

    Args:
        arguments: the command line; by default that of the process.
        models: by default the whole zoo.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check and options.task != "readme":
        parser.error("--check goes with the task readme: python -m bench readme --check")
    if options.full and (options.task not in WITH_FULL or options.quick):
        parser.error(f"--full goes with the tasks {' and '.join(WITH_FULL)}, without --quick")
    if options.task != "robustness" and (options.model or options.images):
        parser.error("--model and --images go with the task robustness")
    if options.jobs < 1 or (options.jobs > 1 and (options.task != "robustness" or options.model or options.images)):
        parser.error(f"--jobs is a number from 1, for the task robustness without --model, got {options.jobs}")
    if options.ray is not None and options.task not in WITH_RAY:
        parser.error(f"--ray goes with the tasks {', '.join(WITH_RAY)}, got {options.task}")
    if options.ray is not None and (options.jobs > 1 or options.model or options.images):
        parser.error("--ray goes with the models that robustness trains, without --jobs, --model and --images")
    if options.gpus_per_job and options.task == "robustness":
        parser.error("--gpus-per-job goes with blocks: the models that robustness trains are small, and run on the CPU")
    if options.gpus_per_job and options.ray is None:
        parser.error("--gpus-per-job goes with --ray: without Ray, blocks are evaluated on the CPU")
    if not options.time_limit > 0:
        parser.error(f"--time-limit must be above 0, got {options.time_limit:g}")
    try:
        if options.task == "readme":
            return _readme(options)
        if options.model or options.images:
            return classifier.run(options)
        if options.task == "scaling":
            return scaling.run(options)
        if options.task in LONG:
            return LONG[options.task](options)
        return _on_blocks(options, zoo() if models is None else models)
    except LipboundsError as error:  # of the records, the cluster, or what the user passed
        print(f"bench: {error}", file=sys.stderr)
        return MISUSE
    except KeyboardInterrupt:
        print(
            "\nStopped. Everything finished so far is in the records; run the same command again to go on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED


def _on_blocks(options: argparse.Namespace, models: Sequence[Model]) -> int:
    """The tasks on attention blocks, and with `all` the pages of the long ones."""
    with cluster_of(options) as cluster:
        statuses = [tightness.run(options, models, cluster)] if options.task != "balls" else []
        if options.task != "tightness":
            statuses.append(balls.run(options, models, cluster))
    here = argparse.Namespace(**{**vars(options), "ray": None})
    for name, run in LONG.items() if options.task == "all" else ():
        try:
            statuses.append(run(here, only_read=not options.quick))
        except NotAnswered:
            print(f"{name}: not all of it is in the records; `python -m bench {name}` makes the rest.")
    return max(statuses)


def _readme(options: argparse.Namespace) -> int:
    current = readme.update(options.readme, options.results / "tightness.json", check=options.check)
    if options.check and not current:
        print(f"{options.readme} is stale: run `python -m bench readme`.", file=sys.stderr)
        return STALE
    print(f"{options.readme} {'is current' if current else 'now holds the current table'}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Compare all registered bounds on real models."
    )
    helps = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    parser.add_argument("task", nargs="?", default="all", choices=TASKS, help=helps)
    parser.add_argument(
        "--quick", action="store_true", help="few inputs; tables go to DIR/quick, records to the same file"
    )
    parser.add_argument("--full", action="store_true", help=f"{', '.join(WITH_FULL)}: more of everything (hours)")
    given = parser.add_argument_group("robustness of a classifier of your own")
    given.add_argument("--model", metavar="NAME", help="a Hugging Face folder or name, package.module:attribute, ...")
    given.add_argument("--images", type=Path, metavar="DIR", help="with a folder of pictures for each class")
    given.add_argument(
        "--classes", type=Path, metavar="FILE", help="a JSON object with the number of the class of each folder by name"
    )
    given.add_argument("--count", type=int, metavar="N", help="of images, a sample (default: 200; with --quick 4)")
    given.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="evaluate again what is in the records")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="default: results")
    parser.add_argument("--time-limit", type=float, default=120.0, metavar="S", help="seconds for one evaluation")
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="tightness, balls and robustness: compute on the Ray cluster at host:port, auto or local; without an "
        "address, on the running one or else on all cores of this machine. Needs `pip install 'lipbounds[ray]'`",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="robustness: models at a time, in processes (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-job", type=float, default=0.0, metavar="G", help="with --ray: evaluate on GPUs, G for each job"
    )
    parser.add_argument(
        "--check", action="store_true", help="readme: exit with 1 if the README is stale, write nothing"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="PATH", help="default: README.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
