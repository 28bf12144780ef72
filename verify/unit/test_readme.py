"""The Python code of the README runs, and prints what the README says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from verify.unit.printed import is_shown


README = Path(__file__).parents[2] / "README.md"


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_the_example_of_the_readme_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text(encoding="utf-8")
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, flags=re.DOTALL)
    exec(code, {})
    got = capsys.readouterr().out
    assert is_shown(printed, got), got


def test_the_readme_fits_three_screens() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
