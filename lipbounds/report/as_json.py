"""A report as JSON, with the texts that the page shows, and back."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Callable
from typing import Any

from lipbounds.claims import KINDS, NORMS, SCOPES
from lipbounds.errors import InvalidInput
from lipbounds.report.patches import Grid, Picture
from lipbounds.report.schema import (
    SCHEMA_VERSION,
    HeadReport,
    InputReport,
    LayerReport,
    ModelReport,
    Number,
    SkippedReport,
    least_at_point,
    ratio,
    shown,
)
from lipbounds.report.summary import fragile_heads, fragile_layer, fragile_tokens, notes_of, summary


def to_dict(report: ModelReport) -> dict[str, Any]:
    """What the JSON file and the page hold; non-finite numbers are the strings "inf" and "-inf".

    Beside the fields of the report: `shown`, the text of a number on the page; `bound`, the smallest proved bound;
    `ratio`, that over the lower bound; `cells`, what the table says of a head; and the words of the promises.

    Args:
        report: from `measure`.
    """
    words = {"kinds": KINDS, "scopes": SCOPES, "norms": NORMS}
    return {"schema_version": SCHEMA_VERSION, **_fields(report, inputs=[*map(_input, report.inputs)]), "words": words}


def to_json(report: ModelReport) -> str:
    """The report as a JSON text.

    Args:
        report: from `measure`.
    """
    return json.dumps(to_dict(report), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> ModelReport:
    """The report that `to_json` wrote.

    Args:
        text: of the file.

    Raises:
        InvalidInput: another version of the format, or not such a file.
    """
    try:
        content = json.loads(text)
        version = content["schema_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidInput(f"text must be a report written by to_json, got something else ({error}).") from error
    if version != SCHEMA_VERSION:
        raise InvalidInput(f"the report must have schema_version {SCHEMA_VERSION}, got {version}; write it anew.")
    return _read(ModelReport, content)


def _input(run: InputReport) -> dict[str, Any]:
    heads = [{"layer": position, "head": head} for position, head in fragile_heads(run)]
    return {
        **_fields(
            run,
            layers=[*map(_layer, run.layers)],
            skipped=[*map(_fields, run.skipped)],
            picture=None if run.picture is None else dc.asdict(run.picture),
        ),
        "summary": summary(run),
        "notes": notes_of(run),
        "fragile_layer": fragile_layer(run),
        "fragile_heads": heads,
    }


def _layer(layer: LayerReport) -> dict[str, Any]:
    return {
        **_fields(
            layer,
            heads=[*map(_head, layer.heads)],
            grid=None if layer.grid is None else dc.asdict(layer.grid),
        ),
        **_derived(layer),
        "fragile_tokens": fragile_tokens(layer),
    }


def _head(head: HeadReport) -> dict[str, Any]:
    derived = _derived(head)
    cells = {
        "constant": _number(head.constant),
        "bound": derived["bound"],
        "ratio": derived["ratio"],
        "g_1": _plain(max(head.g_1), "proved"),
        "entropy": _plain(head.entropy, "estimate"),
        "sink_share": _plain(head.sink_share, "estimate"),
    }
    return {**_fields(head), **derived, "cells": cells}


def _derived(part: LayerReport | HeadReport) -> dict[str, Any]:
    return {"bound": _number(least_at_point(part)), "ratio": _number(ratio(part))}


def _plain(value: float, kind: Any) -> dict[str, Any]:
    return {"value": value, "kind": kind, "shown": shown(value, kind)}


def _number(number: Number | None) -> dict[str, Any] | None:
    if number is None:
        return None
    return {field.name: _finite(getattr(number, field.name)) for field in dc.fields(number)} | {"shown": number.shown}


def _fields(part: Any, **replaced: Any) -> dict[str, Any]:
    """The fields of a dataclass, numbers with their texts."""
    found: dict[str, Any] = {}
    for field in dc.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, tuple) and value and isinstance(value[0], Number):
            value = [*map(_number, value)]
        found[field.name] = _number(value) if isinstance(value, Number) else value
    return found | replaced


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _read(kind: Callable[..., Any], content: dict[str, Any]) -> Any:
    """A dataclass from its fields, whatever else is there."""
    parts = {"inputs": InputReport, "layers": LayerReport, "heads": HeadReport, "skipped": SkippedReport}
    parts |= {"picture": Picture, "grid": Grid}
    parts |= {name: Number for name in ("proved", "constant", "lower", "balls", "tokens")}
    values: dict[str, Any] = {}
    for field in dc.fields(kind):  # pyright: ignore[reportArgumentType]  # every part is a dataclass
        if field.name not in content and field.default is not dc.MISSING:
            continue  # a file from before there was this field
        value = content[field.name]
        part = parts.get(field.name)
        if isinstance(value, list):
            values[field.name] = tuple(_read(part, entry) for entry in value) if part else _as_tuples(value)
        else:
            values[field.name] = _read(part, value) if part and value is not None else value
    if kind is Number:
        values["value"] = float(values["value"])
    return kind(**values)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
