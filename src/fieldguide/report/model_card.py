"""The model card: README.md with the metadata the Hugging Face hub reads, laid out for a terminal too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fieldguide.core.report_elements import Table
from fieldguide.report.charts import FORBIDDEN, decimals_of, is_number, number, plain

PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*")
RESERVED = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})  # not text to YAML
WIDEST = 60  # columns are padded to align, but one long cell must not widen the table


def card(
    *, title: str, verdict: str, facts: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str | Table]], front: dict
) -> str:
    """The card as Markdown: front matter, title, verdict, facts, then each section under its heading.

    A section's text is Markdown and stays as it is; everything else is escaped. `front` becomes the front
    matter key by key. Where it has `task` and `metrics` but no `model-index`, these become one: `metrics` is
    name -> value or a list of {"type", "value", "name"}, `dataset` a name or the hub's {"name", "type"}.
    """
    lines = ["---", *yaml(metadata(title, front)), "---", ""]
    lines += [f"# {escape(title)}", "", f"**{escape(verdict)}**", ""]
    lines += [f"- {escape(label)}: {escape(value)}" for label, value in facts]
    lines += [""] if facts else []
    for heading, content in sections:
        lines += [f"## {escape(heading)}", ""]
        if isinstance(content, Table):
            lines += [*([escape(content.note), ""] if content.note else []), *markdown_table(content), ""]
        else:
            lines += [FORBIDDEN.sub("\ufffd", content).strip("\n"), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


# -- the hub's metadata ------------------------------------------------------------------------------------


def metadata(title: str, front: Mapping[str, Any]) -> dict[str, Any]:
    """`front` with `task` as pipeline tag and the scores as the hub's model-index."""
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


def yaml(value: Any, indent: int = 0) -> list[str]:
    """Lines of YAML for dicts, lists and scalars: the part of the language that front matter needs."""
    pad, lines = " " * indent, []
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, (Mapping, list, tuple)) and item:
                deeper = indent + (2 if isinstance(item, Mapping) else 0)
                lines += [f"{pad}{scalar(str(key))}:", *yaml(item, deeper)]
            else:
                lines.append(f"{pad}{scalar(str(key))}: {scalar(item)}")
        return lines
    for item in value:
        if isinstance(item, (Mapping, list, tuple)) and item:
            inner = yaml(item, indent + 2)
            lines += [f"{pad}- {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{pad}- {scalar(item)}")
    return lines


def scalar(value: Any) -> str:
    """One value such that every YAML reader gets back what was meant."""
    value = plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if value != value else ".inf" if value > 0 else "-.inf"
        text = repr(value)  # YAML 1.1 takes 1e-05 for a word: the mantissa needs a point
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    if isinstance(value, (Mapping, list, tuple)):
        return "{}" if isinstance(value, Mapping) else "[]"
    text = str(value)
    if PLAIN.fullmatch(text) and text.lower() not in RESERVED:
        return text
    # JSON strings are YAML strings if every character outside printable Unicode is escaped the YAML way
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in quoted)


# -- Markdown ----------------------------------------------------------------------------------------------


def escape(text: Any) -> str:
    """One line of text that Markdown shows as it is: no mark-up, links, pictures, HTML, or broken table."""
    text = " ".join(FORBIDDEN.sub("\ufffd", str(text)).split())
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word an underscore means nothing
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"(?i)\b(https?|ftp|mailto|www)([:.])(?=\S)", r"\1\\\2", text)  # no bare links
    return re.sub(r"^(\d+(?=[.)](?: |$))|(?=[#>+=-]))", r"\1\\", text)  # nor headings or lists


def markdown_table(table: Table) -> list[str]:
    """A table with aligned columns, numbers to the right."""
    width = max([len(table.header), *map(len, table.rows)], default=0)
    if not width:
        return ["Nothing to show."]
    rows = [[plain(v) for v in row] + [None] * (width - len(row)) for row in table.rows]
    columns = []
    for k, name in enumerate([*table.header, *[""] * (width - len(table.header))]):
        values = [row[k] for row in rows]
        present = [v for v in values if v is not None]
        numeric = bool(present) and all(map(is_number, present))
        whole = all(isinstance(v, int) for v in present)
        digits = decimals_of(present) if numeric and not whole else None
        texts = [escape(name), *(cell(v, digits) for v in values)]
        wide = max(3, *(min(len(text), WIDEST) for text in texts))
        columns.append([text.rjust(wide) if numeric else text.ljust(wide) for text in texts])
        columns[-1].insert(1, "-" * (wide - 1) + ":" if numeric else "-" * wide)
    return ["| " + " | ".join(cells) + " |" for cells in zip(*columns)]


def cell(value: Any, digits: int | None) -> str:
    if value is None or is_number(value) or isinstance(value, bool):
        return number(value, digits)
    if isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value)):
        return "–".join(number(v, decimals_of(value)) for v in value)
    return escape(value)
