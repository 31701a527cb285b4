"""Output to terminals: control characters in data are shown, not executed, and printing never fails."""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Controls other than tab and line feed, and marks that reorder text. A terminal obeys them: they move the cursor, change the
# title, or hide a part of a line.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    r"""Return text with its control characters written as escapes, such as \x1b."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def echo(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text that may come from data. Controls are escaped, except in what is written into a file or a pipe on stdout."""
    stream = file or sys.stdout
    is_raw = stream is sys.stdout and not stream.isatty()
    print(text if is_raw else escape_controls(text), end=end, file=stream, flush=not end)


def tolerate_any_character() -> None:
    """Make standard output and error write escapes for characters that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
