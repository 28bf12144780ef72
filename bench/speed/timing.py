"""Time and peak memory of one call beside those of another in the same process."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch

from bench.speed.card import card, noted


Make = Callable[[], Callable[[], Any]]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what clear_refs of Linux takes to set the peak back to the present size
MEGABYTE = 2**20


def side_by_side(make: Make, baseline: Make, *, repeats: int, enough: float, device: torch.device) -> dict[str, Any]:
    """Times of a call and of the baseline, in turns, so that what else the machine does slows both.

    The ratio is that of processor times on a CPU, all threads together, which count nothing while other programs run;
    of times between events on CUDA, which the card takes itself; and of wall times elsewhere. On CUDA the clocks, power
    and temperature of the card before and after come along as `card`.

    The first call of each warms up and is not counted, unless it alone takes longer than `enough`.

    Args:
        make: prepares a call, untimed, and returns it: nothing cached by the call before may flatter it.
        baseline: the same for what the time is divided by.
        repeats: how many times each is timed at most.
        enough: seconds of the cost of all repeats, after which no further one is begun.
        device: where both run.
    """
    before = card(device)
    seconds_of(baseline(), device)
    pairs = [(seconds_of(make(), device), seconds_of(baseline(), device))]
    if pairs[0][0].cost(device) < enough:
        pairs = []
    spent = 0.0
    while len(pairs) < repeats and (not pairs or spent < enough):
        pairs.append((seconds_of(make(), device), seconds_of(baseline(), device)))
        spent += sum(seconds.cost(device) for seconds in pairs[-1])
    return {
        "seconds": quartiles([own.wall for own, _ in pairs]),
        "baseline_seconds": quartiles([base.wall for _, base in pairs]),
        "cost": quartiles([own.cost(device) for own, _ in pairs]),
        "ratio": quartiles([own.cost(device) / base.cost(device) for own, base in pairs]),
        "repeats": len(pairs),
        **noted(before, card(device)),
    }


class Seconds(NamedTuple):
    """Wall time, processor time, and time between events on the device where it has them, of one call."""

    wall: float
    processor: float
    events: float | None = None

    def cost(self, device: torch.device) -> float:
        """The time that is compared: of the processor, or the card, that does the work.

        Args:
            device: that the call ran on.
        """
        if self.events is not None:
            return self.events
        return self.processor if device.type == "cpu" else self.wall


def seconds_of(call: Callable[[], Any], device: torch.device) -> Seconds:
    """Time of one call, until the device is done.

    Args:
        call: what is timed.
        device: that it runs on.
    """
    begin, end = _events(device)
    _synchronise(device)
    start, processor = time.perf_counter(), time.process_time()
    if begin is not None:
        begin.record(torch.cuda.current_stream(device))
    call()
    if end is not None:
        end.record(torch.cuda.current_stream(device))
    _synchronise(device)
    wall, processor = time.perf_counter() - start, time.process_time() - processor
    between = None if begin is None or end is None else begin.elapsed_time(end) / 1000
    return Seconds(wall, processor, between)


def _events(device: torch.device) -> tuple[Any, Any]:
    """Two events that take the time on the card itself; None where there is none."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile.

    Args:
        values: at least one.
    """
    return [values[0]] * 3 if len(values) == 1 else quantiles(values, n=4, method="inclusive")


def peak_memory(make: Make, device: torch.device) -> float | None:
    """Megabytes that a call needs at most beyond what was there before it; None where that cannot be told.

    On CUDA what torch allocates. Elsewhere how far the resident set of this process rises, which sees torch, LAPACK and
    everything else: Linux resets the peak on request, and memory that was freed is first handed back to the system, so
    that it counts again when it is taken again.

    Args:
        make: prepares a call and returns it.
        device: that it runs on.
    """
    call = make()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text(RESET_PEAK)
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / MEGABYTE


def exponent(points: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Growth exponent of a time: the slope of a straight line through the last points, in logarithms.

    Args:
        points: sizes and times, in order; the last four at most are used.

    Returns:
        the slope, the smallest and the largest slope between neighbours, and the sizes it was fitted over; None for
        fewer than three points.
    """
    points = points[-4:]
    if len(points) < 3:
        return None
    sizes, times = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    centred = sizes - sizes.mean()
    slopes = times.diff() / sizes.diff()
    return {
        "slope": float((centred * times).sum() / centred.square().sum()),
        "between": [float(slopes.min()), float(slopes.max())],
        "sizes": [points[0][0], points[-1][0]],
    }


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
