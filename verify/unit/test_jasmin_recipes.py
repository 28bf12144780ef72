"""The recipes of docs/jasmin.md run as they stand, and train what they say."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch


PAGE = Path(__file__).parents[2] / "docs" / "jasmin.md"


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_plain_loop_lowers_the_penalty_it_is_given(recipes: list[str], as_a_user_runs_it: None) -> None:
    penalties = []
    for weight in ("0.0", "3.0"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found: dict[str, Any] = {}
            exec(recipes[0].replace("0.01", weight), found)
        with found["reg"] as reg:
            found["model"](found["data"].images[:64])
            penalties.append(float(reg.penalty().detach()))
    assert penalties[1] < penalties[0]


def test_the_trainer_adds_the_penalty_to_its_loss(recipes: list[str], as_a_user_runs_it: None) -> None:
    losses = []
    for weight in ("0.0", "5.0"):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the Trainer about machines without a GPU
            torch.manual_seed(0)
            found: dict[str, Any] = {}
            exec(recipes[1].replace("0.01", weight), found)
        losses.append(found["trainer"].state.log_history[-1]["train_loss"])
    assert losses[1] > losses[0] > 0
