"""Machines that steps are planned for: GPUs by name, and this machine as `probe` measures it.

GPUs have their published rates and an assumed efficiency. A CPU has measured rates, which include the efficiency of its kernels:
small operations are slower than large ones, so a rate is a table over the size of an operation.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.core.files import write_atomically
from fieldguide.core.hardware import cores, ram

GPU_EFFICIENCY = {"matmul": 0.6, "conv": 0.45, "attention": 0.45, "recurrent": 0.25, "other": 0.3}  # assumed, of the peak
GPU_BANDWIDTH_SHARE = 0.75  # of the published bandwidth that kernels reach (assumed)
GPU_OP_SECONDS, GPU_VIEW_SECONDS = 6e-6, 2e-6  # of starting a kernel, and of an operation without one, on the host (assumed)
GPU_PROCESS_BYTES = 600 << 20  # of the driver's context and the libraries on the GPU (assumed)
GPU_LIBRARY_BYTES = 32 << 20  # workspace of cuBLAS (documented for Hopper; 8 MiB before)
REPEATS, LEAST_SECONDS = 7, 0.02

Table = tuple[tuple[float, float], ...]  # (size of an operation, rate) in ascending order


@dataclass(frozen=True)
class Machine:
    """A machine that steps are planned for.

    `rates` are floating-point operations per second by kind and dtype ("matmul/float32"), over the operations of one call;
    `bandwidth` is bytes per second over the bytes of one call.
    """

    name: str
    title: str
    kind: str  # cpu | cuda
    memory: int
    rates: Mapping[str, Table]
    bandwidth: Table
    op_seconds: float
    view_seconds: float
    source: str
    threads: int = 0
    process_bytes: int = 0
    notes: tuple[str, ...] = field(default=())

    def get_flops(self, kind: str, dtype: str, flops: float) -> float:
        """Return the rate for an operation of this many floating-point operations."""
        for key in (f"{kind}/{dtype}", f"{kind}/float32", f"matmul/{dtype}", "matmul/float32"):
            if key in self.rates:
                return interpolate(self.rates[key], flops)
        raise KeyError(kind)

    def get_bandwidth(self, size: float) -> float:
        return interpolate(self.bandwidth, size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interpolate(table: Sequence[Sequence[float]], size: float) -> float:
    """Return the rate at a size, linear between entries in the logarithm of both, constant beyond the ends."""
    if size <= table[0][0]:
        return table[0][1]
    for (low, slow), (high, fast) in pairwise(table):
        if size <= high:
            part = math.log(size / low) / math.log(high / low)
            return math.exp((1 - part) * math.log(slow) + part * math.log(fast))
    return table[-1][1]


def list_machines() -> list[str]:
    """Return the names of all machines: `cpu` is this one."""
    return [*load_gpus(), "cpu"]


def get_machine(name: str | Path | Machine = "cpu") -> Machine:
    """Return a machine by name, or as saved by `probe`. Raises `SettingsError` for an unknown name or a damaged file."""
    if isinstance(name, Machine):
        return name
    if str(name) in load_gpus():
        return load_gpus()[str(name)]
    if str(name) == "cpu":
        return measured_cpu()
    if Path(name).suffix == ".json":
        return read_probe(Path(name))
    raise SettingsError(
        f"unknown machine {str(name)!r}.{nearest(str(name), list_machines())} Choose one of {', '.join(list_machines())}, or the "
        "JSON file of a probe."
    )


@functools.cache
def load_gpus() -> dict[str, Machine]:
    rows = tomllib.loads(files("fieldguide.planning").joinpath("machines.toml").read_text(encoding="utf-8"))
    return {
        name: Machine(
            name=name,
            title=row["title"],
            kind="cuda",
            memory=row["memory"],
            rates={
                f"{kind}/{dtype}": ((1.0, share * rate),)
                for dtype, rate in row["flops"].items()
                for kind, share in GPU_EFFICIENCY.items()
            },
            bandwidth=((1.0, GPU_BANDWIDTH_SHARE * row["bandwidth"]),),
            op_seconds=GPU_OP_SECONDS,
            view_seconds=GPU_VIEW_SECONDS,
            source=row["source"],
            process_bytes=GPU_PROCESS_BYTES,
            notes=("published peak rates and an assumed efficiency; nothing was measured on this machine",),
        )
        for name, row in rows.items()
    }


MAX_CALL_SECONDS = 0.1  # of a call that is timed

_cpu: list[Machine] = []  # what was measured or given in this process


def measured_cpu() -> Machine:
    """Return this machine, measured once in a process."""
    if not _cpu:
        _cpu.append(probe())
    return _cpu[0]


def use_probe(machine: Machine) -> None:
    """Use an earlier measurement of this machine in this process."""
    _cpu[:] = [machine]


def read_probe(path: Path) -> Machine:
    """Return the machine that `probe` saved. Raises `SettingsError` if the file is not one."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{path}: no machine can be read from it: {error}. Write it with `fieldguide probe`.") from None


def from_dict(entry: Mapping[str, Any]) -> Machine:
    pairs: Callable[[Any], Table] = lambda rows: tuple((float(size), float(rate)) for size, rate in rows)
    rates = {key: pairs(rows) for key, rows in entry["rates"].items()}
    return Machine(**{**entry, "rates": rates, "bandwidth": pairs(entry["bandwidth"]), "notes": tuple(entry["notes"])})


# Measuring


def time_best(run: Callable[[], Any], inner: int = 1) -> float:
    """Return the seconds of a call, the best of several rounds: other load only makes a round slower."""
    run()
    best, total, rounds = float("inf"), 0.0, 0
    while rounds < REPEATS and (rounds < 3 or total < LEAST_SECONDS * REPEATS):
        started = time.perf_counter()
        for _ in range(inner):
            run()
        taken = time.perf_counter() - started
        best, total, rounds = min(best, taken / inner), total + taken, rounds + 1
    return best


def probe(path: Path | None = None) -> Machine:
    """Measure this machine in a few seconds; with `path`, write the result as JSON. Use it while nothing else runs."""
    rates: dict[str, Table] = {}
    overhead = measure_overhead()
    with torch.random.fork_rng(devices=[]):
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            rates[f"matmul/{name}"] = measure_rates(matmul_cases(dtype), overhead)
            rates[f"conv/{name}"] = measure_rates(conv_cases(dtype), overhead)
            rates[f"attention/{name}"] = measure_rates(attention_cases(dtype), overhead)
        rates["recurrent/float32"] = measure_rates(recurrent_cases(), overhead)
        bandwidth = measure_bandwidth(overhead)
    machine = Machine(
        name="cpu",
        title=f"{platform.processor() or platform.machine()}, {cores()} cores",
        kind="cpu",
        memory=ram(),
        rates=rates,
        bandwidth=bandwidth,
        op_seconds=overhead,
        view_seconds=overhead / 3,
        source="measured",
        threads=torch.get_num_threads(),
    )
    if path is not None:
        write_atomically(path, json.dumps(machine.to_dict(), indent=1).encode())
    return machine


Case = tuple[float, Callable[[], Any]]  # floating-point operations, call


def measure_rates(cases: Sequence[Case], overhead: float) -> Table:
    """Return the rates over the operations of a call, in ascending order.

    Cases that would take more than `MAX_CALL_SECONDS` are left out: without hardware for bfloat16, a product can take seconds.
    """
    found: list[tuple[float, float]] = []
    for flops, run in sorted(cases, key=lambda case: case[0]):
        if found and flops / found[-1][1] > MAX_CALL_SECONDS:
            break
        found.append((flops, flops / max(time_best(run) - overhead, 1e-7)))
    return tuple(found)


def matmul_cases(dtype: torch.dtype) -> list[Case]:
    cases: list[Case] = []
    for rows, inner, columns in ((64, 64, 64), (256, 256, 256), (1024, 256, 1024), (2048, 768, 768)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        cases.append((2.0 * rows * inner * columns, lambda a=a, b=b: F.linear(a, b)))  # type: ignore[misc]
    return cases


def conv_cases(dtype: torch.dtype) -> list[Case]:
    cases: list[Case] = []
    for rows, channels, side in ((2, 16, 16), (8, 32, 32), (8, 64, 56)):
        x, kernel = torch.randn(rows, channels, side, side).to(dtype), torch.randn(channels, channels, 3, 3).to(dtype)
        cases.append((18.0 * rows * channels**2 * side**2, lambda x=x, kernel=kernel: F.conv2d(x, kernel, padding=1)))  # type: ignore[misc]
    return cases


def attention_cases(dtype: torch.dtype) -> list[Case]:
    cases: list[Case] = []
    for rows, length in ((4, 32), (8, 128), (8, 512)):
        q = torch.randn(rows, 4, length, 64).to(dtype)
        cases.append((4.0 * rows * 4 * length**2 * 64, lambda q=q: F.scaled_dot_product_attention(q, q, q)))  # type: ignore[misc]
    return cases


def recurrent_cases() -> list[Case]:
    cases: list[Case] = []
    for rows, hidden in ((16, 64), (32, 256)):
        layer, x = torch.nn.LSTM(hidden, hidden, batch_first=True), torch.randn(rows, 32, hidden)
        cases.append((16.0 * rows * 32 * hidden**2, lambda layer=layer, x=x: layer(x)))  # type: ignore[misc]
    return cases


def measure_bandwidth(overhead: float) -> Table:
    """Return bytes per second of adding two arrays, over the bytes that are read and written."""
    found = []
    for count in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        a, b, c = torch.ones(count), torch.ones(count), torch.empty(count)
        seconds = time_best(lambda a=a, b=b, c=c: torch.add(a, b, out=c), max(1, (1 << 20) // count))  # type: ignore[misc]
        found.append((12.0 * count, 12.0 * count / max(seconds - overhead, 1e-7)))
    return tuple(found)


def measure_overhead() -> float:
    """Return the seconds of an operation on almost nothing, with the graph for its gradient."""
    x = torch.ones(1, requires_grad=True)
    return time_best(lambda: x * 2.0, 1000)
