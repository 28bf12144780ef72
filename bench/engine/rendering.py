"""Pages of several tasks at a time, each in a process of its own; what they print comes in the order of the tasks."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor

from bench.engine.task import Task


def render(
    tasks: Sequence[Task], options: argparse.Namespace, *, processes: int, first: Collection[Task] = ()
) -> list[int]:
    """Write the pages of the tasks from the records; returns their statuses.

    Args:
        tasks: in the order of what is printed.
        options: the command line.
        processes: how many are forked; with 1 none is. A process in which torch has computed must not fork.
        first: the tasks that take longest, which start first.

    Raises:
        RecordError: as `Task.render`.
    """
    if processes == 1 or "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return [task.render(options) for task in tasks]
    taken = argparse.Namespace(quick=options.quick, results=options.results)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _prepare, (tasks, taken)) as pool:
        order = sorted(range(len(tasks)), key=lambda number: tasks[number] not in first)
        running = {number: pool.submit(_rendered, number) for number in order}
        statuses = []
        try:
            for number in range(len(tasks)):
                status, said, complaints = running[number].result()
                sys.stdout.write(said)
                sys.stderr.write(complaints)
                statuses.append(status)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return statuses


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_shared: tuple[Sequence[Task], argparse.Namespace]  # of a forked process: tasks hold functions, which are not sent


def _prepare(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    global _shared
    _shared = tasks, options
    gc.disable()  # a tenth of the time: what is read is needed to the end, which is seconds away


def _rendered(number: int) -> tuple[int, str, str]:
    """The status of a task, and what it printed on stdout and stderr."""
    tasks, options = _shared
    said, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
        status = tasks[number].render(options)
    return status, said.getvalue(), complaints.getvalue()
