"""Writing a figure to disk, the same bytes for the same numbers."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lipbounds.files import write_atomically


ROUND = 50  # what is cut out of a figure has sides at multiples of 1/50 inch


def arrange(canvas: Figure) -> None:
    """Set the margins as `tight_layout` does, rounded: text is a little wider or narrower on other processors.

    Args:
        canvas: the figure, with all that is drawn on it.
    """
    canvas.tight_layout()
    canvas.set_layout_engine(None)  # what `tight_layout` leaves behind has the figure drawn once more for each file
    margins = ("left", "right", "bottom", "top", "wspace", "hspace")
    canvas.subplots_adjust(**{margin: round(getattr(canvas.subplotpars, margin), 4) for margin in margins})


def save(canvas: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.svg, without the date, and return their paths.

    Args:
        canvas: the figure.
        folder: where they go.
        name: without ending.
    """
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    box = _tight(canvas)
    for path in paths:
        content = BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else None
        svg = path.suffix == ".svg"
        canvas.savefig(content, format=path.suffix[1:], bbox_inches=box, metadata=metadata)
        write_atomically(path, _renumbered(content.getvalue().decode()).encode() if svg else content.getvalue())
    return paths


def _tight(canvas: Figure) -> Bbox:
    """What `bbox_inches="tight"` stands for, rounded outwards: measured once, for both files, without drawing."""
    shown, dpi = canvas.canvas, canvas.dpi
    FigureCanvasAgg(canvas)
    try:
        box = canvas.get_tightbbox().padded(rcParams["savefig.pad_inches"])
        return Bbox(np.stack([np.floor(box.min * ROUND), np.ceil(box.max * ROUND)]) / ROUND)
    finally:
        canvas.set_canvas(shown)
        canvas.dpi = dpi


def _renumbered(text: str) -> str:
    """An SVG whose ids are numbers: matplotlib hashes floats for them, whose last bits differ between processors."""
    names = dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', text))
    numbers = {name: f"id{number}" for number, name in enumerate(names)}
    return re.sub(r"\b[a-z][0-9a-f]{10}\b", lambda found: numbers.get(found[0], found[0]), text)
