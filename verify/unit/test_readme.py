"""The Python code of the README runs, and says what the README says it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


README = Path(__file__).parents[2] / "README.md"


def test_the_example_of_the_readme_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [re.sub(r"^(lipbounds\.get.*?)\s+#.*$", r"print(\1)", line) for line in code.splitlines()]
    exec("\n".join(lines), {})
    point, probable, ball = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"BoundResult\(yudin2025\.biased: [\d.]+, proved, at a point, l2, float32\)", point)
    assert "probable, at a point" in probable
    assert "delta=1e-09" in probable
    assert "proved, on a ball, l2, float32, radius=0.1" in ball
