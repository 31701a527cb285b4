"""Printing of signatures: how a model is called, as a short block or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable

from fieldguide.core.numbers import format_plain
from fieldguide.core.signature import InputField, OptionSpec, RecordField, Signature, Step, TensorSpec
from fieldguide.core.terminal import echo

SHOWN_VALUES = 4  # categories or classes
OUTSIDE = "*"  # marks a step that stays outside of a graph


def print_signature(source: str, signature: Signature, as_json: bool) -> None:
    """Print the signature of a model."""
    if as_json:
        echo(json.dumps(signature.to_json(), ensure_ascii=False))
        return
    echo("\n".join(format_signature(source, signature)))


def format_signature(source: str, signature: Signature) -> list[str]:
    """Return a signature as lines."""
    lines = [f"{source}: {signature.task or 'a network without preprocessing'} with {signature.architecture}"]
    series = signature.series
    if series is not None:
        lines.append(f"series: {series.history} past steps give {series.horizon}; one step is {series.frequency}")
    lines += format_group("inputs, of one row", map(format_input, signature.inputs))
    lines += format_group(f"preprocessing ({OUTSIDE} cannot be part of a graph)", map(format_step, signature.preprocessing))
    lines += format_group("tensors", map(format_tensor, signature.tensors))
    lines += format_group(f"outputs of the network ({signature.method})", map(format_tensor, signature.outputs))
    if (loop := signature.loop) is not None:
        size = f" of {', '.join(map(str, loop.latent))}" if loop.latent else ""
        most = f", at most {loop.max_length:,} tokens" if loop.max_length else ""
        lines.append(f"loop: {loop.kind}{size}{most}")
    lines += format_group("postprocessing", map(format_step, signature.postprocessing))
    lines += format_group(f"prediction, for each {signature.record_for}", map(format_record, signature.record))
    lines += format_group("options", map(format_option, signature.options))
    limits = {name: size for name, size in vars(signature.limits).items() if size is not None}
    lines += [f"limits: {', '.join(f'{size:,} {name}' for name, size in limits.items())}"] if limits else []
    return lines


def format_group(title: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return rows below a title, with aligned columns; nothing if there are no rows."""
    cells = list(rows)
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [f"{title}:", *("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells)]


def format_input(field: InputField) -> tuple[str, ...]:
    """Return name, kind and details of an input."""
    details = [] if field.required else ["optional"]
    if field.low is not None and field.high is not None:
        details.append(" to ".join(v if isinstance(v, str) else format_plain(v) for v in (field.low, field.high)))
    if field.values:
        details.append(format_values(field.values, field.count))
    if (image := field.image) is not None:
        frames = f"{image.frames} x " if image.frames else ""
        details.append(f"{frames}{image.width} x {image.height} pixels, {image.channels} channels ({image.fit})")
    if field.audio is not None:
        details.append(f"{field.audio.sample_rate:,} Hz")
    return field.name, field.kind, "; ".join([*details, *([field.about] if field.about else [])])


def format_values(values: tuple[str, ...], count: int) -> str:
    """Return the first of some values."""
    shown = ", ".join(values[:SHOWN_VALUES])
    return shown if count <= SHOWN_VALUES else f"{shown}, ... ({count:,})"


def format_step(step: Step) -> tuple[str, ...]:
    """Return name and meaning of a step."""
    return step.name + ("" if step.in_graph else OUTSIDE), step.about


def format_tensor(spec: TensorSpec) -> tuple[str, ...]:
    """Return name, type, axes and meaning of a tensor."""
    optional = "" if spec.required else " (optional)"
    return spec.name, spec.dtype, f"[{', '.join(map(str, spec.axes))}]", spec.about + optional


def format_record(field: RecordField) -> tuple[str, ...]:
    """Return name, type and meaning of a value of a record."""
    values = format_values(field.values, field.count) if field.values else ""
    inside = field.items.fields if field.items is not None else field.fields
    parts = f"{{{', '.join(f.name for f in inside)}}}" if inside else ""
    kind = "file" if field.media_types else field.type
    return field.name, kind, "; ".join(filter(None, (field.about, values, parts)))


def format_option(option: OptionSpec) -> tuple[str, ...]:
    """Return name, default and meaning of an option."""
    default = "required" if option.required else "" if option.default is None else str(option.default)
    return option.name, option.type, default, option.about
