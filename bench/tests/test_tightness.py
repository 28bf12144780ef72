"""The task: what is evaluated, skipped and retried, and that a run killed anywhere goes on where it was."""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.engine import evaluators, reference
from bench.engine.evaluate import evaluate, question
from bench.engine.records import Record
from bench.engine.store import Store
from bench.engine.store_file import read
from bench.tests.samples import records_at, spec, tiny_block, tiny_case, tiny_model
from bench.tightness import task as tightness
from lipbounds import registry
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention


# Cheap ones of every sort: the two halves of the bracket, the dense Jacobian, a bound, and one that needs no biases.
NAMES = ["exact", "lanczos", "lanczos_certificate", "yudin2025.biased", "yudin2025.theorem3"]
METHODS = len(NAMES)
BLOCKS = 6


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tightness.jsonl"


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing else were registered, which saves most of the time."""
    chosen = [registry.get(name) for name in NAMES]
    monkeypatch.setattr(registry, "select", lambda **_: chosen)
    monkeypatch.setattr(registry, "refuted", list)


def run(path: Path, **options: Any) -> tightness.Outcome:
    with Store(path, started_by=options.pop("started_by", "")) as store:
        return tightness.run(store, options.pop("models", [tiny_model()]), **options)


def answer(tested: BoundSpec, block: Attention | None = None, **options: Any) -> Record:
    asked = question("tightness", tiny_case(), tested, options)
    block = tiny_case().block if block is None else block
    return evaluate(asked, block, tested, time_limit=5.0, environment="here")


def answers(path: Path) -> dict[str, tuple[Any, ...]]:
    """All but the time taken and the run, which differ between runs."""
    return {key: (each.value, each.status, each.terms) for key, each in records_at(path).items()}


# -- one evaluation --------------------------------------------------------------------------------------------------


def test_an_answer_holds_the_value_its_promise_and_the_means_of_its_parts() -> None:
    def compute(block: Attention, *, delta: float = 1e-3, seed: int = 4, steps: int = 7) -> Any:
        return torch.tensor(2.5), {"part": torch.tensor([1.0, 3.0]), "detail.residual": torch.tensor(1e-8)}

    found = answer(spec(compute, kind="probable"), steps=9)
    assert (found.status, found.value, found.kind, found.scope, found.delta) == ("ok", 2.5, "probable", "point", 1e-3)
    assert (found.terms, found.details) == ({"part": 2.0}, {"residual": pytest.approx(1e-8)})
    assert (found.question.seed, found.question.options) == (4, {"delta": 1e-3, "steps": 9})
    assert (found.tokens, found.heads, found.question.dtype, found.error) == (3, 2, "float64", "")


def test_a_block_without_promise_is_recorded_as_unsupported_with_the_reason() -> None:
    found = answer(spec(lambda block: torch.tensor(1.0), supports=frozenset({"heads"})))
    assert (found.status, found.value) == ("unsupported", None)
    assert "query, key or value biases" in found.error


@pytest.mark.parametrize(
    ("result", "message"),
    [(torch.tensor(float("nan")), "NaN"), (torch.ones(2), "one value per batch item")],
    ids=["nan", "wrong shape"],
)
def test_a_wrong_result_is_recorded_as_failed(result: torch.Tensor, message: str) -> None:
    found = answer(spec(lambda block: result))
    assert (found.status, found.value) == ("failed", None)
    assert found.error.startswith("InvalidInput: ")
    assert message in found.error


def test_an_error_inside_a_bound_is_recorded_as_failed() -> None:
    def compute(block: Attention) -> torch.Tensor:
        raise ZeroDivisionError("in the third step")

    assert answer(spec(compute)).error == "ZeroDivisionError: in the third step"


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs POSIX signals")
def test_a_time_limit_ends_an_evaluation_even_if_the_bound_catches_everything() -> None:
    def compute(block: Attention) -> torch.Tensor:
        for _ in range(1000):
            try:
                time.sleep(0.01)
            except Exception:
                continue
        return torch.tensor(1.0)

    asked = question("tightness", tiny_case(), spec(compute))
    found = evaluate(asked, tiny_block(), spec(compute), time_limit=0.05, environment="here")
    assert found.status == "timeout"
    assert "0.05 s" in found.error
    time.sleep(0.06)  # a timer left running would end the test here


def test_an_interrupt_by_the_user_is_not_recorded() -> None:
    def compute(block: Attention) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(spec(compute))


def test_no_bound_profits_from_what_another_one_computed_before() -> None:
    block = tiny_block()
    assert block.logits.isfinite().all()  # caches them on the block

    def compute(given: Attention) -> torch.Tensor:
        return torch.tensor(float("logits" in vars(given)))

    assert answer(spec(compute), block).value == 0.0


# -- a run -----------------------------------------------------------------------------------------------------------


def test_every_registered_method_is_evaluated_at_every_block(path: Path) -> None:
    outcome = run(path, quick=True)
    radii = {"point": 1, "ball": 3, "change": 3, "compact": 1, "global": 1}
    about_attention = [*registry.select(), *(each for each in registry.refuted() if each.target is Attention)]
    counts = {each.name: radii[each.claim.scope] for each in about_attention}
    assert set(counts) >= set(NAMES)
    found = list(records_at(path).values())
    assert outcome.evaluated == len(found)
    asked = Counter((each.question.bound, each.question.layer) for each in found if each.question.bound != "lanczos")
    del counts["lanczos"]  # as often as it takes
    assert asked == {(name, layer): count for name, count in counts.items() for layer in range(2)}


@pytest.mark.usefixtures("few_methods")
def test_the_literal_theorem_is_unsupported_with_biases(path: Path) -> None:
    run(path)
    found = [each for each in records_at(path).values() if each.question.bound == "yudin2025.theorem3"]
    assert [each.status for each in found] == ["unsupported"] * BLOCKS


@pytest.mark.usefixtures("few_methods")
def test_a_quick_run_asks_a_part_of_what_a_full_run_asks(path: Path) -> None:
    quick = run(path, quick=True)
    full = run(path)
    assert quick.evaluated == full.reused == 2 * METHODS
    assert set(quick.keys) < set(full.keys)


@pytest.mark.usefixtures("few_methods")
def test_a_second_run_evaluates_nothing_and_leaves_the_file_as_it_is(path: Path) -> None:
    run(path)
    before = path.read_bytes()
    outcome = run(path)
    assert (outcome.evaluated, outcome.reused) == (0, BLOCKS * METHODS)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("few_methods")
def test_force_evaluates_all_again(path: Path) -> None:
    run(path)
    before = answers(path)
    assert run(path, force=True).evaluated == BLOCKS * METHODS
    assert answers(path) == before
    assert read(path).superseded == BLOCKS * METHODS


@pytest.mark.usefixtures("few_methods")
@pytest.mark.parametrize("calls", [0, METHODS + 2])
def test_a_run_killed_anywhere_loses_only_the_evaluation_in_flight(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    run(tmp_path / "whole" / "tightness.jsonl")
    counter = itertools.count()

    def killed(*args: Any, **kwargs: Any) -> Record:
        if next(counter) == calls:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluators, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert len(records_at(path)) == calls
    outcome = run(path)
    assert (outcome.evaluated, outcome.reused) == (BLOCKS * METHODS - calls, calls)
    assert answers(path) == answers(tmp_path / "whole" / "tightness.jsonl")


@pytest.mark.usefixtures("few_methods")
def test_failures_are_tried_again_and_what_is_settled_is_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(asked: Any, block: Attention, tested: BoundSpec, **options: Any) -> Record:
        def broken(block: Attention) -> torch.Tensor:
            raise RuntimeError("not today")

        replaced = spec(broken) if tested.name == "yudin2025.biased" else tested
        return evaluate(asked, block, replaced, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluators, "evaluate", failing)
        run(path)
    assert sum(each.status == "failed" for each in records_at(path).values()) == BLOCKS
    assert run(path).evaluated == BLOCKS
    assert not any(each.status == "failed" for each in records_at(path).values())


@pytest.mark.usefixtures("few_methods")
def test_lanczos_takes_more_steps_where_the_residual_is_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "STEPS", (2, 3, 30))
    run(path, quick=True)
    found = [each for each in records_at(path).values() if each.question.bound == "lanczos"]
    for _, group in itertools.groupby(found, key=lambda each: each.question.layer):
        *before, last = group
        assert all(each.details["residual"] > reference.LARGEST_RESIDUAL for each in before)
        assert last.details["residual"] <= reference.LARGEST_RESIDUAL
        assert [each.question.options["steps"] for each in (*before, last)] == [2, 3, 30][: len(before) + 1]
    assert max(each.question.options["steps"] for each in found) == 30


def test_a_large_block_is_measured_without_its_dense_jacobian() -> None:
    small = {method.spec.name for method in tightness.methods(tiny_case())}
    large = {method.spec.name for method in tightness.methods(tiny_case(tokens=301))}
    assert small - large >= {"exact", "power_iteration"}
    assert {registry.get(name).role for name in small - large} == {"estimator"}
    assert {"lanczos_certificate", "yudin2025.theorem3"} <= large


@pytest.mark.usefixtures("few_methods")
def test_a_broken_model_does_not_cost_the_others_their_numbers(path: Path) -> None:
    outcome = run(path, models=[tiny_model("broken", breaks_at=1), tiny_model()])
    assert outcome.problems == {"broken": "OSError: the disk is gone"}
    assert outcome.evaluated == (2 + BLOCKS) * METHODS


@pytest.mark.usefixtures("few_methods")
def test_a_full_disk_ends_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(store: Store, record: Record) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Store, "append", full)
    with pytest.raises(OSError, match="disk full"):
        run(path)


@pytest.mark.usefixtures("few_methods")
def test_a_run_leaves_one_environment_line_with_what_its_methods_promise(path: Path) -> None:
    run(path, started_by="python -m bench")
    ((name, line),) = read(path).environments.items()
    assert {each.environment for each in records_at(path).values()} == {name}
    assert line["command"] == "python -m bench"
    assert line["environment"]["packages"]["torch"] == torch.__version__
    assert line["methods"]["lanczos"]["kind"] == "lower"
    assert line["models"] == {"tiny": "Tiny: two layers"}
