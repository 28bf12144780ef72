"""`--results` that is no folder: one line with the fix, status 2, before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import __main__ as program
from bench.gpu import command as gpu


TASKS = [
    "render",
    "readme",
    "migrate",
    "all",
    "gpu",
    *(task.name for task in program.TASKS if task.name != "classifier"),
]


def odd(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("kept")
    (folder / "dangling").symlink_to(folder / "nowhere")
    return {
        "no folder": folder / "file",
        "no folder, above": folder / "file" / "results",
        "a link to nothing": folder / "dangling",
        "a link to nothing, above": folder / "dangling" / "results",
        "no folder, a device": Path("/dev/null"),
    }


@pytest.mark.parametrize("task", TASKS)
def test_what_is_no_folder_is_refused_in_one_line(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, path in odd(tmp_path).items():
        device = ["--device", "cpu", "--quick"] if task == "gpu" else []
        assert program.main([task, *device, "--results", str(path)], []) == program.MISUSE
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert f"--results must be a folder, got '{path}'" in lines[0]
        assert f"is {kind.split(',')[0]}; pass another" in lines[0]
    assert (tmp_path / "file").read_text() == "kept"
    assert gpu.MISUSE == program.MISUSE


def test_a_folder_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    assert program.main(["render", "--results", str(tmp_path / "a" / "b")], []) == 0
