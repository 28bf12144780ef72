"""The norm of a block's Jacobian, the norms of its two parts, the norms of its rows, and the bounds on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.attention.correlation import spearman_within
from bench.engine.evaluate import question
from bench.engine.records import Question, Record
from bench.engine.reference import LARGEST_RESIDUAL, LOWER, SMALL, STEPS, TASK
from bench.engine.store_file import Entry
from bench.workloads.case import Case
from lipbounds import registry
from lipbounds.errors import Unsupported
from lipbounds.estimators.exact import jacobian
from lipbounds.ops.softmax import g_upper_from_logits
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention


TOO_COSTLY = ("sharp",)  # seconds a block
TOLERANCE = 1e-7  # relative, of the norms of the parts


def methods(target: type[Attention]) -> list[BoundSpec]:
    """The proved l2 bounds at a point that are cheap.

    Args:
        target: the class of the blocks.
    """
    return [
        spec
        for spec in registry.select()
        if (spec.role, spec.claim.kind, spec.claim.scope, spec.claim.norm) == ("bound", "proved", "point", "l2")
        and issubclass(target, spec.target)
        and spec.name not in TOO_COSTLY
    ]


def true_constant(case: Case, known: Mapping[str, Entry], device: torch.device) -> tuple[float, str]:
    """The norm of the Jacobian, and where it is from: exact in the records, or Lanczos, converged as there.

    Lanczos is from below, and its residual is at most 1e-6 of the value unless all steps are spent.

    Args:
        case: the block.
        known: entries of the task `tightness` by key.
        device: where what is not there is computed.
    """
    exact = _known(known, question(TASK, case, registry.get("exact")))
    if exact is not None and exact.value is not None:
        return exact.value, "exact, recorded"
    lanczos = registry.get(LOWER)
    value, source = float("nan"), ""
    for steps in STEPS:
        record = _known(known, question(TASK, case, lanczos, {"steps": steps}))
        if record is not None and record.value is not None:
            value, residual, source = record.value, record.details.get("residual", 0.0), "Lanczos, recorded"
        else:
            result = lanczos(case.block.to(device), steps=steps)
            value, source = result.value.item(), "Lanczos, measured"
            residual = float(result.details["residual"]) if "residual" in result.details else 0.0
        if residual <= LARGEST_RESIDUAL:
            break
    return value, source


def bounds(case: Case, known: Mapping[str, Entry], device: torch.device) -> dict[str, float]:
    """The value of each bound that supports the block, from the records where they have it.

    Args:
        case: the block.
        known: entries of the task `tightness` by key.
        device: where what is not there is computed.
    """
    found = {}
    for spec in methods(type(case.block)):
        record = _known(known, question(TASK, case, spec))
        if record is not None and record.value is not None:
            found[spec.name] = record.value
            continue
        try:
            found[spec.name] = spec(case.block.to(device)).value.item()
        except Unsupported:
            continue
    return found


def _known(known: Mapping[str, Entry], asked: Question) -> Record | None:
    entry = known.get(asked.key)
    return None if entry is None else entry.record


def mixing_block(block: Attention) -> Attention:
    """A block with the same attention map that does not depend on the input: its Jacobian is the mixing part.

    Args:
        block: the block.
    """
    still = {"w_q": torch.zeros_like(block.w_q), "b_q": None, "causal": False}
    return block.replace(**still, logit_bias=block.logits)


def part_norms(block: Attention) -> tuple[float, float]:
    """Norms of the mixing part and of the softmax part, whose sum is the Jacobian; by ARPACK, to 1e-7.

    Args:
        block: without batch dimensions, in float64.
    """
    mixing = mixing_block(block)
    shape = (block.tokens, block.w_o.shape[-1]), tuple(block.moving_input.shape)
    products = {
        "mixing": (mixing.jvp, mixing.vjp),
        "softmax": (lambda v: block.jvp(v) - mixing.jvp(v), lambda v: block.vjp(v) - mixing.vjp(v)),
    }
    found = {name: _norm(forward, backward, *shape, block.device) for name, (forward, backward) in products.items()}
    return found["mixing"], found["softmax"]


def row_correlations(block: Attention) -> dict[str, float | None] | None:
    """Over the rows of a small block: Spearman's correlation of g_1, mean over heads, with norms of rows of Jacobians.

    Row i of a Jacobian is that of the output token i by all of the input.

    Args:
        block: without batch dimensions, in float64; None is returned if it is not small.
    """
    if max(block.moving_input.numel(), block.tokens * block.w_o.shape[-1]) > SMALL:
        return None
    g_1 = g_upper_from_logits(block.logits).mean(-2).cpu().numpy()
    whole, mixing = jacobian(block), jacobian(mixing_block(block))
    parts = {"constant": whole, "mixing": mixing, "softmax": whole - mixing}
    found: dict[str, float | None] = {}
    for name, part in parts.items():
        norms = _row_norms(part, block.tokens)
        value = float(spearman_within(g_1[None], norms[None], np.arange(block.tokens)[None])[0])
        found[name] = value if np.isfinite(value) else None
    return found


def _row_norms(dense: Tensor, tokens: int) -> np.ndarray:
    rows = dense.unflatten(0, (tokens, -1))
    return torch.linalg.eigvalsh(rows @ rows.mT)[..., -1].clamp(min=0).sqrt().cpu().numpy()


def _norm(
    forward: Any, backward: Any, out_shape: tuple[int, ...], in_shape: tuple[int, ...], device: torch.device
) -> float:
    from scipy.sparse.linalg import LinearOperator, svds  # half a second of imports

    size = int(np.prod(out_shape)), int(np.prod(in_shape))

    def product(function: Any, shape: tuple[int, ...]) -> Any:
        def apply(vector: np.ndarray) -> np.ndarray:
            moved = torch.from_numpy(np.asarray(vector).reshape(shape).copy()).to(device)
            return function(moved).cpu().numpy().ravel()

        return apply

    make: Any = LinearOperator  # the stubs of scipy know one of its two forms
    operator = make(size, matvec=product(forward, in_shape), rmatvec=product(backward, out_shape), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(size))
    options: dict[str, Any] = {"k": 1, "tol": TOLERANCE, "v0": start, "return_singular_vectors": False}
    values: Any = svds(operator, **options)
    return float(values[0])
