"""BibTeX of the project, the paper and the sources of bounds."""

from __future__ import annotations

import re

import pytest

from lipbounds import UnknownBound
from lipbounds.citation import bibtex


def test_project_and_paper_are_always_there() -> None:
    text = bibtex()
    assert re.findall(r"@\w+\{(\w+),", text) == ["lipbounds", "yudin2025"]
    assert "eprint = {2507.07814}" in text
    assert "Yudin and Gaponov and Kudriashov and Rakhuba" in text


def test_every_source_has_one_entry_of_its_own() -> None:
    keys = re.findall(r"@\w+\{(\w+),", bibtex(["all"]))
    assert len(keys) == len(set(keys))
    assert {"kim2021", "castin2024", "nair2025", "havens2024", "hu2024"} <= set(keys)
    text = bibtex(["all"])
    assert text.count("{") == text.count("}")


def test_a_bound_that_is_not_there_is_told() -> None:
    with pytest.raises(UnknownBound, match="did you mean"):
        bibtex(["shrap"])
