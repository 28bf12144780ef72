"""The local Lipschitz constant of a whole model with few outputs: the rows of its Jacobian, and the norm of these.

A model has as many rows as outputs (10 logits, the features of one token), and each is one product with the transposed
Jacobian, however many inputs there are. The rows are made in blocks of bounded memory, and what is kept is their Gram
matrix, J J^T; where there are more blocks than one, rows are made again for every pair of blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipbounds.claims import BoundResult, Claim
from lipbounds.errors import InvalidInput
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators.whole_model import first_use, same_in_its_own_dtype
from lipbounds.ops.eigen import eigen
from lipbounds.ops.verified_norm import norm_of_gram
from lipbounds.rounding import inflate
from lipbounds.targets.given import given_tensor
from lipbounds.targets.module_copy import module_copy
from lipbounds.targets.network import Network


BLOCK_ENTRIES = 2**27  # of the rows kept at a time, of all batch items together: 1 GiB
LARGEST_SIDE = 2**13  # of the Gram matrix, whose eigenvalues take minutes beyond


def formed_constant(
    function: nn.Module | Callable[[Tensor], Tensor], x: Float[Tensor, "..."] | Any, *, batch_dims: int = 1
) -> BoundResult:
    """Norm of the Jacobian of a whole model at `x`, from its rows: an upper bound, above it by about 1e-9.

    Promise: proved, at the point, in the l2 norm, of the Jacobian whose rows float64 computes: the arithmetic of the
    model and of its derivatives counts as exact, while the norm of these floats is verified with all rounding (Rump
    2006). `lipbounds.compose.constant` covers the rounding of the model, too, for small networks made of layers. Says
    nothing about neighbours of `x`. The Jacobian is compared with difference quotients as in `whole_model_constant`.

    Args:
        function: a module, which is copied to float64 and evaluation mode, or any callable that takes float64.
        x: the input, a tensor, a NumPy array, or a list; evaluated in float64.
        batch_dims: number of its leading dimensions that are batch; each output item must depend on its own item alone.

    Raises:
        InvalidInput: inputs and outputs of an item are both more than 8192; see `Network` for the function.
        Unsupported: as `whole_model_constant`.
    """
    x = given_tensor("x", x)
    wide = module_copy(function, torch.float64) if isinstance(function, nn.Module) else function
    network = Network(wide, x.detach().double(), batch_dims=batch_dims)
    checked = first_use(network)
    with torch.no_grad():
        operator = JacobianOperator(network)
        if operator.size > LARGEST_SIDE:
            raise InvalidInput(
                f"an item must have at most {LARGEST_SIDE} outputs or inputs, got {operator.out_size} and "
                f"{operator.in_size}; use whole_model_constant, or a model that reads one token."
            )
        gram = _gram(operator)
        norm = norm_of_gram(gram, max(operator.in_size, operator.out_size)) * operator.scale
        if isinstance(function, nn.Module):
            top = eigen(gram)[1][..., -1]
            stretched = top if operator.size == operator.in_size else operator.vjp(top)
            checked = checked & same_in_its_own_dtype(function, network, x, stretched.reshape(x.shape))
    return BoundResult(
        name="formed_constant",
        value=inflate(norm, 2),
        claim=Claim(kind="proved", scope="point"),
        details={"derivative_checked": checked},
    )


def _gram(operator: JacobianOperator) -> Float[Tensor, "*batch size size"]:
    """The Gram matrix of J / scale on its smaller side, as computed."""
    size, batch = operator.size, operator.batch_shape
    length = batch.numel() * max(operator.in_size, operator.out_size)
    edges = [*range(0, size, max(1, min(size, BLOCK_ENTRIES // length))), size]
    blocks = [*itertools.pairwise(edges)]
    gram = operator.scale.new_zeros(*batch, size, size)
    for index, (start, stop) in enumerate(blocks):
        rows = _rows(operator, start, stop)
        gram[..., start:stop, start:stop] = rows @ rows.mT
        for first, last in blocks[:index]:
            part = rows @ _rows(operator, first, last).mT
            gram[..., start:stop, first:last], gram[..., first:last, start:stop] = part, part.mT
    if not bool(gram.isfinite().all()):
        raise InvalidInput("the Jacobian must be finite, got entries that are not; rescale the weights or the input.")
    return gram


def _rows(operator: JacobianOperator, start: int, stop: int) -> Float[Tensor, "*batch rows length"]:
    """Some rows of J / scale, or columns where there are fewer of these."""
    length = max(operator.in_size, operator.out_size)
    rows = operator.scale.new_empty(*operator.batch_shape, stop - start, length)
    for row in range(start, stop):
        unit = operator.scale.new_zeros(*operator.batch_shape, operator.size)
        unit[..., row] = 1.0
        rows[..., row - start, :] = operator.stretch(unit)
    return rows
