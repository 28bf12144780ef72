"""The contract: the exact constant passes every check, and every check can fail."""

from __future__ import annotations

import collections
import dataclasses as dc
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis.database import InMemoryExampleDatabase
from torch import Tensor

import lipbounds
from lipbounds import Attention, BoundSpec, Claim, InvalidInput, UnsupportedAttention
from lipbounds.claims import FEATURES
from lipbounds.testing import contract, coverage_check, relation_checks
from lipbounds.testing.contract import CHECKS, Refuted, checks_for, load_spec, run_check, suite_for
from lipbounds.testing.oracles import jacobian_norm, truth_slack
from lipbounds.testing.recipes import Recipe, build
from verify.unit.sample_bounds import ALMOST_EXACT, AT_CENTRE, EXACT, Compute, spec


# Searches: they run as users run them. Other tests keep the shape checks of what is used here.
pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")


@pytest.mark.parametrize("check", checks_for(EXACT))
@pytest.mark.parametrize("exact", [EXACT, ALMOST_EXACT], ids=lambda s: s.name)
def test_the_exact_constant_passes_every_check(exact: BoundSpec, check: str) -> None:
    few = CHECKS[check].fixed is not None
    assert run_check(exact, check, max_examples=60 if check == "value" else 12) >= (3 if few else 12)


def test_the_exact_constant_is_a_lower_bound_too() -> None:
    assert run_check(spec(jacobian_norm, claim=Claim(kind="lower")), "value", max_examples=40) == 40


def scaled(factor: float) -> Compute:
    return lambda block: jacobian_norm(block) * factor


def naive_g_1(block: Attention) -> Tensor:
    """A bound for one query and one head whose 1 - p_(1) is a subtraction."""
    wide = block.double
    p = torch.nn.functional.pad(wide.probabilities.sort(-1, descending=True).values, (0, 1))
    g = (p[..., 0] * (1 - p[..., 0] + p[..., 1])).amax(-1)
    change = abs(wide.scale_value) * torch.linalg.matrix_norm(wide.keys @ wide.w_q.mT, 2)
    heads = torch.linalg.matrix_norm(wide.values, 2) * g * change * torch.linalg.matrix_norm(wide.w_o, 2)
    return heads.sum(-1) * (1 + 1e-12)


def test_subtraction_in_a_one_hot_row_is_refuted() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    memory = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    block = Attention(x=20 * one[0], w_q=one, w_k=one, w_v=one, w_o=one, memory=memory, moves="query")
    CHECKS["value"].function(spec(naive_g_1), block.at(block.x / 20))
    with pytest.raises(Refuted, match="times as large"):
        CHECKS["value"].function(spec(naive_g_1), block)


def test_a_violation_below_the_slack_of_float64_is_decided_by_sixty_digits() -> None:
    block = build(Recipe(seed=2, n=3, dim=3, spread=4.0))
    slack = (truth_slack(block) / jacobian_norm(block)).item()
    CHECKS["value"].function(spec(scaled(1 - slack / 2)), block)
    with pytest.raises(Refuted, match="value"):
        CHECKS["value"].function(spec(scaled(1 - 1.5 * slack)), block)


def first_head(block: Attention) -> Tensor:
    return block.w_v[..., 0, :, :].abs().amax((-2, -1)).expand(block.batch_shape) + 1


def radius_free(block: Attention, radius: float) -> Tensor:
    return jacobian_norm(block) * (2 - min(radius, 1.0))


class Unchecked(BoundSpec):
    """A bound that forgets to ask what it supports."""

    def __call__(self, block: Attention, radius: float | None = None, **options: object) -> lipbounds.BoundResult:
        value = torch.ones(block.batch_shape)
        return lipbounds.BoundResult(name=self.name, value=value, claim=self.claim)


def bad_gradient(block: Attention) -> Tensor:
    return (block.x.detach() * 2 + block.x).square().sum((-2, -1)).expand(block.batch_shape)


TURNS = itertools.cycle((1, 2))  # the check evaluates a bound in pairs: here, and on the other device


def every_other_time(block: Attention) -> Tensor:
    return jacobian_norm(block) * next(TURNS)


def lucky(block: Attention, *, delta: float = 1e-9, seed: int = 0) -> Tensor:
    draw = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    return jacobian_norm(block) * (1.01 if draw > 2 * delta else 0.99)


def honest(block: Attention, *, delta: float = 1e-9, seed: int = 0) -> Tensor:
    draw = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    return jacobian_norm(block) * (1.01 if draw > delta else 0.99)


def clamped(block: Attention) -> Tensor:
    """sqrt(n) ||W_V|| of each head where nothing else moves; 257 is no number in bfloat16."""
    return torch.tensor(float(block.tokens)).double().sqrt() * block.w_v.double().norm() * block.w_o.double().norm()


def short_root(block: Attention) -> Tensor:
    root = block.x.new_tensor(block.tokens, dtype=torch.bfloat16).double().sqrt()
    return torch.minimum(jacobian_norm(block), root * block.w_v.double().norm() * block.w_o.double().norm())


FIELDS = {field.name: getattr(EXACT, field.name) for field in dc.fields(EXACT)}
UNCHECKED = Unchecked(**FIELDS | {"supports": frozenset()})
BALL = {"claim": Claim(kind="proved", scope="ball")}
WRONG: dict[str, tuple[str, BoundSpec]] = {
    "half the truth": ("value", spec(scaled(0.5))),
    "a part per million low": ("value", spec(scaled(1 - 1e-6))),
    "a lower bound that is one half high": ("value", spec(scaled(1.5), claim=Claim(kind="lower"))),
    "the centre of the ball": ("value", AT_CENTRE),
    "one point sold for all": ("value", spec(jacobian_norm, claim=Claim(kind="proved", scope="global"))),
    "not a number": ("value", spec(lambda block: jacobian_norm(block) * torch.nan)),
    "cast to nearest": ("tight", spec(lambda block: jacobian_norm(block).to(block.dtype))),
    "an error": ("returns", spec(lambda block: torch.zeros(3, 1) @ torch.zeros(2, 1))),
    "negative": ("returns", spec(lambda block: jacobian_norm(block) - 1, claim=Claim(kind="estimate"))),
    "infinite": ("finite", spec(lambda block: torch.full(block.batch_shape, torch.inf))),
    "too many failures": ("coverage", spec(lucky, claim=Claim(kind="probable"))),
    "failures that cannot be counted": ("coverage", spec(jacobian_norm, claim=Claim(kind="probable"))),
    "drawn anew": ("deterministic", spec(lambda block: jacobian_norm(block) * (2 + torch.rand(()).double()))),
    "a clamp in the default dtype": ("surroundings", spec(clamped)),
    "a root of the length in float16": ("closed_form", spec(short_root)),
    "all features": ("unsupported", UNCHECKED),
    "the first token": ("permutation", spec(lambda block: block.x[..., 0, :].norm(dim=-1).expand(block.batch_shape))),
    "the first head": ("head_order", spec(first_head)),
    "entries of W_Q": ("rotation", spec(lambda block: block.w_q.abs().amax((-3, -2, -1)).expand(block.batch_shape))),
    "a small constant": ("scaling", spec(lambda block: jacobian_norm(block) + 1e-3)),
    "the largest of the batch": ("batch", spec(lambda block: jacobian_norm(block).max().expand(block.batch_shape))),
    "a short sum": ("dtype", spec(lambda block: jacobian_norm(block) * (1 + (block.dtype != torch.float64)))),
    "another device": ("device", spec(every_other_time)),
    "half a gradient": ("gradient", spec(bad_gradient)),
    "falling with the radius": ("monotone", spec(radius_free, **BALL)),
}  # fmt: skip


@pytest.fixture
def the_cpu_as_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second device for machines that have none."""
    monkeypatch.setattr(relation_checks, "accelerators", lambda: ["cpu"])


def test_a_bound_may_be_the_same_on_every_device(the_cpu_as_accelerator: None) -> None:
    assert "device" in checks_for(EXACT)
    assert run_check(EXACT, "device", max_examples=12) == 12


@pytest.mark.parametrize("case", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_each_check_finds_its_fault(case: str, without_shrinking: None, the_cpu_as_accelerator: None) -> None:
    check, wrong = WRONG[case]
    with pytest.raises(Refuted) as caught:
        run_check(wrong, check, max_examples=60, seed=1)
    assert caught.value.check == check
    assert caught.value.examples is not None
    assert str(caught.value).endswith(caught.value.snippet)


def test_the_table_covers_every_check() -> None:
    assert {check for check, _ in WRONG.values()} == set(CHECKS)


def test_an_honest_probable_bound_survives() -> None:
    probable = spec(honest, claim=Claim(kind="probable"))
    for block, _ in coverage_check.hard_blocks(probable, 1.0)[:2]:
        coverage_check.coverage(probable, block)


def test_binomial_tail() -> None:
    assert coverage_check.binomial_tail(0, 10, 0.3) == pytest.approx(1.0)
    assert coverage_check.binomial_tail(10, 10, 0.5) == pytest.approx(2.0**-10)


def test_a_refusal_is_no_failure() -> None:
    def picky(block: Attention) -> Tensor:
        if block.tokens > 2:
            raise UnsupportedAttention("two tokens at most.")
        return jacobian_norm(block)

    assert run_check(spec(picky), "value", max_examples=20) >= 20


def test_checks_apply_where_something_is_promised() -> None:
    assert "monotone" not in checks_for(EXACT)
    assert "coverage" not in checks_for(EXACT)
    assert {"monotone", "value"} <= set(checks_for(AT_CENTRE))
    assert set(checks_for(spec(jacobian_norm, claim=Claim(kind="estimate")))) == {
        "deterministic", "returns", "finite", "surroundings",
    }  # fmt: skip
    with pytest.raises(InvalidInput, match="name='beauty'"):
        run_check(EXACT, "beauty")


def test_a_plain_function_is_taken_as_a_proved_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_module.py").write_text("def half(block):\n    return block.x.sum((-2, -1)) / 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_spec("plain_module:half")
    assert (loaded.claim.kind, loaded.claim.scope) == ("proved", "point")
    assert loaded.supports == set(FEATURES)
    assert load_spec("yudin2025.theorem3") is lipbounds.get("yudin2025.theorem3")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:bound", "No module named 'no_such_module'"),
        ("lipbounds:no_such_bound", "no_such_bound"),
        ("lipbounds:__version__", "got str"),
        (":", "package.module:attribute"),
    ],
)
def test_a_path_that_leads_nowhere_is_explained(path: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_spec(path)


def test_a_suite_is_one_test_for_each_check(without_shrinking: None) -> None:
    suite = suite_for(spec(scaled(0.5)))
    (mark,) = suite.pytestmark  # pyright: ignore[reportFunctionMemberAccess]
    assert mark.args == ("check", checks_for(EXACT))
    suite("finite")
    with pytest.raises(Refuted):
        suite("value")


def test_failures_are_remembered_by_bound_and_check() -> None:
    shared = InMemoryExampleDatabase()
    one, other = (contract._Drawer(shared, name) for name in ("one value", "other value"))
    one.save(b"key", b"failure")
    assert set(one.fetch(b"key")) == {b"failure"}
    assert not set(other.fetch(b"key"))
    one.delete(b"key", b"failure")
    assert not set(one.fetch(b"key"))


def test_a_seed_repeats_a_search() -> None:
    def shapes(seed: int) -> list[tuple]:
        seen: collections.deque = collections.deque()

        def record(block: Attention) -> Tensor:
            seen.append((*block.x.shape, block.dtype))
            return jacobian_norm(block)

        run_check(spec(record), "returns", max_examples=15, seed=seed)
        return list(seen)

    assert shapes(5) == shapes(5)
    assert shapes(5) != shapes(6)


# What the long search called refuted and was not, each seen to fail before the check was mended.
FALSE_ALARMS = {
    "a number below all floats of a short dtype": (
        "centred.weights",
        "dtype",
        Attention(
            x=torch.tensor([[0.0]]),
            w_q=torch.tensor([[[0.5, 0.5]]]),
            w_k=torch.tensor([[[0.5, 1.0]]]),
            w_v=torch.tensor([[[0.5]]]),
            w_o=torch.tensor([[[-0.5]]]),
            b_k=torch.tensor([[0.0, 1.0]]),
            scale=0.7071067811865476,
            memory=torch.tensor([[0.0]]),
            moves="query",
        ),
    ),
    "two formulas of one value, one of them at its kink": (
        "sharp",
        "gradient",
        Attention(
            x=torch.tensor([[2.0, 0.5], [1.0, 0.5]], dtype=torch.float64),
            w_q=torch.tensor([[[0.0], [-4.0]]], dtype=torch.float64),
            w_k=torch.tensor([[[0.5], [-0.5]]], dtype=torch.float64),
            w_v=torch.tensor([[[0.0], [-1.0]]], dtype=torch.float64),
            w_o=torch.tensor([[[-0.5]]], dtype=torch.float64),
            scale=1.0,
        ),
    ),
    "what is left of terms ten thousand times as large": (
        "sharp",
        "gradient",
        Attention(
            x=torch.tensor([[0.38805543156191724], [1.0342745341134776]], dtype=torch.float64),
            w_q=torch.tensor([[[-0.13907227580633896, 1.5851827763978166]]], dtype=torch.float64),
            w_k=torch.tensor([[[0.0155129317207694, -1.3377322376630945]]], dtype=torch.float64),
            w_v=torch.tensor([[[0.1956921819914613]]], dtype=torch.float64),
            w_o=torch.tensor([[[-0.31382541884133686]]], dtype=torch.float64),
            query_norm_weight=torch.tensor([[22245.520566612904, 22245.520566612904]], dtype=torch.float64),
            key_norm_weight=torch.tensor([[1.0, 1.0]], dtype=torch.float64),
            norm_eps=1e-05,
            norm_over="head",
            scale=0.7071067811865476,
        ),
    ),
    "the root of a rounding error that a sharp norm magnifies": (
        "covariance.exact",
        "gradient",
        Attention(
            x=torch.tensor([[-2.5, -0.5], [0.0, 0.5]], dtype=torch.float64),
            w_q=torch.tensor([[[-1.0, -0.5, 1.5], [-2.0, 0.0, 1.0]]], dtype=torch.float64),
            w_k=torch.tensor([[[0.0, 0.0, 0.5], [0.0, -1.0, 1.5]]], dtype=torch.float64),
            w_v=torch.tensor([[[1.0], [0.5]]], dtype=torch.float64),
            w_o=torch.tensor([[[1.0]]], dtype=torch.float64),
            query_norm_weight=torch.tensor([[0.2180605073050011, 26.167260876600132, 0.0]], dtype=torch.float64),
            key_norm_weight=torch.tensor([[30.0, -0.125, 0.0]], dtype=torch.float64),
            norm_eps=1e-06,
            norm_over="head",
            scale=0.5773502691896257,
            logit_bias=torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]], dtype=torch.float64),
        ),
    ),
}


@pytest.mark.parametrize("name", FALSE_ALARMS, ids=lambda name: name.replace(" ", "-"))
def test_no_alarm_where_nothing_is_wrong(name: str) -> None:
    bound, check, block = FALSE_ALARMS[name]
    CHECKS[check].function(lipbounds.get(bound), block, radius=None, seed=0)
