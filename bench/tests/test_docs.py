"""Every source of bounds has its page, every page is in the navigation, and no page points to a file that is not."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import lipbounds.bounds
from bench.pages.formatting import table
from lipbounds import registry


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
IN_NAVIGATION = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
WRITTEN = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "results").glob("*.md")])
PARTS = ("Statement", "Proof", "Assumptions", "Where it is tight", "Measured")


@pytest.mark.parametrize("module", [found.name for found in pkgutil.iter_modules(lipbounds.bounds.__path__)])
def test_every_source_has_its_page(module: str) -> None:
    assert f"bounds/{module}.md" in PAGES, f"write docs/bounds/{module}.md and name it in mkdocs.yml"


def test_every_page_is_in_the_navigation_once() -> None:
    of_docs = [name for name in IN_NAVIGATION if not name.startswith("results/")]
    assert sorted(of_docs) == PAGES


@pytest.mark.parametrize(
    "page", ["yudin2025", "yudin2025_ball", "sharp", "sharp_ball", "centred", "covariance", "castin2024"]
)
def test_the_page_of_a_bound_has_all_its_parts(page: str) -> None:
    text = (DOCS / "bounds" / f"{page}.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [title for title in titles if title in PARTS] == [part for part in PARTS if part in titles] == [*PARTS]


def test_every_name_on_the_page_of_castin_is_registered() -> None:
    text = (DOCS / "bounds" / "castin2024.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    registered = {spec.name.split(".")[1] for spec in registry.select() if spec.name.startswith("castin2024.")}
    assert set(listed) == registered


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_hold_in_the_repository(page: str) -> None:
    path = DOCS / page
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).resolve().exists()]
    made_later = {
        "bounds.md",
        "nightly.md",
        "certified.md",
        "robustness.md",
    }  # by `python -m bench` and `python -m verify.nightly`
    assert [link for link in missing if Path(link).name not in made_later] == []


@pytest.mark.parametrize("name", ["hooks", "leaderboard"])
def test_the_site_needs_neither_torch_nor_this_package(name: str) -> None:
    imports = re.findall(
        r"^(?:from|import) (\w+)", (DOCS / f"{name}.py").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert not {"torch", "lipbounds", "bench", "verify"} & set(imports)


@pytest.fixture
def leaderboard(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hook, without mkdocs, which is not in the environment of the tests."""
    for name in ("mkdocs", "mkdocs.config", "mkdocs.config.defaults", "mkdocs.structure", "mkdocs.structure.files"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    spec = importlib.util.spec_from_file_location("leaderboard", DOCS / "leaderboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_leaderboard_has_every_ratio_of_the_records_and_each_with_its_promise(leaderboard: Any) -> None:
    aggregates = json.loads((ROOT / "results" / "tightness.json").read_text(encoding="utf-8"))
    rows = leaderboard.rows(aggregates)
    models = aggregates["models"].values()
    at_point = sum(len(model["overall"]) for model in models)
    on_sets = sum(row["ratio"] is not None for model in models for entry in model["sets"] for row in entry["methods"])
    assert len(rows) == at_point + on_sets
    (sharp,) = [row for row in rows if (row["bound"], row["model"]) == ("sharp", "minilm")]
    (given,) = [row for row in aggregates["models"]["minilm"]["overall"] if row["bound"] == "sharp"]
    assert (sharp["median"], sharp["worst"], sharp["kind"]) == (given["median"], given["worst"], "proved")
    assert [row["median"] for row in rows] == sorted(row["median"] for row in rows)
    table = leaderboard._table([{**sharp, "source": "<script>"}])
    assert table.count("<td") == len(leaderboard.COLUMNS)
    assert "<script>" not in table


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rows_of_a_table_have_one_width_and_lists_a_blank_line(path: Path) -> None:
    assert faults_of_layout(path.read_text(encoding="utf-8")) == []


def faults_of_layout(text: str) -> list[str]:
    """Rows with more or fewer cells than the first of their table, and lists that begin inside a paragraph."""
    faults, width, before, is_code = [], None, "", False
    for line in text.splitlines():
        is_code ^= line.lstrip().startswith("```")
        is_row = line.startswith("|") and not is_code
        cells = len(re.findall(r"(?<!\\)\|", line))
        if is_row and cells != (width or cells):
            faults.append(f"{cells - 1} cells and not {(width or cells) - 1}: {line[:80]}")
        width = (width or cells) if is_row else None
        if not is_code and _is_item(line) and before and not _is_item(before) and not before.startswith(" "):
            faults.append(f"a list without a blank line before it: {line[:80]}")
        before = line
    return faults


def _is_item(line: str) -> bool:
    return re.match(r"(- |\d+\. )", line) is not None


def test_text_is_made_to_fit_its_cell() -> None:
    page = table(["|x|", "count"], [["|f(y) - f(z)| <=\n  L |y - z|", 3], ["`a|b`", None]])
    assert faults_of_layout(page) == []
    assert "\\|f(y) - f(z)\\| <= L \\|y - z\\|" in page


def test_what_is_wrong_with_a_layout_is_found() -> None:
    assert len(faults_of_layout("| a |\n|---|\n| |b| |")) == 1
    assert len(faults_of_layout("text:\n- item\n- item")) == 1
    assert faults_of_layout("text:\n\n- item\n  more\n- item\n\n```\na\n- b\n| a\n| b |\n```") == []


@pytest.mark.parametrize("page", PAGES)
def test_formulas_of_their_own_stand_on_lines_of_their_own(page: str) -> None:
    """Within a paragraph, the site shows the dollar signs."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "$$" in line and line.strip() != "$$"] == []
