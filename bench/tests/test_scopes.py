"""Balls, compact sets, other norms and refuted formulas: radii, references and tables, with numbers done by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.engine.records import Record
from bench.engine.store import Store
from bench.tests.samples import environment_line, record, records_at, spec, tiny_block, tiny_case, tiny_model
from bench.tightness import task as tightness
from bench.tightness.aggregate import aggregate
from bench.tightness.scopes import WITHIN, violations
from bench.tightness.tables import headline, report
from bench.workloads.radii import RELATIVE, radii
from lipbounds import registry
from lipbounds.claims import SCOPES


DECLARED = {"below": "lower", "search": "lower", "guess": "estimate"} | dict.fromkeys(
    ("point.bound", "ball.bound", "ball.other", "compact.bound", "change.bound", "other.norm", "false"), "proved"
)


def tables_of(*records: Record, refuted: tuple[str, ...] = ()) -> dict[str, Any]:
    line = environment_line(**DECLARED)
    for each in records:  # what a table says of a method is what its records say
        line["methods"][each.question.bound] |= {"scope": each.scope, "norm": each.question.norm}
    declared = {name: line["methods"][name] | {"target": "Attention"} for name in refuted}
    return aggregate(records, {"here": line}, command="", records_path="", refuted=declared)


def ball(bound: str, value: float, relative: float = 1.0, kind: str = "proved", **fields: Any) -> Record:
    place: dict[str, Any] = {"scope": "ball", "radius": 5 * relative, "relative_radius": relative} | fields
    return record(bound, value, kind, **place)


def table_rows(page: str, method: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| tiny") and f"`{method}`" in line]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


# -- radii -----------------------------------------------------------------------------------------------------------


def test_balls_have_radii_relative_to_the_median_token_norm() -> None:
    block = tiny_block().replace(x=torch.diag(torch.tensor([1.0, 3.0, 100.0, 2.0], dtype=torch.float64))[:3])
    assert [radius.value for radius in radii(block, "ball") if radius] == pytest.approx([0.03, 0.3, 3.0], rel=1e-6)
    assert radii(block, "change") == radii(block, "ball")
    assert [radius.relative for radius in radii(block, "ball") if radius] == list(RELATIVE)


def test_the_compact_set_holds_the_input() -> None:
    for seed in range(50):
        block = tiny_block(seed)
        (radius,) = radii(block, "compact")
        largest = block.x.norm(dim=-1).max().item()
        assert radius is not None
        assert largest < radius.value < largest * (1 + 2e-5)


@pytest.mark.parametrize("scope", ["point", "global"])
def test_other_scopes_have_no_radius(scope: Any) -> None:
    assert radii(tiny_block(), scope) == [None]


def test_the_radius_does_not_hang_on_the_last_bit_of_the_input() -> None:
    block = tiny_block()
    nudged = block.replace(x=block.x * (1 + 1e-15))
    assert not torch.equal(block.x, nudged.x)
    assert [radii(block, scope) for scope in SCOPES] == [radii(nudged, scope) for scope in SCOPES]


# -- the task --------------------------------------------------------------------------------------------------------


def test_bounds_of_every_scope_are_evaluated_with_their_radii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_point(block: Any) -> torch.Tensor:
        return torch.tensor(7.0)

    def on_set(block: Any, radius: float) -> torch.Tensor:
        return torch.tensor(radius, dtype=torch.float64)

    chosen = [spec(on_set, name=f"test.{scope}", scope=scope) for scope in ("ball", "change", "compact")]
    chosen.append(spec(at_point, name="test.global", scope="global"))
    wrong = spec(on_set, name="test.wrong", scope="ball", status="refuted")
    monkeypatch.setattr(registry, "select", lambda **_: chosen)
    monkeypatch.setattr(registry, "refuted", lambda: [wrong])
    with Store(tmp_path / "records.jsonl") as store:
        tightness.run(store, [tiny_model()], quick=True)
    found = [each for each in records_at(tmp_path / "records.jsonl").values() if each.question.layer == 0]
    at = {(each.question.bound, each.relative_radius): each for each in found}
    balls = [(f"test.{name}", relative) for name in ("ball", "change", "wrong") for relative in RELATIVE]
    assert {key for key in at if key[0] != "lanczos"} == {*balls, ("test.compact", 1.0), ("test.global", None)}
    for (name, relative), each in at.items():
        if relative is not None:
            assert each.value == each.radius, name
    assert len({each.question.key for each in found}) == len(found)


def test_bounds_on_sets_are_evaluated_on_the_first_inputs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_ball(block: Any, radius: float) -> torch.Tensor:
        return torch.tensor(radius, dtype=torch.float64)

    search = spec(on_ball, name="test.search", kind="lower", scope="ball", role="estimator")
    at_point = spec(lambda block: torch.tensor(7.0), name="test.point")
    costly = spec(lambda block: torch.tensor(7.0), name="test.costly")
    monkeypatch.setattr(registry, "select", lambda **_: [spec(on_ball, scope="ball"), at_point, search, costly])
    monkeypatch.setattr(registry, "refuted", list)
    monkeypatch.setattr(tightness, "INPUTS", 2)
    monkeypatch.setattr(tightness, "COSTLY", {"test.costly": 2})
    with Store(tmp_path / "records.jsonl") as store:
        tightness.run(store, [tiny_model(), tiny_model("other")])
    found = records_at(tmp_path / "records.jsonl").values()
    at = {
        name: {(each.question.model, each.question.input) for each in found if each.question.bound == name}
        for name in ("test.search", "test.bound", "test.point", "test.costly")
    }
    counts = {"test.search": 1, "test.bound": 2, "test.point": 3, "test.costly": 2}
    assert at == {
        name: {(model, f"seed-{seed}") for model in ("tiny", "other") for seed in range(count)}
        for name, count in counts.items()
    }


def test_large_blocks_are_bounded_and_not_searched() -> None:
    searching = spec(lambda block, radius: None, kind="lower", scope="ball", role="estimator")
    at_point = spec(lambda block: None, kind="lower", role="estimator")
    bound = spec(lambda block, radius: None, scope="ball")
    answers = {
        tokens: [tightness.affordable(tiny_case(tokens=tokens), each, 1) for each in (searching, at_point, bound)]
        for tokens in (300, 301)  # of four features
    }
    assert answers == {300: [True, True, True], 301: [False, False, True]}
    part = spec(lambda block, radius: None, name=tightness.PARTS[0], scope="ball")
    assert [tightness.affordable(tiny_case(tokens=tokens), part, 1) for tokens in (8191, 8192)] == [True, False]


# -- references ------------------------------------------------------------------------------------------------------


def test_the_norm_at_the_input_is_the_reference_on_a_set_and_in_no_other_norm() -> None:
    compact = {"scope": "compact", "radius": 3.0, "relative_radius": 1.0}
    model = tables_of(
        record("below", 2.0, "lower"),
        ball("ball.bound", 6.0),
        record("compact.bound", 8.0, **compact),
        record("change.bound", 5.0, scope="change", radius=1.0, relative_radius=1.0),
        record("other.norm", 9.0, norm="linf"),
    )["models"]["tiny"]
    found = {entry["scope"]: entry for entry in model["sets"] if entry["norm"] == "l2"}
    ratios = {scope: entry["methods"][0]["ratio"]["median"] for scope, entry in found.items()}
    assert ratios == {"ball": 3.0, "compact": 4.0, "change": 2.5}
    assert all(entry["references"] == {"below": 1} for entry in found.values())
    (other,) = [entry for entry in model["sets"] if entry["norm"] == "linf"]
    assert (other["references"], other["methods"][0]["ratio"]) == ({}, None)
    assert other["methods"][0]["value"]["median"] == 9.0


def test_the_largest_lower_bound_of_a_smaller_set_is_the_reference() -> None:
    def reference(*lowers: Record) -> dict[str, int]:
        (entry,) = [
            entry
            for entry in tables_of(record("below", 2.0, "lower"), *lowers, ball("ball.bound", 6.0))["models"]["tiny"][
                "sets"
            ]
            if any(row["bound"] == "ball.bound" for row in entry["methods"])
        ]
        return entry["references"]

    assert reference() == {"below": 1}
    assert reference(ball("search", 3.0, 0.1, "lower")) == {"search": 1}
    assert reference(ball("search", 3.0, 1.0, "lower", scope="change")) == {"search": 1}
    assert reference(ball("search", 3.0, 2.0, "lower")) == {"below": 1}  # a larger ball
    assert reference(ball("search", 3.0, 0.1, "lower", scope="compact")) == {"below": 1}
    assert reference(ball("search", 3.0, 0.1, "lower", norm="linf")) == {"below": 1}
    assert reference(ball("search", 3.0, 0.1, "lower", input="another")) == {"below": 1}


def test_every_scope_has_its_place() -> None:
    assert {*WITHIN} == {*SCOPES} == {*WITHIN["global"]}
    assert all(scope in inside for scope, inside in WITHIN.items())


def test_bounds_on_sets_do_not_touch_the_numbers_at_the_point() -> None:
    at_point = [record("exact", 2.0), record("below", 1.9, "lower"), record("point.bound", 4.0)]
    line = environment_line(**DECLARED, exact="proved")
    line["methods"]["ball.bound"]["scope"] = "ball"

    def model(*records: Record) -> dict[str, Any]:
        found = aggregate(records, {"here": line}, command="", records_path="")
        return found["models"]["tiny"] | {"headline": headline(found)}

    without, beside = model(*at_point), model(*at_point, ball("ball.bound", 6.0), ball("search", 5.0, kind="lower"))
    assert len(beside.pop("sets")) == 1 > len(without.pop("sets"))
    assert beside == without


def test_a_bound_on_a_ball_below_the_norm_at_its_centre_is_a_violation() -> None:
    found = tables_of(record("below", 2.0, "lower"), ball("ball.bound", 1.5), ball("ball.other", 2.0))
    (violation,) = found["models"]["tiny"]["violations"]
    assert (violation["bound"], violation["scope"], violation["reached"]) == ("ball.bound", "ball", 2.0)
    below_search = tables_of(record("point.bound", 1.5), ball("search", 2.0, kind="lower"))
    assert below_search["models"]["tiny"]["violations"] == []  # the norm at the centre may be smaller than on the ball


# -- pages -----------------------------------------------------------------------------------------------------------


def test_the_page_has_a_section_a_scope_and_norm_and_a_column_a_radius() -> None:
    values = {0.01: (4.0, 6.0, 8.0), 1.0: (20.0, 40.0, 60.0)}
    records = [
        ball("ball.bound", value, relative, input=f"seed-{number}")
        for relative, of in values.items()
        for number, value in enumerate(of)
    ]
    records += [record("below", 2.0, "lower", input=f"seed-{number}") for number in range(3)]
    records += [ball("guess", 1.0, 0.01, "estimate", input="seed-0"), record("other.norm", 9.0, norm="token")]
    page = report(tables_of(*records))
    assert table_rows(page, "ball.bound") == [["tiny", "`ball.bound`", "3", "3.00 (4.00)", "20.0 (30.0)"]]
    assert table_rows(page, "guess") == [["tiny", "`guess`", "1", "0.5000 (0.5000)", "-"]]
    assert table_rows(page, "other.norm") == [["tiny", "`other.norm`", "1", "9.00 (9.00 to 9.00)"]]
    sections = re.split(r"\n##+ ", page)
    (proved,) = [part for part in sections if part.startswith("Proved upper bounds, scope `ball`, norm `l2`")]
    assert "At most so many times above the truth" in proved
    assert "radius 0.01" in proved
    assert "`guess`" not in proved
    (about,) = [part for part in sections if part.startswith("Scope `ball`, norm `l2`")]
    assert "0.01, 1 times the median norm" in about
    (token,) = [part for part in sections if part.startswith("Scope `point`, norm `token`")]
    assert "no ratio" in token


def test_refuted_formulas_are_in_a_table_of_their_own_and_nowhere_else() -> None:
    blocks = [{"input": f"seed-{number}"} for number in range(3)]
    records = [record("below", 2.0, "lower", **block) for block in blocks]
    records += [record("false", value, **block) for value, block in zip((1.0, 0.5, 8.0), blocks, strict=True)]
    records += [record("point.bound", 4.0, **block) for block in blocks]
    found = tables_of(*records, refuted=("false",))
    model = found["models"]["tiny"]
    assert model["refuted"] == [{"bound": "false", "evaluations": 3, "compared": 3, "violated": 2, "worst": 4.0}]
    assert model["violations"] == []
    assert "false" not in found["methods"]
    before, _, section = report(found).partition("## Refuted formulas")
    assert "`false`" not in before
    assert "`false`" not in headline(found)
    (row,) = [line for line in section.splitlines() if "`false`" in line]
    assert [part.strip() for part in row.strip("|").split("|")][3:] == ["point, l2, Attention", "2", "3", "4.00"]


def test_a_refuted_formula_about_other_blocks_is_listed_without_numbers() -> None:
    found = tables_of(record("below", 2.0, "lower"), refuted=("false",))
    assert "no block that it is about" in report(found)
    unmeasured = tables_of(record("below", 2.0, "lower"), record("false", 1.0, norm="linf"), refuted=("false",))
    assert "nothing measures its norm" in report(unmeasured)
    assert "## Refuted" not in report(tables_of(record("below", 2.0, "lower")))


@pytest.mark.parametrize(
    ("excess", "here", "elsewhere"), [(1e-12, True, False), (5e-6, True, False), (2e-5, True, True)]
)
def test_numbers_of_two_machines_may_differ_by_the_rounding_of_a_forward_pass(
    excess: float, here: bool, elsewhere: bool
) -> None:
    lower = record("below", 1.0 + excess, "lower")
    for place, violated in (("here", here), ("again", here), ("elsewhere", elsewhere)):
        found = violations(
            [record("paper.bound", 1.0, environment=place), lower], {"here": "a", "again": "a", "elsewhere": "b"}
        )
        assert bool(found) is violated
