"""The table of public checkpoints, `public.toml`: what is on the Hugging Face Hub that this library loads.

Nothing here contacts the hub. Which row suits some data is decided in `fieldguide.automl.pretrained`.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fieldguide.checkpoints.names import HUB_PREFIX

PERMISSIVE = ("Apache-2.0", "MIT", "BSD-3-Clause")  # licences that allow any use; `--weights auto` chooses no others
ANY_LANGUAGE = "*"


@dataclass(frozen=True, kw_only=True)
class PublicCheckpoint:
    """One row of `public.toml`, whose first lines explain the fields."""

    name: str
    size: str
    tasks: tuple[str, ...]
    mb: float
    licence: str
    data: str
    source: str
    gmacs: float
    file: str = ""  # of several in the repository; empty if the repository is one model
    classes: int = 0  # that it can tell apart; 0: any number, with a new head
    side: int = 0  # 0: it takes no images
    channels: int = 0
    languages: tuple[str, ...] = ()
    length: int = 0  # 0: it takes no texts
    vocab_size: int = 0  # 0: that of the size

    @property
    def location(self) -> str:
        """Return what `fit --weights` takes: hf:organization/name, or hf:organization/name/file."""
        return f"{HUB_PREFIX}{self.path}"

    @property
    def path(self) -> str:
        """Return its place on the hub: organization/name, or organization/name/file."""
        return f"{self.name}/{self.file}" if self.file else self.name

    @property
    def is_permissive(self) -> bool:
        """Return whether the licence allows any use."""
        return self.licence in PERMISSIVE

    def reads_language(self, language: str) -> bool:
        """Return whether it was trained on texts of a language; "" stands for an unknown one."""
        return not self.languages or not language or ANY_LANGUAGE in self.languages or language in self.languages

    def describe(self) -> str:
        """Return name, download size and licence."""
        return f"{self.path} ({self.mb:,.0f} MB, {self.licence})"


@functools.cache
def list_public_checkpoints() -> tuple[PublicCheckpoint, ...]:
    """Return all rows, in the order of the file: within a task, later rows usually score higher."""
    rows = tomllib.loads(files(__package__).joinpath("public.toml").read_text(encoding="utf-8"))["checkpoint"]
    return tuple(PublicCheckpoint(**freeze(row)) for row in rows)


def freeze(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with tuples in place of lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
