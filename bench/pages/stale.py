"""Marks on a page what an older version of a bound, or of the code of a task, measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lipbounds import registry
from lipbounds.errors import UnknownBound


def older_bounds(questions: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Bounds of which the answers are of an older version: the oldest one, and the version of today.

    Args:
        questions: of the answers of a page; they name a bound and its version, or several in `bounds`.
    """
    used: dict[str, int] = {}
    for question in questions:
        several = question.get("bounds")
        named = dict(several) if isinstance(several, Mapping) else {}
        if "bound_version" in question:
            named[question["bound"]] = question["bound_version"]
        for name, version in named.items():
            used[name] = min(int(version), used.get(name, int(version)))
    found = {}
    for name, version in used.items():
        try:
            today = registry.get(name).version
        except UnknownBound:  # of a stranger's package that is not installed here
            continue
        if version < today:
            found[name] = version, today
    return found


def older_code(questions: Iterable[Mapping[str, Any]], today: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Kinds of answers that older code of the task made: the oldest version, and that of today.

    Args:
        questions: of the answers of a page.
        today: the version of each kind (`what` of a question), "" for the others.
    """
    found: dict[str, tuple[int, int]] = {}
    for question in questions:
        kind, version = question.get("what") or "", question.get("version")
        now = today.get(kind, today.get("", 0))
        if isinstance(version, int) and version < now:
            found[kind] = min(version, found.get(kind, (version, now))[0]), now
    return found


def marked(text: str, bounds: Mapping[str, tuple[int, int]], code: Mapping[str, tuple[int, int]], command: str) -> str:
    """The page with a warning below its title, and with the version in each cell that names such a bound.

    Args:
        text: of the page, in Markdown.
        bounds: what `older_bounds` returned.
        code: what `older_code` returned.
        command: that measures again.
    """
    if not bounds and not code:
        return text
    said = [f"`{name}` with version {old} (today {new})" for name, (old, new) in sorted(bounds.items())]
    for kind, (old, new) in code.items():
        said.append(f"answers{f' of the kind {kind}' if kind else ''} with code {old} (today {new})")
    warning = f"**Measured with older versions:** {', '.join(said)}. `{command}` measures them with those of today."
    lines = [_marked(line, bounds) if line.startswith("|") else line for line in text.split("\n")]
    title = next((number for number, line in enumerate(lines) if line.startswith("# ")), -1)
    return "\n".join([*lines[: title + 1], "", warning, *lines[title + 1 :]])


def _marked(row: str, bounds: Mapping[str, tuple[int, int]]) -> str:
    """A row of a table; a cell begins with the name, plain, as code or in bold, and may say more after a space."""
    for name, (old, _) in bounds.items():
        cell = rf"(\| *)([*`]*{re.escape(name)}[*`]*)(?=[ |])"
        row = re.sub(cell, rf"\1\2, measured with version {old}", row)
    return row
