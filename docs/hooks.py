"""Brings results/ into the site, and on the page of each source the numbers of its bounds; run by mkdocs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


RESULTS = Path(__file__).parents[1] / "results"
PAGES = {
    "tightness.md": "python -m bench",
    "bounds.md": "python -m bench",
    "balls.md": "python -m bench balls",
    "certified.md": "python -m bench certified",
    "robustness.md": "python -m bench robustness",
    "robustness_mnist_5k.md": "python -m bench robustness --train-on mnist-5k",
    "pretrained.md": "python -m bench pretrained",
    "pretrained_balls.md": "python -m bench pretrained_balls",
    "claims.md": "python -m bench claims",
    "attention.md": "python -m bench attention",
    "speed.md": "python -m bench speed",
    "training.md": "python -m bench training",
    "scaling.md": "python -m bench scaling",
    "gpu_dry_run.md": "python -m bench gpu --device cpu --quick",
    "nightly.md": "python -m verify.nightly",
    "detection.md": "python -m verify.faults.detection",
}
FIGURES = (
    "tightness.png",
    "balls.png",
    "certified.png",
    "speed.png",
    "pareto.png",
    "attention_maps.png",
    "attention_statistics.png",
    "attention_scatter.png",
    "robustness.png",
    "robustness_constants.png",
    "robustness_g1.png",
    "robustness_mnist_5k.png",
    "robustness_mnist_5k_constants.png",
    "robustness_mnist_5k_g1.png",
    "robustness_mnist_5k_weights.png",
    "certified_instances.csv",
)
MARKER = "<!-- measured -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages, figures and the radii of results/; a page that was not made yet says how to make it."""
    for name, command in PAGES.items():
        uri, source = f"results/{name}", RESULTS / name
        if source.exists():
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        else:
            missing = f"# {source.stem.capitalize()}\n\nNot made yet: run `{command}`.\n"
            files.append(File.generated(config, uri, content=missing))
    for name in FIGURES:
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(RESULTS / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and results/, written as they hold in the repository, made to hold in the site."""
    path = Path(page.file.src_uri)
    if path.parent.name == "results":
        return markdown.replace("](../docs/", "](../")
    if path.parent.name == "bounds" and MARKER in markdown:
        markdown = markdown.replace(MARKER, measured(path.stem))
    return markdown.replace("../results/", "results/")


def measured(source: str) -> str:
    """What the benchmark and the long search say about the bounds of one source.

    Args:
        source: what the names of its bounds begin with, such as `yudin2025`.
    """
    tables = [_at_point(source), *_on_sets(source), _attacked(source)]
    found = [table for table in tables if table]
    return "\n\n".join(found) if found else "No bound of this page is in the records of this version."


def _at_point(source: str) -> str:
    models = _aggregates()["models"]
    cells: dict[str, dict[str, str]] = {}
    for model, numbers in models.items():
        for row in numbers["overall"]:
            if _belongs(row["bound"], source):
                cells.setdefault(row["bound"], {})[model] = _pair(row)
    rows = [[f"`{name}`", *(of.get(model, "-") for model in models)] for name, of in sorted(cells.items())]
    caption = "Value over the norm of the Jacobian at the input, median (worst) over layers and inputs:"
    return _table(caption, ["bound", *models], rows)


def _on_sets(source: str) -> list[str]:
    """One table for each scope, norm and radius: ratios where something measures the truth, or else values."""
    models = _aggregates()["models"]
    cells: dict[tuple[Any, ...], dict[str, dict[str, str]]] = {}
    for model, numbers in models.items():
        for entry in numbers.get("sets", []):
            for row in entry["methods"]:
                if _belongs(row["bound"], source):
                    place = entry["scope"], entry["norm"], entry["relative_radius"], row["ratio"] is None
                    cell = _value(row["value"]) if row["ratio"] is None else _pair(row["ratio"])
                    cells.setdefault(place, {}).setdefault(row["bound"], {})[model] = cell
    tables = []
    for (scope, norm, radius, bare), bounds in cells.items():
        at = f"scope {scope}, norm {norm}" + ("" if radius is None else f", relative radius {radius:g}")
        ratio = f"At most so many times above the truth ({at}), median (worst):"
        caption = f"Value ({at}), median (smallest to largest):" if bare else ratio
        rows = [[f"`{name}`", *(of.get(model, "-") for model in models)] for name, of in sorted(bounds.items())]
        tables.append(_table(caption, ["bound", *models], rows))
    return tables


def _attacked(source: str) -> str:
    path = RESULTS / "nightly.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [row for row in map(json.loads, lines) if row["check"] == "ascent" and _belongs(row["bound"], source)]
    rows = [[f"`{row['bound']}`", f"{row['worst_ratio']:.9f}"] for row in found]
    return _table("Largest true over claimed norm that the verifier's ascent found:", ["bound", "ratio"], rows)


def _aggregates() -> dict[str, Any]:
    return json.loads((RESULTS / "tightness.json").read_text(encoding="utf-8"))


def _belongs(name: str, source: str) -> bool:
    return name.split(".")[0].removesuffix("_fast") == source  # `sharp_fast` is on the page of `sharp`


def _pair(row: dict[str, Any]) -> str:
    return f"{float(row['median']):.3g} ({float(row['worst']):.3g})"


def _value(row: dict[str, Any]) -> str:
    median, smallest, largest = (float(row[name]) for name in ("median", "smallest", "largest"))
    return f"{median:.3g} ({smallest:.3g} to {largest:.3g})"


def _table(caption: str, titles: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join([caption, "", *("| " + " | ".join(cells) + " |" for cells in lines)])
