"""What float32 adds for rounding: enough where rounding is near its worst, and by the constants of the derivation.

Blocks that are drawn at random round far below the worst case, so that a term which is missing goes unseen. Here sums
lose half a unit at every step, exact rows lie where their error lets them, and each term is compared with the formula
of docs/derivatives.md, sections 14 to 16. Each check is seen to fail on the mistakes of `MISTAKES`, which are made in
the text of the modules.
"""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lipbounds.derivatives.first import single_precision
from lipbounds.ops.spectral import Factor
from lipbounds.targets.attention import Attention


UNIT = 2.0**-24
HALF = 2.0**-12  # its square is UNIT, which 1 + UNIT loses
FIRST = "lipbounds.derivatives.first."
SINGLE, NORMS = FIRST + "single_precision", FIRST + "single_norms"
VARIANCE, SOFTMAX, BALL = (
    FIRST + "single_covariance",
    FIRST + "single_softmax",
    "lipbounds.derivatives.ball.single_precision",
)
WEIGHTS = "lipbounds.targets.weight_norms"


def gamma(operations: int) -> float:
    return operations * UNIT / (1 - operations * UNIT)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(m: Any, rows: Tensor, *errors: float) -> Any:
    """Rows of one head, with their lengths, known up to the errors."""
    rows = rows.float().unsqueeze(0)
    length = rows.double().norm(dim=-1) * (1 + 1e-12)
    return m.SingleRows(rows, length, numbers(*(errors or (0.0,) * rows.shape[-2])).unsqueeze(0))


def one_head(x: Tensor, w: Tensor, b: Tensor | None = None, **options: Any) -> Attention:
    """A block whose queries, keys and values are all x w + b."""
    head = w.float().unsqueeze(0)
    bias = None if b is None else b.float().unsqueeze(0)
    biases = {} if bias is None else {"b_q": bias, "b_k": bias, "b_v": bias}
    return Attention(x=x.float(), w_q=head, w_k=head, w_v=head, w_o=head.mT, **biases, **options)


def check_rows(m: Any, weights: Any) -> None:
    dim = 128 * 128
    x, w = torch.zeros(1, dim), torch.zeros(dim, 1)
    lost = torch.zeros(dim, dtype=torch.bool)
    lost[:128] = lost[::128] = True
    x[0, lost], w[lost, 0] = HALF, HALF
    x[0, 0] = w[0, 0] = 1.0
    bias_lost = one_head(numbers(UNIT).reshape(1, 1), torch.ones(1, 1), torch.ones(1))
    tiny_weight = one_head(torch.ones(1, 1), numbers(UNIT).reshape(1, 1), torch.ones(1))
    for block in (one_head(x, w), bias_lost, tiny_weight, one_head(draw(5, 300), draw(300, 4, seed=1), draw(4))):
        bias = torch.zeros(1, 1) if block.b_q is None else block.b_q
        norms = weights.WeightNorms({k: v.double() for k, v in block._weights.items()})
        found = m.single_rows(block.x, norms, "w_q")
        exact = block.x.double() @ block.w_q[0].double() + bias.double()
        assert bool(((found.rows[0].double() - exact).norm(dim=-1) <= found.error[0]).all())
        length = (block.x.double().square().sum(-1) + (block.b_q is not None)).sqrt()
        size = math.hypot(block.w_q.double().norm(), bias.double().norm())
        dim = block.x.shape[-1]
        assert bool((found.error[0] >= gamma(min(128, dim) + math.ceil(dim / 128) + 2) * length * size).all())


def check_logits(m: Any) -> None:
    away = rows_of(m, numbers(1.0, 0.0).reshape(1, 2), 0.1)
    near = rows_of(m, numbers(1.0, 0.0).reshape(1, 2))
    block = one_head(torch.ones(1, 2), torch.eye(2), scale=0.5)
    for queries, keys, moved in ((away, near, 0.05), (near, away, 0.05), (away, away, 0.105)):
        assert m.single_maps(block, queries, keys).error >= moved
    width = 4096  # logits off by as much, of which 1 + UNIT + ... loses nearly all
    long = torch.full((1, width), HALF).index_fill_(1, torch.tensor([0]), 1.0)
    block = one_head(torch.ones(1, 2), torch.ones(2, 2), scale=1.0)
    error = m.single_maps(block, rows_of(m, long), rows_of(m, long)).error
    assert error >= gamma(width + 4) + 112 * UNIT
    # Logits far apart, and moved by a mask: the exact ones are those of the given floats.
    keys = torch.cat([numbers(0.3).float(), -100 * torch.rand(400, generator=torch.Generator().manual_seed(0))])
    for bias in (0.0, 1000.0):
        block = one_head(torch.ones(len(keys), 1), torch.ones(1, 1), scale=1.0)
        block = block.replace(logit_bias=torch.full((len(keys), len(keys)), bias)) if bias else block
        found = m.single_maps(block, rows_of(m, torch.ones(len(keys), 1)), rows_of(m, keys.unsqueeze(-1)))
        weights = found.weights[0, 0].double()
        seen = weights > 1e-30
        off = (weights.log() - (keys.double() - keys[0].double()))[seen].abs().max()
        assert off <= found.error[0, 0]
        assert found.error[0, 0] >= (112 + 2 * (100 + bias if bias else 0)) * UNIT


def check_g_1(m: Any) -> None:
    weights = draw(1, 1, 200).exp().clamp(max=1.0).index_fill(-1, torch.tensor([0]), 1.0)
    tail, second = weights[..., 1:].sum(-1), weights[..., 1:].amax(-1)
    found = m.SingleMaps(weights, 1 + tail, tail, second, numbers(0.01).reshape(1, 1)).row_g_1
    p = (weights.double() / weights.double().sum(-1, keepdim=True)).sort(-1, descending=True).values[0, 0]
    g_1 = p[0] * (1 - p[0] + p[1])
    assert found.upper >= g_1 * math.exp(0.04) * (1 + gamma(200))
    assert found.upper >= found.found * math.exp(0.04) * (1 + gamma(3 * 200))
    one_hot = numbers(0.0, -110.0).reshape(2, 1)  # exp(-110) is no float32, 2 exp(-110) is g_1
    maps = m.single_maps(
        one_head(torch.ones(2, 1), torch.ones(1, 1), scale=1.0), rows_of(m, torch.ones(2, 1)), rows_of(m, one_hot)
    )
    assert bool((maps.row_g_1.upper >= 2 * math.exp(-110.0)).all())


def check_map_norm(m: Any) -> None:
    weights = draw(1, 6, 40).exp()
    weights = weights / weights.amax(-1, keepdim=True)
    found = m.map_norm_upper(weights, weights.sum(-1), torch.full((1, 6), 0.01, dtype=torch.float64))
    p = weights.double() / weights.double().sum(-1, keepdim=True)
    truth = torch.linalg.matrix_norm(p, 2)
    assert bool((found.upper >= truth * math.exp(0.02)).all())
    assert bool((found.upper >= found.found * math.exp(0.02) * (1 + gamma(2 * (6 + 40) + 24))).all())


def check_norms(m: Any) -> None:
    off = rows_of(m, numbers(1.0, 0.0).reshape(1, 2), 0.1)
    factor = Factor(3.0 * torch.eye(2, dtype=torch.float64).unsqueeze(0))
    size = numbers(3.0)
    (plain,), (through,) = m.norms_of_grams([m.gram_of(off)]), m.norms_of_grams([m.gram_through(off, factor, size)])
    assert plain.upper >= 1.1
    assert through.upper >= 3.3
    assert m.through_lengths(off, factor, size).upper >= 3.3
    rows = draw(50, 2)
    exact = rows_of(m, rows)
    total = rows.double().square().sum()
    assert m.gram_of(exact).off >= gamma(52) * total
    assert m.gram_through(exact, factor, size).off >= gamma(52) * total * 9
    gram = m.Gram(torch.eye(2).unsqueeze(0), numbers(0.21), numbers(0.0))
    assert m.norms_of_grams([gram])[0].upper >= 1.1
    width = 4096
    long = torch.full((1, width), HALF).index_fill_(1, torch.tensor([0]), 1.0)
    column = types.SimpleNamespace(
        narrow=long.double().mT.unsqueeze(0),
        scale=torch.ones(1, 1, 1, dtype=torch.float64),
        size=long.double().norm(),
        matrix=torch.zeros(1, 2, 2),
    )
    image = m.through_lengths(rows_of(m, long), column, numbers(1.0))
    assert image.upper >= long.double().square().sum()
    assert image.upper >= image.found * (1 + gamma(width + 4))


def check_centred(m: Any) -> None:
    # (1.3, -1, 0) for (1, -1, 0) moves its first centred row by two thirds of the error, the others by one.
    found = m.centred(rows_of(m, numbers(1.0, -1.0, 0.0).reshape(3, 1), 0.3, 0.0, 0.0))
    assert bool((found.error[0] >= numbers(0.2, 0.1, 0.1)).all())
    rows = 1000 + draw(2000, 3)
    found = m.centred(rows_of(m, rows))
    exact = rows.double() - rows.double().mean(0)
    assert bool(((found.rows[0].double() - exact).norm(dim=-1) <= found.error[0]).all())
    length = rows.double().norm(dim=-1)
    assert bool((found.error[0] >= gamma(2004) * length.square().mean().sqrt() + UNIT * length).all())
    unbiased = m.unbiased(rows_of(m, rows, *(0.1,) * 2000), torch.full((1, 3), 0.1))
    exact = rows.double() - torch.full((1, 3), 0.1).double()
    assert bool((unbiased.error[0] >= 0.1 + (unbiased.rows[0].double() - exact).norm(dim=-1)).all())


def maps_for(m: Any, count: int, keys: int, error: float) -> Any:
    weights = draw(1, count, keys).exp()
    place = weights.argmax(-1, keepdim=True)
    weights = (weights / weights.amax(-1, keepdim=True)).scatter(-1, place, 0.0)
    tail, second = weights.sum(-1), weights.amax(-1)
    errors = torch.full((1, count), error, dtype=torch.float64)
    return m.SingleMaps(weights.scatter(-1, place, 1.0), 1 + tail, tail, second, errors)


def check_variance(m: Any) -> None:
    for keys, dim in ((30, 60), (60, 30)):
        maps, tokens = maps_for(m, 5, keys, 0.01), 100 + draw(keys, dim, seed=3)
        p = maps.weights.double() / maps.weights.double().sum(-1, keepdim=True)
        x = tokens.double() - tokens.double().mean(-2)
        squares = p @ x.square().sum(-1)
        truth = squares - (p @ x).square().sum(-1)
        found = m.row_variance(maps, tokens)
        assert bool((found.upper >= truth * math.exp(0.04)).all())
        least = (found.found + 4 * gamma(keys + dim) * squares * (1 - 1e-3)) * math.exp(0.04)
        assert bool((found.upper >= least * (1 + 2 * gamma(keys + 4))).all())
        rows = m.Rounded(torch.ones(1, 5, dtype=torch.float64), torch.full((1, 5), 2.0, dtype=torch.float64))
        columns = m.column_norm(maps, rows)
        top = p.sum(-2).amax(-1)
        assert bool((columns.upper.square() >= 2 * top * math.exp(0.02) * (1 + gamma(5 + keys))).all())
        assert bool((columns.found.square() <= top * (1 + 1e-5)).all())


def check_softmax(m: Any) -> None:
    maps = maps_for(m, 6, 40, 0.01)
    p = maps.weights.double() / maps.weights.double().sum(-1, keepdim=True)
    exact = torch.linalg.eigvalsh(torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))[..., -1]
    assert bool((m.largest_softmax_norm(maps).upper >= exact.amax(-1) * math.exp(0.04)).all())
    assert bool((m.largest_softmax_norm(maps).upper <= exact.amax(-1) * 1.05).all())
    peaked = m.SingleMaps(
        torch.tensor([[[1.0] + [0.01] * 20]]),
        torch.tensor([[1.2]]),
        torch.tensor([[0.2]]),
        torch.tensor([[0.01]]),
        numbers(0.01).reshape(1, 1),
    )
    theta = m.theta_of_long_rows(peaked)
    assert theta.upper >= 4 * 0.2 / 1.2**2 * math.exp(0.04) * (1 + 3 * gamma(21))
    assert bool((m.theta_of_long_rows(maps_for(m, 6, 40, 0.0)).upper == 1).all())


def check_ball(m: Any) -> None:
    """The interval of logits that move by r, at its ends; lengths beside those of the rows as computed."""
    block = one_head(draw(1, 4), draw(4, 4, seed=1), draw(4, seed=2), scale=1.0)
    norms = block.double.weight_norms
    parts = m.SingleParts(block)
    reach = m._logit_radius(block, parts.queries, parts.keys, 0.1)
    q, k = block.double.queries[0, 0], block.double.keys[0, 0]
    w_q, w_k = block.double.w_q[0], block.double.w_k[0]
    own = (w_q @ k + w_k @ q).norm() * 0.1 + norms.logits * 0.01
    assert reach >= own
    assert reach <= own * 1.001
    far = m.SingleRows(parts.keys.rows, parts.keys.length, torch.full_like(parts.keys.error, 0.1))
    moved = m._own_length(block, parts.queries, far, torch.zeros(1, 1, 1).double(), torch.zeros(1, 1, 1).double())
    inner = (q @ (w_k.mT @ w_q) @ k).double()
    size = w_q.norm() * w_k.norm() * q.norm()
    assert moved.square() >= 2 * (inner + 0.1 * size) * (1 - 1e-5)
    maps, reach = maps_for(single_precision, 5, 40, 0.0), torch.full((1, 5, 40), 0.2)
    ends: list[Tensor] = []
    right = m.g_of_ends
    m.g_of_ends = lambda *given: (ends.extend(given), right(*given))[1]
    m._over_interval(one_head(draw(5, 2), torch.eye(2)), maps.weights, maps.sums, reach)
    weights = maps.weights.double()
    others = weights.sum(-1, keepdim=True) - weights
    high = weights / (weights + others * math.exp(-0.4))
    low = weights / (weights + others * math.exp(0.4))
    assert bool((ends[0] >= high.amax(-1) * (1 + gamma(3 * 40))).all())
    assert bool((ends[1] >= high.sort(-1).values[..., -2] * (1 + gamma(3 * 40))).all())
    assert bool((ends[2] <= low.amax(-1) * (1 - gamma(3 * 40))).all())
    assert bool((ends[3] >= (1 - low.amax(-1)) * (1 + gamma(3 * 40))).all())
    assert bool((ends[0] <= high.amax(-1) * 1.001).all())


Check = tuple[Callable[..., None], tuple[str, ...]]
CHECKS: dict[str, Check] = {
    "rows": (check_rows, (SINGLE, WEIGHTS)),
    "logits": (check_logits, (SINGLE,)),
    "g_1": (check_g_1, (SINGLE,)),
    "map norm": (check_map_norm, (SINGLE,)),
    "norms": (check_norms, (NORMS,)),
    "centred": (check_centred, (NORMS,)),
    "variance": (check_variance, (VARIANCE,)),
    "softmax": (check_softmax, (SOFTMAX,)),
    "ball": (check_ball, (BALL,)),
}
# What is wrong: the check that sees it, the module, and what its text has in place of the right one.
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "rows: chunks are one rounding": (
        "rows",
        SINGLE,
        "min(CHUNK, dim) + math.ceil(dim / CHUNK) + 2",
        "math.ceil(dim / CHUNK) + 2",
    ),
    "rows: sums of chunks are free": (
        "rows",
        SINGLE,
        "min(CHUNK, dim) + math.ceil(dim / CHUNK) + 2",
        "min(CHUNK, dim) + 2",
    ),
    "rows: the bias is no term": ("rows", SINGLE, "+ math.ceil(dim / CHUNK) + 2", "+ math.ceil(dim / CHUNK)"),
    "rows: no 1 beside the tokens": ("rows", SINGLE, "length = (length.square() + 1).sqrt() * (1 + 1e-15)", "pass"),
    "rows: no bias beside the weights": ("rows", WEIGHTS, "squares = squares + bias.square().sum(-1)", "pass"),
    "logits: no error of the queries": ("logits", SINGLE, "queries.error * (longest + key_off) + ", ""),
    "logits: no error of the keys": ("logits", SINGLE, "queries.length * key_off + ", ""),
    "logits: errors do not meet": ("logits", SINGLE, "queries.error * (longest + key_off)", "queries.error * longest"),
    "logits: no rounding of products": ("logits", SINGLE, " + gamma_single(width + 4) * reach", ""),
    "logits: products of one term": ("logits", SINGLE, "gamma_single(width + 4) * reach", "gamma_single(4) * reach"),
    "logits: without the scale": (
        "logits",
        SINGLE,
        "error = scale * error + (width",
        "error = 0.5 * scale * error + (width",
    ),
    "logits: no rounding by the mask": (
        "logits",
        SINGLE,
        "error = error + 2 * UNIT_SINGLE * (scale * reach + visible)",
        "pass",
    ),
    "logits: differences are exact": ("logits", SINGLE, "(OUT_OF_RANGE + 8) * UNIT_SINGLE", "8 * UNIT_SINGLE"),
    "g_1: factors once": (
        "g_1",
        SINGLE,
        "slack = (1 + 8 * gamma_single(keys + 8)) * (4 * self.error)",
        "slack = (1 + 8 * gamma_single(keys + 8)) * (2 * self.error)",
    ),
    "g_1: sums of one term": ("g_1", SINGLE, "8 * gamma_single(keys + 8)", "8 * gamma_single(8)"),
    "g_1: nothing is lost": ("g_1", SINGLE, "found + 4 * (keys + 2) * SMALLEST_SINGLE", "found"),
    "map norm: exact logits": ("map norm", SINGLE, " * (2 * error.amax(-1)).exp()", ""),
    "map norm: sums are free": ("map norm", SINGLE, "2 * gamma_single(2 * (rows + cols) + 24)", "2 * gamma_single(24)"),
    "norms: rows are exact": (
        "norms",
        NORMS,
        "return Gram(matrix, off, values.error.norm(dim=-1))",
        "return Gram(matrix, off, 0 * off)",
    ),
    "norms: rows are exact before the weights": ("norms", NORMS, "rows.error.norm(dim=-1) * norm + turned", "turned"),
    "norms: their error is not multiplied": (
        "norms",
        NORMS,
        "rows.error.norm(dim=-1) * norm",
        "rows.error.norm(dim=-1)",
    ),
    "norms: Gram matrices are exact": ("norms", NORMS, "gamma_single(count + 2) * total", "0 * total"),
    "norms: sums of one term": ("norms", NORMS, "gamma_single(count + 2) * total", "gamma_single(2) * total"),
    "norms: their error stays before the weights": ("norms", NORMS, "off * norm.square()", "off"),
    "norms: eigenvalues are of exact matrices": ("norms", NORMS, "(upper + gram.off).sqrt()", "upper.sqrt()"),
    "lengths: rows are exact": ("norms", NORMS, " + rows.error * size.unsqueeze(-1)", ""),
    "lengths: sums are free": ("norms", NORMS, " + gamma_single(low.shape[-2] + 4)", ""),
    "centred: no error of the mean": ("centred", NORMS, "values.error + error + off", "values.error + off"),
    "centred: no error of the row": ("centred", NORMS, "values.error + error + off", "error + off"),
    "centred: sums are free": ("centred", NORMS, "gamma_single(count + 4) * size", "gamma_single(4) * size"),
    "centred: the difference is exact": ("centred", NORMS, " + UNIT_SINGLE * values.length", ""),
    "unbiased: no error of the row": (
        "centred",
        NORMS,
        "(values.error + 2 * UNIT_SINGLE * size)",
        "(2 * UNIT_SINGLE * size)",
    ),
    "variance: exact logits": ("variance", VARIANCE, " * (4 * maps.error).exp()", ""),
    "variance: sums are free": (
        "variance",
        VARIANCE,
        "gamma_single(keys + dim + 8) * squares",
        "gamma_single(8) * squares",
    ),
    "variance: rows sum to one": ("variance", VARIANCE, "(1 + 4 * gamma_single(keys + 8))", "1"),
    "columns: exact logits": ("variance", VARIANCE, " * (2 * maps.error).exp()", ""),
    "columns: sums are free": ("variance", VARIANCE, "2 * gamma_single(count + keys + 8)", "2 * gamma_single(2)"),
    "softmax: exact logits": ("softmax", SOFTMAX, "((found + lost) * (4 * maps.error).exp())", "(found + lost)"),
    "softmax: the wrong rows are left": ("softmax", SOFTMAX, ">= least * ROUNDED", "<= least * ROUNDED"),
    "theta: sums are free": ("softmax", SOFTMAX, "(1 + 8 * gamma_single(keys + 8)) * (4", "(4"),
    "theta: always of the largest": ("softmax", SOFTMAX, "torch.where(maps.sums <= 2, peaked, 1.0)", "peaked"),
    "ball: no error of the keys": ("ball", BALL, "keys.error * near + ", ""),
    "ball: own key as the others": ("ball", BALL, "rest + largest - entries", "rest + largest + 0 * entries"),
    "ball: sums are free": ("ball", BALL, "up = 1 + 3 * gamma_single(cols + 8) + 32", "up = 1 + 32"),
    "ball: the lower end is exact": ("ball", BALL, ".mul_(2 - up)", ""),
    "ball: radii are not rounded up": ("ball", BALL, ".add_(16 * UNIT_SINGLE).exp_()", ".sub_(1e-3).exp_()"),
    "ball: logits curve nowhere": ("ball", BALL, " + curved[..., 0]", ""),
}


def text_of(name: str) -> str:
    file = importlib.import_module(name).__file__
    assert file is not None
    return Path(file).read_text()


def with_text(name: str, text: str) -> types.ModuleType:
    """The module that this text is, under the name of the right one."""
    module = types.ModuleType(name)
    exec(compile(text, name, "exec"), vars(module))
    return module


def run(check: str, wrong: dict[str, types.ModuleType]) -> None:
    function, names = CHECKS[check]
    function(*(wrong.get(name) or with_text(name, text_of(name)) for name in names))


@pytest.mark.parametrize("check", CHECKS)
def test_rounding_is_covered_near_its_worst(check: str) -> None:
    run(check, {})


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_seen(what: str) -> None:
    check, name, right, wrong = MISTAKES[what]
    text = text_of(name)
    assert text.count(right) == 1, "the module has changed: change the mistake with it"
    with pytest.raises(AssertionError):
        run(check, {name: with_text(name, text.replace(right, wrong))})
