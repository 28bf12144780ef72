"""Records of schema version 1 are brought to this one by a command, with the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as program
from bench.engine.answers import Shown
from bench.engine.evaluate import question
from bench.engine.store import Store
from bench.workloads.models import zoo
from bench.workloads.radii import multiples
from lipbounds import registry


OLD = Path(__file__).parent / "version_1"
ANSWERS = ("value", "terms", "details", "seconds", "status", "error", "tokens", "heads", "module", "radius")


@pytest.fixture
def migrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    for path in OLD.iterdir():
        shutil.copy(path, tmp_path)
    before: dict[str, bytes] = {}
    for _ in range(2):  # the second time there is nothing to do
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert program.main(["migrate", "--results", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    return tmp_path


def old_lines(name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (OLD / name).read_text(encoding="utf-8").splitlines()]
    blocks = {line["id"]: line for line in lines if line.get("record") == "block"}
    return [{**blocks.get(line.get("block"), {}), **line} for line in lines if "record" not in line]


def test_every_evaluation_keeps_its_numbers(migrated: Path) -> None:
    store = Store(migrated / "tightness.jsonl", only_read=True)
    found = [entry.record for entry in store.entries.values()]
    old = old_lines("tightness.jsonl")
    assert len(found) == len(old)
    for line, record in zip(old, found, strict=True):
        assert (record.question.bound, record.question.bound_version) == (line["bound"], line["bound_version"])
        if line.get("error"):  # the wording of today
            line["error"] = line["error"].replace("makes no promise for a block with", "does not cover a block with")
        as_written = record.to_dict()
        assert {name: as_written.get(name) for name in ANSWERS} == {name: line.get(name) for name in ANSWERS}
        assert store.environments[record.environment]["environment"]["cpu"]
    assert {record.question.unit for record in found} >= {"", "median token norm"}


def test_keys_are_those_that_a_run_asks_for_on_any_machine(migrated: Path) -> None:
    store = Store(migrated / "tightness.jsonl", only_read=True)
    (model,) = (model for model in zoo() if model.name == "random-1-head")
    case = next(iter(model.cases(1)))
    for name in ("exact", "yudin2025_ball.biased"):
        spec = registry.get(name)
        versions = {e.question["bound_version"] for e in store.entries.values() if e.question["bound"] == name}
        asked = [question("tightness", case, spec, {}, radius) for radius in multiples(spec.claim.scope)]
        for version in versions & {spec.version}:
            assert version == spec.version
            assert all(each.key in store.entries for each in asked)
    assert "_loaded" not in vars(case)  # nothing was captured for that


def test_the_page_shows_the_newest_version_of_each_bound(migrated: Path) -> None:
    store = Store(migrated / "tightness.jsonl", only_read=True)
    shown = Shown(store, store.pages["standard"]).records
    newest: dict[str, int] = {}
    for entry in store.entries.values():
        asked = entry.question
        newest[asked["bound"]] = max(asked["bound_version"], newest.get(asked["bound"], 0))
    assert {record.question.bound_version for record in shown if record.question.bound == "exact"} == {newest["exact"]}
    assert len(shown) < len(store.entries)


def test_answers_and_their_page_keep_their_numbers(migrated: Path) -> None:
    store = Store(migrated / "certified.jsonl", only_read=True)
    old = json.loads((OLD / "certified.json").read_text())
    assert program.CERTIFIED.render(program._parser().parse_args(["render", "--results", str(migrated)])) == 0
    new = json.loads((migrated / "certified.json").read_text())
    # The page shows radii by method; the certificates of before are answers to another question, and kept.
    kept = [entry.flat for entry in store.entries.values()]
    for before in old["models"]["digits-vit"]["certificates"]:
        numbers = before.items() - {("key", before["key"]), ("schema_version", 1)}
        assert any(numbers <= _hashable(after).items() for after in kept)
    for before in old["models"]["digits-vit"]["attacks"]:
        assert any(before["robust"] == after.get("robust") for after in kept)
    whole, again = old["whole"]["digits-vit"], new["whole"]["digits-vit"]
    assert (again["bound"], again["layers"]) == (whole["bound"], whole["layers"])
    # Three lines, two questions: of the two lines with attention bounded by covariance.exact the last one counts.
    asked = [entry.question["attention"] for entry in store.entries.values() if entry.question["what"] == "whole"]
    assert sorted(asked) == ["covariance.exact", "sharp_fast"]
    assert "- an abacus; commit 0123456789" in (migrated / "certified.md").read_text()


def _hashable(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if isinstance(value, str | int | float | bool | None)}


def test_old_records_say_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(OLD / "tightness.jsonl", tmp_path)
    before = (tmp_path / "tightness.jsonl").read_bytes()
    assert program.main(["tightness", "--quick", "--results", str(tmp_path)], []) == program.MISUSE
    (line,) = capsys.readouterr().err.splitlines()
    assert "run `python -m bench migrate`" in line
    assert (tmp_path / "tightness.jsonl").read_bytes() == before
