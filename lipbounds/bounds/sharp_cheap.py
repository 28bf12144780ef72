r"""A bound at the price of a few forward passes: heads compared by the overlaps of their weights; ours.

The differential of a block has three parts, T1 (mixing), T2 (query) and T3 (key), as in bounds/sharp.py. The weights of
each head are written as W_O^hT = U_O^h L_O^hT, W_Q^h = U_Q^h L_Q^hT, W_K^h = U_K^h L_K^hT with small square factors L
(lipbounds.targets.head_factors), and V' = V L_O, K' = K L_Q, Q' = Q L_K, V and K centred (which J 1 = 0 allows). With
mix_U(c) = || sum_h c_h U_h U_h^T || (lipbounds.ops.mixture),

    ||T1|| <= the norm of a 2 x 2 matrix (lipbounds.derivatives.first.split_mixing);
    ||T2|| <= max_i sqrt( mix_O(c_i) mix_Q(c_i) ),       c_hi = s min( ||V'^T J(P_hi) K'||_F, g_1(P_hi) ||V'|| ||K'|| );
    ||T3|| <= min( nu_O sqrt( mix_K(y^2) ), sqrt( mix_O(y) mix_K(y) ) ),      y_h = s || diag(a_h) Q'_h ||,
              a_hi = min( g_1(P_hi) ||V'||, sqrt( g_1(P_hi) lambda_max(V'^T J(P_hi) V') ) ).

Proof. T2_i = sum_h s U_O^h (V'^T J_hi K') U_Q^hT is block diagonal in i: ops/mixture.py with a_h = c_hi and w = c. T3:
row i is sum_h U_O^h z_hi, z_hi = V'^T J_hi (<u_hi, dx_j>)_j, u_hi = s W_K^h q_hi, and ||V'^T J|| <= ||V'^T J^(1/2)||
||J^(1/2)||, so |z_hi| <= a_hi |dX u_hi|. For any w_h > 0, |sum_h U_O^h z_hi|^2 <= mix_O(w) sum_h |z_hi|^2 / w_h, and

    sum_hi a_hi^2 |dX u_hi|^2 / w_h  =  s^2 sum_j sum_h |diag(a_h) Q'_h U_K^hT dx_j|^2 / w_h
                                     <=  sum_j sum_h (y_h^2 / w_h) |U_K^hT dx_j|^2  <=  mix_K(y^2 / w) |dX|^2;

w = 1 and w = y are the two that are taken. Together: on dX = f z^T, z_hi = <u_hi, z> V'^T J_hi f, so there a_hi may be
replaced by |V'^T J_hi f|, which is small where f is nearly constant on what a row attends to. With t_f and t3_f the
norms of T1 and T3 on such dX, t_r of T1 on those orthogonal to them,

    ||T1 + T3||^2 <= (t_f + t3_f)^2 + (t_r + ||T3||)^2,      and the value is min( that, ||T1|| + ||T3|| ) + ||T2||.

Rotary positions: R_i W_Q^hT stands for W_Q^hT, L_Q is diagonal and commutes with R_i, so in T2 R_i U_Q^hT stands for
U_Q^hT, |R_i U_Q^hT dx| <= rho |U_Q^hT dx|; in T3 R_j W_K^hT likewise, for each j. QK-norm: T_i W_Q^hT and T_j W_K^hT,
with L = 1 and the largest norm of T for rho (lipbounds.derivatives.token_maps). T3 then has no part along f of its own.

Queries alone moving: T2 remains; the memory alone: T1 and T3.

Numerics: float64, what rounding can take off is added by the modules named; no eigenproblem is larger than a head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.covariance import centred_keys, centred_projection
from lipbounds.derivatives.first.head_rows import GramMatrices, HeadRows, through
from lipbounds.derivatives.first.split_mixing import split_mixing
from lipbounds.derivatives.norms import row_g_1
from lipbounds.derivatives.rounding.logits import query_error
from lipbounds.derivatives.token_maps import key_maps, query_maps
from lipbounds.ops.mixture import mixture_norm_upper
from lipbounds.ops.spectral import root, spectral_norm_upper, vector_norm
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate, product
from lipbounds.targets.attention import Attention
from lipbounds.targets.head_factors import HeadFactors
from lipbounds.targets.rms_norm import RmsNorm
from lipbounds.targets.rotary import rotation_norm
from lipbounds.targets.weight_norms import WeightNorms


Side = tuple[HeadFactors, Float[Tensor, "..."]]  # factors, and the largest norm of the maps of the tokens of each head


@bound(
    name="sharp_cheap",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="three parts through overlaps of heads, derived here"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm"),
    cost="O(H n^2 (n + d)) beside the attention maps; of the weights once O(H^2 D d^2 + H^3 d^3)",
)
def sharp_cheap(block: Attention) -> tuple[Tensor, Terms]:
    """Three parts of the differential through overlaps of heads, from Gram matrices of keys and values."""
    wide = block.double
    norms = wide.weight_norms
    values = centred_projection(wide.source_input, wide.w_v)
    grams = GramMatrices(wide, through(values.rows, values.error, norms.factors("w_o")))
    softmax = row_g_1(wide)
    nothing = torch.zeros_like(wide.logits[..., 0, 0, 0])
    query_part = _query_part(wide, norms, grams, softmax) if wide.query_moves else nothing
    memory_part = _memory_part(wide, norms, grams, softmax) if wide.memory_moves else {"detail.memory_part": nothing}
    value = inflate(memory_part["detail.memory_part"] + query_part, 8).expand(block.batch_shape)
    return cast_up(value, block.dtype), {"detail.query_part": query_part, **memory_part}


def _query_part(
    block: Attention, norms: WeightNorms, grams: GramMatrices, softmax: Float[Tensor, "*batch heads n"]
) -> Float[Tensor, "*batch"]:
    """||T2||."""
    heads, gain = _side(block, norms, "w_q", block.query_norm, block.query_rotation)
    centred = centred_keys(block)
    keys = through(centred.rows, centred.error, heads)
    crude = softmax * (grams.values.norm * keys.norm).unsqueeze(-1)
    unit = abs(block.scale_value) * grams.values.unit * keys.unit
    weights = product(torch.minimum(grams.cross(keys), crude), unit.unsqueeze(-1)).mT
    outputs = norms.factors("w_o")
    found = root(mixture_norm_upper(weights, outputs.overlap, outputs.jointly))
    weights = inflate(weights * gain.square().unsqueeze(-2), 8)
    return inflate((found * root(mixture_norm_upper(weights, heads.overlap, heads.jointly))).amax(-1), 16)


def _memory_part(
    block: Attention, norms: WeightNorms, grams: GramMatrices, softmax: Float[Tensor, "*batch heads n"]
) -> Terms:
    """||T1 + T3||."""
    side = _side(block, norms, "w_k", block.key_norm, block.key_rotation)
    queries = through(block.queries, query_error(block).amax(-1), side[0])
    reach = torch.minimum(softmax * grams.values.norm.unsqueeze(-1), root(softmax) * root(grams.largest_variance()))
    unit = abs(block.scale_value) * grams.values.unit * queries.unit
    mixing = split_mixing(block, norms)
    key = along = _key_part(norms, side, _weighted(inflate(reach, 8), queries) * unit)
    if block.key_norm is None and block.key_rotation is None:
        on_direction = _key_part(norms, side, _weighted(grams.image(mixing.direction), queries) * unit)
        along = torch.minimum(along, on_direction)
    parts = torch.stack([mixing.along + along, mixing.across + key], -1)
    jointly = torch.minimum(inflate(vector_norm(parts), 8), mixing.norm + key)
    return {"detail.memory_part": jointly, "detail.mixing": mixing.norm, "detail.key_part": key}


def _weighted(weights: Float[Tensor, "*batch heads n"], queries: HeadRows) -> Float[Tensor, "*batch heads"]:
    """|| diag(a_h) Q'_h ||, rounded up."""
    found = spectral_norm_upper(weights.unsqueeze(-1) * queries.rows)
    off = inflate(vector_norm(weights.detach()) * (queries.error + 2.0**-50 * queries.size), weights.shape[-1] + 16)
    return found + off


def _key_part(norms: WeightNorms, side: Side, sizes: Float[Tensor, "*batch heads"]) -> Float[Tensor, "*batch"]:
    """||T3|| from the y_h."""
    (heads, gain), outputs = side, norms.factors("w_o")
    sizes = inflate(sizes, 8).unsqueeze(-2)
    own = sizes * gain.unsqueeze(-2)
    largest = own.detach().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    squares = mixture_norm_upper((own / unit).square(), heads.overlap, heads.jointly)
    one = outputs.jointly.unsqueeze(-1) * root(squares) * unit.squeeze(-1)
    both = root(mixture_norm_upper(sizes, outputs.overlap, outputs.jointly))
    both = both * root(mixture_norm_upper(own * gain.unsqueeze(-2), heads.overlap, heads.jointly))
    return inflate(torch.minimum(one, both).squeeze(-1), 32)


def _side(block: Attention, norms: WeightNorms, name: str, norm: RmsNorm | None, rotation: Tensor | None) -> Side:
    """The factors of query or key weights and how much their tokens' maps can add to them."""
    like = (block.w_q if name == "w_q" else block.w_k)[..., 0, 0]
    if norm is not None:
        maps = query_maps(block) if name == "w_q" else key_maps(block)
        assert maps is not None
        return norms.factors(name, "plain" if norm.over == "head" else "together"), maps.norm
    if rotation is not None:
        gain = rotation_norm(rotation, like)
        return norms.factors(name, "pairs", rotation.shape[-1]), gain + torch.zeros_like(like)
    return norms.factors(name), torch.ones_like(like)
