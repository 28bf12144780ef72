"""`python -m bench certified`: certified radii beside an attack, and bounds of whole models."""

from __future__ import annotations

import argparse

from bench.certified import tables as certified_tables
from bench.certified import task as certified
from bench.engine.answers import Answers
from bench.engine.machine import describe, environment
from bench.engine.options import command_of, finish, folder_of, profile_of, progress_bar, write_page


def run(options: argparse.Namespace, *, only_read: bool = False) -> int:
    """Answer what is missing, write the page, the numbers and the figures; 1 if a certified image fell.

    Args:
        options: the command line.
        only_read: make nothing anew.

    Raises:
        NotAnswered: something is missing, and nothing is to be made.
    """
    chosen = certified.PROFILES[profile_of(options)]
    answers = Answers(options.results / "certified.jsonl", only_read=only_read)
    pieces = sum(chosen.certified.values()) + len(chosen.whole)
    pieces += sum(chosen.radii for count in chosen.attacked.values() if count)
    with progress_bar(pieces) as advance:
        data = certified.run(answers, chosen, force=options.force and not only_read, advance=advance)
    if only_read:  # the page names the machine and commit of its numbers: it stays
        return finish(answers, [], certified.violations(data))
    folder = folder_of(options)
    text = certified_tables.report(data, command_of(options, "certified"), describe(environment()))
    written = write_page(folder, "certified", text, data)
    return finish(answers, [*written, *certified_tables.draw(data, folder)], certified.violations(data))
