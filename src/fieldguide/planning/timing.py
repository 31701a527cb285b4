"""Planned time of a step: the sum over its operations of the slower of computing and moving bytes, and a cost per operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fieldguide.planning.machines import Machine, get_machine
from fieldguide.planning.records import Work

CALLS, MOVING = "calls", "moving"  # starting operations, and reading and writing
COMPUTED = ("matmul", "conv", "attention", "recurrent")
TERMS = (CALLS, MOVING, *COMPUTED, *(f"{kind}/bfloat16" for kind in COMPUTED))


def plan_seconds(work: Iterable[Work], machine: Machine | None = None, factors: Mapping[str, float] | None = None) -> float:
    """Return the seconds of a step with this work. `factors` correct its terms, as learnt from measured steps."""
    terms = plan_terms(work, machine or get_machine("cpu"))
    return sum((factors.get(name, 1.0) if factors else 1.0) * seconds for name, seconds in terms.items())


def plan_terms(work: Iterable[Work], machine: Machine) -> dict[str, float]:
    """Return the seconds of a step by term: of calls, of operations that move bytes, and of those that compute by kind and dtype."""
    terms = dict.fromkeys(TERMS, 0.0)
    for each in work:
        if each.kind == "view":
            terms[CALLS] += machine.view_seconds
            continue
        terms[CALLS] += machine.op_seconds
        moving = each.bytes / machine.get_bandwidth(each.bytes)
        computing = each.flops / machine.get_flops(each.kind, each.dtype, each.flops) if each.flops else 0.0
        name = f"{each.kind}/bfloat16" if each.dtype == "bfloat16" else each.kind
        terms[MOVING if each.kind not in COMPUTED else name] += max(moving, computing)
    return terms
