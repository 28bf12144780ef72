"""A tensor entry by entry: which output feature of a projection each entry is, and of which token.

Projections that were added, put side by side, multiplied feature by feature or chained are one projection with other
weights (LoRA before it is merged, a bias added after reshaping, batch normalisation in evaluation, one layer a head).
"""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.decompositions import set_entries
from lipbounds.capture.linear_forms import FINE_DTYPES
from lipbounds.capture.projections import Projection, projection, unflattened
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.records import Invocation
from lipbounds.capture.replay import Step


# Steps between a projection and what is traced that leave each entry a feature of a token.
PLAIN = ("reindex", "same", "cast", "dropout", "scale", "combine", "shift")


@dc.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Entries:
    """Entry `e` of a tensor is `factor` times feature `index[e] % F` of token `index[e] // F` of the projection.

    Args:
        projection: with F output features.
        index: of the shape of the tensor.
        factor: one number.
        steps: that were followed.
        constants: the model's own tensors that the factor was read from.
        made_of: the ids of the results of the projections that went in.
        invocations: the modules that were running during the last projection.
        pure: features that stand twice in the tensor, once with another sign or factor, were not made two features.
    """

    projection: Projection
    index: Tensor
    factor: float | Tensor = 1.0
    steps: tuple[Step, ...] = ()
    constants: tuple[Tensor, ...] = ()
    made_of: frozenset[int] = frozenset()
    invocations: tuple[Invocation, ...] = ()
    pure: bool = True

    @property
    def width(self) -> int:
        """F, the number of output features."""
        return self.projection.weight.shape[1]

    @property
    def rows(self) -> Tensor:
        """The number of the token of each entry."""
        return self.index // self.width

    @property
    def features(self) -> Tensor:
        """The number of the feature of each entry."""
        return self.index % self.width

    def folded(self) -> Entries:
        """The same with factor 1."""
        if isinstance(self.factor, float) and self.factor == 1.0:
            return self
        factor, found = self.factor, self.projection
        bias = None if found.bias is None else found.bias * factor
        found = dc.replace(
            found, weight=found.weight * factor, bias=bias, constants=(*found.constants, *self.constants)
        )
        return dc.replace(self, projection=found, factor=1.0, constants=())


class Tracer:
    """Reads tensors as entries of projections, each once. Over 150 lines, because its rules call each other."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._known: dict[int, tuple[Tensor, Entries | None]] = {}

    def entries(self, tensor: Tensor) -> Entries | None:
        """`tensor` entry by entry; None if it is no projection of tokens."""
        if id(tensor) not in self._known:
            step = self.recorder.fresh_step(tensor)
            self._known[id(tensor)] = tensor, None if step is None else self._entries(tensor, step)
        return self._known[id(tensor)][1]

    def _entries(self, tensor: Tensor, step: Step) -> Entries | None:
        if step.kind == "call":
            return self._projected(tensor, step)
        if step.kind == "combine" or (step.kind == "shift" and step.function in ops.ADD):
            return self._combined(step)
        rounds = step.kind == "cast" and step.dtype not in FINE_DTYPES
        follows = step.kind in PLAIN and step.kind != "shift" and not rounds
        source = self.entries(step.source) if follows else None
        if source is None:
            return None
        source = dc.replace(source, steps=(*source.steps, step))
        if step.kind == "scale":
            return dc.replace(source, factor=source.factor * step.factor, constants=(*source.constants, *step.others))
        return dc.replace(source, index=step.again(source.index)) if step.kind == "reindex" else source

    def _projected(self, tensor: Tensor, step: Step) -> Entries | None:
        found = projection(step.function, step.args, step.kwargs, step.shape)
        if found is None or (step.function in ops.PRODUCT and not self.recorder.is_constant(found.constants[0])):
            return None
        record = self.recorder.record(tensor)
        return Entries(
            projection=unflattened(self.recorder, found),
            index=found.entry_index(),
            made_of=frozenset({id(tensor)}),
            invocations=() if record is None else record.invocations,
        )

    # -- several tensors in one ---------------------------------------------------------------------------------

    def _combined(self, step: Step) -> Entries | None:
        tensors = [tensor for tensor, _ in step.versions if tensor.numel() > 0]
        if step.function in ops.JOIN | ops.STACK:
            return self._joined(step, tensors)
        if step.function in ops.NEGATE:
            only = self.entries(tensors[0])
            return None if only is None else dc.replace(only, factor=-1.0 * only.factor, steps=(*only.steps, step))
        if step.function is set_entries or len(tensors) != 2:
            return None
        found = [self.entries(tensor) for tensor in tensors]
        sign = -1.0 if step.function in ops.SUBTRACT else 1.0
        if step.function in ops.MULTIPLY | ops.DIVIDE:
            return self._weighed(step, found, tensors)
        if found[0] is not None and found[1] is not None:
            return self._added(step, found[0], found[1], sign)
        return self._shifted(step, found, tensors, sign)

    def _weighed(self, step: Step, found: list[Entries | None], tensors: list[Tensor]) -> Entries | None:
        """Each feature times its own number."""
        side = 0 if found[0] is not None else 1
        source, other = found[side], tensors[1 - side]
        if source is None or found[1 - side] is not None or (side == 1 and step.function in ops.DIVIDE):
            return None
        if other.dim() > 1 and bool((source.rows == 0).all()):
            return None  # of one token, a rotation by its position looks like a factor for each feature
        other = other.to(source.projection.weight.dtype)
        return self._with_columns(
            source, step, 1 / other if step.function in ops.DIVIDE else other, None, [tensors[1 - side]]
        )

    def _shifted(self, step: Step, found: list[Entries | None], tensors: list[Tensor], sign: float) -> Entries | None:
        """Plus a constant, which goes into the bias."""
        side = 0 if found[0] is not None else 1
        source, other = found[side], tensors[1 - side]
        if source is None or not self.recorder.is_constant(other) or (side == 1 and sign < 0):
            return None
        return self._with_columns(source, step, None, sign * other.to(source.projection.weight.dtype), [other])

    def _with_columns(
        self, source: Entries, step: Step, times: Tensor | None, plus: Tensor | None, constants: list[Tensor]
    ) -> Entries | None:
        """A factor or a summand for each entry, if it is one for each feature (and head); else None."""
        source = source.folded()
        value = times if times is not None else plus
        assert value is not None
        index, value = source.index.expand(step.shape), value.expand(step.shape)
        columns = index % source.width
        kinds = _kinds(columns, value, index // source.width)
        if kinds is None:
            return None
        number, columns, values = kinds
        found = source.projection
        weight, bias = found.weight[:, columns], None if found.bias is None else found.bias[columns]
        if times is not None:
            weight, bias = weight * values, None if bias is None else bias * values
        else:
            bias = values if bias is None else bias + values
        rows = index // source.width
        found = dc.replace(found, weight=weight, bias=bias, constants=(*found.constants, *constants))
        return dc.replace(source, projection=found, index=rows * len(columns) + number, steps=(*source.steps, step))

    def _added(self, step: Step, first: Entries, second: Entries, sign: float) -> Entries | None:
        """The sum of two projections of the same tokens."""
        pair = self._of_same_tokens([first, second])
        if pair is None:
            return None
        first, second = (one.folded() for one in pair)
        one, other = (entries.index.expand(step.shape) for entries in (first, second))
        rows = one // first.width
        if not torch.equal(rows, other // second.width):
            return None
        kinds = _kinds(one % first.width, other % second.width, rows)
        if kinds is None:
            return None
        number, left, right = kinds
        a, b = first.projection, second.projection
        weight = a.weight[:, left] + sign * b.weight[:, right]
        biases = [factor * p.bias[c] for p, c, factor in ((a, left, 1.0), (b, right, sign)) if p.bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        found = dc.replace(a, weight=weight, bias=bias, constants=(*a.constants, *b.constants))
        return dc.replace(_with_history(first, [second], step), projection=found, index=rows * len(left) + number)

    def _joined(self, step: Step, tensors: list[Tensor]) -> Entries | None:
        """Side by side."""
        parts = [self.entries(tensor) for tensor in tensors]
        if any(part is None for part in parts):
            return None
        same = self._of_same_tokens([part for part in parts if part is not None])
        if same is None:
            return None
        projection_, indices = side_by_side([part.folded() for part in same])
        options = {name: value for name, value in step.kwargs.items() if name not in ("tensors", "out")}
        index = step.function(indices, *step.args[1:2], **options)
        whole = _with_history(same[0], same[1:], step)
        alike = all(part.factor is same[0].factor or part.factor == same[0].factor for part in same)
        return dc.replace(
            whole, projection=projection_, index=index, factor=1.0, constants=(), pure=whole.pure and alike
        )

    # -- projections of projections -----------------------------------------------------------------------------

    def _of_same_tokens(self, parts: list[Entries]) -> list[Entries] | None:
        """The parts as functions of the same tokens, where necessary through a projection before; None if of others."""
        ladders = [self.ladder(part) for part in parts]
        for first in ladders[0]:
            chosen = [first]
            for ladder in ladders[1:]:
                chosen += [one for one in ladder if self.same_tokens(one.projection, first.projection)][:1]
            if len(chosen) == len(parts):
                return chosen
        return None

    def ladder(self, entries: Entries) -> list[Entries]:
        """`entries`, the same as a function of what its tokens are a projection of, and so on."""
        found = [entries]
        while (further := self._one_earlier(found[-1])) is not None:
            found.append(further)
        return found

    def same_tokens(self, one: Projection, other: Projection) -> bool:
        """Whether two projections are of the same tokens."""
        if one.tokens is other.tokens:
            return one.feature_dim % one.tokens.dim() == other.feature_dim % other.tokens.dim()
        same = self.recorder.number(one.tokens) == self.recorder.number(other.tokens)
        return same and one.tokens.shape == other.tokens.shape and one.feature_dim == other.feature_dim

    def _one_earlier(self, entries: Entries) -> Entries | None:
        last = entries.projection
        before = self.entries(last.tokens)
        if before is None:
            return None
        before = before.folded()
        index = last.rows(before.index)
        rows, columns = index[:, 0] // before.width, index[0] % before.width
        if not torch.equal(index, rows[:, None] * before.width + columns):
            return None
        first = before.projection
        weight = first.weight[:, columns] @ last.weight
        bias = None if first.bias is None else first.bias[columns] @ last.weight
        if last.bias is not None:
            bias = last.bias if bias is None else bias + last.bias
        whole = dc.replace(first, weight=weight, bias=bias, constants=(*first.constants, *last.constants))
        moved = rows[entries.rows] * entries.width + entries.features
        return dc.replace(
            entries,
            projection=whole,
            index=moved,
            steps=(*before.steps, *entries.steps),
            made_of=entries.made_of | before.made_of,
        )


def side_by_side(parts: list[Entries]) -> tuple[Projection, list[Tensor]]:
    """One projection with the features of all parts, of the same tokens, and the indices of their entries in it."""
    distinct: list[Projection] = []
    for part in parts:
        if not any(part.projection is one for one in distinct):
            distinct.append(part.projection)
    if len(distinct) == 1:
        return distinct[0], [part.index for part in parts]
    widths = [one.weight.shape[1] for one in distinct]
    total, starts = sum(widths), [sum(widths[:i]) for i in range(len(widths))]
    first = distinct[0]
    bias = None
    if any(one.bias is not None for one in distinct):
        bias = torch.cat(
            [one.weight.new_zeros(one.weight.shape[1]) if one.bias is None else one.bias for one in distinct]
        )
    weight = torch.cat([one.weight for one in distinct], 1)
    whole = dc.replace(first, weight=weight, bias=bias, constants=tuple(c for one in distinct for c in one.constants))
    indices = []
    for part in parts:
        (place,) = [i for i, one in enumerate(distinct) if one is part.projection]
        indices.append(part.rows * total + starts[place] + part.features)
    return whole, indices


def _kinds(first: Tensor, second: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Numbers for the pairs that occur of a column and a value; None if there are more than a token has entries."""
    tokens = int(rows.max()) + 1
    if not _same_in_two_tokens(first, second, rows):
        return None
    a, b = first.reshape(-1), second.reshape(-1)
    _, b_number = b.unique(return_inverse=True)
    key = a * (int(b_number.max()) + 1) + b_number
    pairs, number = key.unique(return_inverse=True)
    if len(pairs) * tokens > max(first.numel(), tokens):
        return None
    place = torch.zeros(len(pairs), dtype=torch.long, device=a.device).scatter(
        0, number, torch.arange(len(a), device=a.device)
    )
    return number.view(first.shape), a[place], b[place]


def _same_in_two_tokens(first: Tensor, second: Tensor, rows: Tensor) -> bool:
    """Whether the pairs of the first and the last token are the same, which is soon seen."""
    sets = []
    for token in (int(rows.min()), int(rows.max())):
        chosen = rows == token
        sets.append(torch.stack([first[chosen].double(), second[chosen].double()]).unique(dim=1))
    return torch.equal(*sets)


def _with_history(first: Entries, others: list[Entries], step: Step) -> Entries:
    steps = (*first.steps, *(s for other in others for s in other.steps), step)
    made_of = first.made_of.union(*(other.made_of for other in others))
    pure = first.pure and all(other.pure for other in others)
    return dc.replace(first, steps=steps, made_of=made_of, pure=pure)
