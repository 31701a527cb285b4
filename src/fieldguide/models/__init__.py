"""Architectures, one a file, in a folder for each family. Calling the package lists their names:
`fieldguide.models("resnet*")`."""

from __future__ import annotations

import sys
from types import ModuleType


class Listing(ModuleType):
    """This package, callable: the folder and the public function share the name `models`."""

    def __call__(self, glob: str = "*", *, family: str | None = None, task: str | None = None) -> list[str]:
        return sys.modules[__name__.partition(".")[0]].list_models(glob, family=family, task=task)


sys.modules[__name__].__class__ = Listing
