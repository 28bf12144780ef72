"""Attack a bound by ascent on log(true norm / claimed norm) over inputs, weights, biases and points of a ball."""

from __future__ import annotations

import dataclasses as dc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

import torch

from lipbounds.claims import Feature
from lipbounds.errors import InvalidInput, LipboundsError, UnsupportedAttention
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention, Moves
from lipbounds.targets.rms_norm import NORM_OVER
from lipbounds.testing._ascent import Ascent
from lipbounds.testing._claims import Claims
from lipbounds.testing._falsification import SLACK as SLACK
from lipbounds.testing._falsification import Falsification as Falsification
from lipbounds.testing._falsification import judge as judge
from lipbounds.testing._starts import MASKS, SHIFT, Mask, Parameters
from lipbounds.testing._starts import Setting as Setting


Progress = Callable[[int, float], None]
CONFIRMED = 5  # instances of a search that are judged in 60 digits
SIZES = (1, 2, 3, 4, 6)
SCALES = (None, None, None, 1.0, 0.1, 4.0, -0.7)
NORM_EPS = (0.1, 1e-5, 1.0)
RADII = (1.0, 0.1, 0.01, 3.0)


def falsify(
    spec: BoundSpec,
    *,
    seed: int = 0,
    starts: int = 32,
    steps: int = 150,
    tokens: int = 3,
    dim: int = 3,
    heads: int = 1,
    head_dim: int | None = None,
    features: Iterable[Feature] = (),
    radius: float = 1.0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Falsification:
    """The worst instance of one shape that ascent from many starts finds; it proves a fault, never soundness.

    Args:
        spec: a bound of kind `proved`.
        seed: of all random numbers of the search.
        starts: instances that climb together.
        steps: gradient steps; a quarter as many rounds of local search follow.
        tokens: n.
        dim: D.
        heads: number of heads.
        head_dim: width of a head; dim // heads, at least 1, if None.
        features: what the blocks have beyond heads: `biases`, `mask` (causal), `cross` (the memory moves), `rotary`,
            `qk_norm` (of each head).
        radius: for the scopes that have one; the size of the tokens relative to that of a ball is part of the search.
        seconds: stop climbing after this processor time.
        progress: called with the steps done and the largest ratio so far.

    Raises:
        InvalidInput: a bound of another kind or scope; `some_queries` among the features.
        UnsupportedAttention: the bound does not cover the features.
    """
    wanted = frozenset(features)
    if "some_queries" in wanted:
        raise InvalidInput("features must not hold 'some_queries': the search has no such blocks; `verify` draws some.")
    setting = Setting(
        tokens=tokens,
        dim=dim,
        heads=heads,
        head_dim=head_dim,
        biases="biases" in wanted,
        rotary="rotary" in wanted,
        norm_over="head" if "qk_norm" in wanted else None,
        mask="none" if "mask" not in wanted else "offsets" if "cross" in wanted else "causal",
        moves="memory" if "cross" in wanted else "self",
        radius=radius,
    )
    return attack(spec, setting, seed=seed, starts=starts, steps=steps, seconds=seconds, progress=progress)


def attack(
    spec: BoundSpec,
    setting: Setting,
    *,
    seed: int = 0,
    starts: int = 32,
    steps: int = 150,
    seconds: float | None = None,
    stop_above: float = math.inf,
    progress: Progress | None = None,
) -> Falsification:
    """As `falsify`, for any setting.

    Args:
        spec: a bound of kind `proved`.
        setting: shape and features of the blocks.
        seed: of all random numbers of the search.
        starts: instances that climb together.
        steps: gradient steps; a quarter as many rounds of local search follow.
        seconds: stop climbing after this time.
        stop_above: stop climbing once the ratio is above this.
        progress: called with the steps done and the largest ratio so far.

    Raises:
        InvalidInput: a bound of another kind or scope; starts or steps below 1.
        UnsupportedAttention: the bound does not cover the setting's features.
    """
    _check(spec, setting, starts, steps)
    setting = dc.replace(setting, compact=spec.claim.scope == "compact")
    begun = time.process_time()
    claims = Claims(spec, setting)
    ascent = Ascent(claims, starts, torch.Generator().manual_seed(seed))
    deadline = math.inf if seconds is None else begun + seconds
    ascent.run(steps, deadline=deadline, stop_above=math.log(stop_above), progress=progress)
    found = _confirm(claims, ascent.candidates(CONFIRMED))
    return dc.replace(found, starts=starts, steps=ascent.steps_done, seconds=time.process_time() - begun, seed=seed)


def falsify_widely(
    spec: BoundSpec, *, seed: int = 0, seconds: float = 60.0, skip: int = 0, progress: Progress | None = None
) -> Falsification:
    """The worst instance over many shapes, masks, biases, scales and moves that the bound supports.

    Stops early once an instance refutes the bound.

    Args:
        spec: a bound of kind `proved`.
        seed: of all random numbers of the search.
        seconds: processor time for the whole search; at least one shape is searched.
        skip: shapes to leave out at the beginning. Less `seed`, the seed of an instance found earlier is the number of
            shapes before it.
        progress: called with the steps done and the largest ratio so far.

    Raises:
        InvalidInput: a bound of another kind or scope, or a number of shapes below 0.
        UnsupportedAttention: the bound refuses every block it was asked about.
    """
    if skip < 0:
        raise InvalidInput(f"skip must be >= 0, got {skip}.")
    begun = time.process_time()
    worst: Falsification | None = None
    refusal: LipboundsError | None = None
    steps_done = starts_done = 0
    settings = enumerate(_settings(spec, Random(seed)))
    for trial, (setting, steps) in itertools.islice(settings, skip, None):
        left = seconds - (time.process_time() - begun)
        if trial > skip and (left <= 0 or (worst is not None and worst.refuted)):
            break
        try:
            found = attack(
                spec,
                setting,
                seed=seed + trial,
                steps=steps,
                seconds=max(left, 0.0),
                stop_above=1.05,
                progress=None
                if progress is None
                else lambda step, ratio, before=steps_done: progress(before + step, ratio),
            )
        except LipboundsError as error:
            refusal = error
            continue
        steps_done += found.steps
        starts_done += found.starts
        if worst is None or not found.ratio <= worst.ratio:
            worst = found
    if worst is None:
        raise UnsupportedAttention(f"{spec.name} refuses every block the search offers; the last reason: {refusal}")
    return dc.replace(worst, starts=starts_done, steps=steps_done, seconds=time.process_time() - begun)


def can_climb(spec: BoundSpec) -> bool:
    """Whether the search is for this bound: an upper bound with a proof, of dot-product attention, not everywhere.

    A bound on a ball is attacked at all of its points, one on a compact set at inputs whose largest token is on the
    sphere, one for the change from the centre through the derivative there.
    """
    return spec.claim.kind == "proved" and spec.claim.scope != "global" and spec.target is Attention


def _check(spec: BoundSpec, setting: Setting, starts: int, steps: int) -> None:
    if not can_climb(spec):
        raise InvalidInput(
            f"falsify needs a bound of dot-product attention, of kind 'proved' and not of scope 'global', got "
            f"{spec.name} of kind {spec.claim.kind!r} and scope {spec.claim.scope!r}; test it by its own contract."
        )
    if starts < 1 or steps < 1:
        raise InvalidInput(f"need at least one start and one step, got {starts=} and {steps=}.")
    missing = sorted(setting.features - spec.supports)
    if missing:
        raise UnsupportedAttention(f"{spec.name} does not cover {missing}; choose features from its `supports`.")


def _confirm(claims: Claims, candidates: list[Parameters]) -> Falsification:
    """The worst of the candidates, each judged alone: batches may hide faults, and float64 truths round."""
    setting, ball = claims.setting, claims.spec.needs_radius
    judged = []
    for parameters in candidates:
        block = setting.block(parameters)
        point = setting.point(parameters, block) if SHIFT in parameters else None
        try:
            judged.append(judge(claims.spec, block, radius=setting.radius if ball else None, point=point))
        except Exception as error:
            claims.refusal = error
    if not judged:
        raise UnsupportedAttention(
            f"{claims.spec.name} gave no value for any instance of {setting}; its last words: {claims.refusal}"
        ) from claims.refusal
    return max(judged, key=lambda found: found.ratio)


def _settings(spec: BoundSpec, random: Random) -> Iterator[tuple[Setting, int]]:
    """Small shapes with one feature at a time, quickly and then again, then any shapes and features, ever longer."""
    turned: list[dict[str, Any]] = [{"rotary": True}, {"rotary": True, "biases": True}]
    normed: list[dict[str, Any]] = [{"norm_over": "head"}, {"norm_over": "all_heads", "heads": 2, "biases": True}]
    alone: list[dict[str, Any]] = [
        {},
        *turned,
        *normed,
        {"heads": 2},
        {"biases": True},
        *({"mask": mask} for mask in MASKS[1:]),
    ]
    alone += [{"moves": "query"}, {"moves": "memory"}, {"scale": -0.7}]
    # One query: where it moves, nothing is left but the softmax, with more keys than two.
    one_query = [
        Setting(tokens=1, dim=1, moves="query", memory_tokens=3),
        Setting(tokens=1, dim=1, moves="query", memory_tokens=3, mask="padding"),
        Setting(tokens=1, dim=3, moves="query", memory_tokens=6),
        Setting(tokens=1, dim=1, moves="memory", memory_tokens=2, mask="offsets"),
    ]
    for tokens, steps in ((2, 20), (3, 80)):
        first = [Setting(tokens=tokens, dim=1), Setting(tokens=tokens, dim=3, head_dim=1)]
        small = first + one_query + [Setting(**{"tokens": tokens, "dim": 2, **change}) for change in alone]
        yield from ((setting, steps) for setting in small if setting.features <= spec.supports)
    steps = 60
    while True:
        yield _random_setting(spec, random), steps
        steps = min(steps + 5, 300)


def _random_setting(spec: BoundSpec, random: Random) -> Setting:
    supports = spec.supports
    moves: Moves = random.choice(("self", "self", "query", "memory")) if "cross" in supports else "self"
    rotary = "rotary" in supports and random.random() < 0.5
    normed = "qk_norm" in supports and random.random() < 0.5
    masks: list[Mask] = ["none", *(mask for mask in MASKS if moves == "self" or mask != "causal")]
    return Setting(
        tokens=random.choice(SIZES),
        dim=random.choice(SIZES),
        heads=random.choice((1, 1, 2, 3)) if "heads" in supports else 1,
        head_dim=random.choice((2, 3) if rotary else (None, None, 1, 2, 3)),
        rotary=rotary,
        norm_over=random.choice(NORM_OVER) if normed else None,
        norm_eps=random.choice(NORM_EPS) if normed else NORM_EPS[0],
        value_dim=random.choice((None, None, None, 1, 2)),
        biases="biases" in supports and random.random() < 0.5,
        mask=random.choice(masks) if "mask" in supports else "none",
        moves=moves,
        memory_tokens=random.choice((None, 1, 2, 3)),
        scale=random.choice(SCALES),
        radius=random.choice(RADII),
    )
