"""What every bound must pass, ours or a stranger's, and how to run it.

    import my_package
    from lipbounds.testing import contract
    test_my_bound = contract.suite_for(my_package.MY_BOUND)      # pytest collects it

`CHECKS` holds the checks by name, `TARGET_CHECKS` those of bounds on other blocks than `Attention`; `run_check` runs
one on blocks drawn by Hypothesis. A failure is a `Refuted` whose message ends with a Python snippet that shows it.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import warnings
from collections.abc import Callable, Iterable

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from lipbounds.claims import FEATURES
from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.targets.mlp import Mlp
from lipbounds.targets.target import Target
from lipbounds.testing import (
    behaviour_checks,
    coverage_check,
    deterministic,
    global_state,
    known,
    relation_checks,
    target_checks,
    value_checks,
)
from lipbounds.testing.check import Check as Check
from lipbounds.testing.loading import load_spec as load_spec
from lipbounds.testing.other_targets import target_blocks
from lipbounds.testing.recipes import BATCHED, build
from lipbounds.testing.strategies import attention_blocks, radii, recipes
from lipbounds.testing.tight_instances import tight_blocks
from lipbounds.testing.verdict import Refuted as Refuted


# A block takes milliseconds to build and to judge, and a large one is a large example: neither is a mistake here.
TOLERATED = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
)


def _proved(spec: BoundSpec) -> bool:
    return spec.claim.kind == "proved"


def _plain(spec: BoundSpec, dtype: torch.dtype = torch.float64) -> SearchStrategy[Attention]:
    # Relations compare two numbers up to rounding; extreme blocks are for `value`, which tolerates none.
    return attention_blocks(spec.supports, largest=8, extreme=False, dtype=dtype)


def _single(spec: BoundSpec) -> SearchStrategy[Attention]:
    return attention_blocks(spec.supports, largest=6, batches=False, extreme=False, dtype=torch.float64)


def _batched(spec: BoundSpec) -> SearchStrategy[Attention]:
    plain = recipes(spec.supports, largest=6, batches=False, extreme=False, dtype=torch.float64)
    shapes, fields = st.sampled_from(((2,), (3,), (2, 2))), st.sampled_from(BATCHED)
    return st.builds(lambda r, b, f: build(dc.replace(r, batch=b, batched=f)), plain, shapes, fields)


def _short(spec: BoundSpec) -> SearchStrategy[Attention]:
    return st.one_of(_plain(spec, torch.float32), _plain(spec, torch.bfloat16))


def _beyond(spec: BoundSpec) -> SearchStrategy[Attention]:
    return attention_blocks(largest=4).filter(lambda block: bool(spec.missing_features(block)))


def _value_blocks(spec: BoundSpec) -> SearchStrategy[Attention]:
    # A bound on a ball is compared at a dozen points of it.
    return attention_blocks(spec.supports, largest=12 if spec.claim.scope != "point" else 32)


_FEW = 0.1  # cheap to evaluate and without cases: a few blocks show what these checks can show
CHECKS: dict[str, Check] = {
    "deterministic": Check(function=deterministic.deterministic, share=_FEW),
    "value": Check(
        function=value_checks.value,
        applies=lambda spec: spec.claim.kind in ("proved", "lower"),
        blocks=_value_blocks,
        share=1.0,
    ),
    "tight": Check(
        function=value_checks.tight,
        applies=lambda spec: spec.claim.kind in ("proved", "lower"),
        blocks=lambda spec: tight_blocks(spec.supports),
        share=0.5,
    ),
    "returns": Check(function=value_checks.returns),
    "finite": Check(
        function=value_checks.finite,
        applies=lambda spec: spec.claim.scope in ("point", "ball", "change"),
        blocks=_single,
    ),
    "coverage": Check(
        function=coverage_check.coverage,
        applies=lambda spec: spec.claim.kind == "probable",
        fixed=coverage_check.hard_blocks,
    ),
    "closed_form": Check(
        function=known.closed_form,
        applies=lambda spec: spec.claim.kind in ("proved", "lower") and spec.claim.norm == "l2",
        fixed=known.instances,
    ),
    "surroundings": Check(function=global_state.surroundings, fixed=global_state.blocks),
    "unsupported": Check(
        function=behaviour_checks.unsupported,
        applies=lambda spec: bool(set(FEATURES) - spec.supports),
        blocks=_beyond,
    ),
    "permutation": Check(function=relation_checks.permutation, applies=_proved, blocks=_plain),
    "head_order": Check(
        function=relation_checks.head_order,
        applies=lambda spec: _proved(spec) and "heads" in spec.supports,
        blocks=lambda spec: _plain(spec).filter(lambda block: block.heads > 1),
    ),
    "rotation": Check(function=relation_checks.rotation, applies=_proved, blocks=_plain),
    "scaling": Check(function=relation_checks.scaling, applies=_proved, blocks=_plain),
    "batch": Check(function=relation_checks.batch, applies=_proved, blocks=_batched),
    "dtype": Check(function=relation_checks.dtype, applies=_proved, blocks=_short),
    "device": Check(
        function=relation_checks.device,
        applies=lambda spec: _proved(spec) and bool(relation_checks.accelerators()),
        blocks=_plain,
    ),
    "gradient": Check(
        function=behaviour_checks.gradient,
        applies=lambda spec: _proved(spec) and spec.role == "bound",
        blocks=_single,
    ),
    "monotone": Check(
        function=behaviour_checks.monotone,
        applies=lambda spec: _proved(spec) and spec.claim.scope in ("ball", "change"),
        blocks=_plain,
    ),
}


TARGET_CHECKS: dict[str, Check] = {
    "deterministic": Check(function=deterministic.deterministic, blocks=target_blocks, share=_FEW),
    "value": Check(
        function=target_checks.value,
        applies=lambda spec: spec.claim.kind != "estimate",
        blocks=target_blocks,
        share=0.3,
    ),
    "returns": Check(function=target_checks.returns, blocks=target_blocks, share=_FEW),
    "finite": Check(
        function=target_checks.finite,
        blocks=lambda spec: target_blocks(spec, extreme=False, dtype=torch.float64),
        share=_FEW,
    ),
    "permutation": Check(
        function=target_checks.permutation,
        applies=lambda spec: spec.target is not Mlp,  # it has no tokens
        blocks=target_blocks,
        share=_FEW,
    ),
    "batch": Check(function=target_checks.batch, blocks=lambda spec: target_blocks(spec, batches=True), share=_FEW),
    "dtype": Check(
        function=target_checks.dtype,
        applies=_proved,
        blocks=lambda spec: st.one_of(*(target_blocks(spec, dtype=kind) for kind in (torch.float32, torch.bfloat16))),
        share=_FEW,
    ),
    "surroundings": Check(function=global_state.surroundings, blocks=target_blocks, share=_FEW),
    "gradient": Check(
        function=target_checks.gradient,
        applies=_proved,
        blocks=lambda spec: target_blocks(spec, batches=False, extreme=False, dtype=torch.float64),
        share=_FEW,
    ),
}


def checks_of(spec: BoundSpec) -> dict[str, Check]:
    """The checks by name for the kind of block that a bound is about, whether they apply to it or not."""
    return CHECKS if spec.target is Attention else TARGET_CHECKS


def checks_for(spec: BoundSpec) -> list[str]:
    """Names of the checks that apply to a bound."""
    return [name for name, check in checks_of(spec).items() if check.applies(spec)]


def run_check(
    spec: BoundSpec,
    name: str,
    *,
    max_examples: int | None = None,
    seed: int | None = None,
    seconds: float = 1.0,
    seen: Callable[[Target], None] | None = None,
) -> int:
    """Run one check on blocks drawn by Hypothesis, and shrink what fails.

    Args:
        spec: the bound.
        name: of the check, in `checks_of(spec)`.
        max_examples: blocks to draw; None for the check's share of what the Hypothesis profile says.
        seed: of the search; None for a new one, or for the one given to pytest by `--hypothesis-seed`.
        seconds: processor time after which a check on fixed blocks goes on to no larger ones.
        seen: called with every block before it is judged.

    Returns:
        The number of blocks tried.

    Raises:
        Refuted: the bound failed; `examples` counts the blocks tried until the first failure.
        InvalidInput: there is no check of that name.
    """
    checks = checks_of(spec)
    if name not in checks:
        raise InvalidInput(f"the checks are {list(checks)}, got name={name!r}.")
    attempt = _Attempt(spec, checks[name], seen)
    fixed = attempt.check.fixed
    try:
        if fixed is not None:
            for block, radius in fixed(spec, seconds):
                with contextlib.suppress(Unsupported):  # an honest refusal of a block is no broken promise
                    attempt(block, radius, 0 if seed is None else seed)
        else:
            _search(attempt, name, max_examples, seed)
    except Refuted as refuted:
        refuted.examples = attempt.failed_after
        raise
    return attempt.tried


def suite_for(spec: BoundSpec) -> Callable[..., None]:
    """A pytest test function that runs every check that applies to `spec`, one test each.

    Assign it to a name that pytest collects: `test_mine = suite_for(MINE)`. The number of examples and the seed are
    those of the Hypothesis profile and of `--hypothesis-seed`.
    """
    import pytest  # only here: all else works without it

    @pytest.mark.parametrize("check", checks_for(spec))
    def test_contract(check: str) -> None:
        run_check(spec, check)

    return test_contract


class _Attempt:
    """One check of one bound, counting the blocks it is given."""

    def __init__(self, spec: BoundSpec, check: Check, seen: Callable[[Target], None] | None) -> None:
        self.spec, self.check, self.seen = spec, check, seen
        self.tried = 0
        self.last: tuple[Target, float | None] | None = None
        self.failed_after: int | None = None

    def __call__(self, block: Target, radius: float | None, seed: int) -> None:
        self.tried += 1
        self.last = block, radius
        if self.seen is not None:
            self.seen(block)
        try:
            self.check.function(self.spec, block, radius, seed)
        except Refuted:
            self.failed_after = self.failed_after or self.tried
            raise


def _search(attempt: _Attempt, name: str, max_examples: int | None, seed: int | None) -> None:
    spec = attempt.spec
    radius = radii() if spec.needs_radius else st.none()

    profile = hypothesis.settings()

    @hypothesis.settings(
        max_examples=max_examples or attempt.check.examples,
        database=None if profile.database is None else _Drawer(profile.database, f"{spec.name} {name}"),
        phases=[phase for phase in profile.phases if phase is not Phase.explain],  # the snippet explains better
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=TOLERATED,
    )
    @hypothesis.given(block=attempt.check.blocks(spec), radius=radius, seed=st.integers(0, 2**16))
    def search(block: Target, radius: float | None, seed: int) -> None:
        try:
            attempt(block, radius, seed)
        except Unsupported:  # an honest refusal of a block is no broken promise
            hypothesis.reject()

    with warnings.catch_warnings():
        # A counterexample is printed as a snippet: how long Hypothesis would print the block does not matter.
        warnings.filterwarnings("ignore", "Generating overly large repr")
        try:
            (search if seed is None else hypothesis.seed(seed)(search))()
        except Flaky as flaky:  # what failed at a block has passed there
            assert attempt.last is not None
            refuted = deterministic.changing(spec, *attempt.last, deterministic.SUSPECTED)
            raise refuted or flaky from flaky


class _Drawer(ExampleDatabase):
    """The failures of one bound and check: the tests are one function, so Hypothesis alone would mix them up."""

    def __init__(self, shared: ExampleDatabase, name: str) -> None:
        super().__init__()
        self.shared, self.name = shared, name.encode()

    def fetch(self, key: bytes) -> Iterable[bytes]:
        return self.shared.fetch(self.name + key)

    def save(self, key: bytes, value: bytes) -> None:
        self.shared.save(self.name + key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        self.shared.delete(self.name + key, value)
