"""The numbers of a report in a process of their own, which can be ended whatever it is computing."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch

from lipbounds.allocator import keep_freed_memory
from lipbounds.errors import LipboundsError
from lipbounds.report.evaluation import Found, Plan, Stage, compute
from lipbounds.targets.attention import Attention
from lipbounds.targets.serialize import detached_copy


class Worker:
    """A process that computes stages one after the other, until the time is up.

    Args:
        deadline: on the clock of `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        start = f"import sys; sys.path[:] = {sys.path!r}; from lipbounds.report.worker import serve; serve()"
        self._process = subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._folder, self._count = TemporaryDirectory(), 0
        self._sent: list[Sequence[Attention]] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._send(torch.get_num_threads())

    def compute(self, items: Sequence[Attention], stage: Stage, plan: Plan) -> tuple[Found, bool]:
        """What `lipbounds.report.evaluation.compute` finds, as far as there is time; and whether that is all of it.

        Args:
            items: blocks in float64, without batch dimensions.
            stage: which numbers.
            plan: what is wanted.

        Raises:
            LipboundsError: as `compute` does.
        """
        found = Found()
        # Blocks are sent once: what several stages ask of one is kept with it.
        number = next((i for i, sent in enumerate(self._sent) if sent is items), len(self._sent))
        new = number == len(self._sent)
        if new:
            self._sent.append(items)
        self._send((number, [detached_copy(item) for item in items] if new else None, stage, plan))
        while True:
            try:
                done, answer = self._answers.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                self.close()
                return found, False
            if isinstance(answer, BaseException):
                raise answer
            found = answer
            if done:
                return found, True

    def close(self) -> None:
        """End the process, whatever it is computing."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._folder.cleanup()

    def _send(self, message: Any) -> None:
        """Hand a message over without waiting for the process to read it, which it cannot while it starts."""
        self._count += 1
        path = Path(self._folder.name) / str(self._count)
        path.write_bytes(pickle.dumps(message))
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{path}\n".encode())
            self._process.stdin.flush()
        except OSError:
            pass  # the process has ended, which `_listen` tells

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                self._answers.put(pickle.load(self._process.stdout))
        except Exception:  # the end of the process, at any point of a message
            self._answers.put((True, LipboundsError("the process that computes the numbers ended before its time.")))


def serve() -> None:
    """Compute what comes in, and hand out what is there after each number."""
    keep_freed_memory()
    answers: BinaryIO = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a bound prints must not come among the answers

    def put(done: bool, answer: Any) -> None:
        pickle.dump((done, answer), answers)
        answers.flush()

    messages = (pickle.loads(Path(line.rstrip("\n")).read_bytes()) for line in sys.stdin)
    torch.set_num_threads(next(messages))
    known: list[Sequence[Attention]] = []
    for number, items, stage, plan in messages:
        if items is not None:
            known.append(items)
        try:
            put(True, compute(known[number], stage, plan, keep=lambda found: put(False, found)))
        except LipboundsError as error:
            put(True, error)
