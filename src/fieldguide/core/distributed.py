"""Processes started by `torchrun`: gloo on CPUs, NCCL on GPUs. With a single process, all functions do nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """Return the rank of this process, 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Return this process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def join_process_group() -> Iterator[None]:
    """Join the process group of `torchrun`, if there is one, and leave it at the end."""
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
    try:
        yield
        if started:
            dist.barrier()  # gloo may abort a process that leaves while another one still uses its connections
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block first on the first process of each machine, then on the others, which find its files."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if get_world_size() > 1 and not first:
        dist.barrier()
    try:
        yield
    finally:
        if get_world_size() > 1 and first:
            dist.barrier()


def broadcast(value: Any) -> Any:
    """Return the value of the first process in every process."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, in every process."""
    if get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * get_world_size()
    dist.all_gather_object(box, value)
    return box
