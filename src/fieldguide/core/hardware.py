"""The machine under us: cores and memory. Imports nothing of the project."""

from __future__ import annotations

import ctypes
import os
import resource
import sys


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ram() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        return min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        return total


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_memory() -> bool:
    """From now on this process keeps large blocks of memory that are freed, to use them again; True where that could be
    said, which is on Linux with glibc.

    Else each step of training gives its gradients and activations back to the system, which hands them out again page by
    page, filled with zeros: 6 to 10 % of a step on a CPU (T5-small, GPT-2). The most that is ever held stays the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(TRIM_THRESHOLD, 2**31 - 1) and mallopt(MMAP_MAX, 0))


TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h: bytes free at the end that are given back; blocks apart from the heap
