"""`python -m bench robustness`: robust accuracy of models trained with and without penalties."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.engine.answers import Answers
from bench.engine.options import cluster_of, command_of, finish, folder_of, profile_of, progress_bar, write_page
from bench.robustness import figures, tables
from bench.robustness import task as robustness
from bench.robustness.settings import PROFILES
from bench.robustness.summary import summarised
from bench.robustness.training import Workshop
from lipbounds.models.digits_data import load_digits_split


WEIGHTS = Path(".work") / "robustness"  # under the folder of results; git ignores it


def run(options: argparse.Namespace, *, only_read: bool = False) -> int:
    """Train and attack what is missing, write the page, the numbers and the figures.

    Args:
        options: the command line.
        only_read: make nothing anew.

    Raises:
        NotAnswered: something is missing, and nothing is to be made.
    """
    name = profile_of(options)
    profile = PROFILES[name]
    answers = Answers(options.results / "robustness.jsonl", only_read=only_read)
    workshop = Workshop(answers, options.results / WEIGHTS, load_digits_split(), options.force and not only_read)
    command = command_of(options, "robustness")
    with cluster_of(options) as cluster, progress_bar(robustness.pieces(profile)) as advance:
        found = robustness.run(workshop, profile, jobs=options.jobs, cluster=cluster, advance=advance)
    data = {"command": command, "profile": name, **found}
    summary = summarised(data)
    folder = folder_of(options)
    written = write_page(folder, "robustness", tables.report(data, summary, command), {**summary, **data})
    return finish(workshop.answers, [*written, *figures.draw(data, summary, folder)])
