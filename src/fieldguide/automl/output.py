"""A console whose output may be cut off: `fieldguide fit DATA | head`, or a terminal that is closed, must not end a training."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.segment import Segment

from fieldguide.core.terminal import escape_controls


class OutputConsole(Console):
    """A console that falls silent when nobody can read its output any more, where rich would end the process."""

    on_lost: Callable[[], None] | None = None  # called once, when the output is lost

    @property
    def file(self) -> IO[str]:
        return cast(IO[str], TolerantFile(super().file, self))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """Return the text to be written, with the control characters of data escaped; rich itself lets some pass."""
        return super()._render_buffer(s if s.control else Segment(escape_controls(s.text), s.style) for s in buffer)

    def fall_silent(self) -> None:
        """Drop all further output."""
        if not self.quiet:
            self.quiet = True
            if self.on_lost is not None:
                with suppress(OSError):
                    self.on_lost()


class TolerantFile:
    """A file for output, in which a failure to write silences its console instead of raising an error."""

    def __init__(self, file: IO[str], console: OutputConsole):
        self.wrapped, self.console = file, console

    def write(self, text: str) -> int:
        try:
            return self.wrapped.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.wrapped.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def _give_up(self, error: OSError) -> None:
        if error.errno in (
            errno.EPIPE,
            errno.EIO,
        ):  # a closed pipe or terminal: what is buffered must not fail again at the end
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.wrapped.fileno())
        self.console.fall_silent()


def report_lost_output() -> None:
    """Say on standard error that training continues."""
    print("fieldguide: the output was closed; training continues without it. Stop it with Ctrl-C.", file=sys.stderr)
