"""The task `attention`: parts of the Jacobian, what is taken from records, resuming, verdicts, page and figures."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.func import jacrev

from bench.attention import figures as attention_figures
from bench.attention import measures
from bench.attention import tables as attention_tables
from bench.attention import task as task
from bench.attention.links import MEAN, arrays, factors, links
from bench.attention.maps import examples, statistics
from bench.attention.measures import bounds, mixing_block, part_norms, row_correlations, true_constant
from bench.engine.answers import Shown
from bench.engine.evaluate import question
from bench.engine.evaluators import CPU
from bench.engine.records import Record
from bench.engine.store import Store
from bench.engine.store_file import Entry
from bench.tests.samples import tiny_block, tiny_case
from bench.tightness.task import TASK
from bench.workloads.case import Case
from lipbounds import registry


INPUTS = 8
PROFILE = task.Profile(inputs={"minilm": INPUTS}, attacked={}, rows=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention") / "attention.jsonl"


@pytest.fixture(scope="module")
def made(path: Path) -> Iterator[dict[str, Any]]:
    """One block of tiny inputs, under the name of the model whose maps are drawn, with few bounds."""
    few = [registry.get(name) for name in ("sharp_fast", "yudin2025.biased")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "by_input", lambda name, count: (cases(seed) for seed in range(count)))
        for module in (measures, task):
            patch.setattr(module, "methods", lambda block: few)
        yield run(path)


def run(path: Path) -> dict[str, Any]:
    with Store(path) as store:
        task.run(store, PROFILE, {})
        return task.shown(Shown(store, store.show("standard", store.asked)), PROFILE)


@pytest.fixture
def data(made: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(made)


def cases(seed: int) -> list[Case]:
    return [dc.replace(tiny_case(seed, layer, tokens=4), model="minilm") for layer in range(1)]


def dense(block: Any, function: Any) -> torch.Tensor:
    return jacrev(function)(block.x).reshape(block.x.numel(), block.x.numel())


def test_parts_are_the_jacobian_with_one_factor_fixed() -> None:
    block = tiny_block(tokens=4).replace(causal=True)
    still = block.probabilities

    def mixed(x: torch.Tensor) -> torch.Tensor:
        return (still @ (x @ block.w_v) @ block.w_o).sum(-3)

    whole, mixing = dense(block, block.function()), dense(block, mixed)
    torch.testing.assert_close(dense(block, mixing_block(block).function()), mixing)
    expected = [float(torch.linalg.matrix_norm(part, 2)) for part in (mixing, whole - mixing)]
    assert part_norms(block) == pytest.approx(expected, rel=1e-6)


def test_rows_are_those_of_output_tokens() -> None:
    block = tiny_block(tokens=6)
    found = row_correlations(block)
    rows = dense(block, block.function()).unflatten(0, (6, 4))
    norms = [float(torch.linalg.matrix_norm(row, 2)) for row in rows]
    first, second = block.probabilities.topk(2, -1).values.unbind(-1)
    g_1 = (first * (1 - first + second)).mean(0)
    assert found is not None
    assert found["constant"] == pytest.approx(spearmanr(g_1, norms)[0])
    assert row_correlations(tiny_block(tokens=400)) is None


def recorded(case: Case, name: str, value: float, **options: Any) -> dict[str, Entry]:
    asked = question(TASK, case, registry.get(name), options)
    answer: dict[str, Any] = {"tokens": 3, "heads": 2, "kind": "proved", "scope": "point", "status": "ok"}
    return {asked.key: Entry.of(Record(question=asked, value=value, seconds=1.0, environment="here", **answer))}


def test_records_are_used_where_they_answer_the_same_question() -> None:
    case = tiny_case()
    exact = registry.get("exact")(case.block).value.item()
    assert true_constant(case, {}, CPU) == (pytest.approx(exact, rel=1e-6), "Lanczos, measured")
    assert true_constant(case, recorded(case, "exact", 7.0), CPU) == (7.0, "exact, recorded")
    assert true_constant(case, recorded(case, "lanczos", 8.0, steps=30), CPU) == (8.0, "Lanczos, recorded")
    assert true_constant(tiny_case(1), recorded(case, "exact", 7.0), CPU)[0] != 7.0
    assert bounds(case, recorded(case, "sharp_fast", 99.0), CPU)["sharp_fast"] == 99.0
    measured = bounds(case, {}, CPU)
    assert "yudin2025.theorem3" not in measured  # the block has biases
    assert min(measured.values()) >= exact * (1 - 1e-9)


def test_statistics_of_known_maps() -> None:
    logits = torch.full((2, 4, 4), -40.0, dtype=torch.float64)
    logits[0, :, 1] = 0.0  # a sink
    logits[1] = 0.0  # uniform
    found = statistics(logits)
    assert found["heads"]["most_attended"] == [1, 0.25]
    assert found["heads"]["max_g_1"] == pytest.approx([0, 0.25])
    assert found["heads"]["entropy"] == pytest.approx([0, 1])
    assert found["one_hot_rows"] == 0.5
    assert all(sum(counts) == 8 for counts in found["histograms"].values())


def test_examples_are_chosen_by_their_rule() -> None:
    tokens = 6
    logits = torch.zeros(4, tokens, tokens, dtype=torch.float64)
    logits[1].fill_diagonal_(30.0)
    logits[2, :, 3] = 30.0
    logits[3, :, :2] = 30.0
    block = tiny_block(tokens=tokens)
    zero = {name: torch.zeros(4, *getattr(block, name).shape[1:], dtype=torch.float64) for name in ("w_q", "w_k")}
    rest = {name: torch.cat([getattr(block, name)] * 2) for name in ("w_v", "w_o")}
    drawn = block.replace(**zero, **rest, b_q=None, logit_bias=logits)
    case = dc.replace(tiny_case(), load=lambda: ("", drawn))
    heads = {entry["kind"]: entry["head"] for entry in examples([case])["maps"]}
    assert heads == {"nearly uniform": 0, "nearly one-hot": 1, "sink": 2, "half and half": 3}


def test_a_run_goes_on_where_it_stopped(path: Path, data: dict[str, Any]) -> None:
    before = path.read_bytes()
    assert run(path) == data
    assert path.read_bytes() == before
    again = Store(path, only_read=True)
    assert len(again.entries) == INPUTS + 1
    assert [answer["rows"] for answer in data["models"]["minilm"]["inputs"]] == [True] + [False] * (INPUTS - 1)
    assert all(
        {"commit", "dirty"} <= again.environments[entry.environment]["environment"].keys()
        for entry in again.entries.values()
    )


def planted(data: dict[str, Any], power: float) -> dict[str, Any]:
    """The constant is a power of mean g_1, and images are fooled at its inverse."""
    model = copy.deepcopy(data["models"]["minilm"])
    for number, answer in enumerate(model["inputs"]):
        answer["input"] = f"image-{number}"
        for layer in answer["layers"]:
            layer["constant"] = float(np.mean(layer["heads"]["g_1"])) ** power
            layer["bounds"] = {"test.bound": 3 * layer["constant"]}
    constants = arrays(model)["true constant"].prod(0)
    distances = (1 / constants).tolist()
    first = {key: distances for key in ("jacobian", "margin", "slope", "L2", "Linf")}
    attack = {"weights": "w", "images": [*range(INPUTS)], "wrong": 1, "distances": {"L2": distances}, "first": first}
    return {**data, "models": {"digits-vit": model}, "attacks": {"digits-vit": attack}}


@pytest.mark.parametrize(("power", "verdict"), [(1.0, "holds"), (-1.0, "the opposite")])
def test_a_planted_explanation_is_seen_with_its_sign(data: dict[str, Any], power: float, verdict: str) -> None:
    given = planted(data, power)
    chain = {link.words: link for link in links(given, "digits-vit")}
    for words in (
        "blocks: mean g_1 with the true constant",
        f"images: {MEAN} with the perturbation, L2",
    ):
        assert chain[words].found.verdict(chain[words].sign) == verdict
    measured = {link.words: link.found.value for link in factors(given, "digits-vit")}
    assert (measured["true constant"] > 1) == (power > 0)
    assert (measured["perturbation, L2"] < 1) == (power > 0)
    page = attention_tables.report(given, "command", "records", "a machine")
    assert f"{verdict} at 1 of 1 model." in page
    assert "`test.bound` 1.00" in page


def test_the_length_of_the_input_is_held_fixed_where_it_varies(data: dict[str, Any]) -> None:
    words = "blocks: mean g_1 with the true constant, length held fixed"
    given = planted(data, 1.0)
    assert words not in {link.words for link in links(given, "digits-vit")}
    given = copy.deepcopy(given)  # the arrays of data are made once
    for number, answer in enumerate(given["models"]["digits-vit"]["inputs"]):
        answer["layers"][0]["tokens"] = 4 + number % 3
    assert words in {link.words for link in links(given, "digits-vit")}
    assert "length of the input held fixed" in attention_tables.report(given, "command", "records", "a machine")


def test_page_and_figures(tmp_path: Path, data: dict[str, Any]) -> None:
    given = planted(data, 1.0)
    assert data["examples"]["input"] == cases(INPUTS - 1)[0].input  # no text is long enough, so the last one
    page = attention_tables.report(given, "command", "records", "a machine")
    paths = attention_figures.draw(given, tmp_path)
    names = {path.name for path in paths}
    assert {f"{name}.{ending}" for name in ("attention_maps", "attention_scatter") for ending in ("png", "svg")} < names
    assert {name for name in names if f"({name})" in page} == {name for name in names if name.endswith(".png")}


def test_violations(data: dict[str, Any]) -> None:
    assert task.violations(data, []) == []
    given = planted(data, 1.0)
    given["models"]["digits-vit"]["inputs"][0]["layers"][0]["bounds"]["test.bound"] /= 4
    (found,) = task.violations(given, [])
    assert "test.bound claims" in found
    given = planted(data, 1.0)
    radius = 2 * given["attacks"]["digits-vit"]["distances"]["L2"][3]
    row = {"what": "certificate", "model": "digits-vit", "weights": "w", "image": 3, "radius": radius}
    (found,) = task.violations(given, [row])
    assert "image 3 is certified" in found


def test_first_order_of_a_linear_model_is_exact() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3, bias=False))
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]])
    model[1].weight.data = weight
    image = torch.tensor([[[[0.9, 0.3], [0.1, 0.5]]]])
    found = task.first_order(model, image, torch.tensor([0]))
    assert found["jacobian"] == pytest.approx([2])
    assert found["margin"] == pytest.approx([0.6])
    assert found["slope"] == pytest.approx([5**0.5])
    assert found["L2"] == pytest.approx([min(0.6 / 2**0.5, 0.7 / 5**0.5)])
    assert found["Linf"] == pytest.approx([0.7 / 3])
