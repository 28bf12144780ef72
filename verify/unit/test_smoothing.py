"""Randomised smoothing: the binomial bound has its coverage, radii of linear classifiers are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lipbounds import InvalidInput
from lipbounds.smoothing import certify_smoothed, clopper_pearson


@pytest.mark.parametrize("delta", [0.2, 0.05, 1e-3])
def test_the_binomial_bound_has_its_coverage(delta: float) -> None:
    """P(bound > p) <= delta for every p, summed over all outcomes; and no bound that is one hit larger has it."""
    n = 25
    bounds = [clopper_pearson(k, n, delta) for k in range(n + 1)]
    for step in range(1, 100):
        p = step / 100
        weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        assert sum(w for w, bound in zip(weights, bounds, strict=True) if bound > p) <= delta * (1 + 1e-12)
    assert bounds == sorted(bounds)
    assert bounds[0] == 0
    assert delta ** (1 / n) * (1 - 1e-6) <= bounds[n] <= delta ** (1 / n)  # p^n = delta


def test_the_bound_matches_another_implementation() -> None:
    stats = pytest.importorskip("scipy.stats")
    for hits, n, delta in ((99_000, 100_000, 1e-3), (60, 100, 0.01), (1, 10, 0.05), (9_999, 10_000, 1e-6)):
        wanted = float(stats.beta.ppf(delta, hits, n - hits + 1))
        assert wanted * (1 - 2e-6) <= clopper_pearson(hits, n, delta) <= wanted * (1 + 1e-12)


def test_a_linear_classifier_has_the_radius_of_its_margin() -> None:
    """For two classes and f linear the smoothed classifier is f itself, and the radius is the distance to the plane."""
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double()
    x = torch.tensor([[0.2, 0.0], [0.1, 0.1], [-0.1, 0.0], [1e-4, 0.0]]).double()
    labels = torch.tensor([0, 0, 0, 0])
    found = certify_smoothed(lambda z: z @ weight.T, x, labels, sigma=0.25, samples=4000, delta=1e-4)
    distance = (x @ weight[0]) / 5
    assert found.kind == "probable"
    assert found.correct.tolist() == [True, True, False, False]
    assert bool((found.radius <= distance.clamp(min=0)).all())
    assert bool((found.radius[:2] >= 0.7 * distance[:2]).all())
    assert found.accuracy(0.0) == 0.5
    assert found.prediction.tolist()[2] == 1
    again = certify_smoothed(lambda z: z @ weight.T, x, labels, sigma=0.25, samples=4000, delta=1e-4)
    assert torch.equal(found.radius, again.radius)


X, Y = torch.zeros(1, 2).double(), torch.tensor([0])
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "sigma": (lambda: certify_smoothed(lambda z: z, X, Y, sigma=0.0), "sigma=0"),
    "samples": (lambda: certify_smoothed(lambda z: z, X, Y, sigma=1.0, samples=0), "samples=0"),
    "delta": (lambda: certify_smoothed(lambda z: z, X, Y, sigma=1.0, delta=1.0), "delta=1"),
    "labels": (lambda: certify_smoothed(lambda z: z, X, Y.float(), sigma=1.0), "one integer per input"),
    "nan": (lambda: certify_smoothed(lambda z: z, X * math.nan, Y, sigma=1.0), "finite"),
    "logits": (lambda: certify_smoothed(lambda z: z[:, 0], X, Y, sigma=1.0), "logits"),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(InvalidInput, match=message):
        call()


class Output:
    """What models of the Transformers library return."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits


def two_classes(z: torch.Tensor) -> torch.Tensor:
    """The first class where a normal number is below 0.25: with a probability of about 0.6."""
    return torch.stack([0.25 - z[:, 0], z[:, 0] - 0.25], 1)


@pytest.mark.parametrize(
    "model",
    [
        lambda z: two_classes(z).repeat(2, 1),  # hits would be counted twice
        lambda z: two_classes(z)[:1],
        lambda z: two_classes(z) * math.nan,  # the class of NaN would be the first
        lambda z: torch.cat([two_classes(z), *[z] * (len(z) % 2)], 1),
        lambda z: two_classes(z)[:, :1],
        lambda z: two_classes(z)[0, 0],
        lambda z: [two_classes(z)],
    ],
)
def test_logits_that_are_not_one_row_for_each_draw_are_refused(model: Callable[[Any], Any]) -> None:
    with pytest.raises(InvalidInput, match="model must return logits"):
        certify_smoothed(model, torch.zeros(1, 1), [0], sigma=1.0, samples=101, batch=50)


def test_an_object_with_logits_is_a_model() -> None:
    plain, wrapped = (
        certify_smoothed(model, torch.zeros(1, 1), [0], sigma=1.0, samples=500)
        for model in (two_classes, lambda z: Output(two_classes(z)))
    )
    assert torch.equal(plain.radius, wrapped.radius)
