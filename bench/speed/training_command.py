"""`python -m bench training`: what JaSMin adds to a training step."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from bench.engine.answers import Answers
from bench.engine.machine import describe, environment
from bench.engine.options import command_of, finish, folder_of, profile_of, write_page
from bench.pages.formatting import table
from bench.speed import training_task as training
from bench.speed.tables import target_rows


def run(options: argparse.Namespace, *, only_read: bool = False) -> int:
    """Measure what is missing, write the page and the numbers.

    Args:
        options: the command line.
        only_read: measure nothing anew.

    Raises:
        NotAnswered: something is missing, and nothing is to be measured.
    """
    answers = Answers(options.results / "training.jsonl", only_read=only_read)
    data = training.run(
        answers,
        profile_of(options),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        force=options.force and not only_read,
        advance=lambda what: print(f"training: {what}", file=sys.stderr),
    )
    folder = folder_of(options)
    text = _report(data, command_of(options, "training"), describe(environment()))
    return finish(answers, write_page(folder, "training", text, data))


def _report(data: dict[str, Any], command: str, state: str) -> str:
    here = data["place"]
    counted = (
        "processor time, which counts nothing while other programs run"
        if here["device"] == "cpu"
        else "time between events on the card"
    )
    rows = target_rows([{**row, "method": "JaSMin"} for row in data["rows"]])
    parts = [
        "# Training steps with JaSMin",
        f"Made by `{command}`; nothing here is written by hand.",
        "A step of SGD in float32, forward and backward, with the penalty at its defaults, by one without, in turns "
        f"in one process: median, and in brackets the quartiles, of the ratio of costs ({counted}), on "
        f"{here['hardware']} with {here['threads']} {'thread' if here['threads'] == 1 else 'threads'}.",
        table(["model", "name", "target", "ratio", "met", "seconds"], rows),
        "## Environment",
        f"- {state}",
    ]
    return "\n\n".join(parts) + "\n"
