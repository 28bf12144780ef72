"""Whether the file that shows a counterexample does: it is run before anyone is told to."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from lipbounds.registry import BoundSpec
from lipbounds.testing.snippet import NO_PATH


def why_not(source: str, spec: BoundSpec) -> str:
    """Run the source of a snippet in a namespace of its own; empty if it ends in a failed assertion, as it must.

    Args:
        source: Python source that must show a violation.
        spec: the bound, put where the source has a gap for one that cannot be imported by a path.

    Returns:
        What happened instead.
    """
    names: dict[str, Any] = {"__name__": "__counterexample__", "given": spec}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), torch.enable_grad():
            exec(compile(source.replace(f"spec = {NO_PATH}", "spec = given", 1), "counterexample.py", "exec"), names)
    except AssertionError:  # `Refuted` is one
        return ""
    except Exception as error:
        return f"it ends in {type(error).__name__}: {error}"
    return "it passes" + (f" and prints {printed.getvalue().strip()!r}" if printed.getvalue() else "")
