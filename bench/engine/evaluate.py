"""One evaluation of one bound at one block, whatever comes of it, as a record."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from bench.engine.records import Question, Record, Status
from bench.workloads.case import DTYPE, Case
from bench.workloads.radii import Multiple
from lipbounds.errors import Unsupported
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention


class TimeLimitReached(BaseException):
    """The evaluation ran past its limit; not an Exception, so that no handler inside a bound swallows it."""


def question(
    task: str, case: Case, spec: BoundSpec, options: dict[str, Any] | None = None, radius: Multiple | None = None
) -> Question:
    """What is asked when `spec` is evaluated at `case`.

    Args:
        task: name of the benchmark task.
        case: the block.
        spec: the bound or estimator.
        options: its options that differ from the defaults; all of them end up in the key.
        radius: for the scopes that need one.
    """
    everything = {**spec.defaults, **(options or {})}
    seed = everything.pop("seed", None)
    names = ("model", "model_hash", "input", "input_hash", "layer")
    return Question(
        **{name: getattr(case, name) for name in names},
        task=task,
        bound=spec.name,
        bound_version=spec.version,
        norm=spec.claim.norm,
        radius=None if radius is None else radius.count,
        unit="" if radius is None else radius.unit,
        dtype=DTYPE,
        device="cpu",
        seed=seed,
        options=everything,
    )


def evaluate(
    asked: Question,
    block: Attention,
    spec: BoundSpec,
    *,
    time_limit: float,
    environment: str = "",
    radius: Multiple | None = None,
    module: str = "",
) -> Record:
    """Evaluate and describe what happened; a failure is a record, too. Only an interrupt by the user gets out.

    Args:
        asked: what `question` returned for this block and spec.
        block: the block.
        spec: the bound or estimator.
        time_limit: seconds; it ends the evaluation between two operations of torch, not inside one. Not on Windows.
        environment: id of the environment line, where it is known.
        radius: of the ball or set, for the scopes that need one.
        module: name of the block, for the tables.
    """
    options = {**asked.options, **({} if asked.seed is None else {"seed": asked.seed})}
    value = None if radius is None else radius.at(block).value
    fresh = block.replace()  # without the cached queries, keys and logits of the bound before, which would flatter it
    answer: dict[str, Any] = {}
    status: Status = "ok"
    start = time.perf_counter()
    try:
        with torch.no_grad(), limited(time_limit):
            result = spec(fresh, value, **options)
            if fresh.device.type == "cuda":
                torch.cuda.synchronize(fresh.device)
        answer = {
            "value": result.value.item(),
            "terms": _means(result.terms),
            "details": _means(result.details),
            "delta": result.delta,
        }
    except Unsupported as error:
        status, answer = "unsupported", {"error": str(error)}
    except TimeLimitReached:
        status, answer = "timeout", {"error": f"no result within {time_limit:g} s; raise --time-limit to wait longer."}
    except Exception as error:
        status, answer = "failed", {"error": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - start, 6)  # the clock tells no more
    return Record(
        **_described(asked, block, spec, radius, module),
        **answer,
        seconds=seconds,
        status=status,
        environment=environment,
    )


def lost(
    asked: Question, block: Attention, spec: BoundSpec, error: str, radius: Multiple | None, module: str
) -> Record:
    """The record of an evaluation of which nothing came back, not even an error: that failed, too.

    Args:
        asked: what `question` returned for this block and spec.
        block: the block.
        spec: the bound or estimator.
        error: what is known of the reason.
        radius: of the ball or set, for the scopes that need one.
        module: name of the block, for the tables.
    """
    described = _described(asked, block, spec, radius, module)
    return Record(**described, seconds=0.0, status="failed", error=error, environment="")


def _described(
    asked: Question, block: Attention, spec: BoundSpec, radius: Multiple | None, module: str
) -> dict[str, Any]:
    """What a record says besides the answer."""
    claim: dict[str, Any] = {"kind": spec.claim.kind, "scope": spec.claim.scope}
    if radius is not None:
        found = radius.at(block)
        claim |= {"radius": found.value, "relative_radius": found.relative}
    return {"question": asked, "tokens": block.tokens, "heads": block.heads, "module": module, **claim}


def _means(parts: dict[str, Tensor]) -> dict[str, float]:
    """Numbers as they are; of a part with one entry a head or row the mean, to keep the records small."""
    return {name: torch.as_tensor(part).detach().double().mean().item() for name, part in parts.items()}


@contextmanager
def limited(seconds: float, *, of: Literal["clock", "processor"] = "clock") -> Iterator[None]:
    """Raise TimeLimitReached after so many seconds; signals exist on POSIX and in the main thread only.

    Args:
        seconds: how many.
        of: the clock, or the processor time of this process.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimitReached

    number, timer = (signal.SIGALRM, signal.ITIMER_REAL) if of == "clock" else (signal.SIGPROF, signal.ITIMER_PROF)
    before = signal.signal(number, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)
