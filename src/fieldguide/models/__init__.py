"""Model architectures, one per file, in one folder per family.

Calling the package lists the names: `fieldguide.models("resnet*")`.
"""

from __future__ import annotations

import sys
from types import ModuleType


class Listing(ModuleType):
    """The type of this package, which makes it callable: the folder and the public function share the name `models`."""

    def __call__(self, glob: str = "*", *, family: str | None = None, task: str | None = None) -> list[str]:
        return sys.modules[__name__.partition(".")[0]].list_models(glob, family=family, task=task)


sys.modules[__name__].__class__ = Listing
