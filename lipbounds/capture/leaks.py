"""Values that leave torch: a block must not hold one fixed that was computed from its tokens."""

from __future__ import annotations

from lipbounds.capture import operations as ops
from lipbounds.capture.blocks import Call
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.records import Leak
from lipbounds.capture.refusals import function_name, unsupported


def check_leaks(recorder: Recorder, call: Call) -> None:
    """Refuse a block in whose module a value that was computed from its tokens left torch, or that such a value is in.

    Args:
        recorder: of the run.
        call: of the block, which is complete now.
    """
    now = recorder.now()
    for leak in recorder.leaks:
        inside = call.start <= leak.time <= now
        if not inside and leak.value not in call.numbers:
            continue
        if any(not recorder.ancestors_of(leak.origin).isdisjoint(recorder.ancestors(one)) for one in call.sources):
            raise unsupported(
                call.module,
                f"{function_name(leak.function)} takes a value out of torch that was computed from the tokens, so that "
                "the block would hold it fixed; keep it a tensor",
            )


def warnings_of(recorder: Recorder) -> list[str]:
    """What is to be said of values that left torch elsewhere."""
    return [*dict.fromkeys(map(_warning, recorder.leaks))]


def _warning(leak: Leak) -> str:
    place = f"in {leak.module!r}" if leak.module else "in the model itself"
    what = "decides what is run" if leak.function in ops.DECIDE else "may have gone into a block"
    return (
        f"{place}, {function_name(leak.function)} takes a value out of torch that was computed from the input; where "
        f"it {what}, bounds hold it fixed"
    )
