"""Every source of bounds has its page, every page is in the navigation, and no page points to a file that is not."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

import lipbounds.bounds
from lipbounds import registry


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
IN_NAVIGATION = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
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


def test_the_site_needs_neither_torch_nor_this_package() -> None:
    imports = re.findall(r"^(?:from|import) (\w+)", (DOCS / "hooks.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not {"torch", "lipbounds", "bench", "verify"} & set(imports)
