"""Batched ascent on log(true / claimed): Adam on exact gradients, restarts, then local search without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lipbounds.testing._claims import DIRECTIONS, NUDGE, PROBE, SMALLEST, Claims, along, moved, random_signs
from lipbounds.testing._jacobian import jacobian_parts, reached_norm
from lipbounds.testing._starts import REGIMES, Parameters, Setting, draw_starts


FIRST_RATE, LAST_RATE = 0.1, 0.003
ALLOWED_FALL = 0.1  # of an instance's objective below its highest: then it goes back there and takes half the steps
# The softmax share of the Jacobian that an instance is kept above, in turn over the starts. Without it all of them end
# where logits vanish and most bounds are tight: a fault in the softmax term would be found by luck only.
LEAST_SHARES = (0.0, 0.1, 0.3, 0.5)
# Instances are compared with others of a similar share only: a niche for each interval between these.
NICHES = torch.tensor([0.02, 0.1, 0.3, 0.6], dtype=torch.float64)
LOG_SIZES = (-18.0, 12.0)  # of the size of each tensor
PARENTS = 3  # of local search, beside the best of each niche


class Ascent:
    """A population of instances on the way to larger log(true / claimed); remembers the best each one has been.

    Each tensor of an instance is a direction with entries of order 1 times exp(log size), so that one learning rate
    suits entries of every magnitude and logits can go to 0 or grow without limit.

    Over 150 lines, because gradient steps, restarts and local search change the same population.
    """

    def __init__(self, claims: Claims, starts: int, generator: Generator) -> None:
        self.claims = claims
        self.setting: Setting = claims.setting
        self.generator = generator
        self.starts = starts
        self.leaves = self._fresh()
        # The best of each start in each niche, the niches along the first axis.
        self.best = {name: torch.stack([tensor] * (len(NICHES) + 1)) for name, tensor in self.leaves.items()}
        self.best_log_ratio = torch.full((len(NICHES) + 1, starts), -torch.inf, dtype=torch.float64)
        # The second round over the regimes gets other shares than the first.
        shares = [LEAST_SHARES[(i + i // len(REGIMES)) % len(LEAST_SHARES)] for i in range(starts)]
        self.least_log_share = torch.tensor(shares, dtype=torch.float64).log()
        self.first_moment = {name: torch.zeros_like(tensor) for name, tensor in self.leaves.items()}
        self.second_moment = {name: torch.zeros_like(tensor) for name, tensor in self.leaves.items()}
        self.age = torch.zeros(starts, dtype=torch.float64)
        self.pace = torch.ones(starts, dtype=torch.float64)
        self.highest = torch.full((starts,), -torch.inf, dtype=torch.float64)
        self.at_highest = {name: tensor.clone() for name, tensor in self.leaves.items()}
        self.has_gradient: bool | None = None
        self.steps_done = 0

    def run(
        self, steps: int, *, deadline: float, stop_above: float, progress: Callable[[int, float], None] | None
    ) -> None:
        """Up to `steps` gradient steps, then a quarter as many rounds of local search.

        Args:
            steps: gradient steps.
            deadline: value of time.process_time() after which no step begins (but the first).
            stop_above: a log ratio that is good enough to stop at.
            progress: called with the number of steps done and the largest ratio so far.
        """
        rounds = max(1, steps // 4)
        for step in range(steps + rounds):
            if step and (time.process_time() > deadline or float(self.best_log_ratio.max()) > stop_above):
                return
            if step < steps:
                self._climb(step / steps)
                if step in (steps // 3, 2 * steps // 3):
                    self._restart_worst()
            else:
                self._mutate()
            self.steps_done += 1
            if progress is not None:
                progress(self.steps_done, float(self.best_log_ratio.max().exp()))

    def candidates(self, count: int) -> list[Parameters]:
        """The best instances seen, best first."""
        order = self.best_log_ratio.flatten().argsort(descending=True)[:count]
        chosen = _join({name: leaf.flatten(0, 1)[order] for name, leaf in self.best.items()})
        return [{name: tensor[i] for name, tensor in chosen.items()} for i in range(len(order))]

    # -- gradient steps -----------------------------------------------------------------------------------------

    def _climb(self, done: float) -> None:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.leaves.items()}
        log_true, log_share, log_claimed = self._measure(leaves)
        log_ratio = (log_true - log_claimed).detach()
        self._remember(leaves, log_ratio, log_share)
        aim = log_true + (log_share - self.least_log_share).clamp(max=0.0)
        if self.has_gradient is None:
            self.has_gradient = self._agrees(_gradient(log_claimed, leaves), leaves)
        if self.has_gradient:
            gradient = _gradient(aim - log_claimed, leaves)
        else:
            gradient, claimed = _gradient(aim, leaves), self._differences(leaves)
            gradient = {name: gradient[name] - claimed[name] for name in leaves}
        self._adam(gradient, FIRST_RATE * (LAST_RATE / FIRST_RATE) ** done)
        self._step_back(leaves, (aim - log_claimed).detach())
        lost = ~log_ratio.isfinite()
        if bool(lost.any()):
            self._replace(lost, self._fresh())

    def _measure(self, leaves: Parameters) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the true norm, of the softmax share of the Jacobian, and of the claim, for each instance."""
        parameters = _join(leaves)
        block = self.setting.block(parameters)
        mixing, softmax = jacobian_parts(block, self.setting.point(parameters, block))
        whole = mixing + softmax
        whole = torch.where(whole.isfinite().all(-1).all(-1)[:, None, None], whole, 0.0)
        norm = reached_norm(whole, self.claims.spec.claim.norm, block.tokens, block.moving_input.shape[-2])
        # Where the truth is 0 no claim can be too small: such an instance is as lost as one that overflowed.
        log_true = torch.where(norm > SMALLEST, norm.clamp(min=SMALLEST).log(), torch.nan)
        sizes = [part.square().sum((-2, -1)).clamp(min=SMALLEST).sqrt() for part in (mixing, softmax)]
        log_share = sizes[1].log() - (sizes[0] + sizes[1]).log()
        return log_true, log_share, self.claims.log_values(parameters)

    @torch.no_grad()
    def _agrees(self, gradient: Parameters, leaves: Parameters) -> bool:
        """Whether the automatic gradient of the log claims is that of finite differences for most instances."""
        direction = random_signs(leaves, self.generator)
        measured = self._slope(leaves, direction, PROBE)
        expected = along(gradient, direction)
        close = (measured - expected).abs() <= 0.05 * (measured.abs() + expected.abs()) + 1e-4
        known = measured.isfinite()
        return bool(known.any()) and bool(close[known].double().mean() > 0.7)

    @torch.no_grad()
    def _differences(self, leaves: Parameters) -> Parameters:
        """Simultaneous perturbation: an unbiased, noisy gradient from values of the bound alone."""
        count = 1 if self.claims.one_by_one else DIRECTIONS
        total = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
        for _ in range(count):
            direction = random_signs(leaves, self.generator)
            slope = self._slope(leaves, direction, NUDGE).nan_to_num(0.0, 0.0, 0.0)
            for name in total:
                total[name] += _column(slope, total[name]) * direction[name] / count
        return total

    def _slope(self, leaves: Parameters, direction: Parameters, step: float) -> Float[Tensor, " starts"]:
        """Change of the log claims along a direction, by a central difference."""
        ahead = self.claims.log_values(_join(moved(leaves, direction, step)))
        behind = self.claims.log_values(_join(moved(leaves, direction, -step)))
        return (ahead - behind) / (2 * step)

    @torch.no_grad()
    def _adam(self, gradient: Parameters, rate: float) -> None:
        self.age += 1
        for name, leaf in self.leaves.items():
            slope = gradient[name]
            first, second = self.first_moment[name], self.second_moment[name]
            first.mul_(0.9).add_(slope, alpha=0.1)
            second.mul_(0.99).addcmul_(slope, slope, value=0.01)
            mean = first / (1 - 0.9 ** _column(self.age, first))
            size = (second / (1 - 0.99 ** _column(self.age, second))).sqrt()
            self.leaves[name] = _confined(name, leaf + rate * _column(self.pace, leaf) * mean / (size + 1e-12))

    @torch.no_grad()
    def _step_back(self, leaves: Parameters, height: Tensor) -> None:
        """Return instances that fell to the highest place they came through: narrow ridges need short steps."""
        risen = height > self.highest
        self.highest = torch.where(risen, height, self.highest)
        for name, leaf in leaves.items():
            self.at_highest[name] = torch.where(_column(risen, leaf), leaf.detach(), self.at_highest[name])
        fallen = height < self.highest - ALLOWED_FALL
        if bool(fallen.any()):
            pace = torch.where(fallen, self.pace / 2, self.pace)
            highest = self.highest
            self._replace(fallen, self.at_highest)
            self.pace, self.highest = pace, highest

    # -- the population -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _remember(self, leaves: Parameters, log_ratio: Tensor, log_share: Tensor) -> None:
        """Keep each instance that beats what its start has in the niche it is in."""
        log_ratio = log_ratio.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        niche, start = torch.bucketize(log_share.exp(), NICHES), torch.arange(self.starts)
        better = log_ratio > self.best_log_ratio[niche, start]
        niche, start = niche[better], start[better]
        self.best_log_ratio[niche, start] = log_ratio[better]
        for name, leaf in leaves.items():
            self.best[name][niche, start] = leaf.detach()[better]

    @torch.no_grad()
    def _restart_worst(self) -> None:
        """The worst quarter starts afresh, the next quarter as disturbed copies of the best."""
        order = self.best_log_ratio.amax(0).argsort()
        quarter = self.starts // 4
        for chosen, instances in (
            (order[:quarter], self._fresh()),
            (order[quarter : 2 * quarter], self._disturbed(self._parents(), 0.3)),
        ):
            mask = torch.zeros(self.starts, dtype=torch.bool)
            mask[chosen] = True
            self._replace(mask, instances)

    @torch.no_grad()
    def _mutate(self) -> None:
        """One round of local search around the best instances of every niche."""
        sizes = 10 ** (-4 * torch.rand(self.starts, generator=self.generator, dtype=torch.float64))
        children = self._disturbed(self._parents(), sizes)
        log_true, log_share, log_claimed = self._measure(children)
        self._remember(children, log_true - log_claimed, log_share)

    def _parents(self) -> Parameters:
        """The best of each niche, then the best of all, repeated in turn to a full population."""
        leader = self.best_log_ratio.argmax(-1) + torch.arange(len(self.best_log_ratio)) * self.starts
        ranked = self.best_log_ratio.flatten().argsort(descending=True)
        chosen = torch.cat([leader, ranked[:PARENTS]])
        chosen = chosen[self.best_log_ratio.flatten()[chosen] > -torch.inf]
        chosen = chosen if len(chosen) else ranked[:1]
        chosen = chosen[torch.arange(self.starts) % len(chosen)]
        return {name: leaf.flatten(0, 1)[chosen] for name, leaf in self.best.items()}

    def _disturbed(self, leaves: Parameters, size: float | Tensor) -> Parameters:
        """Some entries of each instance moved at random."""
        disturbed = {}
        for name, leaf in leaves.items():
            noise = torch.randn(leaf.shape, generator=self.generator, dtype=torch.float64)
            kept = torch.rand(leaf.shape, generator=self.generator, dtype=torch.float32) < 0.3
            scale = _column(size, leaf) if isinstance(size, Tensor) else size
            disturbed[name] = _confined(name, leaf + scale * noise * kept)
        return disturbed

    def _fresh(self) -> Parameters:
        return _split(draw_starts(self.setting, self.starts, self.claims.spec.claim.scope == "ball", self.generator))

    def _replace(self, chosen: Tensor, instances: Parameters) -> None:
        for name, leaf in instances.items():
            self.leaves[name] = torch.where(_column(chosen, leaf), leaf, self.leaves[name])
            for moment in (self.first_moment[name], self.second_moment[name]):
                moment[chosen] = 0.0
        self.age[chosen] = 0.0
        self.pace = torch.where(chosen, 1.0, self.pace)
        self.highest = torch.where(chosen, -torch.inf, self.highest)


def _gradient(log_values: Tensor, leaves: Parameters) -> Parameters:
    """Gradient for each instance; 0 where there is none."""
    usable = log_values.isfinite()
    total = torch.where(usable, log_values, 0.0).sum()
    if not total.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if slope is None else slope.nan_to_num(0.0, 0.0, 0.0)
        for (name, leaf), slope in zip(leaves.items(), gradients, strict=True)
    }


def _split(parameters: Parameters) -> Parameters:
    """Each tensor as a direction of root mean square 1 and the log of its size, under the name with a dot."""
    leaves: Parameters = {}
    for name, tensor in parameters.items():
        size = tensor.square().flatten(1).mean(-1).sqrt().clamp(min=1e-8)
        leaves[name] = tensor / _column(size, tensor)
        leaves[f"{name}.log_size"] = size.log()
    return leaves


def _join(leaves: Parameters) -> Parameters:
    return {
        name: leaf * _column(leaves[f"{name}.log_size"].exp(), leaf)
        for name, leaf in leaves.items()
        if not name.endswith(".log_size")
    }


def _confined(name: str, leaf: Tensor) -> Tensor:
    return leaf.clamp(*LOG_SIZES) if name.endswith(".log_size") else leaf.clamp(-50.0, 50.0)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value an instance, shaped to multiply a tensor that has instances along its first axis."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
