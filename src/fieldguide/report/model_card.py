"""The model card: README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fieldguide.core.report_elements import Table
from fieldguide.report.text import FORBIDDEN_CHARACTERS, choose_decimals, format_number, is_number, to_python

WIDEST = 60  # columns are padded to align, but one long cell must not widen the table


def build_card(
    *,
    title: str,
    verdict: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[tuple[str, str | Table]],
    front: dict[str, Any],
) -> str:
    """Return the card as Markdown: front matter, title, result in one sentence, facts, then the sections with headings.

    The text of a section is Markdown and stays as it is; everything else is escaped. `front` becomes the front
    matter key by key. If it has `task` and `metrics` but no `model-index`, these become one: `metrics` is name
    -> value or a list of {"type", "value", "name"}, `dataset` a name or the hub's {"name", "type"}.
    """
    matter = yaml.safe_dump(to_plain(add_model_index(title, front)), sort_keys=False, allow_unicode=True, width=1000)
    lines = ["---", *matter.rstrip("\n").split("\n"), "---", ""]
    lines += [f"# {escape(title)}", "", f"**{escape(verdict)}**", ""]
    lines += [f"- {escape(label)}: {escape(value)}" for label, value in facts]
    lines += [""] if facts else []
    for heading, content in sections:
        lines += [f"## {escape(heading)}", ""]
        if isinstance(content, Table):
            lines += [*([escape(content.note), ""] if content.note else []), *build_table(content), ""]
        else:
            lines += [FORBIDDEN_CHARACTERS.sub("\ufffd", content).strip("\n"), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


# -- the hub's metadata ------------------------------------------------------------------------------------


def add_model_index(title: str, front: Mapping[str, Any]) -> dict[str, Any]:
    """Return `front` with `task` as pipeline tag and the scores as the hub's model-index."""
    rest = {key: value for key, value in front.items() if key not in ("task", "metrics", "dataset")}
    task, metrics, data = front.get("task"), front.get("metrics"), front.get("dataset")
    if task:
        rest.setdefault("pipeline_tag", task)
    if isinstance(metrics, Mapping):
        metrics = [{"type": name, "value": value} for name, value in metrics.items()]
    if metrics and all(isinstance(metric, Mapping) for metric in metrics):
        rest["metrics"] = list(dict.fromkeys(metric["type"] for metric in metrics))
        if task and "model-index" not in rest:
            data = data if isinstance(data, Mapping) else {"name": str(data or "held-out data")}
            data = {"name": data["name"], "type": data.get("type", "private"), **data}
            rest["model-index"] = [
                {
                    "name": title,
                    "results": [{"task": {"type": task}, "dataset": data, "metrics": [dict(metric) for metric in metrics]}],
                }
            ]
    elif metrics:
        rest["metrics"] = metrics
    return rest


def to_plain(value: Any) -> Any:
    """Return nested values as the plain dictionaries, lists and scalars that YAML holds."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return to_python(value)


# -- Markdown ----------------------------------------------------------------------------------------------


def escape(text: Any) -> str:
    """Escape text for one line of Markdown: no markup, links, images, HTML, or broken table."""
    text = " ".join(FORBIDDEN_CHARACTERS.sub("\ufffd", str(text)).split())
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word an underscore means nothing
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"(?i)\b(https?|ftp|mailto|www)([:.])(?=\S)", r"\1\\\2", text)  # no bare links
    return re.sub(r"^(\d+(?=[.)](?: |$))|(?=[#>+=-]))", r"\1\\", text)  # nor headings or lists


def build_table(table: Table) -> list[str]:
    """Return a table with aligned columns, numbers to the right."""
    width = max([len(table.header), *map(len, table.rows)], default=0)
    if not width:
        return ["Nothing to show."]
    rows = [[to_python(v) for v in row] + [None] * (width - len(row)) for row in table.rows]
    columns = []
    for k, name in enumerate([*table.header, *[""] * (width - len(table.header))]):
        values = [row[k] for row in rows]
        present = [v for v in values if v is not None]
        numeric = bool(present) and all(map(is_number, present))
        whole = all(isinstance(v, int) for v in present)
        digits = choose_decimals(present) if numeric and not whole else None
        texts = [escape(name), *(format_cell(v, digits) for v in values)]
        wide = max(3, *(min(len(text), WIDEST) for text in texts))
        columns.append([text.rjust(wide) if numeric else text.ljust(wide) for text in texts])
        columns[-1].insert(1, "-" * (wide - 1) + ":" if numeric else "-" * wide)
    return ["| " + " | ".join(cells) + " |" for cells in zip(*columns)]


def format_cell(value: Any, digits: int | None) -> str:
    if value is None or is_number(value) or isinstance(value, bool):
        return format_number(value, digits)
    if isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value)):
        return "–".join(format_number(v, choose_decimals(value)) for v in value)
    return escape(value)
