"""What the measurements found: a JSON line each, written as it comes, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from bench.engine.machine import ROOT, cpu_name


def place(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """What a result belongs to besides its measurement: hardware, versions and the code.

    Args:
        device: where it was made.
        quick: whether sizes were small.
    """
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "lipbounds").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]):
        digest.update(path.read_bytes())
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "quick": quick,
        "code": digest.hexdigest()[:16],
    }


class Results:
    """Results by part and name, of one place.

    Args:
        path: of the file; lines of other places stay in it and are not read.
        here: what `place` returned.
    """

    def __init__(self, path: Path, here: dict[str, Any]) -> None:
        self.path, self.here = path, here
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        self._torn = bool(text) and not text.endswith("\n")  # what a killed run left
        for line in text.splitlines():
            fields = _parsed(line)
            if fields is not None and fields.get("place") == here:
                self.found[fields["part"], fields["name"]] = fields

    def keep(self, part: str, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Append a result, on disk when this returns.

        Args:
            part: of the page.
            name: of the measurement.
            result: ready for JSON.
        """
        fields = {"part": part, "name": name, "place": self.here, **result}
        with self.path.open("a") as file:
            file.write(("\n" if self._torn else "") + json.dumps(fields) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
        self.found[part, name] = fields
        return fields


def _parsed(line: str) -> dict[str, Any] | None:
    """A line; None for one that was torn."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None
