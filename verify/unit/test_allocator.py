"""Freed memory is kept: tensors made again and again cost no pages of the system."""

from __future__ import annotations

import subprocess
import sys

import pytest


LOOP = """
import resource, sys
from lipbounds.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
bytearray(b"1") * 2**26  # the first one has to come from the system
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(b"1") * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of another system is not changed")
def test_memory_is_taken_from_the_system_once() -> None:
    faults = {}
    for mode in ("leave", "keep"):
        run = subprocess.run([sys.executable, "-c", LOOP, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(run.stdout)
    assert faults["leave"] > 4 * 2**26 / 4096 * 0.9
    assert faults["keep"] < faults["leave"] / 20
