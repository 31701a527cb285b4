"""Peak memory of a trace under models of two allocators: malloc of glibc, and the caching allocator of torch for CUDA.

An allocator takes more from the system than the tensors hold: it rounds sizes up, splits blocks, and keeps blocks that were
freed. `replay` runs the events of several steps, because the first steps leave the free blocks that later ones must use.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

from fieldguide.planning.trace import Trace

PAGE = 4096
ALIGNMENT = 64  # of torch's tensors on the CPU
HEADER = 8  # bytes that malloc puts before a block
SMALLEST = 32  # block of malloc
INITIAL_MMAP_THRESHOLD = 128 << 10
LARGEST_MMAP_THRESHOLD = 32 << 20
CUDA_ROUNDING = 512
SMALL_LIMIT, SMALL_SEGMENT = 1 << 20, 2 << 20  # of CUDA's allocator: blocks up to 1 MiB share segments of 2 MiB
LARGE_SEGMENT, LARGE_LIMIT, LARGE_ROUNDING = 20 << 20, 10 << 20, 2 << 20
LOSS_EVERY, MOST_LOST = 8, 1000  # small objects take a part of every eighth block; there is a limited number of them
REPLAYED_STEPS = 3


class Allocator(Protocol):
    """Interface of the models. `peak` is the most memory that was taken from the system so far."""

    peak: int

    def allocate(self, key: int, size: int) -> None: ...
    def release(self, key: int) -> None: ...


@dataclass
class Block:
    """A contiguous range of memory. `before` and `after` are its neighbors in its segment or heap."""

    size: int
    free: bool = False
    before: Block | None = None
    after: Block | None = None
    number: int = 0
    small: bool = False


class FreeList:
    """Free blocks in order of size; among equal ones the oldest first."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int, Block]] = []
        self.count = 0

    def add(self, block: Block) -> None:
        self.count += 1
        block.number = self.count
        insort(self.blocks, (block.size, block.number, block))

    def remove(self, block: Block) -> None:
        del self.blocks[bisect_left(self.blocks, (block.size, block.number))]

    def take(self, size: int) -> Block | None:
        """Remove and return the smallest block of at least this size."""
        place = bisect_left(self.blocks, (size, 0))
        return self.blocks.pop(place)[2] if place < len(self.blocks) else None


def split(block: Block, size: int, least: int, free: FreeList) -> None:
    """Cut a block to a size; the rest becomes free if it has at least `least` bytes."""
    if block.size - size < least:
        return
    rest = Block(block.size - size, True, block, block.after, small=block.small)
    if block.after:
        block.after.before = rest
    block.after, block.size = rest, size
    free.add(rest)


def merge(block: Block, free: FreeList) -> Block:
    """Join a free block, which is in no list, with its free neighbors."""
    for other in (block.before, block.after):
        if other is not None and other.free:
            free.remove(other)
            first, second = (other, block) if other is block.before else (block, other)
            first.size += second.size
            first.after = second.after
            if second.after:
                second.after.before = first
            block = first
    return block


class Glibc:
    """malloc of glibc: best fit in one heap that grows at its end; large blocks may be mapped apart.

    With `keep` (as `fieldguide.core.hardware.keep_memory` sets it) nothing is mapped apart and nothing is given back, so the
    heap only grows. Otherwise blocks above a threshold are mapped; the threshold rises to the largest mapped block that was
    freed. The end of the heap is hardly ever free, since small objects lie there, so the heap does not shrink.
    """

    def __init__(self, keep: bool):
        self.keep, self.free = keep, FreeList()
        self.blocks: dict[int, Block] = {}
        self.mapped: dict[int, int] = {}
        self.threshold = INITIAL_MMAP_THRESHOLD
        self.last: Block | None = None
        self.heap = self.peak = self.mapped_bytes = self.cuts = 0

    def allocate(self, key: int, size: int) -> None:
        own = max((size + HEADER + 15) // 16 * 16, SMALLEST)
        need = own + ALIGNMENT + SMALLEST  # posix_memalign asks for more, and frees what is before and after
        if not self.keep and need >= self.threshold:
            self.mapped[key] = -(-need // PAGE) * PAGE
            self.mapped_bytes += self.mapped[key]
        else:
            block = self.free.take(need)
            if block is None:
                block = self.extend(need)
            block.free = False
            self.cut(block, own, need)
            self.blocks[key] = block
            while self.last is not None and self.last.after is not None:  # parts were cut off the end
                self.last = self.last.after
        self.peak = max(self.peak, self.heap + self.mapped_bytes)

    def cut(self, block: Block, own: int, need: int) -> None:
        """Cut a block to the size that it needs. The few bytes that alignment takes soon hold other small objects, and are not
        free again when the block is: therefore a block of the same size does not fit into its place."""
        self.cuts += 1
        if not self.keep or self.cuts % LOSS_EVERY or self.cuts > LOSS_EVERY * MOST_LOST or block.size < need:
            split(block, own + SMALLEST, SMALLEST, self.free)
            return
        split(block, need, SMALLEST, self.free)
        lost = Block(block.size - own, False, block, block.after)
        if block.after:
            block.after.before = lost
        block.after, block.size = lost, own

    def extend(self, need: int) -> Block:
        """Return a block at the end of the heap, which the free end is part of."""
        last = self.last
        if last is not None and last.free:
            self.free.remove(last)
            self.heap += need - last.size
            last.size = need
            return last
        block = Block(need, False, last)
        if last is not None:
            last.after = block
        self.last = block
        self.heap += need
        return block

    def release(self, key: int) -> None:
        if key in self.mapped:
            size = self.mapped.pop(key)
            self.mapped_bytes -= size
            if size <= LARGEST_MMAP_THRESHOLD:
                self.threshold = max(self.threshold, size)
            return
        block = self.blocks.pop(key)
        block.free = True
        block = merge(block, self.free)
        if block.after is None:
            self.last = block
        self.free.add(block)


class CudaCache:
    """The caching allocator of torch for CUDA: blocks of 512 bytes in segments of 2 MiB, 20 MiB or more, best fit, kept."""

    def __init__(self) -> None:
        self.free = {True: FreeList(), False: FreeList()}
        self.blocks: dict[int, Block] = {}
        self.peak = 0

    def allocate(self, key: int, size: int) -> None:
        need = max(-(-size // CUDA_ROUNDING), 1) * CUDA_ROUNDING
        small = need <= SMALL_LIMIT
        block = self.free[small].take(need)
        if block is None:
            if small:
                segment = SMALL_SEGMENT
            elif need < LARGE_LIMIT:
                segment = LARGE_SEGMENT
            else:
                segment = -(-need // LARGE_ROUNDING) * LARGE_ROUNDING
            block = Block(segment, small=small)
            self.peak += segment
        block.free = False
        split(block, need, CUDA_ROUNDING if small else SMALL_LIMIT + 1, self.free[small])
        self.blocks[key] = block

    def release(self, key: int) -> None:
        block = self.blocks.pop(key)
        block.free = True
        self.free[block.small].add(merge(block, self.free[block.small]))


def replay(trace: Trace, allocator: Allocator, steps: int = REPLAYED_STEPS, initial: bool = False) -> int:
    """Return the most memory that the allocator takes from the system during the first steps.

    With `initial` it also holds the storages that exist before the first step.
    """
    if initial:
        for key, size in trace.initial.items():
            allocator.allocate(key, size)
    later = trace.later_steps().events
    for step in range(steps):
        for key, size in later if step else trace.events:  # what a step does not leave behind it releases
            if size > 0:
                allocator.allocate(key, size)
            else:
                allocator.release(key)
    return allocator.peak
