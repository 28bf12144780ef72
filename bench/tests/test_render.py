"""Committed pages come from the committed records: the same bytes, without a model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bench.engine.machine import ROOT


RENDER = """
import sys
from bench.__main__ import main
status = main(["render", "--results", sys.argv[1]], processes=2)
heavy = {"transformers", "sklearn", "pyautoattack", "ray", "lipbounds.jasmin", "torch._dynamo"} & sys.modules.keys()
assert not heavy, heavy
sys.exit(status)
"""


def test_every_committed_page_and_figure_renders_to_the_same_bytes(tmp_path: Path) -> None:
    """Where this fails: run `python -m bench render` and commit what it writes."""
    for path in (ROOT / "results").glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", RENDER, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: rendered.pop(name) for name in before} == before
    assert len(rendered) > 30
    stale = [name for name, content in rendered.items() if (ROOT / "results" / name).read_bytes() != content]
    assert stale == [], f"run `python -m bench render` and commit {stale}"
