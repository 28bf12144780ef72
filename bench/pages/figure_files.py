"""Writing a figure to disk, the same bytes for the same numbers."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from lipbounds.files import write_atomically


def save(canvas: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg, without the date, and return their paths.

    Args:
        canvas: the figure.
        folder: where they go.
        name: without ending.
    """
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        content = BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else None
        canvas.savefig(content, format=path.suffix[1:], bbox_inches="tight", metadata=metadata)
        svg = path.suffix == ".svg"
        write_atomically(path, _renumbered(content.getvalue().decode()).encode() if svg else content.getvalue())
    return paths


def _renumbered(text: str) -> str:
    """An SVG whose ids are numbers: matplotlib hashes floats for them, whose last bits differ between processors."""
    names = dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', text))
    numbers = {name: f"id{number}" for number, name in enumerate(names)}
    return re.sub(r"\b[a-z][0-9a-f]{10}\b", lambda found: numbers.get(found[0], found[0]), text)
