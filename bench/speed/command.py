"""`python -m bench speed`: time and memory beside a forward pass."""

from __future__ import annotations

import argparse
import dataclasses as dc
import sys

import torch

from bench.engine.answers import Answers
from bench.engine.machine import describe, environment
from bench.engine.options import command_of, finish, folder_of, profile_of, write_page
from bench.speed import plan as speed_plan
from bench.speed import tables as speed_tables
from bench.speed import task as speed


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
    text = speed_tables.report(data, command_of(options, "speed"), describe(environment()))
    written = write_page(folder, "speed", text, data)
    return finish(answers, [*written, *speed_tables.draw(data, folder)])
