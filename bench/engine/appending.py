"""A file of lines that one process at a time appends to: its lock, and what a killed run left of its last line."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path

from bench.engine.records import RecordError


if sys.platform != "win32":
    import fcntl


def opened(path: Path) -> int:
    """A descriptor to append with, locked until it is closed or the process ends; not locked on Windows."""
    if path.is_symlink() and not path.exists():
        raise OSError(f"it is a link to {os.readlink(path)}, which does not exist")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is a folder" if path.is_dir() else "it is no regular file")
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        if sys.platform == "win32":
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            raise RecordError(
                f"{path} must be written by one run at a time, got a second one; wait for the other run to end, or "
                "pass another --results folder."
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        os.close(file)  # another run replaced the file meanwhile


def repair(path: Path, file: int, torn: int) -> str:
    """Cut off a torn last line, or end a whole one that lacks its line break; returns what was done, for the user."""
    size = os.fstat(file).st_size
    if torn:
        os.ftruncate(file, size - torn)
        return f"{path}: cut off {torn} bytes of a torn last line that a killed run left."
    if not size:
        return ""
    with path.open("rb") as again:
        again.seek(-1, os.SEEK_END)
        if again.read(1) == b"\n":
            return ""
    os.write(file, b"\n")
    return f"{path}: ended the last line, whose line break a killed run did not write."
