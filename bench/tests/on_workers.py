"""What the workers of the tests do; they tell in files, in the folder that WATCHED names, what they begin and where.

What takes long to import is imported by the functions that need it: each worker is a fresh process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from bench.engine.records import Question
    from lipbounds.targets.attention import Attention


WATCHED = "LIPBOUNDS_TESTS_WATCHED"
DOOMED = "doomed"  # holds the id of the node that is to die
PATIENCE = 60.0  # seconds that the other nodes wait for the doomed one
BEFORE = 2  # jobs which that node finishes; the next one never ends there


def begun(folder: Path) -> list[tuple[str, str]]:
    """Key and node of every evaluation that a worker began.

    Args:
        folder: where they told so.
    """
    names = [path.name.split("-") for path in folder.glob("*-*-*")]
    return [(key, node) for key, node, _ in names]


def answer_watched(block: Attention, question: Question, *rest: Any) -> Any:
    """As `answer`; on the doomed node, not even that after a while, and elsewhere not before that node has its share.

    Otherwise the other node could be so much quicker that nothing is under way on the doomed one.

    Args:
        block: the block.
        question: what is evaluated there.
        *rest: what else `answer` takes.
    """
    import ray

    from bench.engine.evaluators import answer

    folder, node = Path(os.environ[WATCHED]), ray.get_runtime_context().get_node_id()
    (folder / f"{question.key}-{node}-{uuid.uuid4().hex}").touch()
    doomed = (folder / DOOMED).read_text() if (folder / DOOMED).exists() else ""

    def share() -> int:
        return sum(where == doomed for _, where in begun(folder))

    if node == doomed and share() > BEFORE:
        time.sleep(600)
    end = time.monotonic() + PATIENCE
    while doomed and node != doomed and share() <= BEFORE and time.monotonic() < end:
        time.sleep(0.05)
    return answer(block, question, *rest)


def answer_slowly(*arguments: Any) -> Any:
    """As `answer`, slowly enough for a driver to be killed in between.

    Args:
        *arguments: of `answer`.
    """
    from bench.engine.evaluators import answer

    time.sleep(0.2)
    return answer(*arguments)


def answer_but_exact_dies(block: Attention, question: Question, *rest: Any) -> Any:
    """As `answer`, but asked for `exact` in the first layer it ends as where memory runs out.

    Args:
        block: the block.
        question: what is evaluated there.
        *rest: what else `answer` takes.
    """
    from bench.engine.evaluators import answer

    if question.bound == "exact" and question.layer == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(block, question, *rest)


def gpus_granted() -> list[int]:
    """The GPUs that Ray gave to the job."""
    import ray

    return [int(one) for one in ray.get_gpu_ids()]


def where_it_runs() -> dict[str, Any]:
    """What an evaluation relies on."""
    import torch

    return {
        "main thread": threading.current_thread() is threading.main_thread(),  # time limits are signals
        "threads": torch.get_num_threads(),
    }
