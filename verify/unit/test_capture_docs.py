"""docs/capture.md: its examples run, and its table is that of the models that are tested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lipbounds.capture import capture
from lipbounds.errors import Unsupported
from verify.unit.capture_hub_models import table


PAGE = (Path(__file__).parents[2] / "docs" / "capture.md").read_text(encoding="utf-8")
FIRST, SKIPPING, BY_HAND = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_table_of_architectures_is_the_list_of_the_models_that_are_tested() -> None:
    (shown,) = re.findall(r"<!-- tested -->\n\n(.*?)\n\n<!-- end -->", PAGE, flags=re.DOTALL)
    assert shown == table(), f"write this between the marks of docs/capture.md:\n{table()}"


def test_the_first_example_finds_its_block() -> None:
    names: dict[str, Any] = {}
    exec(FIRST, names)
    assert names["found"].module == "self_attn"
    assert names["found"].residual < 1e-5
    exec(SKIPPING, names)
    assert len(names["found"]) == 1


def test_a_module_that_is_not_followed_can_be_written_by_hand() -> None:
    names: dict[str, Any] = {}
    exec(BY_HAND, names)
    with pytest.raises(Unsupported, match="product of another form"):
        capture(names["model"], names["x"])
    adapter = re.findall(r"def block_of.*?\n\n\n", BY_HAND, flags=re.DOTALL)[0].strip().splitlines()
    assert len(adapter) == 1 + 3
