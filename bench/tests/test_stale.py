"""What an older version measured is marked on the page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bench.engine.task import Task, Written
from bench.pages import stale
from lipbounds import registry


TODAY = registry.get("sharp_fast").version
PAGE = """# Title

| bound                | value | `sharp_fast` |
|----------------------|-------|--------------|
| `sharp_fast`         | 1.5   | 1            |
| **sharp_fast**       | 1.5   | 1            |
| sharp_fast (proved)  | 1.5   | 1            |
| sharp_faster         | 1.5   | 1            |
"""


def test_the_oldest_version_of_a_bound_is_told() -> None:
    questions = [
        {"bound": "sharp_fast", "bound_version": TODAY - 1},
        {"bound": "sharp_fast", "bound_version": TODAY},
        {"bounds": {"sharp": registry.get("sharp").version, "sharp_fast": TODAY - 2}},
        {"bound": "a stranger's", "bound_version": 0},
        {"bounds": ["not", "of", "interest"]},
    ]
    assert stale.older_bounds(questions) == {"sharp_fast": (TODAY - 2, TODAY)}


def test_kinds_of_answers_have_versions_of_their_own() -> None:
    questions = [{"version": 2, "what": "certificate"}, {"version": 1, "what": "certificate"}, {"version": 1}, {}]
    assert stale.older_code(questions, {"": 1, "certificate": 3}) == {"certificate": (1, 3)}
    assert stale.older_code(questions, {}) == {}


def test_rows_and_titles_of_columns_say_the_version() -> None:
    found = stale.marked(PAGE, {"sharp_fast": (1, 3)}, {}, "python -m bench attention")
    lines = found.splitlines()
    assert "`sharp_fast` with version 1 (today 3)" in lines[2]
    assert "python -m bench attention" in lines[2]
    assert found.count("measured with version 1") == 4
    assert "| sharp_faster         | 1.5 " in found
    assert stale.marked(PAGE, {}, {}, "") == PAGE


@pytest.mark.parametrize(("version", "count"), [(TODAY - 1, 1), (TODAY, 0)])
def test_a_task_marks_its_page_and_not_what_is_declared(tmp_path, version: int, count: int) -> None:
    page, declared = tmp_path / "task.md", tmp_path / "bounds.md"

    def write(*_: object) -> Written:
        for path in (page, declared):
            path.write_text("# Title\n\n| `sharp_fast` |\n")
        return Written(paths=[page, declared], declared=[declared])

    entry = SimpleNamespace(question={"bound": "sharp_fast", "bound_version": version})
    found: Any = SimpleNamespace(entries=[entry], page=SimpleNamespace(data={"command": "python -m bench task"}))
    unused: Any = write
    task = Task(name="task", help="", measure=unused, pages=write, takes=frozenset())
    task._write(found, tmp_path)
    assert page.read_text().count("measured with version") == count
    assert "version" not in declared.read_text()
