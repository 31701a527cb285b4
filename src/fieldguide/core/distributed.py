"""Several processes under `torchrun`: gloo on CPUs, NCCL on GPUs. Alone, every call here costs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """This process's accelerator, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def processes() -> Iterator[None]:
    """Joins the group that `torchrun` started, if it did, and leaves it at the end."""
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def turns() -> Iterator[None]:
    """The first process of each machine goes first, then the others: what it leaves on the disk, they find there."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if world() > 1 and not first:
        dist.barrier()
    try:
        yield
    finally:
        if world() > 1 and first:
            dist.barrier()


def broadcast(value: Any) -> Any:
    """What the first process holds, in every process (settings measured there, a path chosen there)."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in every process."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
    return box
