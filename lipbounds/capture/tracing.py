"""From the queries, keys and values of an attention call back to tokens, weights and heads."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from lipbounds.capture.linear_forms import Form, form_of
from lipbounds.capture.operands import Operand
from lipbounds.capture.projections import Projection, projection_of
from lipbounds.capture.qk_norm import norm_of, read_norm
from lipbounds.capture.recorded_calls import LINEAR, MOVES_AND_SCALES, Step, factor, reindex
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import QK_NORM, check_dropout, unfollowed_in_words, unsupported
from lipbounds.capture.rotations import turned


def trace(recorder: Recorder, tensor: Tensor, role: str, *, transposed: bool = False, repeats: int = 1) -> Operand:
    """Find the projection behind the queries, keys or values of a call, and which token and feature went where.

    The steps between projection and call are not interpreted: they are run again on the token numbers and on the
    feature numbers. Whatever layout the model chose, the result says which weight belongs to which head.

    Args:
        recorder: of the run.
        tensor: shape `*lead n width`.
        role: "queries", "keys" or "values", for messages.
        transposed: `tensor` has the shape `*lead width n` instead.
        repeats: how often each head is used (grouped-query attention).
    """
    root, chain = recorder.walk(tensor, MOVES_AND_SCALES)
    found = projection_of(recorder, root)
    if found is None:
        return _trace_form(recorder, tensor, role, transposed, repeats)
    check_dropout(recorder.module, chain)
    index = [reindex(chain, table) for table in (found.row_index(), found.feature_index())]
    rows, features = (_in_rows(table, transposed, repeats) for table in index)
    mixed = (rows != rows[..., :1]).any() | (features != features[..., :1, :]).any()
    if bool(mixed) or rows.shape[-2:] != (tensor.mT if transposed else tensor).shape[-2:]:
        raise _tokens_mixed(recorder, role)
    record = recorder.record(root)
    return Operand(
        projection=found,
        rows=rows[..., 0],
        features=features[..., 0, :],
        factor=factor(chain),
        constants=(*found.constants, *(other for step in chain if step.kind == "scale" for other in step.others)),
        invocations=() if record is None else record.invocations,
    )


def _trace_form(recorder: Recorder, tensor: Tensor, role: str, transposed: bool, repeats: int) -> Operand:
    """As `trace`, where features were normalised, or added to each other, as rotary positions do."""
    root, form, found, chain = _form(recorder, tensor, role)
    check_dropout(recorder.module, form.steps)
    _check_no_norm(recorder, root, form, role)
    refuse, norm, tables = partial(_refuse, recorder, role), None, (found.row_index(), found.feature_index())
    if chain:
        norm, of_features, of_rows = read_norm(chain, tables[1], tables[0], recorder.fresh_step, refuse)
        tables = of_rows, of_features
    index = torch.stack([_in_rows(index, transposed, repeats) for index, _ in form.terms])
    coefficients = torch.stack([_in_rows(coefficient, transposed, repeats) for _, coefficient in form.terms])
    rows, features = (table.flatten()[index] for table in tables)
    if bool((rows != rows[:1, ..., :1]).any()):
        raise _tokens_mixed(recorder, role)
    eps = torch.finfo(tensor.dtype).eps
    sorted_ = turned(features, coefficients, eps, refuse)
    if role == "values" and norm is not None:
        refuse("they must not be normalised")
    if role == "values" and sorted_.rotation is not None:
        refuse("they must not be turned by positions")
    record, dtype = recorder.record(root), found.tokens.dtype
    return Operand(
        projection=found,
        rows=rows[0, ..., 0],
        features=sorted_.features,
        factor=1.0 if bool((sorted_.gain == 1).all()) else sorted_.gain.to(dtype),
        rotation=None if sorted_.rotation is None else sorted_.rotation.to(dtype),
        order=sorted_.order,
        norm=norm,
        dtypes=tuple({step.dtype for step in (*chain, *form.steps) if step.dtype.is_floating_point}),
        constants=(*found.constants, *form.constants, *(() if norm is None else norm.constants)),
        invocations=() if record is None else record.invocations,
    )


def _form(recorder: Recorder, tensor: Tensor, role: str) -> tuple[Tensor, Form, Projection, list[Step]]:
    """The result of the projection behind `tensor`, `tensor` as linear forms, and the steps of a norm in between.

    The forms are in the result of the norm if there is one, else in that of the projection.
    """
    start = root = recorder.projected(tensor)
    found, chain = None, []
    if root is not None:
        start, chain = norm_of(recorder, root) or (root, [])
        found = projection_of(recorder, start)
    form = recorder.walk(tensor, LINEAR)[0] if root is None or found is None else form_of(recorder, tensor, root)
    if root is None or start is None or found is None or isinstance(form, Tensor):
        ended = start if chain and found is None else form
        assert isinstance(ended, Tensor)
        raise unsupported(
            recorder.module,
            f"the {role} must come from a linear projection of the tokens through re-indexing, scaling, RMSNorm and "
            f"rotary positions only, got {unfollowed_in_words(recorder, ended)}",
        )
    return start, form, found, chain


def _check_no_norm(recorder: Recorder, root: Tensor, form: Form, role: str) -> None:
    """Refuse factors that were computed from the projection itself."""
    origin = recorder.origin(root)
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
