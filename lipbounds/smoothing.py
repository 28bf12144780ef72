r"""Randomised smoothing: a radius for any classifier, of any size, that holds with probability 1 - delta.

The smoothed classifier of f answers with the class that f gives most often at x + sigma e, e standard normal. If that
class has probability p > 1/2 there, the smoothed classifier keeps it on the l2 ball of radius sigma Phi^-1(p), Phi the
standard normal distribution function (Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918, Theorem 1, with the other
classes together at most 1 - p). p is bounded from below by sampling: `selection` draws choose the class, `samples`
fresh draws count how often it comes, k times, and the bound of Clopper and Pearson,

    p_low = the p with P(Bin(n, p) >= k) = delta,

is above the truth with probability at most delta. So every radius fails with probability at most delta, over the draws;
a batch of B inputs has a wrong one among them with probability at most B delta.

It is a statement about the smoothed classifier, not about f, and it is `probable`, not proved: never in one column with
proved radii. The draws come from a pseudo-random generator and count as independent and normal.

Numerics: the binomial tail is summed in logarithms; lgamma is within 8 ulps, at most 1e-7 in the exponent for n up to
1e6, so the tail is raised by 1e-6 before it is compared with delta, and the bisection ends on the lower side. Phi^-1 is
lowered by 1e-9 of its value.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.claims import Kind
from lipbounds.errors import InvalidInput
from lipbounds.targets.given import WHOLE, given_tensor


MOST_SAMPLES = 1_000_000
TAIL_SLACK, QUANTILE_SLACK, BISECTIONS = 1e-6, 1e-9, 100


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class SmoothedCertificate:
    """Radii of the smoothed classifier at a batch of inputs.

    Args:
        radius: l2 radius of each input, each wrong with probability at most `delta`; 0 where the label is not the class
            that was counted, or its probability may be 1/2 or less.
        prediction: the class that came most often in the first draws.
        correct: whether that is the label, and its probability is above 1/2 with probability 1 - delta.
        probability: lower bound of Clopper and Pearson on the probability of the prediction.
        sigma: standard deviation of the noise.
        samples: draws that were counted, for each input.
        delta: probability of failure, for each input.
        kind: `probable`.
    """

    radius: Float[Tensor, " batch"]
    prediction: Int[Tensor, " batch"]
    correct: Tensor
    probability: Float[Tensor, " batch"]
    sigma: float
    samples: int
    delta: float
    kind: Kind = "probable"

    def accuracy(self, radius: float) -> float:
        """Share of the inputs whose label the smoothed classifier keeps up to that radius.

        Args:
            radius: >= 0.
        """
        return float((self.correct & (self.radius >= radius)).double().mean())


@torch.no_grad()
def certify_smoothed(
    model: Callable[[Tensor], Any],
    x: Float[Tensor, "batch ..."] | Any,
    labels: Int[Tensor, " batch"] | Any,
    *,
    sigma: float,
    samples: int = 10_000,
    selection: int = 100,
    delta: float = 1e-3,
    batch: int = 256,
    seed: int = 0,
) -> SmoothedCertificate:
    """Radii within which the smoothed classifier keeps the label, each with probability 1 - delta.

    Source: Cohen, Rosenfeld, Kolter 2019 (arXiv 1902.02918), algorithm CERTIFY.

    Args:
        model: a batch of inputs to a batch of logits, or an object that has them as `logits`; such as a module in
            evaluation mode. It gets inputs in the dtype of `x`: their rounding counts as part of it.
        x: inputs, pixels or embeddings, one batch dimension; a tensor, a NumPy array, or a list.
        labels: the right classes; likewise.
        sigma: standard deviation of the noise on every number of the input.
        samples: draws that are counted, for each input; at most a million.
        selection: draws that choose the class.
        delta: probability of failure, for each input.
        batch: draws evaluated together.
        seed: of the draws.

    Raises:
        InvalidInput: an option out of range, labels that do not fit, or logits that are NaN or not one row per input.
    """
    x, labels = given_tensor("x", x), given_tensor("labels", labels)
    _check(x, labels, sigma, samples, selection, delta, batch)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: a seed means the same noise on every device
    radii, predictions, lower = [], [], []
    for image in x:
        first = _counts(model, image, sigma, selection, batch, generator)
        prediction = int(first.argmax())
        hits = int(_counts(model, image, sigma, samples, batch, generator)[prediction])
        probability = clopper_pearson(hits, samples, delta)
        radii.append(sigma * _quantile(probability))
        predictions.append(prediction)
        lower.append(probability)
    prediction = torch.tensor(predictions, dtype=torch.int64, device=x.device)
    radius = torch.tensor(radii, dtype=torch.float64, device=x.device)
    correct = (prediction == labels.to(x.device)) & (radius > 0)
    return SmoothedCertificate(
        radius=torch.where(correct, radius, 0.0),
        prediction=prediction,
        correct=correct,
        probability=torch.tensor(lower, dtype=torch.float64, device=x.device),
        sigma=sigma,
        samples=samples,
        delta=delta,
    )


def clopper_pearson(hits: int, samples: int, delta: float) -> float:
    """Lower bound on a probability, too large with probability at most delta.

    Args:
        hits: how often the event came.
        samples: in how many independent draws.
        delta: probability of failure.
    """
    if hits == 0:
        return 0.0
    counts = torch.arange(hits, samples + 1, dtype=torch.float64, device="cpu")
    total = torch.tensor(float(samples), dtype=torch.float64, device="cpu")
    choose = torch.lgamma(total + 1) - torch.lgamma(counts + 1) - torch.lgamma(total - counts + 1)
    low, high = 0.0, hits / samples
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        p = torch.tensor(middle, dtype=torch.float64, device="cpu")
        terms = choose + counts * p.log() + (total - counts) * torch.log1p(-p) if middle < 1 else counts * 0
        tail = float(torch.logsumexp(terms, 0).exp()) * (1 + TAIL_SLACK)
        low, high = (middle, high) if tail <= delta else (low, middle)
    return low


def _counts(
    model: Callable[[Tensor], Any], image: Tensor, sigma: float, samples: int, batch: int, generator: torch.Generator
) -> Tensor:
    """How often each class comes."""
    total: Tensor | None = None
    for start in range(0, samples, batch):
        size = (min(batch, samples - start), *image.shape)
        noise = torch.randn(size, generator=generator, dtype=image.dtype, device=generator.device).to(image.device)
        logits = _logits(model(image + sigma * noise), size[0], None if total is None else len(total))
        found = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
        total = found if total is None else total + found
    assert total is not None
    return total


def _logits(output: Any, draws: int, classes: int | None) -> Tensor:
    """What the model returned, with one row for each draw; the number of classes must not change between calls."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise InvalidInput(f"model must return logits, a tensor [batch, classes], got {type(logits).__name__}.")
    wanted = max(2, logits.shape[-1] if logits.dim() else 0) if classes is None else classes
    if logits.shape != (draws, wanted):
        raise InvalidInput(
            f"model must return logits [batch, classes] with one row for each of the {draws} inputs of a call, and the "
            f"same classes in every call, got shape {tuple(logits.shape)}."
        )
    if bool(logits.isnan().any()):
        raise InvalidInput("model must return logits that are numbers, got NaN: then it has no class.")
    return logits


def _quantile(probability: float) -> float:
    """Phi^-1, rounded down; 0 for probabilities of at most 1/2."""
    if probability <= 0.5:
        return 0.0
    value = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64, device="cpu")))
    return max(value * (1 - QUANTILE_SLACK), 0.0)


def _check(x: Tensor, labels: Tensor, sigma: float, samples: int, selection: int, delta: float, batch: int) -> None:
    if not 0 < sigma < float("inf"):
        raise InvalidInput(f"sigma must be positive and finite, got sigma={sigma}.")
    if not (1 <= samples <= MOST_SAMPLES and selection >= 1 and batch >= 1):
        raise InvalidInput(
            f"samples must be between 1 and {MOST_SAMPLES}, selection and batch at least 1, got {samples=}, "
            f"{selection=}, {batch=}."
        )
    if not 0 < delta < 1:
        raise InvalidInput(f"delta must be between 0 and 1, got delta={delta}.")
    if labels.dtype not in WHOLE or labels.dim() != 1 or len(labels) != len(x):
        raise InvalidInput(f"labels must be one integer per input, got {labels.dtype} of shape {tuple(labels.shape)}.")
    if len(x) == 0 or not x.dtype.is_floating_point or not bool(x.isfinite().all()):
        raise InvalidInput(f"x must hold at least one input of finite floats, got {x.dtype} of shape {tuple(x.shape)}.")
