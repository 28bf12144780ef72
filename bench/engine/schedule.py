"""What is asked at a block, one question after the other: the next one may depend on the answer."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from bench.engine.records import Question, Record
from bench.workloads.case import Case
from bench.workloads.radii import Multiple
from lipbounds.registry import BoundSpec


class Method(NamedTuple):
    """A bound or estimator as it is evaluated: with its options, and the radius where its scope has one."""

    spec: BoundSpec
    options: dict[str, Any]
    radius: Multiple | None = None


# Yields what to evaluate at one block, is sent the record, and yields again or ends.
Chain = Generator[Method, Record, None]


def single(method: Method) -> Chain:
    """A chain of one question.

    Args:
        method: what is evaluated.
    """
    yield method


@dc.dataclass(eq=False)
class Block:
    """A block with chains under way.

    Args:
        case: the block.
        left: number of its chains that have not ended.
        sent: what stands for the block on a cluster, once a worker needs it.
    """

    case: Case
    left: int
    sent: Any = None


@dc.dataclass(eq=False)
class PendingQuestion:
    """A question with what is needed to answer it.

    Args:
        question: what is asked.
        block: where.
        method: what is evaluated.
    """

    question: Question
    block: Block
    method: Method


@dc.dataclass(eq=False)
class RunningChain:
    """One chain under way.

    Args:
        block: where it asks.
        chain: what it asks.
        keys: of its questions so far.
        asked: the question that it waits at; None before the first one and after the last one.
    """

    block: Block
    chain: Chain
    keys: list[str] = dc.field(default_factory=list)
    asked: PendingQuestion | None = None

    def next(self, record: Record | None) -> Method | None:
        """What to evaluate next; None at the end.

        Args:
            record: the answer before; None at the beginning.
        """
        try:
            return next(self.chain) if record is None else self.chain.send(record)
        except StopIteration:
            self.asked = None
            self.block.left -= 1
            return None


def chains_at(case: Case, chains: Sequence[Chain]) -> list[RunningChain]:
    """The chains at one block, none of them begun.

    Args:
        case: the block.
        chains: what is asked there.
    """
    block = Block(case, len(chains))
    return [RunningChain(block, chain) for chain in chains]
