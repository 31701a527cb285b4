"""The index of a checkpoint in several files: `model.safetensors.index.json`."""

from __future__ import annotations

from pathlib import Path

from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import AGAIN, read_json


def read_shard_names(path: Path) -> list[str]:
    """Return the sorted names of the files that an index lists.

    Raises `WeightsError` if it lists none, or files outside its folder.
    """
    weight_map = read_json(path, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{path} is not an index of shards: weight_map must map names of tensors to names of files. {AGAIN}")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or "\0" in name]:
        raise WeightsError(f"{path} refers to files outside its folder: {', '.join(outside[:3])}. Use file names only.")
    return names
