"""||T3_i T3_i^T||_F^(1/2) of every row i of the key part, all heads together, for the factors as computed, rounded up.

Equation (6) of docs/bounds/sharp.md: with C_i the array of blocks sum_j <u_hij, u_gij> x_hij^T x_gij and S that of
W_O^h W_O^gT, the square of the square is tr(S C_i S C_i). Rounding: docs/derivatives.md, section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.pulled_queries import PulledQueries
from lipbounds.ops.spectral import power_of_two, root, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


CHUNK_ENTRIES = 2**22  # of the kernels of the rows that are made at a time


def joint_rows(
    block: Attention,
    values: Float[Tensor, "*batch heads m value_dim"],
    w_o: Float[Tensor, "*weights heads value_dim out_dim"],
    logit_gradient: Float[Tensor, "*batch heads n dim"],
) -> Float[Tensor, "*out n"]:
    """The rows where the gradient of the logits is the same for all keys.

    Args:
        block: in float64.
        values: centred.
        w_o: output weights.
        logit_gradient: u_hi.
    """
    outputs = w_o.flatten(-3, -2) @ w_o.flatten(-3, -2).mT
    of_row = power_of_two(logit_gradient.detach().movedim(-3, -2))  # [*, n, 1, 1]
    turned = logit_gradient.movedim(-3, -2) / of_row  # [*, n, h, D]
    maps = block.probabilities.movedim(-3, -2)  # [*, n, h, j]
    rows = values.movedim(-3, -2)  # [*, j, h, v]
    operations = rows.shape[-3] + outputs.shape[-1] + w_o.shape[-1] + logit_gradient.shape[-1] + 16
    chunk = max(1, CHUNK_ENTRIES // (outputs.shape[-1] * max(outputs.shape[-1], rows.shape[-3])))
    squares = [
        _row_norms(maps[..., start : start + chunk, :, :], rows, turned[..., start : start + chunk, :, :], outputs, w_o,
                   operations)
        for start in range(0, block.tokens, chunk)
    ]  # fmt: skip
    return inflate(root(torch.cat(squares, -1)), 8) * of_row[..., 0, 0]


def pulled_joint_rows(
    block: Attention,
    values: Float[Tensor, "*batch heads m value_dim"],
    w_o: Float[Tensor, "*weights heads value_dim out_dim"],
) -> tuple[Float[Tensor, "*out n"], Float[Tensor, "*gradients heads n m"], Float[Tensor, "*gradients heads n"]]:
    """The rows where each key has a gradient of its own, the lengths |u_hij|, rounded up, and errors of the u_hij.

    Args:
        block: in float64, with rotary positions or QK-norm.
        values: centred.
        w_o: output weights.
    """
    queries = PulledQueries(block)
    outputs = w_o.flatten(-3, -2) @ w_o.flatten(-3, -2).mT
    heads, keys, dim = block.heads, block.logits.shape[-1], queries.weights.shape[-2]
    operations = keys + outputs.shape[-1] + w_o.shape[-1] + dim + 16
    entries = heads * max(keys * dim, keys * outputs.shape[-1], heads * w_o.shape[-2] ** 2)
    chunk = max(1, CHUNK_ENTRIES // entries)
    found = []
    for start in range(0, block.tokens, chunk):
        which = slice(start, min(start + chunk, block.tokens))
        pulled = queries(which)
        gradients = pulled @ queries.weights.mT.unsqueeze(-3)  # u_hij, [*, h, c, j, D]
        with torch.no_grad():
            own = 2 * gamma(pulled.shape[-1] + 8) * pulled.norm(dim=-1).amax(-1)
            error = inflate((queries.error[..., which] + own) * queries.weights_size.unsqueeze(-1), dim)
        maps = block.probabilities[..., which, :]
        deviations = maps.unsqueeze(-1) * (values.unsqueeze(-3) - (maps @ values).unsqueeze(-2))
        rows = _pulled_row_norms(deviations.movedim(-4, -3), gradients.movedim(-4, -3), outputs, w_o, operations)
        lengths = inflate(vector_norm(gradients) + error.unsqueeze(-1), dim)
        found.append((rows, lengths, error))
    rows, lengths, errors = zip(*found, strict=True)
    return torch.cat(rows, -1), torch.cat(lengths, -2), torch.cat(errors, -1)


def _row_norms(
    maps: Tensor, rows: Tensor, turned: Tensor, outputs: Tensor, w_o: Tensor, operations: int
) -> Float[Tensor, "*batch count"]:
    """||T3_i T3_i^T||_F for some rows i.

    Args:
        maps: [*, count, h, j].
        rows: the centred values, [*, j, h, v].
        turned: u_hi, [*, count, h, D].
        outputs: S, all heads in one.
        w_o: for the size of the slack.
        operations: roundings in an entry of S C.
    """
    means = torch.einsum("...chj,...jhv->...chv", maps, rows)
    deviations = maps.mT.unsqueeze(-1) * (rows.unsqueeze(-4) - means.unsqueeze(-3))  # [*, count, j, h, v]
    width = rows.shape[-1]
    alike = (turned @ turned.mT).repeat_interleave(width, -1).repeat_interleave(width, -2)
    flat = deviations.flatten(-2)
    core = alike * (flat.mT @ flat)
    with torch.no_grad():
        length = (deviations.norm(dim=(-3, -1)) * turned.norm(dim=-1)).square().sum(-1)
    return _traced(outputs, core, length, w_o, operations)


def _pulled_row_norms(
    deviations: Tensor, gradients: Tensor, outputs: Tensor, w_o: Tensor, operations: int
) -> Float[Tensor, "*batch count"]:
    """Their roots, with gradients u_hij.

    Args:
        deviations: x_hij, [*, count, h, j, v].
        gradients: u_hij, [*, count, h, j, D].
        outputs: as above.
        w_o: as above.
        operations: as above.
    """
    unit = power_of_two(gradients.detach().flatten(-3, -2))
    gradients = gradients / unit.unsqueeze(-1)
    alike = torch.einsum("...hja,...gja->...hgj", gradients, gradients)
    core = deviations.unsqueeze(-3).mT @ (alike.unsqueeze(-1) * deviations.unsqueeze(-4))
    with torch.no_grad():
        length = (deviations.norm(dim=-1) * gradients.norm(dim=-1)).square().sum((-2, -1))
    core = core.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return inflate(root(_traced(outputs, core, length, w_o, operations)), 8) * unit[..., 0, 0]


def _traced(
    outputs: Tensor, core: Tensor, length: Tensor, w_o: Tensor, operations: int
) -> Float[Tensor, "*batch count"]:
    """tr (S C S C)^(1/2), with what rounding can have taken off it; `length` is at least the size of C."""
    product = outputs.unsqueeze(-3) @ core
    squared = (product * product.mT).sum((-2, -1))
    with torch.no_grad():
        error = 2 * gamma(operations) * length * w_o.square().sum((-3, -2, -1)).unsqueeze(-1)
        size = product.flatten(-2).norm(dim=-1)
        slack = 2 * gamma(product.shape[-1] ** 2 + 8) * size.square() + 2 * error * size + error.square()
    return root(squared.clamp(min=0) + slack)
