"""What `lipbounds diff` calls worse, missing and failing, and what files it reads."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipbounds.difference import Difference, compare, worse_by
from lipbounds.errors import InvalidInput
from lipbounds.results import Figure, read_results


RESULTS = Path(__file__).parents[2] / "results"


def compared(before: Any, after: Any, folder: Path, **options: Any) -> Difference:
    paths = folder / "before", folder / "after"
    for path, content in zip(paths, (before, after), strict=True):
        lines = [json.dumps(line) for line in content] if isinstance(content, list) else [json.dumps(content)]
        path.write_text("\n".join(lines) + "\n")
    return compare(*map(read_results, paths), **{"tolerance": 0.05} | options)


@pytest.mark.parametrize(
    ("before", "after", "better", "factor"),
    [
        (2.0, 3.0, "lower", 1.5),
        (3.0, 2.0, "lower", 2 / 3),
        (2.0, 3.0, "higher", 2 / 3),
        (3.0, 2.0, "higher", 1.5),
        (2.0, 2.0, "lower", 1.0),
        (0.0, 0.0, "higher", 1.0),
        (0.0, 1.0, "lower", math.inf),
        (0.0, 1.0, "higher", 0.0),
        (1.0, 0.0, "higher", math.inf),
        (1.0, 0.0, "lower", 0.0),
        (1.0, math.inf, "lower", math.inf),
        (math.inf, 1.0, "lower", 0.0),
        (math.inf, math.inf, "lower", 1.0),
        (1.0, math.nan, "lower", math.inf),
        (1.0, math.nan, "higher", math.inf),
        (math.nan, 1.0, "lower", 0.0),
        (math.nan, math.nan, "lower", 1.0),
    ],
)
def test_the_factor_by_which_a_figure_is_worse(before: float, after: float, better: Any, factor: float) -> None:
    assert worse_by(Figure(before, better), Figure(after, better)) == factor


# -- tables of tightness ----------------------------------------------------------------------------------------------


def ratios(median: float, worst: float) -> dict[str, Any]:
    return {"median": median, "worst": worst, "best": median, "count": 4}


def tightness() -> dict[str, Any]:
    on_ball = {
        "bound": "ball",
        "kind": "proved",
        "ratio": ratios(2.0, 3.0),
        "value": {"median": 5.0, "smallest": 4.0, "largest": 6.0, "count": 4},
    }
    table = {
        "inputs": 2,
        "overall": [
            {"bound": "upper", "kind": "proved", "scope": "point", **ratios(10.0, 20.0)},
            {"bound": "lower", "kind": "lower", "scope": "point", **ratios(0.9, 0.5)},
            {"bound": "guess", "kind": "estimate", "scope": "point", **ratios(0.8, 1.25)},
        ],
        "sets": [{"norm": "l2", "scope": "ball", "relative_radius": 0.1, "references": {}, "methods": [on_ball]}],
        "not_answered": [{"bound": "other", "status": "unsupported", "error": "no promise", "count": 1}],
        "violations": [],
    }
    return {"schema_version": 1, "environments": [], "methods": {}, "models": {"vit": table}, "problems": {}}


def test_nothing_is_worse_in_the_same_file(tmp_path: Path) -> None:
    found = compared(tightness(), tightness(), tmp_path)
    assert not found.regressed
    assert (found.compared, found.new, found.better) == (9, 0, [])


OVERALL: Callable[[Any], Any] = lambda content: content["models"]["vit"]["overall"]  # noqa: E731


@pytest.mark.parametrize(
    ("row", "statistic", "value", "worse"),
    [
        (0, "median", 10.4, None),  # within 5 %
        (0, "median", 10.6, 1.06),
        (0, "worst", 40.0, 2.0),
        (0, "median", "inf", math.inf),
        (0, "median", 5.0, None),
        (1, "median", 0.45, 2.0),  # a lower bound falls
        (1, "median", 1.0, None),
        (2, "median", 0.4, 2.0),  # an estimate goes away from 1, downwards or upwards
        (2, "worst", 2.5, 2.0),
        (2, "worst", 1.0, None),
    ],
)
def test_a_looser_bound_is_worse(row: int, statistic: str, value: Any, worse: float | None, tmp_path: Path) -> None:
    after = tightness()
    OVERALL(after)[row][statistic] = value
    found = compared(tightness(), after, tmp_path)
    assert [change.factor for change in found.worse] == pytest.approx([] if worse is None else [worse])
    assert found.regressed == (worse is not None)


def test_the_tolerance_is_the_callers(tmp_path: Path) -> None:
    after = tightness()
    OVERALL(after)[0]["median"] = 10.4
    assert compared(tightness(), after, tmp_path, tolerance=0.0).regressed
    assert not compared(tightness(), after, tmp_path, tolerance=0.04).regressed


def test_a_bound_on_a_ball_is_compared_by_ratio_and_value(tmp_path: Path) -> None:
    after = tightness()
    row = after["models"]["vit"]["sets"][0]["methods"][0]
    row["ratio"]["worst"], row["value"]["median"] = 6.0, 20.0
    found = compared(tightness(), after, tmp_path)
    assert [(change.what, change.factor) for change in found.worse] == [
        ("proved, ball, l2, radius 0.1: value, median", 4.0),
        ("proved, ball, l2, radius 0.1: ratio to the truth, worst", 2.0),
    ]


def test_what_is_gone_is_missing_and_what_is_added_is_new(tmp_path: Path) -> None:
    after = tightness()
    del OVERALL(after)[0]
    found = compared(tightness(), after, tmp_path)
    assert found.regressed
    assert [(row.method, row.places) for row in found.missing] == [("upper", 1), ("upper", 1)]
    back = compared(after, tightness(), tmp_path)
    assert (back.regressed, back.new) == (False, 2)


def test_a_weaker_promise_is_not_the_same_figure(tmp_path: Path) -> None:
    after = tightness()
    OVERALL(after)[0]["kind"] = "probable"
    assert {row.method for row in compared(tightness(), after, tmp_path).missing} == {"upper"}


@pytest.mark.parametrize(
    "breakage",
    [
        lambda c: c["models"]["vit"]["not_answered"].append({"bound": "b", "status": "failed", "error": "e"}),
        lambda c: c["models"]["vit"]["not_answered"].append({"bound": "b", "status": "timeout", "error": "e"}),
        lambda c: c["models"]["vit"]["violations"].append({"bound": "b", "lower_bound": "l", "layer": 0, "input": "i"}),
        lambda c: c["problems"].update(vit="cannot be loaded"),
    ],
)
def test_a_failure_counts_where_it_is_new(breakage: Callable[[Any], None], tmp_path: Path) -> None:
    after = tightness()
    breakage(after)
    assert len(compared(tightness(), after, tmp_path).failures) == 1
    assert not compared(after, after, tmp_path).regressed
    assert not compared(after, tightness(), tmp_path).regressed


def test_medians_over_other_inputs_are_not_compared(tmp_path: Path) -> None:
    after = tightness()
    after["models"]["vit"]["inputs"] = 3
    with pytest.raises(InvalidInput, match="2 inputs of vit in the first file and 3"):
        compared(tightness(), after, tmp_path)


# -- certified radii and records --------------------------------------------------------------------------------------


def certified() -> dict[str, Any]:
    rows = [
        {"method": method, "image": image, "radius": radius, "seconds": 1.0}
        for method, radius in (("joint", 0.2), ("product", 0.1))
        for image in (1, 2)
    ]
    whole = {"attention": "a", "bound": 9.0, "joint": 4.0, "lower": 3.0}
    return {"models": {"vit": {"certificates": rows, "attacks": []}}, "whole": {"vit": whole}}


def test_a_smaller_certified_radius_is_worse_and_a_larger_one_better(tmp_path: Path) -> None:
    after = certified()
    first, second, _, other = after["models"]["vit"]["certificates"]
    first["radius"], second["radius"], other["radius"] = 0.1, 0.05, 0.3
    found = compared(certified(), after, tmp_path)
    assert [(c.what, c.where, c.factor, c.places) for c in found.worse] == [("certified radius", "image 2", 4.0, 2)]
    assert [(c.method, c.what, c.places) for c in found.better] == [("product", "certified radius", 1)]


def test_a_looser_whole_model_is_worse_and_one_below_the_truth_a_failure(tmp_path: Path) -> None:
    after = certified()
    after["whole"]["vit"] |= {"joint": 5.0, "bound": 2.0}
    found = compared(certified(), after, tmp_path)
    assert [change.what for change in found.worse] == ["whole model, joint"]
    assert len(found.failures) == 1


def test_times_are_compared_on_request_by_their_median(tmp_path: Path) -> None:
    after = certified()
    for row in after["models"]["vit"]["certificates"]:
        row["seconds"] = 2.0
    assert not compared(certified(), after, tmp_path).regressed
    found = compared(certified(), after, tmp_path, with_seconds=True)
    assert [(change.what, change.factor) for change in found.worse] == 2 * [("seconds, median", 2.0)]


def records(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    block = {
        "record": "block",
        "id": "b",
        "model": "vit",
        "layer": 0,
        "input": "i",
        "dtype": "float64",
        "device": "cpu",
    }
    shared = {"block": "b", "bound": "upper", "bound_version": 1, "kind": "proved", "scope": "point", "norm": "l2"}
    answered = {"status": "ok", "value": 2.0, "seconds": 0.1}
    lines = [{"record": "environment", "id": "e"}, block, *(shared | answered | answer for answer in answers)]
    return [{"schema_version": 1, **line} for line in lines]


def test_records_are_matched_by_place(tmp_path: Path) -> None:
    found = compared(records({}), records({"value": 3.0}), tmp_path)
    assert [(c.method, c.where, c.factor) for c in found.worse] == [("upper", "layer 0, i, float64, cpu", 1.5)]


def test_of_several_records_the_highest_version_counts_then_the_latest(tmp_path: Path) -> None:
    before = records({"bound_version": 2, "value": 2.0}, {"bound_version": 1, "value": 9.0})
    after = records({"value": 9.0}, {"value": 2.0})
    found = compared(before, after, tmp_path)
    assert (found.compared, found.regressed, found.better) == (1, False, [])


def test_a_record_that_fails_is_missing_and_failing(tmp_path: Path) -> None:
    after = records({}, {"bound_version": 2, "status": "timeout", "error": "120 s", "value": None})
    after.append(records({"bound": "another"})[-1])
    found = compared([*records({}), after[-1]], after, tmp_path)
    assert [failure.reason for failure in found.failures] == ["timeout: 120 s"]
    assert [missing.method for missing in found.missing] == ["upper"]


def test_a_torn_last_line_is_what_a_killed_run_left(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in records({})) + '\n{"schema_ver')
    assert len([row for row in read_results(path).figures if row.what.endswith("value")]) == 1


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tightness.json", "certified.json", "balls.jsonl"])
def test_the_committed_results_are_read(name: str) -> None:
    results = read_results(RESULTS / name)
    assert len(results.figures) > 50
    found = compare(results, results, tolerance=0.0, with_seconds=True)
    assert (found.regressed, found.compared) == (False, len(results.figures))


def test_files_of_different_structure_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="tightness and certified"):
        compared(tightness(), certified(), tmp_path)


def test_files_without_a_common_figure_are_not_compared(tmp_path: Path) -> None:
    other = tightness()
    other["models"] = {"bert": other["models"]["vit"]}
    with pytest.raises(InvalidInput, match="in common"):
        compared(tightness(), other, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *[b"", b"{", b"3", b"[]", b"[3]", b"{}", b"\xff", b'{"models": 3, "whole": {}}', b"[" * 100_000, b"1" * 5000],
        *[json.dumps(tightness() | change).encode() for change in ({"schema_version": 2}, {"models": []})],
    ],
)
def test_any_other_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidInput, match="file"):
        read_results(tmp_path / "file")


def test_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "a\0b"):
        with pytest.raises(InvalidInput, match="must be a"):
            read_results(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw: Callable[..., Any]) -> Any:
    """A good file with something else in one place of it."""
    content = copy.deepcopy(
        draw(st.sampled_from([tightness(), certified(), records({}, {"status": "failed", "error": ""})]))
    )
    place: Any = content
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.integers(0, 3)) == 0:
            place[key] = draw(JSON)
            return content
        place = place[key]


@settings(max_examples=60, deadline=None)
@given(content=damaged())
def test_a_damaged_file_is_read_or_refused(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    lines = [json.dumps(line) for line in content] if isinstance(content, list) else [json.dumps(content)]
    path.write_text("\n".join(lines) + "\n")
    with contextlib.suppress(InvalidInput):
        results = read_results(path)
        for good in (tightness(), certified(), records({}, {"status": "failed", "error": ""})):
            path.write_text("\n".join(map(json.dumps, good)) if isinstance(good, list) else json.dumps(good))
            with contextlib.suppress(InvalidInput):
                for pair in ((results, read_results(path)), (read_results(path), results)):
                    compare(*pair, tolerance=0.0, with_seconds=True)


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=200) | JSON.map(lambda content: json.dumps(content).encode()))
def test_random_bytes_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(content)
    with pytest.raises(InvalidInput):
        read_results(path)
