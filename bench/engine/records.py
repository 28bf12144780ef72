"""One record = one evaluation: what was asked, what came out, and the key that tells whether it was asked before.

In the file (bench/engine/store.py) records are JSON objects, one a line. Non-finite numbers are written as the strings
"inf", "-inf" and "nan", which keeps the file valid JSON. Fields that hold nothing are left out.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
from functools import cached_property
from typing import Any, Literal

from lipbounds.errors import LipboundsError
from lipbounds.files import without_infinities as without_infinities


SCHEMA_VERSION = 1
KEY_LENGTH = 16  # hexadecimal digits: 64 bits, far from collisions at any number of records here
Status = Literal["ok", "failed", "timeout", "unsupported"]


class RecordError(LipboundsError):
    """A file of records cannot be read or written as it is."""


@dc.dataclass(frozen=True, kw_only=True)
class Question:
    """Everything that determines a result; the key is the hash of it.

    Args:
        task: name of the benchmark task.
        model: name of the model.
        model_hash: content hash of its weights.
        layer: number of the attention block among those of the model, from 0.
        module: qualified name of the module, or what else tells the blocks apart; empty for the model itself.
        input: name of the input.
        input_hash: content hash of the input.
        bound: name of the bound or estimator.
        bound_version: its version.
        norm: norm of the promise.
        radius: radius of the ball or set, None for the scopes `point` and `global`.
        dtype: of the block that was bounded.
        device: device type.
        seed: of the method's own random numbers, None if it has none.
        options: the method's other options, with their values.
    """

    task: str
    model: str
    model_hash: str
    layer: int
    module: str = ""
    input: str
    input_hash: str
    bound: str
    bound_version: int
    norm: str
    radius: float | None = None
    dtype: str
    device: str
    seed: int | None = None
    options: dict[str, Any] = dc.field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Content hash of all fields."""
        return content_hash({field.name: getattr(self, field.name) for field in dc.fields(self)})


@dc.dataclass(frozen=True, kw_only=True)
class Record:
    """The answer to a question.

    Args:
        question: what was evaluated.
        tokens: number of queries of the block.
        heads: number of its heads.
        kind: kind of the promise: proved, probable, estimate or lower.
        scope: point, ball, change, compact or global.
        relative_radius: the radius in units of the input, see bench.workloads.radii; None for the scopes without one.
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
    kind: str
    scope: str
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
        """All fields with the key and the schema version, but for those that hold nothing."""
        answer = {field.name: getattr(self, field.name) for field in dc.fields(self) if field.name != "question"}
        fields = {"schema_version": SCHEMA_VERSION, "key": self.question.key, **dc.asdict(self.question), **answer}
        return {name: value for name, value in fields.items() if value not in (None, {}, "")}

    def _check_types(self) -> None:
        """Refuse what was not written by `to_dict`; the question needs no check, for the key is its hash."""
        types = {
            str: ("kind", "scope", "status", "error", "environment"),
            int: ("tokens", "heads"),
            int | float: (
                "seconds",
                *(name for name in ("relative_radius", "delta") if getattr(self, name) is not None),
            ),
        }
        for wanted, names in types.items():
            for name in names:
                if not isinstance(getattr(self, name), wanted):
                    raise TypeError(f"{name}={getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Record:
        """The record that `to_dict` took apart.

        Args:
            fields: as parsed from JSON.

        Raises:
            RecordError: a field is missing, unknown or of another type, or the key does not fit the fields.
        """
        fields = {name: value for name, value in fields.items() if name != "schema_version"}
        key = fields.pop("key", None)
        asked = {field.name for field in dc.fields(Question)}
        try:
            for name in ("terms", "details"):
                fields[name] = {term: float(value) for term, value in fields.get(name, {}).items()}
            if "value" in fields:
                fields["value"] = float(fields["value"])
            question = Question(**{name: value for name, value in fields.items() if name in asked})
            record = cls(question=question, **{name: value for name, value in fields.items() if name not in asked})
            record._check_types()
            wanted = question.key
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecordError(
                f"a record must have the fields of schema version {SCHEMA_VERSION}, got {error}."
            ) from error
        if key != wanted:
            raise RecordError(
                f"the key must be the hash of the record's fields, {wanted}, got key={key!r}; the line was "
                "edited: delete it and run `python -m bench` again."
            )
        return record


def content_hash(content: Any) -> str:
    """Hash of anything JSON can hold; dictionaries in any order hash alike."""
    return hashlib.sha256(to_json(content, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def to_json(content: Any, **options: Any) -> str:
    """Compact JSON of one line, non-finite numbers as strings."""
    return json.dumps(
        without_infinities(content), separators=(",", ":"), ensure_ascii=False, allow_nan=False, **options
    )


def check_schema(fields: dict[str, Any], place: str) -> None:
    """Refuse what another version of this program wrote.

    Args:
        fields: the parsed line or file.
        place: where it stands, for the message.

    Raises:
        RecordError: the schema version is missing, older or newer.
    """
    version = fields.get("schema_version")
    if version == SCHEMA_VERSION:
        return
    wanted = f"{place} must have schema_version={SCHEMA_VERSION}, got schema_version={version!r}"
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RecordError(f"{wanted}: it was written by a newer version; update lipbounds to read it.")
    raise RecordError(
        f"{wanted}: it was written by an older version, and no migration from there exists; move the file away and run "
        "`python -m bench`, which computes everything again, or read it with the commit named in its environment lines."
    )
