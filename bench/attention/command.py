"""`python -m bench attention`: attention maps beside local constants and attacks."""

from __future__ import annotations

import argparse

from bench.attention import figures as attention_figures
from bench.attention import tables as attention_tables
from bench.attention import task as attention
from bench.engine.answers import Answers
from bench.engine.machine import describe, environment
from bench.engine.options import command_of, finish, folder_of, profile_of, progress_bar, shown
from bench.engine.store import read
from lipbounds.files import write_atomically


def run(options: argparse.Namespace, *, only_read: bool = False) -> int:
    """Answer what is missing, write the page and the figures; 1 if a certified image fell.

    Args:
        options: the command line.
        only_read: make nothing anew.

    Raises:
        NotAnswered: something is missing, and nothing is to be made.
    """
    profile = attention.PROFILES[profile_of(options)]
    answers = Answers(options.results / "attention.jsonl", only_read=only_read)
    known = read(options.results / "tightness.jsonl").records
    with progress_bar(attention.pieces(profile)) as advance:
        data = attention.run(answers, profile, known, force=options.force and not only_read, advance=advance)
    troubles = attention.violations(data, Answers(options.results / "certified.jsonl").found)
    if only_read:  # the page names the machine and commit of its numbers: it stays
        return finish(answers, [], troubles)
    folder = folder_of(options)
    command = command_of(options, "attention")
    text = attention_tables.report(data, command, shown(answers.path), describe(environment()))
    write_atomically(folder / "attention.md", text.encode())
    paths = [folder / "attention.md", *attention_figures.draw(data, folder)]
    return finish(answers, paths, troubles)
