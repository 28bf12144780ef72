"""The checks of bounds on attention types other than `Attention`: the same promises, judged by the dense Jacobian.

Their names are those of `contract.CHECKS`, and so is what they mean.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.registry import BoundSpec
from lipbounds.targets._tensor_target import TensorTarget
from lipbounds.testing import dense_jacobian
from lipbounds.testing.verdict import Refuted, evaluate


SCALES = (1e-2, 0.3, 3.0, 100.0)
SAME = (
    1e-9  # relative difference of two evaluations of a formula in norms, without cancellation, that rounding explains
)
STEP, KINK = 1e-6, 1e-4
NO_DIGITS = 16 * 2.0**-1022  # numbers of this size have lost theirs, and are nothing but the slack of a value of 0
# Tokens in any order; keys and values in one order.
ORDERS = {"x": 0, "queries": 1, "keys": 2, "values": 2}


def value(spec: BoundSpec, block: TensorTarget, radius: float | None = None, seed: int = 0) -> None:
    """An upper bound is not below the norm of the Jacobian, at the input or, where it is global, at others as well.

    `claimed + slack >= truth` with the slack of `dense_jacobian.truth_slack` and nothing else. A global bound is also
    compared at the input and at a random one, both scaled by factors from 1e-2 to 1e2.

    Raises:
        Refuted: the promise is broken.
        InvalidInput: the truth is not known for the kind, scope or norm of the bound.
    """
    if spec.claim.kind != "proved" or spec.claim.scope not in ("point", "global"):
        raise InvalidInput(
            f"bounds on {spec.target.__name__} can be checked where they are proved and at a point or global, "
            f"got {spec.name} with kind={spec.claim.kind!r}, scope={spec.claim.scope!r}."
        )
    claimed = evaluate("value", spec, block, radius, seed).detach()
    wide = block.double
    inputs = wide.moving_input.unsqueeze(0)
    if spec.claim.scope == "global":
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(wide.moving_input.shape, generator=generator, dtype=torch.float64).to(block.device)
        size = wide.moving_input.square().mean().sqrt()
        random = random * torch.where(size > 0, size, 1.0)
        inputs = torch.cat(
            [inputs, *(factor * start.unsqueeze(0) for start in (inputs[0], random) for factor in SCALES)]
        )
    _judge(spec, block, wide.at(inputs), claimed, radius, seed)


def returns(spec: BoundSpec, block: TensorTarget, radius: float | None = None, seed: int = 0) -> None:
    """Every supported block gets one number >= 0 per batch item, without an error and without NaN."""
    found = evaluate("returns", spec, block, radius, seed)
    if not bool((found >= 0).all()):
        _refute("returns", f"a norm must be >= 0, got {found.min().item()!r}", spec, block, radius, seed)


def finite(spec: BoundSpec, block: TensorTarget, radius: float | None = None, seed: int = 0) -> None:
    """At an ordinary block the number is finite: infinity is true of everything and says nothing."""
    if not bool(evaluate("finite", spec, block, radius, seed).isfinite().all()):
        _refute("finite", "an ordinary block must get a finite number, got inf", spec, block, radius, seed)


def permutation(spec: BoundSpec, block: TensorTarget, radius: float | None = None, seed: int = 0) -> None:
    """The order of tokens does not matter; keys and values are permuted together."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[tuple[int, int], Tensor] = {}
    changes: dict[str, Any] = {}
    for name in ORDERS.keys() & block.tensors.keys():
        rows = block.tensors[name].shape[-2]
        order = orders.setdefault((ORDERS[name], rows), torch.randperm(rows, generator=generator))
        changes[name] = block.tensors[name][..., order, :]
    expected = evaluate("permutation", spec, block, radius, seed).detach()
    found = evaluate("permutation", spec, block.replace(**changes), radius, seed).detach()
    _same("permutation", spec, block, radius, seed, found, expected, SAME, "with its tokens in another order")


def batch(spec: BoundSpec, block: TensorTarget, radius: float | None = None, seed: int = 0) -> None:
    """A batch of blocks gets the numbers its items get one by one."""
    together = evaluate("batch", spec, block, radius, seed).detach()
    for index in _indices(together):
        alone = evaluate("batch", spec, item(block, index), radius, seed).detach()
        _same("batch", spec, block, radius, seed, alone, together[index], SAME, "alone, as in its batch")


def dtype(spec: BoundSpec, block: TensorTarget, radius: float | None = None, seed: int = 0) -> None:
    """In a short dtype a block gets the number of the same floats in float64, up to the rounding of the short one."""
    finfo = torch.finfo(block.dtype)
    short = evaluate("dtype", spec, block, radius, seed).detach().clamp(max=finfo.max)
    long = evaluate("dtype", spec, block.double, radius, seed).detach().clamp(min=finfo.tiny, max=finfo.max)
    short = short.clamp(min=finfo.tiny)
    _same("dtype", spec, block, radius, seed, short, long, 64 * finfo.eps, f"in {block.dtype}, as in float64")


def gradient(spec: BoundSpec, block: TensorTarget, radius: float | None = None, seed: int = 0) -> None:
    """Where the value has a gradient for input and weights, it is that of finite differences; kinks are left out."""
    tracked = {name: tensor.detach().clone().requires_grad_() for name, tensor in block.tensors.items()}
    with torch.enable_grad():
        total = evaluate("gradient", spec, block.replace(**tracked), radius, seed).sum()
        if not total.requires_grad:
            return
        slopes = torch.autograd.grad(total, list(tracked.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    # Relative to the size of each tensor, so that all of them count.
    directions = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) * tensor.abs().amax()
        for name, tensor in block.tensors.items()
    }

    def at(step: float) -> float:
        moved = {name: tensor.detach() + step * directions[name] for name, tensor in block.tensors.items()}
        return float(evaluate("gradient", spec, block.replace(**moved), radius, seed).detach().sum())

    middle, ahead, behind = at(0.0), at(STEP), at(-STEP)
    right, left = (ahead - middle) / STEP, (middle - behind) / STEP
    natural = abs(middle) + abs(right)
    if abs(right - left) > KINK * natural:
        return
    got = sum(float((s * directions[n]).sum()) for n, s in zip(tracked, slopes, strict=True) if s is not None)
    if not abs((right + left) / 2 - got) <= 4 * KINK * natural + NO_DIGITS:
        reason = f"the gradient must be that of finite differences, got {got!r} and {(right + left) / 2!r}"
        _refute("gradient", reason + " along a random direction", spec, block, radius, seed)


def item(block: TensorTarget, index: tuple[int, ...]) -> TensorTarget:
    """One item of a batch of blocks, without batch dimensions.

    Args:
        block: its fields may have different batch dimensions that broadcast.
        index: position in `block.batch_shape`.
    """
    shape = block.batch_shape
    fields = {name: t.expand(*shape, *t.shape[t.dim() - block.trailing[name] :]) for name, t in block.tensors.items()}
    return block.replace(**{name: tensor[index] for name, tensor in fields.items()})


def _judge(
    spec: BoundSpec, block: TensorTarget, at: TensorTarget, claimed: Tensor, radius: float | None, seed: int
) -> None:
    """Compare the claims at `block` with the truth at `at`, the same blocks at several inputs, the first dimension."""
    matrix = dense_jacobian.jacobian(at)
    truth = dense_jacobian.dense_norm(matrix, spec.claim.norm)
    if bool((truth <= claimed).all()):
        return
    if not bool(truth.isfinite().all()):
        raise InvalidInput("the truth overflows in float64 at this block; make its tokens or weights smaller.")
    slack = dense_jacobian.truth_slack(at, spec.claim.norm, matrix).nan_to_num(torch.inf)
    excess = truth - claimed - slack
    if bool((excess <= 0).all()):
        return
    index = max(_indices(excess), key=lambda i: float(excess[i]))
    claim, reached = claimed[index[1:]].item(), truth[index].item()
    reason = f"the truth must be <= the bound, got the bound {claim!r} and the truth {reached!r}"
    single = item(at, index)
    if evaluate("value", spec, single, radius, seed).item() != claim:  # in a shorter dtype, or only in its batch
        single = block
    _refute("value", reason, spec, single, radius, seed, claim, reached)


def _indices(values: Float[Tensor, "*batch"]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, values.shape)))


def _same(
    check: str, spec: BoundSpec, block: TensorTarget, radius: float | None, seed: int, found: Tensor, expected: Tensor,
    room: float, law: str,
) -> None:  # fmt: skip
    if bool(((found == expected) | ((found - expected).abs() <= room * expected)).all()):
        return
    reason = f"the bound must be the same {law} (within {room:.2g}), got {found.tolist()!r} and {expected.tolist()!r}"
    _refute(check, reason, spec, block, radius, seed)


def _refute(
    check: str, reason: str, spec: BoundSpec, block: TensorTarget, radius: float | None, seed: int,
    claimed: float = float("nan"), reached: float = float("nan"),
) -> None:  # fmt: skip
    raise Refuted(
        reason, check=check, spec=spec, block=block, radius=radius, seed=seed, claimed=claimed, reached=reached
    )
