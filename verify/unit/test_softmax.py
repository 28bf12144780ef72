"""Norms of the softmax Jacobian against 60-digit arithmetic at the very floats given, near one-hot rows first."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from lipbounds.errors import InvalidInput
from lipbounds.ops import softmax, softmax_spectrum


mpmath.mp.dps = 60
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative width of the promise: rounding slack in float64 plus one cast to the dtype.
SLACK = {torch.float64: 1e-12, torch.float32: 2.5e-7, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
ROWS = {
    "one token": [0.3],
    "uniform": [1.0, 1.0, 1.0, 1.0],
    "tie": [3.0, 3.0, -1.0, 0.5],
    "half and half": [0.0, 0.0, -60.0],
    "nearly one-hot": [0.0, -37.0, -38.5, -40.0],
    "one-hot to all digits": [50.0, 0.0, 0.0, 0.0],
    "beyond the range of exp": [0.0, -1e4],
    "masked": [1.0, float("-inf"), 0.5, float("-inf"), -2.0],
    "one visible key": [float("-inf"), 2.0, float("-inf")],
    "almost tied": [1.0, 1.0 - 2.0**-9, 0.2],
    "large and close": [1e4, 1e4 - 8.0, 1e4 - 16.0],
    "tiny logits": [1e-8, -1e-8, 3e-8],
    "flat tail": [5.0, *[0.0] * 12],
}


def exact_probabilities(logits: torch.Tensor) -> list[mpmath.mpf]:
    entries = [mpmath.mpf(value) for value in logits.double().tolist()]
    entries = [entry - max(entries) for entry in entries]
    weights = [mpmath.exp(entry) for entry in entries]
    total = sum(weights)
    return [weight / total for weight in weights]


def exact_g(p: list[mpmath.mpf], k: int) -> mpmath.mpf:
    ordered = [*sorted(p, reverse=True), mpmath.mpf(0)]
    # A sum of the others here, too: 60 digits are not enough for the subtraction at logits of 1000.
    return ordered[k - 1] * (sum(ordered[: k - 1]) + sum(ordered[k:]) + ordered[k])


def exact_norm(p: list[mpmath.mpf], *, normalised: bool = False) -> mpmath.mpf:
    # The eigenvalues come with an absolute error: as many more digits as the norm (>= p_(1) (1 - p_(1))) is small.
    small = max(p) * sum(sorted(p)[:-1])
    with mpmath.workdps(40 + int(-2 * mpmath.log10(small)) if small else 30):
        p = [entry / sum(p) for entry in p] if normalised else p
        return _largest_eigenvalue(p)


def _largest_eigenvalue(p: list[mpmath.mpf]) -> mpmath.mpf:
    matrix = mpmath.matrix(len(p), len(p))
    for i, j in itertools.product(range(len(p)), repeat=2):
        matrix[i, j] = (p[i] if i == j else 0) - p[i] * p[j]
    return max(abs(value) for value in mpmath.eigsy(matrix, eigvals_only=True))


def smallest_above(value: torch.Tensor) -> float:
    """What the result may exceed the truth by when the truth underflows: one subnormal, or exp's own range."""
    return max(torch.finfo(value.dtype).tiny, 1e-300) * 4


def assert_just_above(value: torch.Tensor, exact: mpmath.mpf, tokens: int = 1) -> None:
    got = mpmath.mpf(value.double().item())
    assert got >= exact, f"below the exact value by a factor {mpmath.nstr(exact / got if got else 0, 5)}"
    assert got <= exact * (1 + SLACK[value.dtype] + 8 * tokens * 2.0**-53) + smallest_above(value)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=ROWS, ids=lambda name: name.replace(" ", "-"))
def logits(request: pytest.FixtureRequest, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(ROWS[request.param], dtype=torch.float64).to(dtype)


def random_logits(seed: int, n: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, generator=generator, dtype=torch.float64)


def test_every_g_k_is_just_above_its_formula(logits: torch.Tensor) -> None:
    exact = exact_probabilities(logits)
    together = softmax.g_all_upper_from_logits(logits)
    for k in range(1, len(exact) + 1):
        assert_just_above(softmax.g_upper_from_logits(logits, k), exact_g(exact, k))
        assert_just_above(together[k - 1], exact_g(exact, k))


def test_spectral_norm_is_just_above_the_largest_eigenvalue(logits: torch.Tensor) -> None:
    assert_just_above(
        softmax_spectrum.spectral_norm_upper_from_logits(logits),
        exact_norm(exact_probabilities(logits), normalised=True),
    )


def test_l1_norm_is_just_above_the_largest_column_sum(logits: torch.Tensor) -> None:
    exact = exact_probabilities(logits)
    assert_just_above(
        softmax.l1_norm_upper_from_logits(logits),
        max(2 * p * (sum(exact[:i]) + sum(exact[i + 1 :])) for i, p in enumerate(exact)),
    )


@pytest.mark.parametrize(("seed", "n", "scale"), [*itertools.product(range(4), [2, 3, 7, 16], [0.1, 3.0, 30.0, 300.0])])
def test_random_rows(seed: int, n: int, scale: float) -> None:
    row = random_logits(seed, n, scale)
    exact = exact_probabilities(row)
    assert_just_above(softmax.g_upper_from_logits(row), exact_g(exact, 1))
    assert_just_above(softmax_spectrum.spectral_norm_upper_from_logits(row), exact_norm(exact, normalised=True))


def test_a_long_row_keeps_its_promise() -> None:
    row = random_logits(5, 3000, 8.0)
    assert_just_above(softmax.g_upper_from_logits(row), exact_g(exact_probabilities(row), 1), tokens=3000)


def test_the_subtraction_that_is_avoided_breaks_the_bound() -> None:
    """The hazard is real: with 1 - p_(1) by subtraction the value falls far below the formula."""
    row = torch.tensor([0.0, -17.0], dtype=torch.float32)
    p = row.softmax(-1)
    naive = p[0] * (1 - p[0] + p[1])
    exact = exact_g(exact_probabilities(row), 1)
    assert mpmath.mpf(naive.item()) < 0.75 * exact
    assert_just_above(softmax.g_upper_from_logits(row), exact)


@pytest.mark.parametrize("row", [r for r in ROWS.values() if float("-inf") not in r], ids=str)
def test_from_probabilities_covers_both_readings_of_one_minus_p(row: list[float], dtype: torch.dtype) -> None:
    """Rounded probabilities need not sum to 1: the value holds for 1 - p and for the sum of the others."""
    p = torch.tensor(row, dtype=torch.float64).softmax(-1).to(dtype)
    entries = [mpmath.mpf(value) for value in p.double().tolist()]
    ordered = [*sorted(entries, reverse=True), mpmath.mpf(0)]
    for k in range(1, len(entries) + 1):
        subtracted = ordered[k - 1] * (1 - ordered[k - 1] + ordered[k])
        assert_just_above(softmax.g_upper(p, k), max(subtracted, exact_g(entries, k)))
    total = sum(entries)
    got = mpmath.mpf(softmax_spectrum.spectral_norm_upper(p).double().item())
    truth = max(exact_norm(entries), exact_norm(entries, normalised=True))
    assert got >= truth
    assert got <= truth * (1 + SLACK[dtype]) + 2 * abs(total - 1) + smallest_above(p)


def test_dyadic_probabilities_are_exact() -> None:
    """Probabilities that floats hold exactly: no reading differs, so the value is the eigenvalue itself."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    entries = [mpmath.mpf(value) for value in p.tolist()]
    assert_just_above(softmax_spectrum.spectral_norm_upper(p), exact_norm(entries))
    assert_just_above(softmax.l1_norm_upper(p), mpmath.mpf("0.5"))
    assert_just_above(softmax.inf_to_one_norm_upper(p), mpmath.mpf(1))


@pytest.mark.parametrize("seed", range(5))
def test_eigenvalues_are_below_g_k(seed: int) -> None:
    p = random_logits(seed, 9, 2.0).softmax(-1)
    exact = [mpmath.mpf(value) for value in p.tolist()]
    total = sum(exact)
    matrix = mpmath.matrix(9, 9)
    for i, j in itertools.product(range(9), repeat=2):
        matrix[i, j] = (exact[i] / total if i == j else 0) - exact[i] * exact[j] / total**2
    eigenvalues = sorted(mpmath.eigsy(matrix, eigvals_only=True), reverse=True)
    for k, eigenvalue in enumerate(eigenvalues, start=1):
        assert mpmath.mpf(softmax.g_upper(p, k).item()) >= eigenvalue


@pytest.mark.parametrize("seed", range(6))
def test_inf_to_one_norm_against_all_sign_vectors(seed: int) -> None:
    p = random_logits(seed, 8, 1.5).softmax(-1)
    jacobian = torch.diag(p) - torch.outer(p, p)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64)
    brute = (signs @ jacobian).abs().sum(-1).max()
    assert softmax.inf_to_one_norm_upper(p).item() == pytest.approx(brute.item(), rel=1e-12)
    assert softmax.inf_to_one_norm_upper(p) >= brute * (1 - 1e-14)


def test_inf_to_one_norm_of_a_long_flat_row_is_the_bound_one() -> None:
    assert softmax.inf_to_one_norm_upper(torch.full((40,), 1 / 40, dtype=torch.float64)).item() == pytest.approx(1)


def test_batches_equal_their_rows() -> None:
    batch = torch.stack([random_logits(seed, 6, 4.0) for seed in range(6)]).reshape(2, 3, 6)
    for function in (softmax.g_upper_from_logits, softmax_spectrum.spectral_norm_upper_from_logits):
        whole = function(batch)
        assert whole.shape == (2, 3)
        assert torch.equal(whole[1, 2], function(batch[1, 2]))


@pytest.mark.parametrize(
    "function",
    [
        softmax.g_upper_from_logits,
        lambda row: softmax.g_upper_from_logits(row, 2),
        softmax_spectrum.spectral_norm_upper_from_logits,
        softmax.l1_norm_upper_from_logits,
    ],
    ids=["g_1", "g_2", "norm", "l1"],
)
@pytest.mark.parametrize("row", [[0.3, -1.0, 0.8, 0.1], [9.0, -1.0, 0.5, 0.2], [0.9, 0.8, 0.75, -3.0]], ids=str)
def test_gradients_are_those_of_finite_differences(function: object, row: list[float]) -> None:
    logits = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, logits, eps=1e-6, atol=1e-7, rtol=1e-5)  # pyright: ignore


@pytest.mark.parametrize("row", [r for r in ROWS.values()], ids=list(ROWS))
def test_gradients_are_finite_at_ties_one_hot_and_masked_rows(row: list[float]) -> None:
    for function in (softmax.g_upper_from_logits, softmax_spectrum.spectral_norm_upper_from_logits):
        logits = torch.tensor(row, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(logits), logits)
        assert gradient.isfinite().all()
        assert (gradient[logits.isneginf()] == 0).all()


BAD = {
    "nan": (lambda: softmax.g_upper_from_logits(torch.tensor([0.0, float("nan")])), "NaN"),
    "plus infinity": (lambda: softmax.g_upper_from_logits(torch.tensor([0.0, float("inf")])), r"\+inf"),
    "masked": (lambda: softmax.g_upper_from_logits(torch.full((2, 2), -torch.inf)), "2 fully masked"),
    "integers": (lambda: softmax.g_upper_from_logits(torch.tensor([0, 1])), "floating"),
    "empty": (lambda: softmax.g_upper_from_logits(torch.zeros(3, 0)), r"shape \(3, 0\)"),
    "rank": (lambda: softmax.g_upper(torch.tensor([0.5, 0.5]), 3), "k=3"),
    "negative": (lambda: softmax.g_upper(torch.tensor([1.5, -0.5])), "from_logits"),
    "not normalised": (lambda: softmax_spectrum.spectral_norm_upper(torch.tensor([0.5, 0.2])), "off by 0.3"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_gets_one_clear_error(case: str, as_a_user_runs_it: None) -> None:
    call, message = BAD[case]
    with pytest.raises(InvalidInput, match=message):
        call()


@pytest.mark.parametrize("difference", [0.0, 2.0**-53, 1e-13, 1e-10, 1e-8])
def test_the_gradient_at_two_nearly_tied_keys(difference: float) -> None:
    """Found by the nightly search: two largest weights that differ by rounding alone had a wrong eigenvector.

    At a tie the eigenvector is (e_1 - e_2) / sqrt(2) and the eigenvalue p_1 = p_2, so its gradient by p is that of
    (p_1 + p_2) / 2.
    """
    logits = torch.tensor([1.0, 1.0 - difference, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(softmax_spectrum.spectral_norm_upper_from_logits(logits), logits)
    (expected,) = torch.autograd.grad(logits.softmax(-1)[:2].mean(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
