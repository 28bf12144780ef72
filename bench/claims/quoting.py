"""Tables of results in the pages that quote them, and the check that they are the current ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from bench.pages.page import markers
from lipbounds.files import write_atomically


QUOTED = {"verdicts": "claims.md", "claims": "claims.md", "pretrained": "pretrained.md"}  # marked part: page of results


def update(pages: Iterable[Path], results: Path, *, check: bool) -> list[Path]:
    """The pages that did not hold the current tables; they hold them afterwards, unless `check`.

    Args:
        pages: in which tables stand between markers; what has no markers is left alone.
        results: the folder with the pages that are quoted; those that are not there are not.
        check: only look.
    """
    found = {name: _between(results / page, name) for name, page in QUOTED.items()}
    stale = []
    for path in pages:
        old = new = path.read_text(encoding="utf-8") if path.exists() else ""
        folder = Path(os.path.relpath(results, path.parent)).as_posix()
        for name, part in found.items():
            begin, end = markers(name)
            if part and begin in new and end in new:
                linked = re.sub(r"\]\((\w+\.md)\)", rf"]({folder}/\1)", part)
                new = new.partition(begin)[0] + begin + linked + end + new.partition(end)[2]
        if new != old:
            stale.append(path)
            if not check:
                write_atomically(path, new.encode())
    return stale


def _between(page: Path, name: str) -> str:
    """What stands between the markers of a page; empty where there is none."""
    begin, end = markers(name)
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return text.partition(begin)[2].partition(end)[0]
