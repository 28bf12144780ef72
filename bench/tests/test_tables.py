"""Tables, figures and the README from records with numbers that can be checked by hand; and the command line."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench.engine.records import RecordError
from bench.engine.schedule import Chain
from bench.pages.formatting import figure, summary_words
from bench.tests.samples import environment_line, record, records_at, tiny_model
from bench.tightness import features, readme
from bench.tightness.aggregate import aggregate, ratio
from bench.tightness.answer import findings, sentences
from bench.tightness.figures import draw, space_out
from bench.tightness.tables import headline, report
from lipbounds import registry


KINDS = {
    "paper.bound": "proved",
    "paper.theorem": "proved",
    "exact": "proved",
    "below": "lower",
    "probably": "probable",
}
BEFORE, AFTER = "# Title\n\ntext\n", "\nmore text\n"


def tables_of(*records: Any, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "command": "python -m bench tightness",
        "records_path": "results/tightness.jsonl",
    } | options
    return aggregate(records, {"here": environment_line(**KINDS)}, **settings)


@pytest.fixture
def aggregates() -> dict[str, Any]:
    """Two layers, three inputs: the truth is 2, the bound 4, 6, 20 and 2, 2, 2, and a lower bound reaches 1.9."""
    values = {0: (4.0, 6.0, 20.0), 1: (2.0, 2.0, 2.0)}
    records = []
    for layer, of in values.items():
        for number, value in enumerate(of):
            place = {"layer": layer, "input": f"seed-{number}", "module": f"block.{layer}"}
            error = {"status": "unsupported", "error": "no | promise"}
            records += [
                record("paper.bound", value, **place),
                record("paper.theorem", None, **place, **error),
                record("exact", 2.0, **place),
                record("below", 1.9, "lower", **place),
                record("probably", 2.2, "probable", delta=1e-9, **place),
            ]
    return tables_of(*records)


def row_of(rows: list[dict[str, Any]], bound: str) -> dict[str, Any]:
    (found,) = [row for row in rows if row["bound"] == bound]
    return found


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_against_the_exact_norm(aggregates: dict[str, Any]) -> None:
    model = aggregates["models"]["tiny"]
    assert model["references"] == {"exact": 6}
    expected = {"kind": "proved", "scope": "point", "median": 1.5, "worst": 10.0, "best": 1.0, "count": 6}
    assert row_of(model["overall"], "paper.bound") == {"bound": "paper.bound", **expected}
    assert [row["median"]["paper.bound"] for row in model["per_layer"]] == [3.0, 1.0]
    assert [row["reference"] for row in model["per_layer"]] == [2.0, 2.0]


@pytest.mark.parametrize("step", [1, -1])
def test_the_exact_norm_is_the_reference_whatever_the_order_of_the_records(step: int) -> None:
    records = [record("exact", 2.0), record("below", 2.0, "lower"), record("paper.bound", 4.0)]
    model = tables_of(*records[::step])["models"]["tiny"]
    assert model["references"] == {"exact": 1}
    assert row_of(model["overall"], "paper.bound")["median"] == 2.0


def test_the_worst_lower_bound_is_the_smallest() -> None:
    blocks = [{"input": f"seed-{number}"} for number in range(2)]
    lower = [record("below", value, "lower", **block) for value, block in zip((1.0, 1.5), blocks, strict=True)]
    rows = tables_of(*lower, *(record("exact", 2.0, **block) for block in blocks))["models"]["tiny"]["overall"]
    assert (rows[0]["worst"], rows[0]["best"]) == (0.5, 0.75)


def test_without_an_exact_norm_the_largest_lower_bound_is_the_reference() -> None:
    lowers = [record("below", value, "lower", options={"steps": value}) for value in (1.0, 4.0, 3.0)]
    model = tables_of(*lowers, record("paper.bound", 8.0))["models"]["tiny"]
    assert model["references"] == {"below": 1}
    assert row_of(model["overall"], "paper.bound")["median"] == 2.0


def test_how_well_the_truth_is_known_comes_with_the_kind_of_that_promise() -> None:
    lower, proved, probable = (
        record("below", 4.0, "lower"),
        record("paper.bound", 8.0),
        record("probably", 4.1, "probable"),
    )
    known = tables_of(lower, proved, probable)
    assert known["models"]["tiny"]["bracket"] == {"ratio": pytest.approx(1.025), "kind": "probable"}
    assert "By the smallest upper bounds (probable), the truth is at most 2.5 % above it." in report(known)
    assert "By the smallest upper bounds (proved), the truth is at most 100 % above it." in report(
        tables_of(lower, proved)
    )
    assert "itself a proved upper bound" in report(tables_of(record("exact", 4.0), lower, proved))
    assert "No upper bound says" in report(tables_of(lower))


def test_a_block_that_nothing_measured_is_counted_and_not_compared() -> None:
    model = tables_of(record("paper.bound", 8.0))["models"]["tiny"]
    assert (model["overall"], model["unmeasured"]) == ([], 1)
    assert "1 block of tiny has no reference and is in no table." in report(tables_of(record("paper.bound", 8.0)))


def test_a_ratio_to_zero_is_infinite_unless_the_value_is_zero() -> None:
    assert (ratio(0.0, 0.0), ratio(1.0, 0.0), ratio(1.0, 4.0)) == (1.0, math.inf, 0.25)


@pytest.mark.parametrize(("kind", "name"), [("proved", "paper.bound"), ("probable", "probably")])
def test_an_upper_bound_below_a_lower_one_is_put_at_the_top_of_the_page(kind: str, name: str) -> None:
    found = tables_of(record(name, 1.0, kind), record("below", 1.5, "lower"))
    (violation,) = found["models"]["tiny"]["violations"]
    assert (violation["bound"], violation["value"], violation["reached"]) == (name, 1.0, 1.5)
    assert "One of the two is wrong" in report(found).split("## ")[0]


def test_bounds_above_the_lower_bound_are_no_violation(aggregates: dict[str, Any]) -> None:
    assert aggregates["models"]["tiny"]["violations"] == []
    assert "wrong" not in report(aggregates)


def test_the_gain_of_the_paper_is_a_ratio_of_its_bounds() -> None:
    values = {"yudin2025.biased": 6.0, "yudin2025.biased_half": 9.0, "yudin2025.biased_exact": 4.5}
    values["yudin2025.biased_one"] = 15.0
    norms = dict(zip(values, (0.3, 0.5, 0.2, 1.0), strict=True))
    records = [record(name, value, details={"softmax_norm": norms[name]}) for name, value in values.items()]
    found = aggregate(records, {"here": environment_line(*values)}, command="", records_path="")
    (row,) = found["models"]["tiny"]["gain"]
    (sentence,) = findings(found, "tiny", "yudin2025.biased")
    assert "1.500 to 1.500 times smaller than with the constant 1/2" in sentence
    assert row["half_over_g_1"] == pytest.approx(1.5)
    assert row["half_over_exact"] == pytest.approx(2.0)
    assert row["one_over_half"] == pytest.approx(15 / 9)
    assert row["g_1_over_exact"] == pytest.approx(6 / 4.5)
    assert (row["g_1"], row["exact_norm"]) == (0.3, 0.2)
    assert "| 0       | 1.667        | 1.500          | 2.00" in report(found)


def test_ratios_by_length_share_a_class_up_to_each_power_of_two() -> None:
    values = {3: 4.0, 4: 8.0, 5: 20.0, 8: 40.0}  # tokens and the bound; the truth is 2
    records = []
    for tokens, value in values.items():
        place = {"input": f"seed-{tokens}", "tokens": tokens}
        records += [record("exact", 2.0, **place), record("paper.bound", value, **place)]
    found = tables_of(*records)
    rows = found["models"]["tiny"]["per_length"]
    assert [(row["tokens"], row["inputs"], row["median"]["paper.bound"]) for row in rows] == [
        ([3, 4], 2, 3.0),
        ([5, 8], 2, 15.0),
    ]
    assert "| 3 to 4   | 2        | 3.00" in report(found)
    (sentence,) = findings(found, "tiny", "paper.bound")
    assert "is 3.00 at 3 to 4, 15.0 at 5 to 8 tokens" in sentence


def test_the_page_begins_with_the_figure_the_answer_and_the_headline() -> None:
    values = {"exact": 2.0, "sharp": 3.0, "yudin2025.biased": 12.0}
    found = aggregate(
        [record(name, value) for name, value in values.items()],
        {"here": environment_line(*values)},
        command="",
        records_path="",
    )
    nearest, paper, sound = sentences(found)
    assert nearest.endswith("is `sharp` on tiny (1.500 times).")  # `exact` is the truth here
    assert "6.00 times the true constant on tiny (4.00 times the nearest one)" in paper
    assert sound.startswith("In 2 evaluations of upper bounds at a point, on 1 model, none")
    first = report(found).split("\n## ")[0]
    assert first.index("(tightness.png)") < first.index(nearest) < first.index("| `yudin2025.biased`")
    wrong = tables_of(record("paper.bound", 1.0), record("below", 1.5, "lower"))
    assert not any("none was below" in sentence for sentence in sentences(wrong))


def test_one_length_gets_no_table_by_length(aggregates: dict[str, Any]) -> None:
    assert "by length" not in report(aggregates)
    assert findings(aggregates, "tiny", "paper.bound") == []
    assert findings(aggregates, "no such model", "paper.bound") == []


# -- pages -----------------------------------------------------------------------------------------------------------


def test_no_table_has_more_than_one_kind_of_ratio(aggregates: dict[str, Any]) -> None:
    sections = [part for part in report(aggregates).split("\n#") if "median ratio" in part]
    assert len(sections) == 3
    for section in sections:
        assert sum(f"`{name}`" in section for name in ("paper.bound", "probably", "below")) == 1


def test_the_page_says_what_made_it_what_the_kinds_mean_and_what_failed(aggregates: dict[str, Any]) -> None:
    page = report(aggregates)
    for needed in (
        "`python -m bench tightness` from `results/tightness.jsonl`",
        "- probable: an upper bound that fails with probability at most delta",
        "Scope `point`: the norm of the Jacobian at the given input",
        "Reference: `exact` (proved) at 6 blocks",
        "no \\| promise",
        "commit 0123456789 with uncommitted changes",
    ):
        assert needed in page
    assert "| tiny    | `paper.theorem` | unsupported | 6 " in page


def test_the_headline_has_proved_bounds_only_and_a_dash_where_nothing_is_promised(aggregates: dict[str, Any]) -> None:
    assert "| `paper.bound` | Summary of paper.bound | 1.500 (10.0) |" in headline(aggregates)
    assert not any(name in headline(aggregates) for name in ("probably", "below", "paper.theorem"))
    other = {**aggregates["models"]["tiny"], "overall": []}
    both = {**aggregates, "models": {**aggregates["models"], "other": other}}
    assert "| 1.500 (10.0) | -       |" in headline(both)


def test_the_headline_says_where_a_bound_was_evaluated_at_fewer_blocks(aggregates: dict[str, Any]) -> None:
    fewer = copy.deepcopy(aggregates)
    (model,) = fewer["models"].values()
    (row,) = [row for row in model["overall"] if row["bound"] == "paper.bound"]
    assert "n = " not in headline(fewer).split("|", 1)[1]
    row["count"] -= 1
    assert f"1.500 (10.0, n = {row['count']})" in headline(fewer)


def test_numbers_are_written_with_the_digits_that_matter() -> None:
    written = {
        2.5e140: "2.50e+140",
        12345.6: "12,346",
        123.4: "123",
        12.34: "12.3",
        2.5: "2.50",
        1.0249: "1.025",
        0.25: "0.2500",
    }
    written |= {0.999999: "0.999999", 3e-7: "3.00e-07", 0.0: "0.0000", math.inf: "inf", None: "-"}
    assert {value: figure(value) for value in written} == written


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ("proof of Theorem 3", "Proof of Theorem 3"),
        ("By Lanczos, from below: x", "By Lanczos"),
        ("A 0.5. Two.", "A 0.5"),
    ],
)
def test_a_summary_is_cut_to_its_first_clause(summary: str, words: str) -> None:
    assert summary_words(summary) == words


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    placed = space_out([0.0, 0.01, 0.02, 0.5], 0.1)
    assert placed == pytest.approx([-0.09, 0.01, 0.11, 0.5])


def test_the_figure_is_the_same_for_the_same_numbers(aggregates: dict[str, Any], tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in draw(aggregates, tmp_path / "first")}
    second = {path.name: path.read_bytes() for path in draw(aggregates, tmp_path / "second")}
    assert first == second
    assert sorted(first) == ["tightness.png", "tightness.svg"]
    text = first["tightness.svg"].decode()
    assert ">paper.bound</text>" in text  # the names of the tables
    assert ">below</text>" not in text


# -- README ----------------------------------------------------------------------------------------------------------


def test_the_readme_gets_the_table_between_its_markers_and_nothing_else_changes() -> None:
    text = f"{BEFORE}{readme.BEGIN}\nold\n{readme.END}{AFTER}"
    once = readme.insert(text, "| new |")
    assert once == f"{BEFORE}{readme.BEGIN}\n| new |\n{readme.END}{AFTER}"
    assert readme.insert(once, "| new |") == once


@pytest.mark.parametrize(
    "text",
    ["no markers", readme.BEGIN, readme.END, f"{readme.END} {readme.BEGIN}", f"{readme.BEGIN}{readme.END}" * 2],
)
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match="tightness:begin"):
        readme.insert(text, "table")


# -- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [registry.get(name) for name in ("exact", "lanczos", "lanczos_certificate", "yudin2025.biased")]
    monkeypatch.setattr(registry, "select", lambda **_: chosen)
    monkeypatch.setattr(registry, "refuted", list)
    monkeypatch.setattr(features, "page", lambda _: "# Bounds\n")
    # Others are tested in files of their own.
    monkeypatch.setattr(command_line, "TASKS", (command_line.TIGHTNESS, command_line.BALLS))


def bench(*arguments: str, **options: Any) -> int:
    given: dict[str, Any] = {"models": [tiny_model()], **options}
    return command_line.main(list(arguments), **given)


@pytest.mark.usefixtures("few_methods")
def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--results", str(tmp_path)]
    assert bench("tightness", "--quick", *results) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quick", "tightness.jsonl"]
    assert bench("tightness", *results) == 0
    output = capsys.readouterr().out
    assert "16 answers made, 8 taken from" in output
    names = ["bounds.md", "tightness.json", "tightness.md", "tightness.png", "tightness.svg"]
    assert {path.name for path in tmp_path.iterdir()} == {"quick", "tightness.jsonl", *names}
    assert all(str(tmp_path / name) in output for name in names)
    written = json.loads((tmp_path / "tightness.json").read_text())
    assert (written["schema_version"], written["models"]["tiny"]["inputs"]) == (1, 3)

    before = {name: (tmp_path / name).read_bytes() for name in [*names, "tightness.jsonl"]}
    assert bench("tightness", *results) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before

    page = tmp_path / "README.md"
    page.write_text(f"{BEFORE}{readme.BEGIN}\n{readme.END}{AFTER}")
    assert bench("readme", "--check", "--readme", str(page), *results) == 1
    assert "yudin2025" not in page.read_text()
    assert bench("readme", "--readme", str(page), *results) == 0
    assert bench("readme", "--check", "--readme", str(page), *results) == 0
    assert "`yudin2025.biased`" in page.read_text()


@pytest.mark.usefixtures("few_methods")
def test_an_interrupt_says_how_to_go_on_and_leaves_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Chain:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr("bench.tightness.task.converged_lanczos", interrupted)
        assert bench("--results", str(tmp_path)) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert len(records_at(tmp_path / "tightness.jsonl")) == 3
    assert bench("--quick", "--results", str(tmp_path)) == 0
    assert "5 answers made, 3 taken from" in capsys.readouterr().out


@pytest.mark.usefixtures("few_methods")
def test_what_failed_is_in_the_exit_status_on_stderr_and_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [tiny_model(), tiny_model("broken", breaks_at=1)]
    assert bench("--results", str(tmp_path), models=models) == 1
    assert "broken is incomplete: OSError: the disk is gone" in capsys.readouterr().err
    assert "**broken is incomplete**: OSError: the disk is gone" in (tmp_path / "tightness.md").read_text()


def test_readme_before_any_results_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}\n{readme.END}")
    assert bench("readme", "--readme", str(page), "--results", str(tmp_path)) == 2
    assert "run `python -m bench` first" in capsys.readouterr().err


REFUSED = {
    "--check": "--check goes with the tasks readme, got all",
    "--time-limit 0": "--time-limit must be above 0",
    "speed --full": "--full goes with the tasks certified, pretrained, robustness, got speed",
    "render --force": "--force goes with the tasks",
    "certified --time-limit 5": "--time-limit goes with the tasks",
    "tightness --device nowhere": "device must be a device that is here",
    "speed --device cuda:77": "device must be a device that is here",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items())
def test_a_command_line_that_means_nothing_is_refused_in_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = bench(*arguments.split(), "--results", str(tmp_path))
    except SystemExit as left:  # the parser's own
        status = left.code
    error = capsys.readouterr().err
    assert status == command_line.MISUSE
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("task", command_line.TASKS, ids=lambda task: task.name)
def test_every_task_declares_options_that_there_are(task: Any) -> None:
    options = command_line._parser().parse_args([task.name])
    assert task.takes <= vars(options).keys()
    assert {"quick", "force", "results"} <= task.takes
