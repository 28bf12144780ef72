"""Does a probable bound fail as rarely as it says? A binomial test with a stated error rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.testing import oracles
from lipbounds.testing.recipes import Recipe, build
from lipbounds.testing.verdict import Refuted, evaluate


DELTA = 0.3  # large enough that failures can be counted
SEEDS = 200
ERROR_RATE = 1e-6  # probability that a bound which keeps its delta is refuted at one block
FEWEST_STEPS = (2, 3, 4, 6, 8, 12, 16, 24, 32)


def hard_blocks(spec: BoundSpec, seconds: float) -> list[tuple[Attention, None]]:
    """Blocks whose top singular value is hard to find from a random start, too large for a dense shortcut.

    One token attends to itself alone, so the Jacobian is W_V W_O: a chosen spectrum with one value just above the rest.

    Args:
        spec: the bound, at a point; all get the same blocks.
        seconds: not looked at: the blocks are few.
    """
    one = torch.ones(1, dtype=torch.float64)
    spectra = [
        torch.cat([one, torch.linspace(0.9, 0.1, 95, dtype=torch.float64)]),
        torch.cat([one, _least_visible(95, 0.16)]),
        torch.cat([one, torch.linspace(0.99, 0.9, 95, dtype=torch.float64)]),
    ]
    blocks = [_diagonal(spectrum) for spectrum in spectra]
    blocks.append(build(Recipe(seed=1, n=12, dim=8, heads=2, head_dim=4, value_dim=4, out_dim=8, spread=4.0)))
    return [(block, None) for block in blocks]


def coverage(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """Over many random starts at one block the bound fails no more often than its `delta` allows.

    The bound must have the options `delta` and `seed`; one called `steps` is set as low as the bound accepts, where
    it is most likely to fail. Refuted if so many failures had a probability below `ERROR_RATE` for a bound that keeps
    delta.
    """
    lacking = sorted({"delta", "seed"} - set(spec.defaults))
    if lacking:
        raise Refuted(
            f"a probable bound needs the options delta and seed so that its failures can be counted, lacks {lacking}",
            check="coverage", spec=spec, block=block, radius=radius, seed=seed,
        )  # fmt: skip
    floor = oracles.jacobian_norm(block) - oracles.truth_slack(block)
    for options in _options(spec, block, radius):
        failures = 0
        for start in range(SEEDS):
            drawn = {"seed": seed * SEEDS + start, "delta": DELTA, **options}
            value = evaluate("coverage", spec, block, radius, seed, drawn)
            failures += int(not bool((value >= floor).all()))
        if binomial_tail(failures, SEEDS, DELTA) < ERROR_RATE:
            raise Refuted(
                f"at delta={DELTA} at most about {DELTA * SEEDS:.0f} of {SEEDS} values may be below the truth, "
                f"got {failures} ({options or 'default options'})",
                check="coverage", spec=spec, block=block, radius=radius, seed=seed, claimed=DELTA,
                reached=failures / SEEDS,
            )  # fmt: skip


def binomial_tail(failures: int, trials: int, rate: float) -> float:
    """Probability of at least `failures` failures in `trials` trials that each fail with probability `rate`.

    Args:
        failures: the number counted.
        trials: independent trials.
        rate: strictly between 0 and 1.
    """
    terms = (math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(failures, trials + 1))
    return math.fsum(terms)


def _options(spec: BoundSpec, block: Attention, radius: float | None) -> list[dict[str, int]]:
    """The default options, and the fewest steps the bound accepts if it takes steps."""
    if "steps" not in spec.defaults:
        return [{}]
    for steps in FEWEST_STEPS:
        try:
            spec(block, radius, delta=DELTA, steps=steps)
        except InvalidInput:
            continue
        return [{"steps": steps}, {"steps": 2 * steps}]
    return [{}]


def _least_visible(count: int, gap: float) -> Tensor:
    """Singular values below 1 that hide it best from a few Lanczos steps: squares like Chebyshev nodes on [0, 1 - gap].

    They come closest to the worst case in the proof of the Lanczos inequality: a relative error that was halved fails.
    """
    angles = torch.linspace(0, math.pi, count, dtype=torch.float64)
    return ((1 - gap) * (1 + torch.cos(angles)) / 2).clamp(min=1e-6).sqrt()


def _diagonal(spectrum: Tensor) -> Attention:
    size = len(spectrum)
    zero = torch.zeros(1, size, 1, dtype=torch.float64)
    x = torch.ones(1, size, dtype=torch.float64)
    return Attention(
        x=x, w_q=zero, w_k=zero, w_v=torch.diag(spectrum)[None], w_o=torch.eye(size, dtype=torch.float64)[None]
    )
