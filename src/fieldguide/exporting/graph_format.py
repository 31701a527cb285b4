"""What a format of graphs is: how a graph is written, how `run.py` opens it, and what must be absent when it is verified."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fieldguide.exporting.graph import Graph
from fieldguide.exporting.precision import Precision


@dataclass(frozen=True)
class Port:
    """An input or output of a written graph, as its README shows it."""

    name: str
    type: str
    axes: tuple[str, ...]


class GraphFormat(ABC):
    """A format of graphs in exported folders.

    Attributes:
        name: for `--to`.
        suffix: of files.
        session: the parts of `session.py` that open and run files (runners/).
        packages: of `run.py`, in addition to those of its other parts.
        absent: modules that must not be imported when a folder is verified, the most important first.
        precisions: of the stored weights.
        about: what a file is, in one sentence.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    session: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]
    absent: ClassVar[tuple[str, ...]] = ("fieldguide",)
    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)
    about: ClassVar[str]

    @abstractmethod
    def check_packages(self) -> None:
        """Raise `SettingsError` if a package that writes files is not installed."""

    @abstractmethod
    def write(self, graph: Graph, path: Path, precision: Precision) -> dict[str, Any]:
        """Write a graph to a file, and return what `run.py` must know of it.

        Raises `ExportError` if the graph cannot be traced, or if the file gives other outputs than the module for other sizes of dynamic
        axes than those of the traced batch.
        """

    @abstractmethod
    def describe(self, graph: Graph, path: Path) -> tuple[list[Port], list[Port]]:
        """Return the inputs and outputs of a written graph."""
