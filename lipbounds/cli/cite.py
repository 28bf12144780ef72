"""`lipbounds cite`: BibTeX of this project, of the paper, and of the sources of bounds."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    bounds: Annotated[
        list[str] | None, typer.Argument(help="Names of bounds whose sources are wanted, too; `all` for every source.")
    ] = None,
) -> None:
    """Print BibTeX: this project, Yudin et al. 2025, and the sources of the bounds that are named."""
    from lipbounds.citation import bibtex

    print(bibtex(bounds or []), end="")  # noqa: T201 - to be piped into a file
