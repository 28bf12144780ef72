"""Writing a figure to disk, the same bytes for the same numbers."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

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
        svg = path.suffix == ".svg"
        canvas.savefig(content, format=path.suffix[1:], bbox_inches=_tight(canvas, svg), metadata=metadata)
        write_atomically(path, _renumbered(content.getvalue().decode()).encode() if svg else content.getvalue())
    return paths


def _tight(canvas: Figure, svg: bool) -> Bbox:
    """What `bbox_inches="tight"` stands for, without drawing the figure once more to find it."""
    shown, dpi = canvas.canvas, canvas.dpi
    (FigureCanvasSVG if svg else FigureCanvasAgg)(canvas)
    try:
        return canvas.get_tightbbox().padded(rcParams["savefig.pad_inches"])
    finally:
        canvas.set_canvas(shown)
        canvas.dpi = dpi


def _renumbered(text: str) -> str:
    """An SVG whose ids are numbers: matplotlib hashes floats for them, whose last bits differ between processors."""
    names = dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', text))
    numbers = {name: f"id{number}" for number, name in enumerate(names)}
    return re.sub(r"\b[a-z][0-9a-f]{10}\b", lambda found: numbers.get(found[0], found[0]), text)
