"""The same network with nothing computed that a later `Pool` drops: attention has queries for the tokens read, alone.

Layers that act on every token alone commute with taking one token, so a `Pool` of the first or last token moves
forward over them, up to the layer that mixes tokens before it. There it becomes part of attention, whose other rows
nobody reads: as an output they would only add to its norm, and to how fast its Jacobian turns. As keys and values all
tokens stay. In a residual, the skip connection starts at the token read.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Int
from torch import Tensor

from lipbounds.compose.propagated_set import Rules
from lipbounds.compose.rewrite import flat, rewritten
from lipbounds.errors import InvalidInput
from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import AttentionLayer, Layer, Linear, Normalization, Pointwise, Pool, Residual, Sequence


@dc.dataclass(frozen=True, eq=False, repr=False)
class ReadResidual(Residual):
    """x -> skip(token(x)) + body(x), the body one row.

    Args:
        body: as in `Residual`; it returns the token read.
        skip: as in `Residual`.
        read: which token.
    """

    read: Pool = dc.field(kw_only=True)

    def function(self):
        return lambda x: self.joined(self.read(x), self.body(x))

    @property
    def description(self) -> str:
        return f"{super().description}, at the {self.read.description}"


def bounded_layers(layers: list[tuple[str, Layer]], x: Tensor, rules: Rules) -> list[tuple[str, Layer]]:
    """The layers as they are bounded: rewritten, and without rows that are not read where the rules allow it.

    Args:
        layers: with their paths.
        x: the input of the first.
        rules: whose bounds of attention may not know blocks in which some tokens have no query.
    """
    flattened = flat(layers)
    return rewritten(read_only(flattened, x) if rules.reads_some_tokens else flattened)


def read_only(layers: list[tuple[str, Layer]], x: Tensor) -> list[tuple[str, Layer]]:
    """The layers without rows of attention that are not read; the same function at inputs of the shape of `x`.

    Args:
        layers: flat, with their paths.
        x: the input of the first.
    """
    out = list(layers)
    for index in range(len(layers)):
        pool = out[index][1]
        if not isinstance(pool, Pool) or pool.how == "mean":
            continue
        place = index
        while place > 0 and acts_by_token(out[place - 1][1]):
            place -= 1
        if place > 0 and _ends_in_attention(out[place - 1][1]):
            path, mixing = out[place - 1]
            tokens = _after(out[: place - 1], x)
            out[place - 1 : index + 1] = [(path, _reading(mixing, pool, tokens)), *out[place:index]]
            return read_only(out, x)
    return out


def acts_by_token(layer: Layer) -> bool:
    """Whether the layer acts on every token alone.

    Args:
        layer: the layer.
    """
    if isinstance(layer, Residual):
        return all(acts_by_token(part) for _, part in flat([("", layer.body)]))
    return isinstance(layer, Linear | Pointwise | Normalization)


def of_queries_at(block: Attention, at: Int[Tensor, " queries"]) -> Attention:
    """The block with queries of some of its tokens only: these rows of its output.

    Args:
        block: of self-attention in which every token has a query.
        at: the numbers of the tokens.

    Raises:
        InvalidInput: some tokens have no query already.
    """
    if block.queries_at is not None:
        raise InvalidInput("block must have a query for every token, got one with queries_at.")
    mask, rotation = block.mask, block.query_rotation
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], block.tokens, mask.shape[-1]).index_select(-2, at)
    if rotation is not None:
        rotation = rotation.expand(*rotation.shape[:-3], block.tokens, *rotation.shape[-2:]).index_select(-3, at)
    return block.replace(queries_at=at, logit_bias=mask, causal=False, query_rotation=rotation)


def _ends_in_attention(layer: Layer) -> bool:
    """Whether the layer is attention, or a residual whose body is attention behind layers on tokens one by one."""
    if isinstance(layer, AttentionLayer):
        return layer.block.queries_at is None
    if not isinstance(layer, Residual) or isinstance(layer, ReadResidual):
        return False
    *before, (_, last) = flat([("", layer.body)])
    return isinstance(last, AttentionLayer) and _ends_in_attention(last) and all(acts_by_token(b) for _, b in before)


def _reading(layer: Layer, pool: Pool, x: Tensor) -> Layer:
    """Attention, or a residual that ends in it, of which one row is read."""
    if isinstance(layer, AttentionLayer):
        block = layer.block
        if block.x.shape[-2] != x.shape[-2]:
            block = block.replace(x=block.x.new_zeros(x.shape[-2], block.x.shape[-1]))
        at = torch.tensor([0 if pool.how == "first" else x.shape[-2] - 1], dtype=torch.int64, device=block.device)
        return dc.replace(layer, block=of_queries_at(block, at))
    assert isinstance(layer, Residual)
    named = flat([("", layer.body)])
    paths, parts = zip(*named, strict=True)
    last = _reading(parts[-1], pool, x)
    body = last if len(parts) == 1 else Sequence((*parts[:-1], last), tuple(path.removeprefix(".") for path in paths))
    return ReadResidual(body, layer.skip, read=pool)


def _after(layers: list[tuple[str, Layer]], x: Tensor) -> Tensor:
    """What reaches the layer behind these, for its number of tokens."""
    with torch.no_grad():
        for _, layer in layers:
            x = layer(x)
    return x
