"""Writing a figure to disk, the same bytes for the same numbers."""

from __future__ import annotations

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
        write_atomically(path, content.getvalue())
    return paths
