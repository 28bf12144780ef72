"""Values of a new version of a bound that follow from recorded ones: what took hours is not computed twice."""

from __future__ import annotations

import dataclasses as dc

from bench.engine.records import Question, Record
from bench.engine.store import Store


# A version of a bound that is by its definition the least of what these return, to the last bit.
LEAST_OF = {("sharp", 4): (("sharp", 3), ("sharp_fast", 3))}


def following(store: Store, asked: Question) -> Record | None:
    """The answer that follows from recorded answers of other bounds or versions; None where it does not.

    The environment is that of the first of them; the details name all, and the seconds are those of all together.

    Args:
        store: what is known.
        asked: a question that is not in it.
    """
    named = LEAST_OF.get((asked.bound, asked.bound_version), ())
    found = [store.record(dc.replace(asked, bound=name, bound_version=version).key) for name, version in named]
    known = [record for record in found if record is not None and record.status == "ok" and record.value is not None]
    if not known or len(known) < len(named):
        return None
    values = {
        f"{name}, version {version}": float(record.value or 0.0)
        for (name, version), record in zip(named, known, strict=True)
    }
    return dc.replace(
        known[0],
        question=asked,
        value=min(values.values()),
        terms={},
        details=values,
        seconds=sum(record.seconds for record in known),
    )
