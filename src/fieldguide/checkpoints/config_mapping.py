"""Public configuration files: identification of the model, and conversion of keys to config fields and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fieldguide.checkpoints.config_check import check_fields
from fieldguide.checkpoints.names import CONFIG_FILE
from fieldguide.core.card import Card
from fieldguide.core.errors import WeightsError, nearest
from fieldguide.core.validation import guard, read_json
from fieldguide.models.mapping.config_rules import ConfigRow, Constant, Derived, Expect, LabelCount, ValueMap, WithDefault
from fieldguide.models.registry import cards

TYPE_KEYS = ("model_type", "_class_name")  # keys that identify the model in the configurations that we write
IDENTITY_KEYS = (*TYPE_KEYS, "general.architecture")  # ... and in those that we read
TIMM = "timm"  # its configurations hold a name and the arguments that differ from the defaults of that name
TIMM_ARGS = {"img_size": "image", "drop_rate": "dropout", "drop_path_rate": "drop_path"}  # argument of timm -> our field
IGNORED_TIMM_ARGS = (
    "num_classes",
    "in_chans",
    "global_pool",
    "pretrained",
    "checkpoint_path",
)  # follow from the tensors, or have no effect
IdentifiedConfig = tuple[Card, str, Mapping[str, ConfigRow]]  # card, origin, table of configuration keys


def read(path: Path) -> dict[str, Any]:
    """Return the keys of a JSON or GGUF file. Raises `WeightsError` if it holds none."""
    if path.suffix == ".gguf":
        from fieldguide.core.gguf import read_metadata

        return read_metadata(path)
    return read_json(path, WeightsError)


def read_network_config(folder: Path) -> tuple[Card, Any]:
    """Return the card and the config of the network whose configuration is in a folder, without its weights.

    Raises `WeightsError` if no card matches.
    """
    path = folder / CONFIG_FILE
    public = read(path)
    if (known := identify_config(public)) is None:
        raise WeightsError(f"{path} describes {public.get('_class_name', 'a network')}, which is not supported.")
    card, _, table = known
    return card, card.config(**to_config_fields(card, table, public, path))


def identify_config(config: Mapping[str, Any]) -> IdentifiedConfig | None:
    """Return card, origin and key table of a configuration, or None if no card matches.

    Of several, the one that requires most keys matches: T5's encoder alone differs from T5 by one more key.
    """
    best: IdentifiedConfig | None = None
    required = -1
    for card in cards().values():
        for origin, table in card.configs.items():
            identity = {
                key: row.among or (row.value,)
                for key, row in table.items()
                if isinstance(row, Expect) and (key in IDENTITY_KEYS or row.among)
            }
            plain = [] if identity.keys() & set(IDENTITY_KEYS) else [key for key, row in table.items() if isinstance(row, str)]
            matches = all(look_up(config, key)[1] in values for key, values in identity.items()) and all(
                look_up(config, key)[1] is not None for key in plain
            )
            if matches and len(identity) > required:
                best, required = (card, origin, table), len(identity)
    return best


def resolve_timm_name(config: Mapping[str, Any], where: Any) -> tuple[Card, str, dict[str, Any]]:
    """Return card, size and overrides for the architecture name in a configuration of timm.

    Raises `WeightsError` for an unknown name or unknown overrides.
    """
    known = {name: (card, meant) for card in cards().values() for name, meant in card.aliases.get(TIMM, {}).items()}
    name = str(config["architecture"]).partition(".")[0]
    if name not in known:
        raise WeightsError(
            f"{where} describes the timm model {name}, which is not supported.{nearest(name, known)} "
            "If you know an equivalent model of this library, pass its name=..."
        )
    card, meant = known[name]
    size, changes = (meant, {}) if isinstance(meant, str) else meant
    args = {key: value for key, value in (config.get("model_args") or {}).items() if key not in IGNORED_TIMM_ARGS}
    if unsupported := [key for key in args if key not in TIMM_ARGS or not card.accepts(TIMM_ARGS[key])]:
        raise WeightsError(f"{where}: model_args.{unsupported[0]}={args[unsupported[0]]!r} is not supported for {size}.")
    return card, size, {**changes, **{TIMM_ARGS[key]: value for key, value in args.items() if value is not None}}


def look_up(config: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """Return whether a dotted key exists, and its value."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False, None
        config = config[part]
    return True, config


def to_config_fields(card: Card, table: Mapping[str, ConfigRow], config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """Return a public configuration as config fields.

    Raises `WeightsError` that lists every key by which it describes another network, or names a value that no network has.
    """
    with guard(where, WeightsError):
        return _convert_fields(card, table, config, where)


def _convert_fields(card: Card, table: Mapping[str, ConfigRow], config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    keys: dict[str, str] = {}  # field -> public key
    kinds = {f.name: str(f.type) for f in fields(card.config)}
    faults = []
    for key, row in table.items():
        there, value = look_up(config, key)
        if isinstance(row, WithDefault):
            values[row.ours] = value if there and value is not None else row.value
        elif isinstance(row, ValueMap) and there:
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, list | dict) or value not in row.values:
                faults.append(f"{key}={value!r} must be one of {', '.join(map(repr, row.values))}")
            else:
                values[row.ours] = row.values[value]
        elif isinstance(row, LabelCount):
            if there and not isinstance(value, list | dict):
                raise WeightsError(f"{where}: {key} must list the names of the labels.")
            values[row.ours] = len(value) if there else row.absent
        elif isinstance(row, Constant):
            values[row.ours] = row.value
        elif isinstance(row, Derived):
            values |= row.read(config)
        elif isinstance(row, str) and there and value is not None:
            values[row] = value
        keys |= dict.fromkeys(values.keys() - keys.keys(), key)
    values = {k: tuple(v) if kinds.get(k, "").startswith("tuple") and isinstance(v, list) else v for k, v in values.items()}
    if not faults:
        check_fields(card, values, where, keys)
        made = card.config(**values)
        for key, row in table.items():
            there, value = look_up(config, key)
            if isinstance(row, Expect) and not there and row.absent is not ...:
                there, value = True, row.absent
            if isinstance(row, Expect) and there and (wanted := row.value(made) if callable(row.value) else row.value) != value:
                faults.append(f"{key}={value!r} is not supported; {card.name} requires {wanted!r}")
    if faults:
        raise WeightsError(
            "\n".join([f"{where} describes a network that differs from {card.name}:", *(f"  {f}" for f in faults)])
        )
    return values


def to_public_config(card: Card, table: Mapping[str, ConfigRow], config: Any) -> dict[str, Any]:
    """Return a config under public keys. Raises `WeightsError` for values that the origin cannot express."""
    out: dict[str, Any] = {}
    for key, row in table.items():
        if isinstance(row, Constant):
            if (own := getattr(config, row.ours)) != row.value:
                raise WeightsError(f"{card.name} with {row.ours}={own!r} cannot be exported to this format: {key.strip('<>')}.")
            continue
        if isinstance(row, Expect):
            if not row.written:
                continue
            value = row.value(config) if callable(row.value) else row.value
        elif isinstance(row, ValueMap):
            own = getattr(config, row.ours)
            found = [theirs for theirs, ours in row.values.items() if ours == own]
            if not found:
                raise WeightsError(
                    f"{card.name} with {row.ours}={own!r} cannot be exported to this format, whose {key} supports only "
                    f"{', '.join(f'{row.ours}={ours!r}' for ours in row.values.values())}."
                )
            value = found[:1] if key == "architectures" else found[0]
        elif isinstance(row, Derived):
            value = row.write(config)
        elif isinstance(row, LabelCount):
            value = {str(i): f"LABEL_{i}" for i in range(getattr(config, row.ours))}
        else:
            value = getattr(config, row if isinstance(row, str) else row.ours)
        *parents, last = key.split(".")
        part = out
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = list(value) if isinstance(value, tuple) else value
    return out
