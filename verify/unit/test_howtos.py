"""The pages of docs/: what they show runs in the order of the page, and prints what they say it prints."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

import lipbounds
from verify.unit.printed import VARY, is_shown


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LIBRARY = str(Path(lipbounds.__file__).parents[1])
# The pages whose blocks stand in tests of their own, which ask for more than that they run.
ELSEWHERE = {"capture.md": "test_capture_docs.py", "jasmin.md": "test_jasmin_recipes.py"}
# Commands on other pages take minutes, or need what the reader has; on these they are part of what is tried.
HOWTOS = sorted((DOCS / "howto").glob("*.md"))
SHELL_TOO = {*HOWTOS, DOCS / "faq.md"}
Block = tuple[str, str, int]  # language, text, line of the page


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [(token.info, token.content, token.map[0]) for token in tokens if token.type == "fence" and token.map]


def runnable(page: Path) -> bool:
    return any(language == "python" for language, _, _ in blocks(page))


PAGES = sorted(page for page in DOCS.rglob("*.md") if runnable(page) and page.name not in ELSEWHERE)


def run_python(text: str, names: dict[str, Any], where: str) -> str:
    """What a block prints; one that begins with the name of a file is saved under it, and then imported by others."""
    first = text.split("\n", 1)[0]
    if first.startswith("# ") and first.endswith(".py"):
        file = Path(first.removeprefix("# "))
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, where, "exec"), names)
    return printed.getvalue()


def run_shell(text: str, where: str) -> str:
    """What a block prints on stdout, with the commands of this environment and the library of this tree."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": LIBRARY, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{where}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def compare(got: str, want: str, where: str, *, vary: bool = False) -> None:
    assert is_shown(want, got, vary=vary), f"{where}: the page says\n{want}\nbut it is\n{got}"


def run_page(page: Path, *, shell: bool) -> None:
    """Run the blocks of a page in the working directory; Python blocks share their names."""
    names: dict[str, Any] = {"__name__": "page"}
    printed: str | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for language, text, line in blocks(page):
        where = f"{page.name}:{line + 1}"
        if language == "text" and printed is not None:
            compare(printed, text, where, vary=VARY in "".join(lines[line - 2 : line]))
        printed = None
        if language == "python":
            printed = run_python(text, names, where)
        elif language == "sh" and shell and not text.startswith("pip install"):
            printed = run_shell(text, where)


@pytest.fixture
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory as the pages want it: with results/, and where files that are saved are found by imports."""
    (tmp_path / "results").mkdir()
    for name in ("tightness.json", "tightness.jsonl"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_bounds", None)  # each page has its own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_what_a_page_shows_runs(page: Path, at_work: Path, as_a_user_runs_it: None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run_page(page, shell=page in SHELL_TOO)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_blocks_of_other_pages_are_run_in_their_own_tests(name: str) -> None:
    test = (Path(__file__).parent / ELSEWHERE[name]).read_text(encoding="utf-8")
    assert name in test
    assert "exec(" in test


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(1 / 0)\n```\n", "division by zero"),
        ("```python\na = 1\nprint(a)\n```\n\n```text\n2\n```\n", "the page says\n +2\n"),
        ("```sh\nexit 3\n```\n", "exit status 3"),
        ("```sh\nfalse | true\n```\n", "exit status 1"),
        ("```sh\necho one two\n```\n\n```text\none ... three\n```\n", "the page says"),
    ],
)
def test_a_page_that_is_wrong_is_told(text: str, complaint: str, at_work: Path) -> None:
    (page := at_work / "page.md").write_text(text, encoding="utf-8")
    with pytest.raises((AssertionError, ZeroDivisionError), match=complaint):
        run_page(page, shell=True)


def test_blocks_share_names_files_and_the_library_of_this_tree(at_work: Path) -> None:
    shown = """\
```python
# my_bounds.py
HERE = 1
```

```python
import lipbounds, my_bounds
print(my_bounds.HERE, HERE, lipbounds.__file__)
```

```text
1 1 ...
```

```sh
python -c "import lipbounds, my_bounds; print(my_bounds.HERE, lipbounds.__file__)"
```

```text
1 LIBRARY/lipbounds/__init__.py
```
""".replace("LIBRARY", LIBRARY)
    (page := at_work / "page.md").write_text(shown, encoding="utf-8")
    run_page(page, shell=True)


@pytest.mark.parametrize(
    ("want", "got", "vary", "shown"),
    [
        ("sharp 4.003", "sharp  4.002", False, True),
        ("sharp 4.003", "sharp 4.2", False, False),
        ("sharp 4.003", "sharp 9", True, True),
        ("sharp 4.003", "blunt 4.003", True, False),
        ("worst  seconds\n1.01  0.4", "worst  seconds\n1.01  70", False, True),
        ("worst  seconds\n1.01  0.4", "worst  seconds\n1.50  0.4", False, False),
        ("seconds\n0.4\n\nnothing: 3", "seconds\n0.5\n\nnothing: 4", False, False),
        ("one\ntwo", "one", False, False),
        ("['0.412']", "['0.411']", False, True),
    ],
)
def test_numbers_of_a_page_must_be_right_but_for_their_last_digits(
    want: str, got: str, vary: bool, shown: bool
) -> None:
    assert is_shown(want, got, vary=vary) == shown


def test_the_how_tos_are_there() -> None:
    assert [page.stem for page in HOWTOS] == ["certify", "compare", "penalty", "report", "train", "verify"]
