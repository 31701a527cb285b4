"""Write docs/checkpoints.md from docs/checkpoints.toml: python docs/checkpoints.py."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INTRO = """# Public checkpoints

Checkpoints of the Hugging Face Hub that are used most for the tasks of this library, and whether they load: by
`fieldguide predict hf:NAME ...`, `fieldguide fit ... --weights hf:NAME` and `fieldguide.load("hf:NAME")`. Written by
`make catalogue` from `docs/checkpoints.toml`.

`tests/test_checkpoint_list.py` proves every *yes*: transformers writes a copy of the checkpoint with its configuration as published
but fewer and narrower layers, fieldguide loads it without being told what it is, and the outputs are equal. The number of
parameters is that of the published configuration, with tied tensors counted once and without layers that are not used here.

"""
PIPELINES = """
## Text-to-image

Pipelines of diffusers, for `fieldguide predict hf:NAME "a prompt"`. `tests/test_text_to_image.py` proves each class: diffusers
writes a tiny pipeline with random weights, and the images for the same noise are equal. The networks at their published sizes
are in [catalogue.md](catalogue.md).

"""


def read() -> dict[str, Any]:
    return tomllib.loads((HERE / "checkpoints.toml").read_text("utf-8"))


def get_config(data: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a checkpoint, as in its config.json."""
    config = merge(data["config"][row["config"]], row.get("changes", {}))
    config = {key: None if value == "null" else value for key, value in config.items()}
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(row["labels"])}} if "labels" in row else {}
    return {**config, **labels, "architectures": [row["class"]]}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with changes, also of its parts."""
    parts = {key: merge(base[key], value) for key, value in changes.items() if is_part(base.get(key), value)}
    return {**base, **changes, **parts}


def is_part(before: Any, after: Any) -> bool:
    """Return whether a value is a configuration of its own."""
    return isinstance(before, dict) and isinstance(after, dict) and "hidden_size" in before


def format_row(row: dict[str, Any]) -> str:
    """Return the line of a checkpoint."""
    loads = "yes" if "config" in row else f"no: {row['why']}"
    params = f"{row['params']:,}" if "params" in row else ""
    return f"| `{row['name']}` | {row['architecture']} | {row['task']} | {params} | {loads} |"


def page(data: dict[str, Any]) -> str:
    """Return the page."""
    rows = data["checkpoint"]
    loaded = sum("config" in row for row in rows)
    return (
        INTRO
        + f"{loaded} of {len(rows)} load.\n\n"
        + "| checkpoint | architecture | task | parameters | loads |\n| --- | --- | --- | ---: | --- |\n"
        + "".join(f"{format_row(row)}\n" for row in rows)
        + PIPELINES
        + "| pipeline | class of diffusers | network |\n| --- | --- | --- |\n"
        + "".join(f"| `{row['name']}` | {row['class']} | {row['size']} |\n" for row in data["pipeline"])
    )


if __name__ == "__main__":
    (HERE / "checkpoints.md").write_text(page(read()), "utf-8")
