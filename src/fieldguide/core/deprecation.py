"""Former names of public arguments, which are accepted with a warning for two minor versions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, what: str = "argument", stacklevel: int = 3) -> None:
    """Warn that a name has changed."""
    warnings.warn(f"the {what} {old!r} is now called {new!r}; the old name is removed in 0.4", DeprecationWarning, stacklevel)


def accept_renamed(**renamed: str) -> Callable[[Function], Function]:
    """Decorate a function so that keyword arguments under their former names (`old="new"`) are accepted with a warning."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in renamed.items():
                if old in kwargs:
                    warn_renamed(old, new)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def rename_keys(values: Mapping[str, Any], renamed: Mapping[str, str], what: str, stacklevel: int = 4) -> dict[str, Any]:
    """Return `values` with former keys replaced by their new names, with a warning for each."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in renamed:
            warn_renamed(key, renamed[key], what, stacklevel)
        out[renamed.get(key, key)] = value
    return out
