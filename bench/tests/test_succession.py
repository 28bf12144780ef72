"""A new version of a bound that is the least of recorded ones is read off the records, and only then."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

import pytest

from bench.engine.records import Record
from bench.engine.store import Store
from bench.engine.succession import LEAST_OF, following
from bench.tests.samples import record
from lipbounds import registry


def versioned(bound: str, version: int, value: float | None = 2.0, **fields: Any) -> Record:
    made = record(bound, value, **fields)
    return dc.replace(made, question=dc.replace(made.question, bound_version=version))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "records.jsonl")


def test_the_least_of_what_is_recorded(store: Store) -> None:
    old, fast = versioned("sharp", 3, 3.0), versioned("sharp_fast", 3, 2.5)
    asked = versioned("sharp", 4).question
    store.append(old)
    assert following(store, asked) is None  # half of it is not enough
    store.append(fast)
    found = following(store, asked)
    assert found is not None
    assert (found.question, found.value, found.seconds) == (asked, 2.5, old.seconds + fast.seconds)
    assert found.details == {"sharp, version 3": 3.0, "sharp_fast, version 3": 2.5}


def test_nothing_follows_from_a_failure_or_for_another_version(store: Store) -> None:
    store.append(versioned("sharp", 3))
    store.append(versioned("sharp_fast", 3, None, status="failed", error="no memory"))
    assert following(store, versioned("sharp", 4).question) is None
    assert following(store, versioned("sharp", 5).question) is None


def test_the_rule_is_about_versions_that_there_are() -> None:
    for (name, version), parts in LEAST_OF.items():
        assert registry.get(name).version == version, "a newer version needs a rule of its own, or none"
        for part, part_version in parts:
            assert part_version == registry.get(part).version - (part == name)
