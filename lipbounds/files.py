"""Writing files: whole or not at all, and JSON that every parser reads."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers and killed runs see the old or the new content, never a part.

    Args:
        path: of the file; its folder is made if missing.
        content: of the whole file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(content: Any) -> str:
    """JSON over several lines, ending in a line break.

    Args:
        content: what JSON can hold, and non-finite numbers, which are written as the strings "inf", "-inf" and "nan".
    """
    return json.dumps(without_infinities(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def without_infinities(content: Any) -> Any:
    """The content with non-finite numbers as strings, and tuples as lists.

    Args:
        content: what JSON can hold, and non-finite numbers.
    """
    if isinstance(content, dict):
        return {name: without_infinities(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_infinities(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
