"""Bounds of a model side by side: ranked where they can be, with the truth, in every format."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lipbounds
from lipbounds import Comparison, InvalidInput
from lipbounds.cli.app import app
from lipbounds.comparison.ground_truth import chosen, cost
from lipbounds.comparison.measure import compare_runs
from lipbounds.comparison.row import Row
from lipbounds.difference import compare as difference
from lipbounds.errors import LipboundsError
from lipbounds.estimators.exact import exact_work, jacobian
from lipbounds.number_format import counted, shown
from lipbounds.results import read_results
from verify.unit.blocks import random_block


MODEL = nn.TransformerEncoder(
    nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
).eval()
X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
BOUNDS = ["yudin2025.biased", "sharp_fast", lipbounds.bounds.sharp, lipbounds.get("lanczos"), "covariance_token.exact"]


@pytest.fixture(scope="module")
def found() -> Comparison:
    return lipbounds.compare(MODEL, X, bounds=[*BOUNDS, "sharp_ball"], radii=[0.1])


def test_numbers_are_those_of_the_bounds_and_ratios_those_over_the_truth(found: Comparison) -> None:
    with torch.no_grad():
        blocks = lipbounds.capture(MODEL, X)
    for layer, block in enumerate(blocks):
        value, exact = lipbounds.get("sharp_fast")(block).value, lipbounds.get("exact")(block).value
        rows = [row for row in found.rows if (row.bound, row.layer) == ("sharp_fast", layer)]
        assert [row.value for row in rows] == value.tolist()
        assert [row.ratio for row in rows] == pytest.approx((value / exact).tolist(), rel=1e-5)


def test_bounds_are_ranked_within_kind_scope_norm_and_radius(found: Comparison) -> None:
    groups = found.groups()
    names = {group: [one.bound for one in summaries] for group, summaries in groups.items()}
    assert names == {
        ("proved", "point", "l2", None): ["sharp", "sharp_fast", "yudin2025.biased"],
        ("proved", "point", "token", None): ["covariance_token.exact"],
        ("proved", "ball", "l2", 0.1): ["sharp_ball"],
        ("lower", "point", "l2", None): ["lanczos"],
    }
    (token,) = groups["proved", "point", "token", None]
    assert token.ratio is None  # the truth is in another norm
    assert all(one.count == 4 for summaries in groups.values() for one in summaries)


def test_it_prints_as_tables(found: Comparison) -> None:
    text = repr(found)
    assert text.startswith("TransformerEncoder: 2 attention layers, 4 blocks; truth at the point in l2: exact norm")
    assert "proved, on a ball, l2, radius 0.1; the ratio is over the truth at the centre" in text
    assert text.index("sharp ") < text.index("sharp_fast ") < text.index("yudin2025.biased ")
    assert found._repr_html_().count("<table>") == 4


def test_shown_numbers_are_rounded_to_the_side_of_the_promise() -> None:
    place: dict[str, Any] = {
        "input": "",
        "layer": 0,
        "module": "",
        "item": 0,
        "radius": None,
        "delta": None,
        "seconds": 0.0,
    }
    numbers: dict[str, Any] = {"value": 1.00001, "truth": 1.0, "truth_from_below": 1.0, "scope": "point", "norm": "l2"}
    rows = (Row(bound="up", kind="proved", **place, **numbers), Row(bound="down", kind="lower", **place, **numbers))
    lines = [line.split() for line in repr(Comparison(model="m", rows=rows)).splitlines()]
    up, down = (next(line for line in lines if line[:1] == [name]) for name in ("up", "down"))
    assert up[1:4] == ["1.001", "1.001", "1.001"]
    assert down[1:4] == ["1.000", "1.000", "1.000"]


def test_csv_json_and_latex_hold_every_number(found: Comparison, tmp_path: Path) -> None:
    lines = [*csv.DictReader(io.StringIO(found.to_csv(tmp_path / "a.csv")))]
    assert len(lines) == len(found.rows)
    assert [float(line["value"]) for line in lines] == [row.value for row in found.rows]
    assert (tmp_path / "a.csv").read_text() == found.to_csv()
    rows = json.loads(found.to_json(tmp_path / "a.json"))["rows"]
    assert [row["ratio"] for row in rows] == [row.ratio for row in found.rows]
    latex = found.to_latex(tmp_path / "a.tex")
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 4
    assert r"\texttt{covariance\_token.exact} & " in latex
    assert all(line.count("&") == 5 for line in latex.splitlines() if line.endswith(r"\\"))


def test_the_figure_has_its_message_as_title(found: Comparison, tmp_path: Path) -> None:
    figure = found.plot(tmp_path / "a.png")
    (axes,) = figure.axes
    ratio = shown(found.groups()["proved", "point", "l2", None][0].ratio or 0.0, "proved")
    assert axes.get_title(loc="left") == f"TransformerEncoder: sharp is {ratio} times the truth"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["yudin2025.biased", "sharp_fast", "sharp"]
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(LipboundsError, match="a truth, got none"):
        lipbounds.compare(MODEL, X, bounds=["sharp_fast"], truth="none").plot()


def test_a_data_frame_needs_pandas_and_says_so(found: Comparison) -> None:
    try:
        import pandas  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(LipboundsError, match="pip install pandas"):
            found.to_pandas()
    else:
        assert len(found.to_pandas()) == len(found.rows)


def test_left_out_bounds_are_named() -> None:
    compared = lipbounds.compare(MODEL, X[:1], bounds=["yudin2025.theorem3", "sharp_fast"])
    assert compared.refused == {}  # torch starts with biases at zero
    biased = random_block(b_q=torch.ones(2, 3, dtype=torch.float64))
    compared = lipbounds.compare(biased, bounds=["yudin2025.theorem3", "sharp_fast"])
    assert "biases" in compared.refused["yudin2025.theorem3"]
    assert "yudin2025.theorem3: left out" in repr(compared)
    assert {row.bound for row in compared.rows} == {"truth", "sharp_fast"}


def test_the_default_is_every_proved_bound_in_l2_and_balls_come_with_radii() -> None:
    block = random_block()
    names = {row.bound for row in lipbounds.compare(block, truth="none").rows}
    specs = lipbounds.select(kind="proved", norm="l2", scope="point", role="bound", block=block)
    assert names == {spec.name for spec in specs}
    with_balls = lipbounds.compare(block, truth="none", radii=[0.01]).rows
    assert {"sharp_ball", "centred.change", "yudin2025_ball.biased"} <= {row.bound for row in with_balls}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lipbounds.compare(MODEL, X, bounds=["sharp_ball"]), "pass radii="),
        (lambda: lipbounds.compare(MODEL, X, radii=[-1.0]), "radii must be finite and above 0"),
        (lambda: lipbounds.compare(MODEL, X, bounds=["kim2021.l2"]), "bounds must be about attention"),
        (lambda: lipbounds.compare(MODEL, X, bounds=[3]), "names or specs, got int"),
        (lambda: lipbounds.compare(MODEL, X, truth="maybe"), "truth must be one of"),
        (lambda: lipbounds.compare(random_block(), X), "inputs go with a torch.nn.Module"),
        (lambda: lipbounds.compare(3), "or what capture found, got int"),
        (lambda: lipbounds.truth(random_block(), method="guess"), "method must be one of"),
    ],
)
def test_wrong_arguments_are_told(call: Any, message: str) -> None:
    with pytest.raises((InvalidInput, TypeError), match=message):
        call()


def test_the_truth_is_exact_for_small_blocks_and_certified_for_large_ones() -> None:
    block = random_block()
    exact, certified = lipbounds.truth(block), lipbounds.truth(block, method="certificate", delta=1e-6)
    assert (exact.kind, certified.kind, certified.delta) == ("proved", "probable", 1e-6)
    assert bool((exact.terms["lower"] <= exact.value).all())
    assert float(exact) == pytest.approx(float(exact.terms["lower"]), rel=1e-6)
    assert exact.note == cost(block)
    large = random_block(x=torch.ones(1500, 6, dtype=torch.float64))
    assert chosen(large, "auto") == "certificate"
    assert "120 products" in cost(large)


def test_what_exact_refuses_is_said_beforehand_and_where_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block()
    work = exact_work(block)
    assert (work.rows, work.columns) == tuple(jacobian(block).shape[-2:])
    assert f"{work.rows} x {work.columns}, verified" in cost(block)
    monkeypatch.setattr("lipbounds.estimators.exact.MAX_ENTRIES", work.rows * work.columns)
    batch = block.replace(x=block.x * torch.tensor([1.0, 2.0]).reshape(2, 1, 1))
    one_by_one = [float(lipbounds.get("exact")(block.replace(x=x))) for x in batch.x]  # neither is too large alone
    assert lipbounds.get("exact")(batch).value.tolist() == pytest.approx(one_by_one, rel=1e-12)
    monkeypatch.setattr("lipbounds.estimators.exact.MAX_ENTRIES", work.rows * work.columns - 1)
    assert "method='certificate' is a certificate by 120 products" in cost(block, method="exact")
    with pytest.raises(InvalidInput, match="method='certificate'"):
        lipbounds.truth(block, method="exact")


def test_several_inputs_are_rows_of_their_own() -> None:
    runs = {name: lipbounds.capture(MODEL, X[i : i + 1]) for i, name in enumerate(("first", "second"))}
    compared = compare_runs(runs, bounds=["sharp_fast"], truth="none", name="model")
    places = [(row.input, row.layer) for row in compared.rows]
    assert places == [("first", 0), ("first", 1), ("second", 0), ("second", 1)]


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    torch.save(torch.rand(1, 1, 8, 8), tmp_path / "x.pt")
    files = [tmp_path / name for name in ("a.tex", "a.csv", "a.pdf")]
    options = ["--latex", str(files[0]), "--csv", str(files[1]), "--figure", str(files[2])]
    bounds = ["--bounds", "sharp_fast", "--bounds", "yudin2025.biased", "--truth", "certificate"]
    done = CliRunner().invoke(app, ["compare", "lipschitz-vit", "--data", str(tmp_path / "x.pt"), *bounds, *options])
    assert done.exit_code == 0, done.output
    assert "sharp_fast" in done.stdout
    assert "truth: certificate by 120 products" in done.stderr
    assert all(file.stat().st_size > 100 for file in files)


def test_reports_before_and_after_training_are_compared(tmp_path: Path) -> None:
    from lipbounds.report import measure, to_json

    paths = []
    for name, scale in (("before", 1.0), ("after", 2.0)):
        model = nn.MultiheadAttention(8, 2, batch_first=True, bias=False).eval()
        with torch.no_grad():
            torch.manual_seed(0)
            model.out_proj.weight.copy_(scale * torch.randn(8, 8))
            model.in_proj_weight.copy_(torch.randn(24, 8))

        class Self(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x, x, x)[0]

        report = measure(Self(model).eval(), X[:1], name=name, bounds=["sharp_fast"], radii=[])
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(to_json(report))
    found = difference(*map(read_results, paths), tolerance=0.05)
    assert {change.method for change in found.worse} == {"sharp_fast", "exact", "lanczos"}
    assert all(change.factor == pytest.approx(2.0, rel=1e-6) for change in found.worse)


def test_one_thing_is_not_many() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "query", "queries") for number in (1, 2)] == ["1 query", "2 queries"]
    shown_as = str(lipbounds.compare(random_block(heads=1), bounds=["sharp_fast"]))
    assert shown_as.startswith("attention: 1 attention layer, 1 block;")
