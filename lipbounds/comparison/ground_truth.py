"""The true constant at a point: the exact norm of the Jacobian, or a certificate where the block is large."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, Literal, get_args

from lipbounds.bound_spec import block_in
from lipbounds.claims import BoundResult
from lipbounds.derivatives.first.dense import jacobian_entries
from lipbounds.errors import InvalidInput
from lipbounds.estimators.exact import exact_work, product_operations
from lipbounds.registry import Captured, get
from lipbounds.targets.attention import Attention


Method = Literal["auto", "exact", "certificate"]
EXACT_ENTRIES = 1200**2  # of a Jacobian whose exact norm takes about a second
STEPS = 60


def truth(
    block: Attention | Captured, *, method: str = "auto", delta: float = 1e-9, steps: int = STEPS, seed: int = 0
) -> BoundResult:
    """The local Lipschitz constant of an attention block at its input, in l2: an upper bound, with a lower one.

    Small blocks get the norm of the dense Jacobian, which is proved and about 1e-9 above the exact number; large ones
    a certificate by Lanczos, which is probable and some per cent above it. `terms["lower"]` is a lower bound of the
    constant in both cases, and `note` names the method and what it costs; `lipbounds.comparison.cost` tells that
    beforehand.

    Args:
        block: the block, or what `lipbounds.capture` found.
        method: `exact`, `certificate`, or `auto`: exact up to a Jacobian of 1200 x 1200 entries.
        delta: probability of failure allowed to the certificate, for each batch item.
        steps: Lanczos steps.
        seed: of the random start.

    Returns:
        kind `proved` or `probable`, at a point, in l2, one number per batch item.

    Raises:
        InvalidInput: an unknown method; a Jacobian too large for `exact`; an option out of range.
    """
    block = _block(block, method)
    if chosen(block, method) == "exact":
        upper = get("exact")(block)
        lower = get("lanczos")(block, steps=max(steps, STEPS), seed=seed)
    else:
        upper = get("lanczos_certificate")(block, delta=delta, steps=steps, seed=seed)
        lower = get("lanczos")(block, steps=steps, seed=seed)
    terms = {**upper.terms, "lower": lower.value}
    return dc.replace(upper, name="truth", terms=terms, note=cost(block, method=method, steps=steps))


def cost(block: Attention | Captured, *, method: str = "auto", steps: int = STEPS) -> str:
    """What `truth` will do and what that takes, in words, without doing it: operations and memory by the shapes.

    One core made 1.4e10 to 2.4e10 of these operations a second where it was measured, and more cores make more.

    Args:
        block: the block, or what `lipbounds.capture` found.
        method: as in `truth`.
        steps: as in `truth`.

    Raises:
        InvalidInput: an unknown method.
    """
    block = _block(block, method)
    items = block.batch_shape.numel()
    each = "" if items == 1 else f" for each of {items} items"
    if chosen(block, method) == "exact":
        work = exact_work(block)
        size = f"a Jacobian of {work.rows} x {work.columns}"
        if work.is_refused:
            other = cost(block, method="certificate", steps=steps)
            return f"exact refuses {size}; method='certificate' is a {other}"
        return (
            f"norm of {size}, verified by a Cholesky factorisation: about {work.operations:.1e} operations{each}, "
            f"{work.bytes / 2**30:.1g} GiB"
        )
    products = 2 * steps
    operations = 2 * products * product_operations(block)
    return f"certificate by {products} products with J^T J{each}: about {operations:.1e} operations"


def chosen(block: Attention, method: str) -> str:
    """The method that `auto` stands for.

    Args:
        block: the block.
        method: as in `truth`.
    """
    if method != "auto":
        return method
    return "exact" if jacobian_entries(block) <= EXACT_ENTRIES else "certificate"


def _block(given: Any, method: str) -> Attention:
    if method not in get_args(Method):
        raise InvalidInput(f"method must be one of {get_args(Method)}, got method={method!r}.")
    block = block_in(given)
    if not isinstance(block, Attention):
        raise InvalidInput(f"truth needs an Attention or what capture found, got {type(block).__name__}.")
    return block
