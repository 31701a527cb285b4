"""Settings of the process on this machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from fieldguide.core.hardware import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
def used():
    block = bytearray(64 << 20)
    del block
used()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    used()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by rules of their own")
def test_freed_memory_is_reused():
    """A new page causes a page fault, a reused block does not."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "keep")
    }
    assert faults["plain"] > 100 > faults["keep"]
