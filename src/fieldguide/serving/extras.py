"""The optional packages of the server."""

from __future__ import annotations

from importlib.util import find_spec

from fieldguide.core.errors import SettingsError

PACKAGES = {"starlette": "starlette", "uvicorn": "uvicorn", "python_multipart": "python-multipart", "msgspec": "msgspec"}
# uvicorn also uses httptools and uvloop if they are installed, and answers more requests then.


def check_packages() -> None:
    """Raise `SettingsError`, with the command that installs them, if packages of the server are missing."""
    if missing := [name for module, name in PACKAGES.items() if find_spec(module) is None]:
        raise SettingsError(f"`fieldguide serve` needs {', '.join(missing)}: pip install 'fieldguide[serve]'")
