"""Records of a traced step: storages in order of allocation and release, and the work of each operation."""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("weights", "gradients", "optimizer", "average", "activations", "temporary", "kernel", "data", "cache", "other")


@dataclass(frozen=True)
class Work:
    """The work of one operation."""

    name: str  # of the operation, such as "mm"
    kind: str  # matmul | conv | attention | recurrent | other | view
    dtype: str
    flops: float
    bytes: float  # read and written
    phase: str = ""  # forward | backward | update


@dataclass
class Trace:
    """Storages in order of allocation and release, and the work of a step.

    `events` are (storage, bytes): bytes > 0 is an allocation, and -bytes a release. `initial` are the storages that exist
    before the step, with their bytes; they are never released.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    parts: dict[int, str] = field(default_factory=dict)
    initial: dict[int, int] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)

    @property
    def lasting(self) -> dict[int, int]:
        """The storages that the step leaves behind, such as the state of the optimizer, with their bytes."""
        live: dict[int, int] = {}
        for storage, size in self.events:
            if size > 0:
                live[storage] = size
            else:
                live.pop(storage, None)
        return live

    def later_steps(self) -> Trace:
        """Return the trace of a step after the first one, before which the lasting storages exist already."""
        lasting = self.lasting
        return Trace([event for event in self.events if event[0] not in lasting], self.parts, self.initial | lasting, self.work)

    def without(self, part: str) -> Trace:
        """Return the trace without the storages of a part."""
        left = {number for number, name in self.parts.items() if name == part}
        return Trace([event for event in self.events if event[0] not in left], self.parts, self.initial, self.work)

    def find_peak(self) -> tuple[int, dict[str, int]]:
        """Return the most bytes that are allocated at a time in this step, and how they divide into parts at that moment."""
        live = dict(self.initial)
        now = best = sum(live.values())
        at = 0
        for number, (_, size) in enumerate(self.events, 1):
            now += size
            if now > best:
                best, at = now, number
        for storage, size in self.events[:at]:
            if size > 0:
                live[storage] = size
            else:
                live.pop(storage, None)
        by_part = dict.fromkeys(PARTS, 0)
        for storage, size in live.items():
            by_part[self.parts.get(storage, "temporary")] += size
        return best, by_part
