r"""Blocks of any length whose Jacobian norm is known in closed form, beyond what search or a dense truth can reach.

Two values. One feature, x_i = +1 or -1 in turn, n even, W_Q W_K^T = a with s = 1, W_V = v > 0, W_O = 1. With t =
tanh a, y_i = v tanh(a x_i) and

    dy_i/dx_k = v P_ik (1 + a x_i (x_k - m_i)) + delta_ik v a (1 - t^2),      m_i = x_i t.

On vectors that sum to 0 over the tokens of each value this is v a (1 - t^2); on the two indicator vectors it is a
symmetric circulant with the eigenvalues v (1 + a (1 - t^2)) and v (t + 2 a (1 - t^2)). The norm is the largest size of
the three, whatever n is.

Equal tokens. Every row of P is uniform and every row of V the same, so dP V = 0 and dY = P dX W_V: ||W_V W_O||, as
||P|| = 1. No logits (W_Q = 0): dS = 0 and P is uniform: the same, for any tokens.

Biased queries. The tokens and weights of two values but W_Q = 0 and b_Q = a: every row of P has (1 + t)/n at +1 and
(1 - t)/n at -1, and m_i = t, so dY is n equal rows with v (1 + t)(1 + a (1 - t))/n and v (1 - t)(1 - a (1 + t))/n: the
norm is v/sqrt(2) times that of ((1 + t)(1 + a (1 - t)), (1 - t)(1 - a (1 + t))), whatever n, b_K and b_V are.

Sinks. W_Q = 0 and all keys hidden but c: P has n equal rows of c entries 1/c: sqrt(n/c) ||W_V W_O||. Without a mask the
key of one token is so large that all other weights are below e^-800: sqrt(n) v but for a relative 1e-300.

Rewritten. Rank-one weights: the two values along a unit vector u of D features, all weights along u. A dead head, with
W_V = 0, adds nothing. G heads with the same keys and values, grouped, whose outputs are G features: sqrt(G) times the
norm. A mask that splits the tokens into two halves that do not see each other: the norm of a half.

One query over many keys. Query 0, keys and values m tokens +1 or -1 in turn, moving query: dy = s a Cov(v, k) dx = a v;
with all keys hidden but two, +1 and -1, the same.
"""

from __future__ import annotations

import dataclasses as dc
import math
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.errors import InvalidInput
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.testing.loading import expression
from lipbounds.testing.verdict import Refuted, evaluate


A, V = 0.75, 1.5  # a and v of the two values
STEEP = 1.25  # a of biased queries
SINK = 800.0  # the logit of a sink above those of all other keys: exp(-800) is far below the smallest float
WIDTH = 4  # D of rank-one weights
LENGTHS = (16, 64, 256, 2048, 4096)
LONG = 1000  # from here on only the families of `AT_LENGTH`
TOLERANCE = 1e-12  # relative, for the rounding of the closed forms and of an evaluation to nearest
GROWTH = 2.5  # power of the time in the length, between that of maps and that of dense Jacobians
RADIUS = 0.5  # of balls: a bound on a ball is at least the norm at its centre


@dc.dataclass(frozen=True, kw_only=True)
class Known:
    """A block and the exact norm of its Jacobian in the Euclidean norm.

    Args:
        family: name in `FAMILIES`.
        tokens: n that was asked for.
        block: in float64.
        constant: its norm.
    """

    family: str
    tokens: int
    block: Attention
    constant: float


_KNOWN: weakref.WeakKeyDictionary[Attention, Known] = weakref.WeakKeyDictionary()


def known(family: str, tokens: int) -> Known:
    """The instance of a family with that many tokens.

    Args:
        family: name in `FAMILIES`.
        tokens: a multiple of 4; at least 2 for those of `ANY_NUMBER`.

    Raises:
        InvalidInput: no such family, or not of so many tokens.
    """
    if family not in FAMILIES or tokens < 2 or (tokens % 4 and family not in ANY_NUMBER):
        raise InvalidInput(
            f"family must be one of {list(FAMILIES)} and tokens a multiple of 4, or any number from 2 on for "
            f"{sorted(ANY_NUMBER)}; got {family!r} and {tokens}."
        )
    block, constant = FAMILIES[family](tokens)
    instance = Known(family=family, tokens=tokens, block=block, constant=constant)
    _KNOWN[block] = instance
    return instance


def two_values_norm(a: float, v: float) -> float:
    """Norm of the block with two values; see the top of this file."""
    t = math.tanh(a)
    slope = a * (1 - t * t)
    return v * max(abs(slope), abs(1 + slope), abs(t + 2 * slope))


def _float(entries: list[list[float]]) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64, device="cpu")


def _in_turn(tokens: int) -> Tensor:
    """+1 and -1 in turn, as one feature."""
    return _float([[1.0], [-1.0]]).repeat((tokens + 1) // 2, 1)[:tokens]


def _weights(query: float, key: float = 1.0, value: float = V) -> dict[str, Any]:
    """Of one head on one feature."""
    entries = {"w_q": query, "w_k": key, "w_v": value, "w_o": 1.0}
    return {name: _float([[entry]]).unsqueeze(0) for name, entry in entries.items()}


def _hiding(queries: int, tokens: int, visible: int) -> Tensor:
    """A mask that shows the first keys alone."""
    return _float([[0.0] * visible + [-math.inf] * (tokens - visible)]).expand(queries, -1)


def _two_values(tokens: int) -> tuple[Attention, float]:
    return Attention(x=_in_turn(tokens), **_weights(A), scale=1.0), two_values_norm(A, V)


def _steep(tokens: int) -> tuple[Attention, float]:
    return Attention(x=_in_turn(tokens), **_weights(-3.0), scale=1.0), two_values_norm(-3.0, V)


def _equal_tokens(tokens: int) -> tuple[Attention, float]:
    return Attention(x=_float([[3.0]]).repeat(tokens, 1), **_weights(A), scale=1.0), V


def _no_logits(tokens: int) -> tuple[Attention, float]:
    return Attention(x=_in_turn(tokens), **_weights(0.0), scale=1.0), V


def _biased_queries(tokens: int) -> tuple[Attention, float]:
    biases: dict[str, Any] = {"b_q": _float([[STEEP]]), "b_k": _float([[0.5]]), "b_v": _float([[2.0]])}
    t = math.tanh(STEEP)
    at_ones = (1 + t) * (1 + STEEP * (1 - t)), (1 - t) * (1 - STEEP * (1 + t))
    return Attention(x=_in_turn(tokens), **_weights(0.0), **biases, scale=1.0), V * math.hypot(*at_ones) / math.sqrt(2)


def _sink(tokens: int) -> tuple[Attention, float]:
    # Feature 0 is 1 everywhere and asks; feature 1 marks the sink, which is seen; feature 2 is the value.
    x = _float([[1.0, 0.0, 0.0]]).repeat(tokens, 1)
    x[0, 1] = 1.0
    rows = {"w_q": [[1.0], [0.0], [0.0]], "w_k": [[0.0], [SINK], [0.0]], "w_v": [[0.0], [0.0], [V]], "w_o": [[1.0]]}
    weights: dict[str, Any] = {name: _float(row).unsqueeze(0) for name, row in rows.items()}
    block = Attention(x=x, **weights, scale=1.0)
    return block, V * math.sqrt(tokens)


def _hidden_keys(tokens: int) -> tuple[Attention, float]:
    block = Attention(x=_in_turn(tokens), **_weights(0.0), scale=1.0, logit_bias=_hiding(tokens, tokens, 1))
    return block, V * math.sqrt(tokens)


def _two_keys(tokens: int) -> tuple[Attention, float]:
    block = Attention(x=_in_turn(tokens), **_weights(0.0), scale=1.0, logit_bias=_hiding(tokens, tokens, 2))
    return block, V * math.sqrt(tokens / 2)


def _rank_one(tokens: int) -> tuple[Attention, float]:
    unit = _float([[0.5] * WIDTH])  # of norm 1, exactly
    column = unit.mT.unsqueeze(0)
    block = Attention(
        x=_in_turn(tokens) @ unit, w_q=A * column, w_k=column, w_v=V * column, w_o=unit.unsqueeze(0), scale=1.0
    )
    return block, two_values_norm(A, V)


def _dead_head(tokens: int) -> tuple[Attention, float]:
    living, dead = _weights(A), _weights(2.0, value=0.0)
    both: dict[str, Any] = {name: torch.cat([living[name], dead[name]]) for name in living}
    return Attention(x=_in_turn(tokens), **both, scale=1.0), two_values_norm(A, V)


def _grouped(tokens: int) -> tuple[Attention, float]:
    weights = _weights(A)
    queries = weights["w_q"].repeat(2, 1, 1)
    outputs = _float([[1.0, 0.0], [0.0, 1.0]]).unsqueeze(1)  # each head writes a feature of its own
    half = tokens // 2
    split = torch.full((2, 1, 2, 1), -math.inf, dtype=torch.float64, device="cpu")
    split[0, :, 0], split[1, :, 1] = 0.0, 0.0
    mask = split.expand(2, half, 2, half).reshape(tokens, tokens)
    block = Attention(x=_in_turn(tokens), **weights | {"w_q": queries, "w_o": outputs}, scale=1.0, logit_bias=mask)
    return block, math.sqrt(2.0) * two_values_norm(A, V)


def _one_query(tokens: int) -> tuple[Attention, float]:
    zero = _float([[0.0]])
    return Attention(x=zero, memory=_in_turn(tokens), moves="query", **_weights(A), scale=1.0), A * V


def _one_query_two_keys(tokens: int) -> tuple[Attention, float]:
    block, norm = _one_query(tokens)
    return block.replace(logit_bias=_hiding(1, tokens, 2)), norm


FAMILIES: dict[str, Callable[[int], tuple[Attention, float]]] = {
    "two values": _two_values,
    "two values, steep": _steep,
    "biased queries": _biased_queries,
    "sink": _sink,
    "equal tokens": _equal_tokens,
    "no logits": _no_logits,
    "rank-one weights": _rank_one,
    "dead head": _dead_head,
    "hidden keys": _hidden_keys,
    "two keys": _two_keys,
    "grouped heads with a mask": _grouped,
    "one query": _one_query,
    "one query, two keys": _one_query_two_keys,
}
# Of any number of tokens, tried at one more: bfloat16 does not hold 257, float16 not 2049. Others: multiples of 4.
ANY_NUMBER = frozenset({"sink", "equal tokens", "no logits", "hidden keys", "two keys"})
AT_LENGTH = ("two values", "sink", "one query, two keys")  # of thousands of tokens, where each takes seconds
FEATURES_OF: dict[str, frozenset[Feature]] = {name: make(4)[0].features for name, make in FAMILIES.items()}


def instances(spec: BoundSpec, seconds: float) -> Iterator[tuple[Attention, float | None]]:
    """Known blocks that a bound supports, ever longer, with a radius for its scope.

    A length is tried if the processor time of the same families at the length before, times the ratio of the lengths to
    the power `GROWTH`, is within the limit; short blocks cost what is called, and not what is computed, so there the
    power 1.5 is taken. The caller sees which blocks came.

    Args:
        spec: the bound.
        seconds: the limit for one length.
    """
    supported = [family for family in FAMILIES if FEATURES_OF[family] <= spec.supports]
    spent: dict[str, float] = {}
    before = LENGTHS[0]
    for tokens in LENGTHS:
        families = [family for family in supported if tokens < LONG or family in AT_LENGTH]
        power = 1.5 if tokens < LONG else GROWTH
        if spent and sum(spent[family] for family in families) * (tokens / before) ** power > seconds:
            return
        before = tokens
        for family in families:
            begun = time.process_time()
            block = known(family, tokens + (family in ANY_NUMBER)).block
            yield block, radius_for(spec, block)
            spent[family] = time.process_time() - begun


def closed_form(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """At blocks of up to thousands of tokens with a norm in closed form, the number is on the right side of it."""
    instance = _KNOWN.get(block)
    if instance is None:
        raise InvalidInput("block must be one that lipbounds.testing.known.known returned: its norm is looked up.")
    claimed = evaluate("closed_form", spec, block, radius, seed).detach().item()
    lower = spec.claim.kind == "lower"
    truth = instance.constant
    if claimed <= truth * (1 + TOLERANCE) if lower else claimed >= truth * (1 - TOLERANCE):
        return
    side = "above" if lower else "below"
    raise Refuted(
        f"at {instance.family!r} with n = {instance.tokens} the norm is {truth!r} in closed form, got {claimed!r}, "
        f"{side} it",
        check="closed_form", spec=spec, block=block, radius=radius, seed=seed, claimed=claimed, reached=truth,
        source=_source(spec, instance, radius),
    )  # fmt: skip


def radius_for(spec: BoundSpec, block: Attention) -> float | None:
    """A radius for which the promise of the bound covers the norm at the input; None for a scope without one.

    Args:
        spec: the bound.
        block: unbatched.
    """
    if not spec.needs_radius:
        return None
    if spec.claim.scope == "compact":
        return max(float(tokens.norm(dim=-1).max()) for tokens in (block.x, block.source_input)) * (1 + TOLERANCE)
    return 0.0 if spec.claim.kind == "lower" else RADIUS


_SOURCE = """import lipbounds
from lipbounds.testing.contract import load_spec
from lipbounds.testing.known import known

spec = {spec}
instance = known({family!r}, {tokens})  # lipbounds.testing.known derives the norm
claimed = spec(instance.block{radius}).value.double().item()
truth = instance.constant
print(f"claimed {{claimed!r}}, truth {{truth!r}}")
assert {promise}, "the bound is on the wrong side of the truth"
"""


def _source(spec: BoundSpec, instance: Known, radius: float | None) -> str:
    """A file that makes the block again: its entries would fill pages."""
    lower = spec.claim.kind == "lower"
    return _SOURCE.format(
        spec=expression(spec) or f"...  # {spec.name} cannot be imported by a path: put your BoundSpec here",
        family=instance.family,
        tokens=instance.tokens,
        radius="" if radius is None else f", radius={radius!r}",
        promise=f"claimed <= truth * (1 + {TOLERANCE})" if lower else f"claimed >= truth * (1 - {TOLERANCE})",
    )
