"""Inspection of a pickle before it is unpickled, opcode by opcode, without creating its objects.

Which classes a pickle may use is decided by the unpickler (`torch.load(weights_only=True)`, `torchscript`). This module bounds
time and memory: a few bytes can ask for a terabyte, or describe a tuple of a few objects that takes years to hash.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import IO, Any

MAX_OPCODES = 5_000_000  # a tensor takes about 30
MAX_OBJECTS = 20_000_000  # in all tuples, with shared objects counted where they occur
FORBIDDEN = {"builtins bytearray", "__builtin__ bytearray"}  # allocates as many bytes as the file says
PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
GET = {"GET", "BINGET", "LONG_BINGET"}
FILLING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "ADDITEMS"}  # change the object below their arguments


def check_pickle(file: IO[bytes]) -> None:
    """Check the pickle that starts at the position of `file`; afterwards the position is behind it.

    Raises `UnpicklingError` for one that is truncated, malformed, or takes too much time or memory.
    """
    try:
        inspect_opcodes(file)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise pickle.UnpicklingError(f"invalid opcode or argument ({str(error) or type(error).__name__})") from None


def inspect_opcodes(file: IO[bytes]) -> None:
    """Follow the stack of the unpickler, with the number of objects in each value in place of the value."""
    stack, marks, memo, total = list[int](), list[int](), dict[int, int](), 0
    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if number > MAX_OPCODES:
            raise pickle.UnpicklingError(f"more than {MAX_OPCODES:,} opcodes")
        if name == "GLOBAL" and argument in FORBIDDEN:
            raise pickle.UnpicklingError("a bytearray is not supported")
        if name in PUT:
            if not 0 <= int(argument) <= MAX_OPCODES:
                raise pickle.UnpicklingError(f"the memo index {argument} is out of range")
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in GET:
            stack.append(memo[int(argument)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            marks.append(len(stack))
        else:
            taken, objects = list(opcode.stack_before), 1
            if pickletools.markobject in taken:
                start = marks.pop()
                objects += sum(stack[start:])
                del stack[start:]
                taken = taken[: taken.index(pickletools.markobject)]
            for position in reversed(range(len(taken))):
                own = stack.pop()
                objects += 0 if position == 0 and name in FILLING else own
            total += objects
            if total > MAX_OBJECTS:
                raise pickle.UnpicklingError(f"more than {MAX_OBJECTS:,} objects")
            stack += [objects] * len(opcode.stack_after)
