"""Display of the phases of a long command: what is being done, for how long, and how much is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Phases:
    """Show the present phase with a running clock on a terminal; elsewhere, print one line for each phase.

    With a total, the examples done are shown as well. `lines=False` prints nothing where there is no terminal.
    """

    def __init__(self, console: Console, lines: bool = True):
        self.console, self.lines = console, lines
        self.bar: Bar | None = None
        self.line = TaskID(0)

    def start(self, name: str, total: int | None = None) -> None:
        """Begin a phase; the previous one ends."""
        self.stop()
        if not self.console.is_terminal:
            if self.lines:
                self.console.print(f"{name} ...", markup=False)
            return
        counted = (BarColumn(20), TextColumn("{task.completed:,.0f} of {task.total:,.0f}")) if total else ()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn())
        self.bar = Bar(*columns, console=self.console, transient=True)
        self.line = self.bar.add_task(name, total=total)
        self.bar.start()

    def advance(self, done: int) -> None:
        """Show the number of examples done in this phase."""
        if self.bar is not None:
            self.bar.update(self.line, completed=done)

    def stop(self) -> None:
        """End the phase, and remove it from the terminal."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
