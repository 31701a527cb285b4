"""Import this before anything else: one thread, and the clock is the CPU time of this process, whatever else the machine does."""

from __future__ import annotations

import os
import time

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

time.monotonic = time.perf_counter = time.process_time
