"""Writing files: whole or not at all, and JSON that every parser reads."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lipbounds.errors import InvalidInput


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers and killed runs see the old or the new content, never a part.

    Args:
        path: of the file; its folder is made if missing.
        content: of the whole file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_special(path):
        try:
            # A pipe without a reader is an error then, where a plain open would wait for one.
            handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            os.set_blocking(handle, True)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        except OSError as error:  # of a write, which knows no name
            raise OSError(error.errno, error.strerror, str(path)) from error
        return
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a path that no file can be written to, before the work whose result it is meant for.

    Args:
        path: of the file; its folder is made if missing, as it would be later.

    Raises:
        InvalidInput: it is a folder, or no file can be made there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if not _is_special(path):
            _beside(path).touch()
            _beside(path).unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"a file must be written, got the path '{path}' ({reason}); pass another path.") from error


def refuse_pipe(path: Path) -> None:
    """Refuse to read a named pipe, whose other end may never come; those that a shell opens under /dev have one.

    Args:
        path: to read.

    Raises:
        InvalidInput: it is one.
    """
    try:
        is_pipe = path.is_fifo() and path.parts[:2] != ("/", "dev")
    except (OSError, ValueError):  # no path at all, which whoever opens it will say
        return
    if is_pipe:
        raise InvalidInput(f"'{path}' must be a file, got a named pipe, which waits for ever; pass another path.")


def _is_special(path: Path) -> bool:
    """Such as /dev/stdout, which is written to and never replaced."""
    return path.exists() and not path.is_file()


def _beside(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name}.{os.getpid()}.tmp")


def json_text(content: Any) -> str:
    """JSON over several lines, in ASCII, ending in a line break.

    Args:
        content: what JSON can hold, and non-finite numbers, which are written as the strings "inf", "-inf" and "nan".
    """
    return json.dumps(without_infinities(content), indent=2, allow_nan=False) + "\n"


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
