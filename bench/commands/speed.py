"""`python -m bench speed`: time and memory beside a forward pass."""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import sys

import torch

from bench import speed_plan, speed_tables
from bench.certified_data import Answers
from bench.commands.common import command_of, finish, folder_of, profile_of
from bench.machine import describe, environment
from bench.records import without_infinities
from bench.store import write_atomically
from bench.tasks import speed


def run(options: argparse.Namespace, *, only_read: bool = False) -> int:
    """Measure what is missing, write the page, the numbers and the figures.

    Args:
        options: the command line.
        only_read: measure nothing anew.

    Raises:
        NotAnswered: something is missing, and nothing is to be measured.
    """
    answers = Answers(options.results / "speed.jsonl", only_read=only_read)
    data = speed.run(
        answers,
        dc.replace(speed_plan.PROFILES[profile_of(options)], stop=options.time_limit),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        force=options.force and not only_read,
        advance=lambda what: print(f"speed: {what}", file=sys.stderr),
    )
    folder = folder_of(options)
    page, numbers = folder / "speed.md", folder / "speed.json"
    write_atomically(page, speed_tables.report(data, command_of(options, "speed"), describe(environment())).encode())
    write_atomically(numbers, (json.dumps(without_infinities(data), indent=1, ensure_ascii=False) + "\n").encode())
    return finish(answers, [page, numbers, *speed_tables.draw(data, folder)])
