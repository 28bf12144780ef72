"""One record = one evaluation: what was asked, what came out, and the key that tells whether it was asked before.

A record is what the tasks on attention blocks keep in the store (bench/engine/store.py). Non-finite numbers are written
as the strings "inf", "-inf" and "nan", which keeps the file valid JSON. Fields that hold nothing are left out.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
from functools import cached_property
from typing import Any, Literal

from lipbounds.bound_spec import NOT_COVERED
from lipbounds.errors import LipboundsError
from lipbounds.files import without_infinities as without_infinities


SCHEMA_VERSION = 2
UNCOVERED_IN_OLD_RECORDS = "makes no promise for a block with"  # what version 0.1 said
KEY_LENGTH = 16  # hexadecimal digits: 64 bits, far from collisions at any number of records here
Status = Literal["ok", "failed", "timeout", "unsupported"]


class RecordError(LipboundsError):
    """A file of records cannot be read or written as it is."""


class NotAnswered(RecordError):
    """A question whose answer is not in the records."""


@dc.dataclass(frozen=True, kw_only=True)
class Question:
    """Everything that determines a result, as it was asked and never as a processor rounded it; the key is its hash.

    Args:
        task: name of the benchmark task.
        model: name of the model.
        model_hash: content hash of its weights, or of the recipe of weights that are drawn.
        layer: number of the attention block among those of the model, from 0.
        input: name of the input.
        input_hash: content hash of the raw input, or of the recipe of an input that is drawn.
        bound: name of the bound or estimator.
        bound_version: its version.
        norm: norm of the promise.
        radius: radius of the ball or set, None for the scopes `point` and `global`.
        unit: of the radius: `one`, or a norm of the input's tokens, see bench.workloads.radii; empty without a radius.
        dtype: of the block that was bounded.
        device: device type.
        seed: of the method's own random numbers, None if it has none.
        options: the method's other options, with their values.
    """

    task: str
    model: str
    model_hash: str
    layer: int
    input: str
    input_hash: str
    bound: str
    bound_version: int
    norm: str
    radius: float | None = None
    unit: str = ""
    dtype: str
    device: str
    seed: int | None = None
    options: dict[str, Any] = dc.field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Content hash of all fields that hold something."""
        return content_hash(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All fields, but for those that hold nothing."""
        fields = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        return {name: value for name, value in fields.items() if value not in (None, {}, "")}


@dc.dataclass(frozen=True, kw_only=True)
class Record:
    """The answer to a question.

    Args:
        question: what was evaluated.
        tokens: number of queries of the block.
        heads: number of its heads.
        module: qualified name of its module, or what else tells the blocks apart.
        kind: kind of the promise: proved, probable, estimate or lower.
        scope: point, ball, change, compact or global.
        radius: the radius itself, in the l2 norm; None for the scopes without one.
        relative_radius: the same in units of the input, see bench.workloads.radii.
        delta: probability of failure of a probable bound.
        value: the number; None unless the status is ok.
        terms: the parts of the value; of a part with one entry a head or row, the mean.
        details: what a reader needs to judge the value, likewise.
        seconds: wall time of the evaluation, once and without warm-up.
        status: ok, failed, timeout or unsupported.
        error: the text of the error unless the status is ok.
        environment: id of the environment line that the record belongs to.
    """

    question: Question
    tokens: int
    heads: int
    module: str = ""
    kind: str
    scope: str
    radius: float | None = None
    relative_radius: float | None = None
    delta: float | None = None
    value: float | None = None
    terms: dict[str, float] = dc.field(default_factory=dict)
    details: dict[str, float] = dc.field(default_factory=dict)
    seconds: float
    status: Status
    error: str = ""
    environment: str

    @property
    def settled(self) -> bool:
        """Whether asking again is pointless: failures and time limits are tried again."""
        return self.status in ("ok", "unsupported")

    def to_dict(self) -> dict[str, Any]:
        """The fields of the answer, but for those that hold nothing."""
        fields = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        fields = {name: value for name, value in fields.items() if name not in ("question", "environment")}
        return {name: value for name, value in fields.items() if value not in (None, {}, "")}

    @classmethod
    def from_dict(cls, asked: dict[str, Any], answer: dict[str, Any], environment: str) -> Record:
        """The record that `Question.to_dict` and `to_dict` took apart.

        Args:
            asked: the fields of the question.
            answer: those of the answer.
            environment: id of the environment line.

        Raises:
            RecordError: a field is missing, unknown or of another type.
        """
        try:
            numbers = {name: float(answer[name]) for name in ("value", "radius", "relative_radius") if name in answer}
            parts: dict[str, Any] = {
                name: {term: float(value) for term, value in answer.get(name, {}).items()}
                for name in ("terms", "details")
            }
            fields: dict[str, Any] = {**answer, **numbers, **parts}
            if "error" in answer:
                fields["error"] = answer["error"].replace(UNCOVERED_IN_OLD_RECORDS, NOT_COVERED)
            record = cls(question=Question(**asked), environment=environment, **fields)
            record._check_types()
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecordError(
                f"a record must have the fields of schema version {SCHEMA_VERSION}, got {error}; restore the file."
            ) from error
        return record

    def _check_types(self) -> None:
        """Refuse what was not written by `to_dict`."""
        for name in ("kind", "scope", "status", "error", "module"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r}")
        for name in ("tokens", "heads"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name}={getattr(self, name)!r}")
        for name in ("seconds", "delta"):
            if not isinstance(getattr(self, name), int | float | None):
                raise TypeError(f"{name}={getattr(self, name)!r}")
        if self.seconds is None:
            raise TypeError("seconds=None")


def content_hash(content: Any) -> str:
    """Hash of anything JSON can hold; dictionaries in any order hash alike."""
    return hashlib.sha256(to_json(content, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def to_json(content: Any, **options: Any) -> str:
    """Compact JSON of one line, non-finite numbers as strings."""
    return json.dumps(
        without_infinities(content), separators=(",", ":"), ensure_ascii=False, allow_nan=False, **options
    )


def check_schema(fields: dict[str, Any], place: str, wanted_version: int = SCHEMA_VERSION) -> None:
    """Refuse what another version of this program wrote.

    Args:
        fields: the parsed line or file.
        place: where it stands, for the message.
        wanted_version: of its structure.

    Raises:
        RecordError: the schema version is missing, older or newer.
    """
    version = fields.get("schema_version")
    if version == wanted_version and not isinstance(version, bool):
        return
    wanted = f"{place} must have schema_version={wanted_version}, got schema_version={version!r}"
    if isinstance(version, int) and version > wanted_version:
        raise RecordError(f"{wanted}: it was written by a newer version; update lipbounds to read it.")
    raise RecordError(f"{wanted}: it was written by an older version; run `python -m bench migrate` to bring it here.")
