"""Outward rounding: how a float64 computation becomes a number that is still a bound.

Every bound is evaluated in float64, whatever dtype came in: floats of up to 64 bits are exact there. What rounding the
evaluation itself commits is covered by explicit slack, and the one cast back to the caller's dtype goes upwards.

The standard model: `fl(a op b) = (a op b)(1 + e)`, `|e| <= u = 2**-53`. A sum of n non-negative terms, in any order,
and a product of n factors each carry a relative error of at most `gamma(n) = n u / (1 - n u)` (Higham 2002, Lemma 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipbounds.devices import is_transformed


UNIT_ROUNDOFF = 2.0**-53  # of float64
SMALLEST_NORMAL = 2.0**-1022  # of float64
# torch.exp in float64 is within 1 ulp (SLEEF, CUDA libdevice); 4 leaves room for other back ends.
EXP_ULPS = 4


def gamma(operations: int) -> float:
    """Relative error bound of `operations` float64 roundings in a row (Higham 2002, Lemma 3.1)."""
    return operations * UNIT_ROUNDOFF / (1 - operations * UNIT_ROUNDOFF)


def inflate(value: Tensor, operations: int) -> Tensor:
    """Multiply a non-negative float64 result so that it is >= the exact one, given its number of roundings.

    The factor is `1 + 2 gamma(operations + 2)`: `1/(1 - gamma)` is below it, and the two spare roundings pay for the
    multiplication itself.
    """
    return value * (1 + 2 * gamma(operations + 2))


def product(first: Tensor, *others: Tensor | float) -> Tensor:
    """Product of non-negative float64 numbers of any sizes, from left to right; no part of it leaves float64.

    The factors are scaled by powers of two, which rounds nothing, and the scales are put back at the end: so a tiny
    factor may come before a huge one. What is positive and below the smallest normal number is rounded up to it. 0
    times infinity is 0: infinity stands for a number beyond all floats.

    Args:
        first: not NaN.
        others: not NaN; all broadcast.
    """
    factors = [first, *(other if isinstance(other, Tensor) else first.new_full((), other) for other in others)]
    flat = torch.cat([factor.reshape(-1) for factor in factors])  # scaled all at once: most are a few numbers
    exponent = torch.frexp(torch.where(flat.isinf(), 1.0, flat).detach()).exponent.to(flat.dtype)
    zero = flat == 0
    # Ones for what is beside infinity or zero: the answer is known there, and their product would be NaN.
    scaled = torch.where(zero, 1.0, _divided(flat, exponent))
    sizes = [factor.numel() for factor in factors]
    parts = zip(*(table.split(sizes) for table in (scaled, exponent, zero)), strict=True)
    whole, exponents, empty = None, first.new_zeros(()), first.new_zeros((), dtype=torch.bool)
    for factor, part in zip(factors, parts, strict=True):
        own, power, none = (table.view(factor.shape) for table in part)
        whole = own if whole is None else torch.where(empty, 1.0, whole) * own
        exponents, empty = exponents + power, empty | none
    assert whole is not None
    half = (exponents / 2).floor()
    value = torch.where(empty, 0.0, whole) * half.exp2() * (exponents - half).exp2()
    return torch.where(~empty & (value < SMALLEST_NORMAL), SMALLEST_NORMAL, value)


def _divided(factor: Tensor, exponent: Tensor) -> Tensor:
    """factor / 2**exponent, in two steps: powers of two below the smallest normal number may be flushed to zero."""
    half = (exponent / 2).floor()
    return factor / half.exp2() / (exponent - half).exp2()


_SAME_SIZE_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _next_above(value: Tensor) -> Tensor:
    """The next float towards +infinity, through the bit pattern: torch.nextafter lacks float16 on CUDA."""
    bits = (value + 0.0).view(_SAME_SIZE_INTEGER[value.element_size()])  # + 0.0 turns -0.0 into 0.0
    return torch.where(value >= 0, bits + 1, bits - 1).view(value.dtype)


class _RoundUp(torch.autograd.Function):
    """Cast to a dtype towards +infinity; the gradient is that of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, dtype: torch.dtype) -> Tensor:
        cast = value.to(dtype)
        return torch.where(cast.to(value.dtype) < value, _next_above(cast), cast)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.input_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.to(ctx.input_dtype), None


def cast_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest float of `dtype` that is >= `value`; differentiable as the identity.

    Args:
        value: float64 tensor.
        dtype: the floating-point dtype to return.
    """
    if not value.requires_grad and not is_transformed(value):
        return _RoundUp.forward(value, dtype)  # a Function costs several times as much as what this one does
    return _RoundUp.apply(value, dtype)  # pyright: ignore[reportReturnType]


def cast_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest float of `dtype` that is <= `value`; differentiable as the identity.

    Args:
        value: float64 tensor.
        dtype: the floating-point dtype to return.
    """
    return -cast_up(-value, dtype)


def to_working(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float64, where every float of the supported dtypes is exact."""
    return tuple(tensor.to(torch.float64) for tensor in tensors)
