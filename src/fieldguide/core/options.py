"""The one parser of options: text from the command line or values from Python become typed values.

Settings, task options, prediction options and load options are dataclasses (or mappings of names to types) that this
module reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.core.structure import Limits

# Other names of prediction options -> their names.
PREDICT_ALIASES = {
    "tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "beams": "num_beams",
    "penalty": "length_penalty",
    "repetition": "repetition_penalty",
    "stop": "stop_strings",
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "num_return_sequences": "count",
    "score_threshold": "threshold",
    "iou_threshold": "overlap",
}


def rename_aliases(changes: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the changes under the options' own names. Raises `SettingsError` if one option is given under two names."""
    renamed: dict[str, Any] = {}
    for key, value in changes.items():
        name = aliases.get(key, key)
        if name in renamed:
            raise SettingsError(f"{key} is another name for {name}, which is also set. Set only one of them.")
        renamed[name] = value
    return renamed


def option_types(schema: type | Mapping[str, Any]) -> dict[str, Any]:
    """Return the types of the options by name, from a dataclass or a mapping."""
    if isinstance(schema, Mapping):
        return dict(schema)
    hints = get_type_hints(schema)
    return {f.name: hints[f.name] for f in fields(schema)}


def option_limits(schema: type | Mapping[str, Any]) -> dict[str, Limits]:
    """Return the limits of the options that are declared as `Annotated[TYPE, Limits(least, most)]`, by name."""
    if isinstance(schema, Mapping):
        return {}
    hints = get_type_hints(schema, include_extras=True)
    return {
        name: limits
        for name, hint in hints.items()
        for part in (hint, *get_args(hint))  # also in `Annotated[TYPE, Limits(least, most)] | None`
        for limits in getattr(part, "__metadata__", ())
        if isinstance(limits, Limits)
    }


def check_limits(label: str, value: Any, limits: Limits | None) -> None:
    """Raise `SettingsError` if a number is out of its limits; None and NaN are left to others."""
    if value is None or limits is None:
        return
    if value < limits.least:
        raise SettingsError(f"{label}={value} must be at least {limits.least:,}.")
    if value > limits.most:
        raise SettingsError(f"{label}={value} must be at most {limits.most:,}.")


def parse_options(
    schema: type | Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    owner: str,
    prefix: str = "",
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the changed options with values of their types.

    Args:
        schema: the dataclass that declares the options, or a mapping of names to types.
        changes: the options that the user set; values may be text.
        owner: whose options these are, for errors: "image-classification", "a language model".
        prefix: what the user writes before the name: "task.".
        aliases: other names -> names.

    Raises `SettingsError` for an unknown option, an option set under two names, a value of another type, and a number out of
    its limits.
    """
    types, limits, aliases = option_types(schema), option_limits(schema), aliases or {}
    named = rename_aliases(changes, {alias: name for alias, name in aliases.items() if name in types and alias not in types})
    for key in named:
        if key not in types:
            known = [alias for alias, name in aliases.items() if name in types]
            raise SettingsError(
                f"{owner} has no option {prefix}{key}.{nearest(key, (*types, *known))} Options are: "
                f"{', '.join(f'{prefix}{name}' for name in sorted(types)) or 'none'}."
            )
    values = {key: parse_value(f"{prefix}{key}", value, types[key]) for key, value in named.items()}
    for key, value in values.items():
        check_limits(f"{prefix}{key}", value, limits.get(key))
    return values


def parse_value(label: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, which is a type or its union with None.

    "none" and "auto" are None where the type allows it. Raises `SettingsError` for a value of another type; `label` names
    the option in the message.
    """
    kinds = getattr(kind, "__args__", (kind,))
    if value is None and type(None) not in kinds:
        raise SettingsError(f"{label} must not be empty (None or null). Leave it out for its default.")
    if value is None or (isinstance(value, str) and value.lower() in ("none", "auto") and type(None) in kinds):
        return None
    want = next(k for k in kinds if k is not type(None))
    try:
        if want is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if want is int and (number := float(value)) == int(number):
            return int(number)
        if want is float:
            return float(value)
        if want is str:
            return str(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    raise SettingsError(f"{label}={value!r} is not {'an integer' if want is int else f'a {want.__name__}'}.")
