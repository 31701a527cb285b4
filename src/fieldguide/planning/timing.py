"""Planned time of a step: the sum over its operations of the slower of computing and moving bytes, and a cost per operation."""

from __future__ import annotations

from collections.abc import Iterable

from fieldguide.planning.machines import Machine, get_machine
from fieldguide.planning.trace import Work


def plan_seconds(work: Iterable[Work], machine: Machine | None = None) -> float:
    """Return the seconds of a step with this work."""
    machine = machine or get_machine("cpu")
    return sum(seconds_of(each, machine) for each in work)


def seconds_of(work: Work, machine: Machine) -> float:
    if work.kind == "view":
        return machine.view_seconds
    moving = work.bytes / machine.get_bandwidth(work.bytes)
    computing = work.flops / machine.get_flops(work.kind, work.dtype, work.flops) if work.flops else 0.0
    return machine.op_seconds + max(moving, computing)
