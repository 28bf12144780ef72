"""Queries, keys and values traced back to their projections, and sorted into batch items and heads."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture.projections import Projection
from lipbounds.capture.qk_norm import Norm
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.records import Invocation
from lipbounds.capture.refusals import unsupported
from lipbounds.targets.rms_norm import NormOver


@dc.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class HeadProjection:
    """One of queries, keys, values as `tokens @ weight + bias` a head.

    Args:
        tokens: shape `*batch n in`.
        weight: shape `heads in width`.
        bias: shape `heads width`.
        rotation: as `Attention` has it.
        norm: weights of the RMSNorm after the projection, shape `heads width`; its eps; what it may be over, as
            `Attention` has it (with one head, either).
        source: the model's own tensor that holds the tokens.
        rows: the number of each token among those of the source; shape `batch n`.
    """

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    source: Tensor
    rows: Tensor
    rotation: Tensor | None = None
    norm: tuple[Tensor, float, frozenset[NormOver]] | None = None


@dc.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Operand:
    """Queries, keys or values, one matrix for each leading index, traced back to their projection.

    Args:
        projection: the call that made them.
        rows: the number of the token that each row belongs to; shape `*lead n`.
        features: the number of the output feature that each column is; shape `*lead width`.
        factor: what they were multiplied by after projection and norm: one number, or one for each column; shape
            `*lead width`.
        norm: what they were normalised by, and multiplied feature by feature, right after the projection.
        rotation: rotary positions; shape `*lead n 2 pairs`.
        order: the column of the call that each column here is, where they were sorted; shape `width`.
        dtypes: in which they were computed, where not in that of the tokens.
        numbers: that went into the steps after the projection.
        constants: the model's own tensors that weights and factor were read from.
        invocations: the modules that were running during the projection.
    """

    projection: Projection
    rows: Tensor
    features: Tensor
    factor: float | Tensor
    constants: tuple[Tensor, ...]
    invocations: tuple[Invocation, ...]
    rotation: Tensor | None = None
    order: Tensor | None = None
    norm: Norm | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    numbers: tuple[float, ...] = ()

    def expand(self, lead: torch.Size) -> Operand:
        """Broadcast the leading dimensions to `lead` and flatten them."""

        def flat(table: Tensor, own: int) -> Tensor:
            return table.expand(*lead, *table.shape[-own:]).reshape(-1, *table.shape[-own:])

        factor = self.factor
        return dc.replace(
            self,
            rows=flat(self.rows, 1),
            features=flat(self.features, 1),
            rotation=None if self.rotation is None else flat(self.rotation, 3),
            factor=flat(factor, 1) if isinstance(factor, Tensor) and factor.dim() > 0 else factor,
        )

    def take(self, lead: Tensor) -> Operand:
        """The entries of a flat leading dimension that the index tensor `lead` names."""
        rotation = None if self.rotation is None else self.rotation[lead]
        factor = self.factor
        factor = factor[lead] if isinstance(factor, Tensor) and factor.dim() > 0 else factor
        return dc.replace(self, rows=self.rows[lead], features=self.features[lead], rotation=rotation, factor=factor)

    def times(self, gain: Tensor, read_from: Iterable[Tensor]) -> Operand:
        """Multiplied by one more number for each leading index, which was read from the tensors `read_from`."""
        factor = self.factor * (gain[:, None] if gain.dim() else gain)
        factor = factor.expand(self.features.shape) if factor.dim() else factor
        return dc.replace(self, factor=factor, constants=(*self.constants, *read_from))

    @property
    def lead(self) -> torch.Size:
        return self.rows.shape[:-1]


@dc.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Layout:
    """Which leading index of a call is which batch item and which head.

    Args:
        cell: the flat leading index of each batch item and head; shape `batch heads`.
        batch_shape: the batch dimensions of the block, `batch` entries in all.
        queries: the number of queries n.
    """

    cell: Tensor
    batch_shape: tuple[int, ...]
    queries: int

    @property
    def heads(self) -> int:
        return self.cell.shape[1]

    def locate(self) -> tuple[Tensor, Tensor]:
        """For each flat leading index, the number of its batch item and of its head."""
        batch, head = (torch.empty_like(self.cell.flatten()) for _ in range(2))
        numbers = torch.arange(self.cell.numel(), device=self.cell.device)
        batch[self.cell.flatten()] = numbers // self.heads
        head[self.cell.flatten()] = numbers % self.heads
        return batch, head


def qkv_and_layout(recorder: Recorder, operands: list[Operand]) -> tuple[list[HeadProjection], Layout]:
    """Sort the leading indices into batch items (equal tokens) and heads (equal features), and collect each part.

    Args:
        recorder: of the run.
        operands: queries, keys and values, with one flat leading dimension of the same size.
    """
    batch = _numbered(torch.cat([operand.rows for operand in operands], dim=1))
    head = _numbered(torch.cat([operand.features for operand in operands], dim=1))
    batches, heads = int(batch.max()) + 1, int(head.max()) + 1
    cell = batch.new_full((batches, heads), -1)
    cell[batch, head] = torch.arange(len(batch), device=batch.device)
    if batches * heads != len(batch) or bool((cell < 0).any()):
        raise unsupported(
            recorder.module,
            f"every head must see every batch item once, got {len(batch)} matrices of queries for {batches} items "
            f"and {heads} heads",
        )
    batch_shape = _batch_shape(operands, [operand.rows[cell[:, 0]] for operand in operands])
    layout = Layout(cell=cell, batch_shape=batch_shape, queries=operands[0].rows.shape[-1])
    return [_head_projection(recorder, operand, layout) for operand in operands], layout


def _head_projection(recorder: Recorder, operand: Operand, layout: Layout) -> HeadProjection:
    rows, features = operand.rows[layout.cell[:, 0]], operand.features[layout.cell[0]]
    if bool((rows.sort(dim=-1).values.diff(dim=-1) == 0).any()):
        raise unsupported(recorder.module, "each token must be used once in a block, got one that is repeated")
    found, factor = operand.projection, operand.factor
    if isinstance(factor, Tensor) and factor.dim() > 0:
        factor = factor[layout.cell]
        if not bool((factor == factor[:1]).all()):
            raise unsupported(
                recorder.module, "a factor must be the same for all items of the batch, got different ones"
            )
        factor = factor[0]
    check_constant(recorder, found.tokens, "projection weights and rotary positions", operand.constants)
    # Indexing copies, so later in-place changes of the model's tensors do not reach the block.
    tokens = found.rows(found.tokens)[rows].view(*layout.batch_shape, rows.shape[-1], -1)
    norm = None if operand.norm is None else _norm(recorder, operand.norm, features, factor, tokens.dtype)
    factor = factor if norm is None else 1.0
    weight = found.weight[:, features].movedim(0, 1)
    weight = weight * (factor[:, None] if isinstance(factor, Tensor) and factor.dim() > 0 else factor)
    bias = None if found.bias is None else found.bias[features] * factor
    rotation = None if operand.rotation is None else _rotation(recorder, operand.rotation, layout)
    return HeadProjection(
        tokens=tokens, weight=weight, bias=bias, source=found.tokens, rows=rows, rotation=rotation, norm=norm
    )


def _norm(
    recorder: Recorder, norm: Norm, features: Tensor, factor: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, float, frozenset[NormOver]]:
    """The norm of each head; `features` are sorted, `heads width`, and `factor` goes into the weights."""
    group, width = norm.group[features], features.shape[-1]
    of_head = bool((group == group[:, :1]).all()) and norm.size == width
    of_all = bool((group == group[:1, :1]).all()) and norm.size == len(features.unique())
    over: dict[NormOver, bool] = {"head": of_head, "all_heads": of_all}
    repeated = bool((features.sort(-1).values.diff(dim=-1) == 0).any())
    if repeated or not any(over.values()):
        raise unsupported(
            recorder.module,
            f"queries and keys must be normalised over the features of a head or of all heads, got {norm.size} "
            f"features together where a head has {width} of {len(features.unique())}",
        )
    return (
        (norm.weight[features] * factor).to(dtype),
        norm.eps,
        frozenset(name for name, holds in over.items() if holds),
    )


def _rotation(recorder: Recorder, rotation: Tensor, layout: Layout) -> Tensor:
    """Without its heads, and without the batch if it is the same for all."""
    rotation = rotation[layout.cell]
    if not bool((rotation == rotation[:, :1]).all()):
        raise unsupported(recorder.module, "rotary positions must be the same for all heads, got different ones")
    rotation = rotation[:, 0]
    if bool((rotation == rotation[:1]).all()):
        return rotation[0].clone()
    return rotation.view(*layout.batch_shape, *rotation.shape[1:])


def check_constant(recorder: Recorder, tokens: Tensor, name: str, constants: Iterable[Any]) -> None:
    """Refuse weights, masks or factors that were computed from the tokens: a block holds them fixed."""
    for constant in constants:
        if isinstance(constant, Tensor) and (recorder.is_stale(constant) or recorder.related(constant, tokens)):
            raise unsupported(
                recorder.module, f"the {name} must not depend on the tokens, got one that was computed from them"
            )


def _numbered(keys: Tensor) -> Tensor:
    """Equal rows get equal numbers, counted in the order of first appearance."""
    _, inverse = keys.unique(dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(inverse), dtype=torch.int64, device=keys.device)
    first = first.scatter_reduce(0, inverse, torch.arange(len(inverse), dtype=torch.int64, device=keys.device), "amin")
    return first.argsort().argsort()[inverse]


def _batch_shape(operands: list[Operand], rows: list[Tensor]) -> tuple[int, ...]:
    """The batch dimensions of the model's own tokens if these come in their own order; one dimension otherwise."""
    shapes = set()
    for operand, numbers in zip(operands, rows, strict=True):
        lead = list(operand.projection.tokens.shape)
        del lead[operand.projection.feature_dim]
        in_order = torch.equal(numbers.flatten(), torch.arange(numbers.numel(), device=numbers.device))
        fits = in_order and lead and lead[-1] == numbers.shape[-1] and operand.projection.feature_dim == -1
        shapes.add(tuple(lead[:-1]) if fits else None)
    (shape,) = shapes if len(shapes) == 1 else (None,)
    batches = len(rows[0])
    return shape if shape is not None and torch.Size(shape).numel() == batches else (batches,)
