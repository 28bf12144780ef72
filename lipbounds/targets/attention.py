"""One multi-head attention block at one input.

| paper | here | shape |
|---|---|---|
| X | `x` | n tokens, D features |
| W_Q, W_K, W_V, W_O of head h | `w_q[h]`, `w_k[h]`, `w_v[h]`, `w_o[h]` | D x d, D x d, D x d_v, d_v x D |
| b_Q, b_K, b_V of head h, b_O | `b_q[h]`, `b_k[h]`, `b_v[h]`, `b_o` | d, d, d_v, D |
| R_i, of queries; of keys | `query_rotation`; `key_rotation` | rotary positions: lipbounds.targets.rotary |
| N, of queries; of keys | `query_norm`; `key_norm` | QK-norm: lipbounds.targets.rms_norm; the identity unless given |
| s | `scale` | 1/sqrt(d) unless given |
| B | `logit_bias` | H x n x m, -inf where masked |
| Q, K | `queries`, `keys` | rows N(x_i W_Q + b_Q) R_i^T and N(x_j W_K + b_K) R_j^T; H x n x d, H x m x d |
| S, P | `logits`, `probabilities` | S = s Q K^T + B, P = row softmax of S; H x n x m |
| Y | `forward()` | sum_h P_h V_h W_O^h + b_O, n x D |

With `queries_at` only these tokens have queries, and an output: the rows of Q, P and Y are those of the tokens named.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.devices import answers
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.targets._attention_checks import TRAILING, check_attention, expand_batches, expand_groups
from lipbounds.targets.frozen import record_versions
from lipbounds.targets.projection import affine_factors, merge_heads, project, project_heads
from lipbounds.targets.rms_norm import NormOver, RmsNorm, normalise
from lipbounds.targets.rotary import rotate, rotate_back
from lipbounds.targets.target import Target
from lipbounds.targets.weight_norms import NAMES, WeightNorms, norms_of


Moves = Literal["self", "query", "memory"]
UNWEIGHTED = TRAILING.keys() - set(NAMES)


@dc.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Attention(Target):
    """A multi-head attention block at one input, frozen; the function whose Jacobian is bounded.

    The tensors are kept, not copied: after a change in place (`x.mul_(2)`, an optimiser's step) bounds refuse the
    block; make a new one, or give it a copy (lipbounds.targets.frozen). All tensors share one floating dtype and
    device. Leading batch dimensions of inputs, weights and logit bias broadcast against each other, so one block may
    hold many inputs, many weights, or both.

    Over 150 lines, because half of it is fields and their description, the rest is the function with its derivatives.

    Args:
        x: the tokens that give the queries, and for self-attention also the keys and values.
        w_q: query weights, one matrix a head.
        w_k: key weights; with fewer heads than `w_q` (grouped-query attention) each is repeated for its group.
        w_v: value weights, grouped as `w_k`.
        w_o: output weights, one matrix a head: the rows of the usual output projection that belong to the head.
        b_q: query bias.
        b_k: key bias.
        b_v: value bias.
        b_o: output bias; it does not move the Jacobian.
        scale: factor s of the logits; 1/sqrt(d) if None.
        query_rotation: rotary positions of the queries, cosines and sines of the angles of each token (layout:
            lipbounds.targets.rotary), such as `torch.stack([angles.cos(), angles.sin()], -2)`; with `key_rotation`.
        key_rotation: the same for the keys; in self-attention usually the same tensor.
        query_norm_weight: QK-norm (lipbounds.targets.rms_norm): the weights of the RMSNorm that queries go through
            before they are turned, one vector a head; ones where the norm has none, 1 + w for Gemma's w; with the
            next three.
        key_norm_weight: the same for the keys; grouped as `w_k`.
        norm_eps: what both norms add to the mean square.
        norm_over: the features whose mean square is taken: of each `head`, or of `all_heads` of the token together.
        logit_bias: added to the logits: a mask (-inf where a key is hidden), relative positions; constant in the input.
        causal: hide the keys after each query; self-attention only (a rectangular mask has no single convention).
        memory: the tokens that give keys and values in cross-attention (or with a key-value cache); None: `x` does.
        moves: the input the Lipschitz constant is about: `self` (x, everywhere), or with a memory `query` or `memory`.
        queries_at: the numbers of the tokens that have queries, in the order of the output; None: all. Self-attention
            only, as in a layer that updates the class token alone. `query_rotation` and `logit_bias` then have a row
            for each of these, and a causal mask is passed as `logit_bias`.

    Raises:
        InvalidInput: a shape, dtype or device does not fit; an entry is NaN or infinite; a query sees no key.
    """

    x: Float[Tensor, "*#batch n dim"]
    w_q: Float[Tensor, "*#weights heads dim head_dim"]
    w_k: Float[Tensor, "*#weights groups memory_dim head_dim"]
    w_v: Float[Tensor, "*#weights groups memory_dim value_dim"]
    w_o: Float[Tensor, "*#weights heads value_dim out_dim"]
    b_q: Float[Tensor, "*#weights heads head_dim"] | None = None
    b_k: Float[Tensor, "*#weights groups head_dim"] | None = None
    b_v: Float[Tensor, "*#weights groups value_dim"] | None = None
    b_o: Float[Tensor, "*#weights out_dim"] | None = None
    query_rotation: Float[Tensor, "*#rotary queries 2 pairs"] | None = None
    key_rotation: Float[Tensor, "*#rotary m 2 pairs"] | None = None
    query_norm_weight: Float[Tensor, "*#weights heads head_dim"] | None = None
    key_norm_weight: Float[Tensor, "*#weights groups head_dim"] | None = None
    norm_eps: float | None = None
    norm_over: NormOver | None = None
    scale: float | None = None
    logit_bias: Float[Tensor, "*#mask queries m"] | None = None
    causal: bool = False
    memory: Float[Tensor, "*#memory m memory_dim"] | None = None
    moves: Moves = "self"
    queries_at: Int[Tensor, " queries"] | None = None

    def __post_init__(self) -> None:
        self.__dict__["has_biases"] = check_attention(self)  # what `has_biases` keeps
        if self.scale is None:
            object.__setattr__(self, "scale", self.w_q.shape[-1] ** -0.5)
        for name in ("w_k", "w_v", "b_k", "b_v", "key_norm_weight"):
            object.__setattr__(self, name, expand_groups(self, name))
        for name, tensor in expand_batches(self).items():
            object.__setattr__(self, name, tensor)
        record_versions(self)

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.w_q.shape[-3]

    @property
    def tokens(self) -> int:
        """Number of queries n."""
        return self.x.shape[-2] if self.queries_at is None else len(self.queries_at)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def query_input(self) -> Tensor:
        """The tokens that give queries: `x`, or those of its rows that `queries_at` names."""
        return self.of_queries(self.x)

    def of_queries(self, rows: Tensor) -> Tensor:
        """Those of the rows, one for each token of `x`, that belong to tokens with a query."""
        return rows if self.queries_at is None else rows.index_select(-2, self.queries_at)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """The transpose of `of_queries`: each row at its token, 0 at those without a query."""
        if self.queries_at is None:
            return rows
        whole = rows.new_zeros(*rows.shape[:-2], self.x.shape[-2], rows.shape[-1])
        return whole.index_copy(-2, self.queries_at, rows)

    def token_of(self, row: int) -> int:
        """The number of the token that the query of a row belongs to."""
        return row if self.queries_at is None else int(self.queries_at[row])

    @property
    def source_input(self) -> Tensor:
        """The tokens that give keys and values: `memory`, or `x` in self-attention."""
        return self.x if self.memory is None else self.memory

    @property
    def moving_input(self) -> Tensor:
        """The input that the Lipschitz constant is about."""
        return self.source_input if self.moves == "memory" else self.x

    @property
    def query_moves(self) -> bool:
        return self.moves in ("self", "query")

    @property
    def memory_moves(self) -> bool:
        return self.moves in ("self", "memory")

    @cached_property
    def batch_shape(self) -> torch.Size:
        """The broadcast leading shape of inputs, weights and logit bias."""
        leading = [self.x.shape[:-2], self.source_input.shape[:-2], self.w_q.shape[:-3]]
        leading += [t.shape[:-3] for t in (self.logit_bias, self.query_rotation, self.key_rotation) if t is not None]
        return broadcast_shape(leading)

    @cached_property
    def features(self) -> frozenset[Feature]:
        """What a bound must make a promise for to be evaluated here; a bias that is zero is not a feature."""
        present: set[Feature] = set()
        if self.heads > 1:
            present.add("heads")
        if self.has_biases:
            present.add("biases")
        if self.logit_bias is not None or self.causal:
            present.add("mask")
        if self.memory is not None:
            present.add("cross")
        if self.query_rotation is not None:
            present.add("rotary")
        if self.query_norm_weight is not None:
            present.add("qk_norm")
        if self.queries_at is not None:
            present.add("some_queries")
        return frozenset(present)

    @cached_property
    def has_biases(self) -> bool:
        """Whether a bias of queries, keys or values is not zero."""
        return any(answers(*(bias != 0 for bias in (self.b_q, self.b_k, self.b_v) if bias is not None)))

    # -- its values ---------------------------------------------------------------------------------------------

    @cached_property
    def mask(self) -> Tensor | None:
        """Logit bias and causal mask in one, broadcastable to the logits; None if there is neither."""
        if not self.causal:
            return self.logit_bias
        future = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=self.device).triu(1)
        causal = torch.zeros(self.tokens, self.tokens, dtype=self.dtype, device=self.device)
        causal = causal.masked_fill(future, -torch.inf)
        return causal if self.logit_bias is None else self.logit_bias + causal

    @property
    def query_norm(self) -> RmsNorm | None:
        """N of the queries; None without QK-norm."""
        return self._norm(self.query_norm_weight)

    @property
    def key_norm(self) -> RmsNorm | None:
        """N of the keys; None without QK-norm."""
        return self._norm(self.key_norm_weight)

    def _norm(self, weight: Tensor | None) -> RmsNorm | None:
        if weight is None:
            return None
        assert self.norm_eps is not None  # checked at construction
        assert self.norm_over is not None
        return RmsNorm(weight=weight, eps=self.norm_eps, over=self.norm_over)

    @cached_property
    def projected_queries(self) -> Float[Tensor, "*batch heads n head_dim"]:
        """X W_Q + b_Q: the queries before they are normalised and turned."""
        return project_heads(self.query_input, self.w_q, self.b_q)

    @cached_property
    def projected_keys(self) -> Float[Tensor, "*batch heads m head_dim"]:
        """X W_K + b_K: the keys before they are normalised and turned."""
        return project_heads(self.source_input, self.w_k, self.b_k)

    @cached_property
    def queries(self) -> Float[Tensor, "*batch heads n head_dim"]:
        return rotate(normalise(self.projected_queries, self.query_norm), self.query_rotation)

    @cached_property
    def keys(self) -> Float[Tensor, "*batch heads m head_dim"]:
        return rotate(normalise(self.projected_keys, self.key_norm), self.key_rotation)

    @cached_property
    def values(self) -> Float[Tensor, "*batch heads m value_dim"]:
        return project_heads(self.source_input, self.w_v, self.b_v)

    @cached_property
    def logits(self) -> Float[Tensor, "*batch heads n m"]:
        """S = s Q K^T + B."""
        products = self.scale_value * self.queries @ self.keys.mT
        return products if self.mask is None else products + self.mask

    @cached_property
    def probabilities(self) -> Float[Tensor, "*batch heads n m"]:
        """The attention maps P."""
        return self.logits.softmax(-1)

    @property
    def query_factors(self) -> tuple[Tensor, Tensor]:
        """Matrices of given floats whose product is Q before norm and rotation: what rounding analysis needs."""
        return affine_factors(self.query_input, self.w_q, self.b_q)

    @property
    def key_factors(self) -> tuple[Tensor, Tensor]:
        """Matrices of given floats whose product is K before norm and rotation."""
        return affine_factors(self.source_input, self.w_k, self.b_k)

    @property
    def value_factors(self) -> tuple[Tensor, Tensor]:
        """Matrices of given floats whose product is V."""
        return affine_factors(self.source_input, self.w_v, self.b_v)

    @property
    def scale_value(self) -> float:
        assert self.scale is not None  # set in __post_init__
        return self.scale

    def forward(self) -> Float[Tensor, "*batch n out_dim"]:
        """Y, the output of the block."""
        output = merge_heads(self.probabilities @ self.values, self.w_o)
        return output if self.b_o is None else output + self.b_o[..., None, :]

    # -- its Jacobian -------------------------------------------------------------------------------------------

    def jvp(self, tangent: Float[Tensor, "*extra moving dim"]) -> Float[Tensor, "*out n out_dim"]:
        """Jacobian times `tangent`, a change of the moving input; extra leading dimensions are directions."""
        change = tangent.new_zeros(())
        logit_change = tangent.new_zeros(())
        if self.query_moves:
            logit_change = logit_change + self._query_change(project(self.of_queries(tangent), self.w_q)) @ self.keys.mT
        if self.memory_moves:
            logit_change = logit_change + self.queries @ self._key_change(project(tangent, self.w_k)).mT
            change = change + self.probabilities @ project(tangent, self.w_v)
        change = change + self._softmax_derivative(self.scale_value * logit_change) @ self.values
        return merge_heads(change, self.w_o)

    def vjp(self, cotangent: Float[Tensor, "*extra n out_dim"]) -> Float[Tensor, "*out moving dim"]:
        """Transposed Jacobian times `cotangent`, a covector of the output; extra leading dimensions are directions."""
        per_head = cotangent.unsqueeze(-3) @ self.w_o.mT
        logit_change = self.scale_value * self._softmax_derivative(per_head @ self.values.mT)
        result = cotangent.new_zeros(())
        if self.query_moves:
            by_query = rotate_back(logit_change @ self.keys, self.query_rotation)
            if self.query_norm is not None:
                by_query = self.query_norm.vjp(self.projected_queries, by_query)
            result = result + self.to_tokens((by_query @ self.w_q.mT).sum(-3))
        if self.memory_moves:
            by_key = rotate_back(logit_change.mT @ self.queries, self.key_rotation)
            if self.key_norm is not None:
                by_key = self.key_norm.vjp(self.projected_keys, by_key)
            result = result + (by_key @ self.w_k.mT).sum(-3)
            result = result + (self.probabilities.mT @ per_head @ self.w_v.mT).sum(-3)
        return result

    def _query_change(self, projected: Tensor) -> Tensor:
        """How the queries change when what they are projected to changes."""
        if self.query_norm is not None:
            projected = self.query_norm.jvp(self.projected_queries, projected)
        return rotate(projected, self.query_rotation)

    def _key_change(self, projected: Tensor) -> Tensor:
        """How the keys change when what they are projected to changes."""
        if self.key_norm is not None:
            projected = self.key_norm.jvp(self.projected_keys, projected)
        return rotate(projected, self.key_rotation)

    def _softmax_derivative(self, change: Tensor) -> Tensor:
        """J(P_i) times each row i of `change`; J is symmetric, so this serves both directions."""
        weighted = self.probabilities * change
        return weighted - self.probabilities * weighted.sum(-1, keepdim=True)

    # -- others like it -----------------------------------------------------------------------------------------

    def at(self, moving: Tensor) -> Attention:
        """The same block with the moving input replaced by `moving`."""
        return self.replace(**{"memory" if self.moves == "memory" else "x": moving})

    def replace(self, **changes: Any) -> Attention:
        """The same block with some fields replaced, validated again."""
        return dc.replace(self, **changes)

    def to(self, target: torch.dtype | torch.device | str) -> Attention:
        """The same block in another dtype or on another device."""
        fields = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        at = fields.pop("queries_at")
        if at is not None and not isinstance(target, torch.dtype):
            fields["queries_at"] = at
        return self.replace(**{name: value.to(target) for name, value in fields.items() if isinstance(value, Tensor)})

    @cached_property
    def double(self) -> Attention:
        """The same block in float64, where bounds are evaluated: floats of every supported dtype are exact there."""
        if self.dtype == torch.float64:
            return self
        norms = norms_of(self._weights)
        tensors = {
            name: value.double() for name, value in vars(self).items() if name in UNWEIGHTED and value is not None
        }
        # What was finite in a short dtype is finite in float64: nothing is to be checked again.
        wide = object.__new__(Attention)
        for name, value in {**vars(self), **tensors, **norms.weights}.items():
            if name in self.__dataclass_fields__:
                object.__setattr__(wide, name, value)
        wide.__dict__["_norms"] = norms
        return wide

    @property
    def weight_norms(self) -> WeightNorms:
        """What bounds need of the weights alone; of a block in float64."""
        weights = self._weights
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights.values()):
            return WeightNorms(weights)  # a graph of its own for each use
        return self._norms

    @cached_property
    def _norms(self) -> WeightNorms:
        return norms_of(self._weights)

    @property
    def _weights(self) -> dict[str, Tensor]:
        return {name: weight for name in NAMES if (weight := getattr(self, name)) is not None}

    def function(self) -> Callable[[Tensor], Tensor]:
        """The block as a plain function of its moving input, without validation, for automatic differentiation."""
        mask = self.mask  # made here: what is cached inside a transform of torch.func does not outlive it

        def call(moving: Tensor) -> Tensor:
            x = self.x if self.moves == "memory" else moving
            source = moving if self.memory_moves else self.source_input
            x = self.of_queries(x)
            queries = rotate(normalise(project(x, self.w_q, self.b_q), self.query_norm), self.query_rotation)
            keys = rotate(normalise(project(source, self.w_k, self.b_k), self.key_norm), self.key_rotation)
            logits = self.scale_value * queries @ keys.mT
            logits = logits if mask is None else logits + mask
            output = merge_heads(logits.softmax(-1) @ project(source, self.w_v, self.b_v), self.w_o)
            return output if self.b_o is None else output + self.b_o[..., None, :]

        return call
