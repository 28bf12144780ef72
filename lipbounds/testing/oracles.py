r"""The truth a bound is judged by: the norm of the Jacobian of an attention block.

This code shares nothing with the library that it judges.

It reads the fields of an `Attention` and nothing else. Row i of head h is written relative to its most visible key
t(i):

    Y_i = sum_h [ V_t + sum_j P_ij (V_j - V_t) ] W_O,      P_ij ~ exp( s q_i . (K_j - K_t) + B_ij - B_it )

so one-hot rows and a large common mean of the tokens cancel nothing: the differences are taken of the tokens
themselves. Its Jacobian blocks are, with v_ij = (V_j - V_t) W_O, c_ij = v_ij - sum_l P_il v_il, k_ij = K_j - K_t,

    dY_i/dx_j (keys, values) = sum_h P_ij [ (W_V W_O)^T + s c_ij (W_K q_i)^T ]
    dY_i/dx_i (queries)      = sum_h s sum_j P_ij c_ij (k_ij - sum_l P_il k_il)^T W_Q^T.

Rotary positions put R_i q_i for q_i and R_j k_j for k_j in these formulas, W_Q R_i^T for W_Q, W_K R_j^T for W_K, and

    R_j K_j - R_t K_t = R_j (x_j - x_t) W_K + (R_j - R_t) (x_t W_K + b_K)

for K_j - K_t, with R as dense matrices: where two tokens have the same position nothing cancels, as before.

QK-norm puts N(k) = w r k for k before it is turned, r = (mean k^2 + eps)^(-1/2), and for W_Q the transposed derivative
of a normalised query by its token, r (W_Q - c u^T / D) w with u = r k and c = sum W_Q u over what is normalised
together. Its differences are formed from those of the tokens, too,

    N(k_j) - N(k_t) = w ( r_j (k_j - k_t) + (r_j - r_t) k_t ),   r_j - r_t = mean((k_t - k_j)(k_t + k_j)) r_j^2 r_t^2 /
                                                                            (r_j + r_t).

The unit tests compare them with torch.func.jacrev of `attention_output` and with arithmetic in 60 digits. Automatic
differentiation itself will not do as the truth: its softmax rule cancels at rows that are nearly one-hot.

How sure the float64 number is: `truth_slack` bounds its error, by the same formula on absolute values (Higham 2002,
section 3.1) and the error of the logits. Where a claim lies within it, lipbounds.testing.extended decides with 60
digits.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.targets.attention import Attention
from lipbounds.testing._fields import TRAILING, whole
from lipbounds.testing._fields import additive_mask as additive_mask
from lipbounds.testing._fields import batch_item as batch_item
from lipbounds.testing._fields import rotation_matrices as rotation_matrices
from lipbounds.testing._norms import magnified, moved_weights, normalise, normalised_differences, projected


UNIT = 2.0**-53
SMALLEST = torch.finfo(torch.float64).tiny


def attention_output(block: Attention, moving: Float[Tensor, "*batch moving dim"]) -> Float[Tensor, "*out n out_dim"]:
    """Output of `block` with its moving input replaced by `moving`, in float64, written out once more.

    Args:
        block: only its fields are read.
        moving: replaces `x`, or `memory` where that is what moves.
    """
    if block.queries_at is not None:
        return attention_output(whole(block), moving)[..., block.queries_at, :]
    f = _double(block)
    moving = moving.to(torch.float64)
    queries_from = f["x"] if block.moves == "memory" else moving
    memory = moving if block.moves != "query" else f["memory"]
    queries, keys, values = (
        _with_bias(torch.einsum("...nd,...hde->...hne", tokens, f[f"w_{name}"]), f[f"b_{name}"])
        for name, tokens in (("q", queries_from), ("k", memory), ("v", memory))
    )
    queries, keys = normalise(block, "query", queries), normalise(block, "key", keys)
    queries, keys = _turn(rotation_matrices(block, "query"), queries), _turn(rotation_matrices(block, "key"), keys)
    logits = float(block.scale or 0.0) * torch.einsum("...hne,...hme->...hnm", queries, keys)
    maps = (logits + additive_mask(block)).softmax(-1)
    output = torch.einsum("...hnm,...hme,...hef->...nf", maps, values, f["w_o"])
    return output if f["b_o"] is None else output + f["b_o"].unsqueeze(-2)


def jacobian(block: Attention) -> Float[Tensor, "*batch outputs inputs"]:
    """Dense Jacobian of the flattened output by the flattened moving input, in float64, by the formulas above."""
    if block.queries_at is not None:
        rows = jacobian(whole(block)).unflatten(-2, (block.x.shape[-2], -1))
        return rows[..., block.queries_at, :, :].flatten(-3, -2)
    return _assemble(_Parts.of(block), centre=-1.0)


def jacobian_norm(block: Attention) -> Float[Tensor, "*batch"]:
    """The local Lipschitz constant at the input: spectral norm of the dense Jacobian, in float64, rounded to nearest.

    Neither an upper nor a lower bound by itself: it is off by at most `truth_slack`.
    """
    dense = jacobian(block)
    size = dense.abs().amax((-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    dense = dense / size
    gram = dense @ dense.mT if dense.shape[-2] <= dense.shape[-1] else dense.mT @ dense
    # The largest eigenvalue of a Gram matrix is accurate to rounding; only the small ones are not.
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt() * size[..., 0, 0]


def truth_slack(block: Attention) -> Float[Tensor, "*batch"]:
    """How far `jacobian_norm` can be from the exact norm, in absolute terms.

    The rounding of each product and sum is at most gamma times the same formula on absolute values; an error of at
    most d in the logits of a row moves each of its probabilities by a factor within exp(2 d), and a term holds up to
    three of them; probabilities below the range of floats are lost. About 1e-13 of the norm on ordinary blocks.
    Where queries and keys are normalised, an error of k moves r by at most mean(|k| |error|) r^2 of itself, to first
    order; a term holds up to nine r, for which 16 times that is taken.
    """
    block = whole(block)  # whose Jacobian has those of a block with fewer queries among its rows
    parts = _Parts.of(block).absolute(block)
    turns = 1 if parts.shift is None else 3  # a rotation is one more sum over features, of queries and of keys
    operations = (
        sum(parts.dx.shape[-3:]) + turns * parts.queries.shape[-1] + parts.w_v.shape[-1] + parts.w_q.shape[-2] + 32
    )
    if block.norm_eps is not None:
        operations += 4 * parts.queries.shape[-1] * parts.w_v.shape[-3]
    root_error = operations * UNIT * magnified(block, operations)[..., None]  # infinite if it is not small
    logit_error = _logit_error(block, parts, operations, root_error).amax(-2)  # worst head of each row
    relative = torch.expm1(6 * logit_error) + 8 * operations * UNIT + 16 * root_error.clamp(max=1.0)
    size = _assemble(parts, centre=1.0)
    rounding = _frobenius(size * relative.repeat_interleave(size.shape[-2] // relative.shape[-1], -1).unsqueeze(-1))
    spectrum = 8 * max(size.shape[-2:]) * UNIT * _frobenius(size)
    lost = SMALLEST * _frobenius(_assemble(dc.replace(parts, maps=torch.ones_like(parts.maps)), centre=1.0))
    return rounding + spectrum + lost


# -- the float64 formulas -------------------------------------------------------------------------------------------


@dc.dataclass(frozen=True)
class _Parts:
    """What the Jacobian blocks are made of.

    `dx[h, i, j]` is x_j - x_t(i), `key_apart[h, i, j]` the same of the keys, `top[h, i]` the one-hot row of t(i), and
    `shift[h, i, j]` is R_j - R_t(i), None without rotary positions. Queries and keys are turned; `w_q[h, i]` and
    `w_k[h, j]` are the weights with the rotation of the token, one for all where there is none.
    """

    dx: Tensor
    top: Tensor
    shift: Tensor | None
    key_apart: Tensor
    queries: Tensor
    maps: Tensor
    relative_logits: Tensor
    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    scale: float
    moves: str
    batch: torch.Size

    @classmethod
    def of(cls, block: Attention) -> _Parts:
        f = _double(block)
        scale = float(block.scale or 0.0)
        memory = f["x"] if f["memory"] is None else f["memory"]
        mask = additive_mask(block)
        turn_queries, turn_keys = rotation_matrices(block, "query"), rotation_matrices(block, "key")
        queries = _with_bias(torch.einsum("...nd,...hde->...hne", f["x"], f["w_q"]), f["b_q"])
        w_q = _turned_weights(moved_weights(block, "query", f["w_q"], queries), turn_queries)
        queries = _turn(turn_queries, normalise(block, "query", queries))
        keys = torch.einsum("...nd,...hde->...hne", memory, f["w_k"])
        if turn_keys is not None or block.norm_eps is not None:  # else a key bias moves all logits of a row alike
            keys = _with_bias(keys, f["b_k"])
        w_k = _turned_weights(moved_weights(block, "key", f["w_k"], keys), turn_keys)
        turned = _turn(turn_keys, normalise(block, "key", keys))
        rough = scale * torch.einsum("...hne,...hme->...hnm", queries, turned) + mask
        top = torch.nn.functional.one_hot(rough.argmax(-1), rough.shape[-1]).to(torch.float64)
        dx = memory.unsqueeze(-3).unsqueeze(-3) - torch.einsum("...hnm,...md->...hnd", top, memory).unsqueeze(-2)
        visible = torch.where(mask.isneginf(), 0.0, mask)  # 0 * -inf would be nan
        above = mask - (top * visible).sum(-1, keepdim=True)
        shift = None if turn_keys is None else _shift(turn_keys, top)
        apart = _key_differences(block, dx, f["w_k"], turn_keys, shift, top, keys)
        relative = scale * torch.einsum("...hne,...hnme->...hnm", queries, apart) + above
        # Rounding of huge logits may have missed the largest one: relative to it, exp would overflow.
        weights = (relative - relative.amax(-1, keepdim=True)).exp()
        maps = weights / weights.sum(-1, keepdim=True)
        return cls(
            dx, top, shift, apart, queries, maps, relative, w_q, w_k, f["w_v"], f["w_o"],
            scale=scale, moves=block.moves, batch=block.batch_shape,
        )  # fmt: skip

    def absolute(self, block: Attention) -> _Parts:
        """The same with every entry replaced by the sum of the absolute values it is computed from."""
        f: dict[str, Any] = {name: None if tensor is None else tensor.abs() for name, tensor in _double(block).items()}
        memory = f["x"] if f["memory"] is None else f["memory"]
        turns = [rotation_matrices(block, "query"), rotation_matrices(block, "key"), self.shift]
        turn_queries, turn_keys, shift = (None if turn is None else turn.abs() for turn in turns)
        queries = _with_bias(torch.einsum("...nd,...hde->...hne", f["x"], f["w_q"]), f["b_q"])
        keys = _with_bias(torch.einsum("...nd,...hde->...hne", memory, f["w_k"]), f["b_k"])
        at_queries, at_keys = projected(block, "query"), projected(block, "key")
        w_q = moved_weights(block, "query", f["w_q"], queries, at=at_queries)
        w_k = moved_weights(block, "key", f["w_k"], keys, at=at_keys)
        queries = normalise(block, "query", queries, at=at_queries)
        apart = _key_differences(block, self.dx.abs(), f["w_k"], turn_keys, shift, self.top, keys, at_keys)
        return dc.replace(
            self, dx=self.dx.abs(), key_apart=apart, queries=_turn(turn_queries, queries), scale=abs(self.scale),
            w_q=_turned_weights(w_q, turn_queries), w_k=_turned_weights(w_k, turn_keys),
            w_v=f["w_v"], w_o=f["w_o"],
        )  # fmt: skip


def _turn(matrices: Tensor | None, vectors: Tensor) -> Tensor:
    """R_i times each vector of token i."""
    return vectors if matrices is None else torch.einsum("...nef,...hnf->...hne", matrices, vectors)


def _turned_weights(weights: Tensor, matrices: Tensor | None) -> Tensor:
    """W R_i^T for each token, with an axis of size 1 for the tokens if nothing depends on the token."""
    return weights if matrices is None else weights @ matrices.mT.unsqueeze(-4)


def _shift(matrices: Tensor, top: Tensor) -> Tensor:
    """R_j - R_t(i), exactly 0 where both tokens have the same rotation."""
    return matrices.unsqueeze(-4).unsqueeze(-4) - torch.einsum("...hnm,...mef->...hnef", top, matrices).unsqueeze(-3)


def _key_differences(
    block: Attention, dx: Tensor, w_k: Tensor, turn: Tensor | None, shift: Tensor | None, top: Tensor, keys: Tensor,
    at: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Normalised and turned keys relative to that of t(i); `keys` are neither yet, `at` is as in `normalise`."""
    if block.norm_eps is None:
        apart = torch.einsum("...hnmd,...hde->...hnme", dx, w_k)
    else:
        apart = normalised_differences(block, dx, w_k, top, keys, at=at)
        keys = normalise(block, "key", keys, at=at)
    if turn is None or shift is None:
        return apart
    at_top = torch.einsum("...hnm,...hmf->...hnf", top, keys)
    apart = torch.einsum("...mef,...hnmf->...hnme", turn, apart)
    return apart + torch.einsum("...hnmef,...hnf->...hnme", shift, at_top)


def _assemble(parts: _Parts, centre: float) -> Tensor:
    """The dense Jacobian from its parts; `centre` is -1 for the formula, +1 for its form on absolute values."""
    p, scale = parts.maps, parts.scale
    through = torch.einsum("...hde,...hef->...hdf", parts.w_v, parts.w_o)
    values = torch.einsum("...hnmd,...hdf->...hnmf", parts.dx, through)
    centred = values + centre * torch.einsum("...hnm,...hnmf->...hnf", p, values).unsqueeze(-2)
    weighted = p.unsqueeze(-1) * centred
    n, m = p.shape[-2:]
    dim_out = through.shape[-1]
    if parts.moves == "query":
        dense = p.new_zeros(*parts.batch, n, dim_out, n, parts.w_q.shape[-2])
    else:
        pull = scale * torch.einsum("...hne,...hmde->...hnmd", parts.queries, parts.w_k)
        dense = torch.einsum("...hnm,...hdf->...nfmd", p, through)
        dense = dense + torch.einsum("...hnmf,...hnmd->...nfmd", weighted, pull)
        dense = dense.expand(*parts.batch, n, dim_out, m, -1).clone()
    if parts.moves != "memory":
        keys = parts.key_apart
        keys = keys + centre * torch.einsum("...hnm,...hnme->...hne", p, keys).unsqueeze(-2)
        own = scale * torch.einsum("...hnmf,...hnme->...hnfe", weighted, keys)
        own = torch.einsum("...hnfe,...hnde->...nfd", own, parts.w_q).expand(*parts.batch, n, dim_out, -1)
        dense.diagonal(dim1=-4, dim2=-2).add_(own.movedim(-3, -1))
    return dense.reshape(*parts.batch, n * dim_out, -1)


def _logit_error(block: Attention, parts: _Parts, operations: int, root_error: Tensor) -> Tensor:
    """Largest error of the relative logits of each row, over the keys that floats can see."""
    size = parts.scale * torch.einsum("...hne,...hnme->...hnm", parts.queries, parts.key_apart)
    mask = additive_mask(block)
    finite = torch.where(mask.isneginf(), 0.0, mask).abs().amax(-1, keepdim=True)
    error = 2 * UNIT * (operations * size + 2 * finite) + 16 * root_error[..., None, None].clamp(max=1e300) * size
    seen = parts.relative_logits > -750.0  # exp of anything lower is 0, exactly and in floats
    error = torch.where(seen, error, 0.0).amax(-1)
    return torch.where(root_error[..., None].isinf(), 10.0, error).clamp(max=10.0)


def _double(block: Attention) -> dict[str, Any]:
    """The tensor fields in float64, where the floats of every dtype are exact."""
    fields = {name: getattr(block, name) for name in TRAILING}
    return {name: None if tensor is None else tensor.detach().to(torch.float64) for name, tensor in fields.items()}


def _with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.unsqueeze(-2)


def _frobenius(matrix: Tensor) -> Tensor:
    """Frobenius norm without overflow or underflow of the squares."""
    size = matrix.abs().amax((-2, -1), keepdim=True).clamp(min=SMALLEST)
    return (matrix / size).square().sum((-2, -1)).sqrt() * size[..., 0, 0]
