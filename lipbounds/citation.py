"""BibTeX of this project, of the paper it is about, and of the sources of bounds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lipbounds import __version__
from lipbounds.claims import Source
from lipbounds.registry import get, registry


PAPER = "yudin2025.theorem3"


def bibtex(names: Sequence[str] = ()) -> str:
    """The entries, one for each source.

    Args:
        names: of bounds; `all` for every registered one.

    Raises:
        UnknownBound: there is no bound of such a name.
    """
    specs = [*registry] if "all" in names else [get(name) for name in names]
    entries: dict[str, str] = {}
    for source in (get(PAPER).source, *(spec.source for spec in specs)):
        if source.authors:
            entries.setdefault(key(source), entry(source))
    own = {
        "title": "{lipbounds}: compare, verify and use local {Lipschitz} bounds of transformers",
        "author": "{The lipbounds developers}",
        "note": f"Version {__version__}",
    }
    return "\n".join([_entry("software", "lipbounds", own), *(entries[name] for name in sorted(entries))])


def key(source: Source) -> str:
    """Such as `yudin2025`: the first author and the year.

    Args:
        source: with authors.
    """
    first = re.split(r",| and | et al", source.authors.removeprefix("after "))[0]
    return f"{re.sub(r'[^a-z]', '', first.lower())}{source.year or ''}"


def entry(source: Source) -> str:
    """One source as BibTeX.

    Args:
        source: with authors.
    """
    authors = re.sub(r"\s+et al\.?", " and others", source.authors.removeprefix("after "))
    fields = {"title": f"{{{source.title}}}", "author": authors.replace(", ", " and "), "year": str(source.year or "")}
    if source.arxiv:
        fields |= {"eprint": source.arxiv, "archiveprefix": "arXiv"}
    return _entry(
        "article" if source.arxiv else "misc", key(source), {name: fields[name] for name in fields if fields[name]}
    )


def _entry(kind: str, name: str, fields: dict[str, str]) -> str:
    lines = [f"  {field} = {{{text}}}," for field, text in fields.items()]
    return "\n".join([f"@{kind}{{{name},", *lines, "}"]) + "\n"
