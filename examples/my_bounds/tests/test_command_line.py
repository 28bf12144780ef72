"""What `lipbounds verify` says of the right bound and of the wrong one, and that the entry point is found."""

import json
import subprocess
import sys
from pathlib import Path

import lipbounds


def verify(bound: str, report: Path, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lipbounds", "verify", bound, "--seconds", str(seconds), "--report", str(report)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_entry_point_registers_the_bound() -> None:
    assert lipbounds.get("my_bounds.frobenius").source.title == "my_bounds"


def test_the_right_bound_is_sound_so_far(tmp_path: Path) -> None:
    done = verify("my_bounds:FROBENIUS", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sound_so_far"]
    assert {row["name"] for row in report["comparisons"]} >= {"my_bounds.frobenius", "yudin2025.biased"}


def test_the_wrong_bound_comes_back_with_a_snippet_that_runs(tmp_path: Path) -> None:
    # Ascent finds it, in the second part of the time: seconds on an idle machine, and more on a busy one.
    done = verify("my_bounds:TOO_SMALL", tmp_path / "report.json", seconds=60)
    assert done.returncode == 1, done.stdout + done.stderr
    snippet = json.loads((tmp_path / "report.json").read_text())["snippet"]
    assert snippet.strip() in done.stdout
    (tmp_path / "snippet.py").write_text(snippet)
    shown = subprocess.run([sys.executable, tmp_path / "snippet.py"], capture_output=True, text=True, check=False)
    assert "AssertionError: the bound is below the truth" in shown.stderr


def test_a_misspelt_bound_is_a_usage_error(tmp_path: Path) -> None:
    done = verify("my_bounds:FROBENIUSS", tmp_path / "report.json")
    assert done.returncode == 2
    assert "check the spelling" in done.stderr
