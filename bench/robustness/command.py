"""`python -m bench robustness`: run what is missing, write the page, the numbers and the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.certified_data import Answers
from bench.records import without_infinities
from bench.robustness import figures, tables
from bench.robustness.settings import PROFILES, Profile
from bench.robustness.summary import summarised
from bench.robustness.training import Workshop
from bench.store import write_atomically
from bench.tasks import robustness
from lipbounds.models.digits_data import load_digits_split


WEIGHTS = Path(".work") / "robustness"  # under the folder of results; git ignores it


def run(results: Path, name: str, *, force: bool = False, only_read: bool = False) -> tuple[Answers, list[Path]]:
    """Run a profile and write its page, numbers and figures; returns the answers and what was written.

    Args:
        results: folder of the records; pages of the profile quick go to `quick` in it.
        name: of the profile.
        force: make again what is in the records.
        only_read: make nothing anew.

    Raises:
        NotAnswered: something is missing, and nothing is to be made.
    """
    profile = PROFILES[name]
    answers = Answers(results / "robustness.jsonl", only_read=only_read)
    workshop = Workshop(answers, results / WEIGHTS, load_digits_split(), force)
    command = "python -m bench robustness" + ("" if name == "standard" else f" --{name}")
    data = {"command": command, "profile": name, **_with_progress(workshop, profile)}
    summary = summarised(data)
    folder = results / "quick" if name == "quick" else results
    page, numbers = folder / "robustness.md", folder / "robustness.json"
    write_atomically(page, tables.report(data, summary, command).encode())
    content = without_infinities({**summary, **data})
    write_atomically(numbers, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return answers, [page, numbers, *figures.draw(data, summary, folder)]


def _with_progress(workshop: Workshop, profile: Profile) -> dict[str, Any]:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=robustness.pieces(profile))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        return robustness.run(workshop, profile, advance=advance)
