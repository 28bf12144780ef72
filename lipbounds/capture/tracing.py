"""From the queries, keys and values of an attention call back to tokens, weights and heads."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from lipbounds.capture.entries import Entries, Tracer, side_by_side
from lipbounds.capture.linear_forms import Form, form_of, linear_leaves
from lipbounds.capture.operands import Operand
from lipbounds.capture.qk_norm import Norm, norm_of, read_norm
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import QK_NORM, check_dropout, unfollowed_in_words, unsupported
from lipbounds.capture.replay import Step, numbers_in
from lipbounds.capture.rotations import turned


def trace(tracer: Tracer, tensor: Tensor, role: str, *, transposed: bool = False, repeats: int = 1) -> list[Operand]:
    """Find the projection behind the queries, keys or values of a call, and which token and feature went where.

    The steps between projection and call are not interpreted: they are run again on the token numbers and on the
    feature numbers. Whatever layout the model chose, the result says which weight belongs to which head.

    Args:
        tracer: of the run.
        tensor: shape `*lead n width`.
        role: "queries", "keys" or "values", for messages.
        transposed: `tensor` has the shape `*lead width n` instead.
        repeats: how often each head is used (grouped-query attention).

    Returns:
        What was found; where the tokens are a projection themselves, also as a function of what they were made of.
    """
    recorder = tracer.recorder
    entries = tracer.entries(tensor)
    if entries is None:
        return [_trace_form(tracer, tensor, role, transposed, repeats)]
    check_dropout(recorder.module, entries.steps)
    found = []
    for one in tracer.ladder(entries):
        rows, features = (_in_rows(table, transposed, repeats) for table in (one.rows, one.features))
        mixed = (rows != rows[..., :1]).any() | (features != features[..., :1, :]).any()
        if bool(mixed) or rows.shape[-2:] != (tensor.mT if transposed else tensor).shape[-2:]:
            if found:
                break
            raise _tokens_mixed(recorder, role)
        operand = Operand(
            projection=one.projection,
            rows=rows[..., 0],
            features=features[..., 0, :],
            factor=one.factor,
            dtypes=_dtypes(one.steps),
            numbers=numbers_in(one.steps),
            constants=(*one.projection.constants, *one.constants),
            invocations=one.invocations,
        )
        found.append(operand)
    return found


def _dtypes(steps: Iterable[Step]) -> tuple[torch.dtype, ...]:
    return tuple({step.dtype for step in steps if step.dtype.is_floating_point})


def _trace_form(tracer: Tracer, tensor: Tensor, role: str, transposed: bool, repeats: int) -> Operand:
    """As `trace`, where features were normalised, or added to each other, as rotary positions do."""
    recorder, refuse = tracer.recorder, partial(_refuse, tracer.recorder, role)
    leaves, between = _leaves(tracer, tensor, role)
    source, norm, tables, chain = _source(tracer, leaves, role, refuse)
    form = form_of(recorder, tensor, dict(zip(map(id, leaves), tables, strict=True)), between)
    check_dropout(recorder.module, [*source.steps, *chain, *form.steps])
    _check_no_norm(recorder, leaves[0], form, role)
    index = torch.stack([_in_rows(index, transposed, repeats) for index, _ in form.terms])
    coefficients = torch.stack([_in_rows(coefficient, transposed, repeats) for _, coefficient in form.terms])
    index = _without_blanks(index, coefficients, source.width)
    rows, features = index // source.width, index % source.width
    if bool((rows != rows[:1, ..., :1]).any()):
        raise _tokens_mixed(recorder, role)
    eps = torch.finfo(tensor.dtype).eps
    sorted_ = turned(features, coefficients, eps, refuse)
    if role == "values" and norm is not None:
        refuse("they must not be normalised")
    if role == "values" and sorted_.rotation is not None:
        refuse("they must not be turned by positions")
    found, dtype = source.projection, source.projection.tokens.dtype
    return Operand(
        projection=found,
        rows=rows[0, ..., 0],
        features=sorted_.features,
        factor=1.0 if bool((sorted_.gain == 1).all()) else sorted_.gain.to(dtype),
        rotation=None if sorted_.rotation is None else sorted_.rotation.to(dtype),
        order=sorted_.order,
        norm=norm,
        dtypes=_dtypes([*source.steps, *chain, *form.steps]),
        numbers=numbers_in([*source.steps, *chain, *form.steps]),
        constants=(*found.constants, *form.constants, *(() if norm is None else norm.constants)),
        invocations=source.invocations,
    )


def _leaves(tracer: Tracer, tensor: Tensor, role: str) -> tuple[list[Tensor], list[Tensor]]:
    """What `tensor` is a linear form in: projections, or the result of a norm; and the tensors in between."""
    recorder = tracer.recorder

    def is_leaf(one: Tensor) -> bool:
        if norm_of(recorder, one) is not None:
            return True
        entries = tracer.entries(one)
        return entries is not None and entries.pure and isinstance(entries.factor, float) and entries.factor == 1.0

    found = linear_leaves(recorder, tensor, is_leaf)
    if isinstance(found, Tensor):
        raise _no_projection(recorder, found, role)
    return found


def _source(
    tracer: Tracer, leaves: list[Tensor], role: str, refuse: Callable[[str], NoReturn]
) -> tuple[Entries, Norm | None, list[Tensor], list[Step]]:
    """The projection behind the leaves, their norm, the entry of the projection each of their entries is, and steps."""
    recorder = tracer.recorder
    normed = norm_of(recorder, leaves[0])
    if normed is None:
        parts = [tracer.entries(leaf) for leaf in leaves]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or any(not tracer.same_tokens(p.projection, known[0].projection) for p in known):
            refuse("what is added must be made of one projection, or of projections of the same tokens")
        projection, tables = side_by_side([part.folded() for part in known])
        steps = tuple(step for part in known for step in part.steps)
        return dc.replace(known[0].folded(), projection=projection, steps=steps), None, tables, []
    if len(leaves) > 1:
        refuse("what is added must be normalised together")
    start, chain = normed
    source = tracer.entries(start)
    if source is None:
        raise _no_projection(recorder, start, role)
    source = source.folded()
    norm, features, rows = read_norm(chain, source.features, source.rows, recorder.fresh_step, refuse)
    return source, norm, [rows * source.width + features], chain


def _without_blanks(index: Tensor, coefficients: Tensor, width: int) -> Tensor:
    """Terms with coefficient 0 of other tokens count as terms of the token that the others are of."""
    rows = index // width
    main = index.gather(0, coefficients.abs().argmax(0, keepdim=True))
    return torch.where((coefficients == 0) & (rows != main // width), main, index)


def _no_projection(recorder: Recorder, ended: Tensor, role: str) -> Exception:
    return unsupported(
        recorder.module,
        f"the {role} must come from a linear projection of the tokens through re-indexing, scaling, RMSNorm and "
        f"rotary positions only, got {unfollowed_in_words(recorder, ended)}",
    )


def _check_no_norm(recorder: Recorder, root: Tensor, form: Form, role: str) -> None:
    """Refuse factors that were computed from the projection itself."""
    base = recorder.projected(root)
    origin = recorder.origin(root if base is None else base)
    for constant in form.constants:
        if origin is not None and origin in recorder.ancestors(constant, since=origin.time):
            _refuse(recorder, role, f"they must be linear in the tokens, got factors computed from them; {QK_NORM}")


def _in_rows(table: Tensor, transposed: bool, repeats: int) -> Tensor:
    table = table.mT if transposed else table
    return table.repeat_interleave(repeats, -3) if repeats > 1 else table


def _refuse(recorder: Recorder, role: str, reason: str) -> NoReturn:
    raise unsupported(
        recorder.module, f"the {role} are more than projected, normalised and turned by positions: {reason}"
    )


def _tokens_mixed(recorder: Recorder, role: str) -> Exception:
    return unsupported(
        recorder.module, f"each row of the {role} of a head must hold features of one token, got tokens mixed"
    )
