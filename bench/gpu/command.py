"""`python -m bench gpu`: everything that needs a GPU, in the ten minutes for which one is at hand."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.engine.evaluate import TimeLimitReached, limited
from bench.engine.machine import ROOT
from bench.engine.options import check_folder
from bench.gpu.measurements import Measurement, Skipped, measurements
from bench.gpu.page import page
from bench.gpu.results import Results, place
from lipbounds.devices import device_named
from lipbounds.errors import LipboundsError
from lipbounds.files import write_atomically


HELP = "what needs a GPU, in the ten minutes for which one is at hand: see `python -m bench gpu --help`"
MISUSE, FAILED = 2, 1
MINUTES = 9.0


def main(arguments: Sequence[str]) -> int:
    """Run and return the exit status: 0, 1 where a check or a measurement failed, 2 for misuse.

    Args:
        arguments: those after `gpu`.
    """
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or with --quick cpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes; the page goes to DIR/quick")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="no measurement begins later (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the four files of Fashion-MNIST; default: 8 x 8 digits",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="default: results")
    options = parser.parse_args(arguments)
    try:
        device = device_named(options.device)
        check_folder(options.results)
    except LipboundsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return MISUSE
    if device.type != "cuda" and not options.quick:
        parser.error(f"pages of this command are of GPUs: --device {options.device} goes with --quick")
    return _run(device, options)


def _run(device: torch.device, options: argparse.Namespace) -> int:
    """Every measurement that there is time for, and the page after each part and at the end."""
    here = place(device, quick=options.quick)
    folder = options.results / "quick" if options.quick else options.results
    name = "gpu_" + "".join(letter if letter.isalnum() else "-" for letter in here["hardware"].lower())
    results, every = (
        Results(folder / f"{name}.jsonl", here),
        measurements(device, quick=options.quick, data=options.data),
    )
    target = folder / f"{name}.md"
    end, troubles = time.monotonic() + 60 * options.minutes, 0
    for number, measurement in enumerate(every, 1):
        known = results.found.get((measurement.part, measurement.name))
        if known is not None and "error" not in known and not options.force:
            continue
        if time.monotonic() > end:
            print(f"bench: {options.minutes:g} minutes are over; run the same command again to go on.", file=sys.stderr)
            break
        print(f"[{number}/{len(every)}] {measurement.part}: {measurement.name}", file=sys.stderr)
        results.keep(measurement.part, measurement.name, _made(measurement))
        write_atomically(target, page(every, results.found, here).encode())
    for measurement in every:
        result = results.found.get((measurement.part, measurement.name), {})
        if "error" in result or result.get("passed") is False:
            troubles += 1
            print(f"{measurement.part}, {measurement.name}: {result.get('error', 'the check failed')}", file=sys.stderr)
    write_atomically(target, page(every, results.found, here).encode())
    print(f"Written: {target}, {results.path}")
    return FAILED if troubles else 0


def _made(measurement: Measurement) -> dict[str, Any]:
    """The result of a measurement, or why there is none: what comes after it is made all the same."""
    began = time.perf_counter()
    try:
        with limited(measurement.limit):
            result: dict[str, Any] = measurement.work()
    except Skipped as reason:
        result = {"skipped": str(reason)}
    except TimeLimitReached:
        result = {"error": f"no result within {measurement.limit:g} s"}
    except Exception as error:  # out of memory, a kernel that does not compile: the page says so
        result = {
            "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        }
    return result | {"seconds_in_all": time.perf_counter() - began}
