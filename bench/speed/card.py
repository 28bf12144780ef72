"""What a graphics card was doing while something was timed on it: clocks, power, temperature and memory."""

from __future__ import annotations

import subprocess
from typing import Any

import torch


# What nvidia-smi calls each, in units of megahertz, watts, degrees Celsius and mebibytes.
ASKED = {
    "sm_clock": "clocks.sm",
    "largest_sm_clock": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power": "power.draw",
    "temperature": "temperature.gpu",
    "memory": "memory.total",
    "memory_used": "memory.used",
}


def card(device: torch.device) -> dict[str, float | None] | None:
    """The state of a card now; None for another device, or where nvidia-smi does not tell.

    Args:
        device: that something is timed on.

    Returns:
        by the names in `ASKED`, None where the card does not tell.
    """
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(ASKED.values())}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(ASKED, map(_number, done.stdout.strip().split(",")), strict=False))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def noted(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    """The states before and after, as they are kept beside times: clocks that fell tell of a card that throttled.

    Args:
        before: what `card` returned.
        after: the same, later.
    """
    return {} if before is None and after is None else {"card": {"before": before, "after": after}}
