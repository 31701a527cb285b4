"""Text, numbers and elements of the report as safe markup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

EMPTY_ELEMENTS = frozenset({"path", "line", "rect", "circle", "image", "use", "img", "input"})  # elements without children
# Control characters that HTML and XML forbid, lone surrogates, and marks that change the direction of text.
FORBIDDEN_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff\ufffe\uffff]")
UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMBT]|ms|s|min|h|[KMGT]i?B)(?!\w))")  # no line break before a unit
CHARACTER_WIDTH = 6.5  # estimated width of a character of a label, in drawing units


def clean_text(text: Any) -> str:
    """Return text that any parser accepts, with forbidden characters replaced; markup is returned unchanged."""
    return text if isinstance(text, Markup) else FORBIDDEN_CHARACTERS.sub("\ufffd", str(text))


def el(name: str, *children: Any, **attributes: Any) -> Markup:
    """Return an element. Children and attribute values are escaped unless they are markup; None is left out.

    >>> el("text", "a < b", class_="tick", text_anchor="end")
    Markup('<text class="tick" text-anchor="end">a &lt; b</text>')
    """
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(clean_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in EMPTY_ELEMENTS:
        return Markup(f"<{name}{inside}/>")
    body = "".join(escape(clean_text(child)) for child in children if child is not None)
    return Markup(f"<{name}{inside}>{body}</{name}>")


def join(parts: Iterable[Markup]) -> Markup:
    """Concatenate markup."""
    return Markup("").join(parts)


def join_units(text: str) -> str:
    """Return a text in which numbers are not separated from their units by line breaks."""
    return UNIT.sub("\u00a0", str(text))


def estimate_width(text: str) -> float:
    """Estimate the width of a label in drawing units; without a browser, text cannot be measured."""
    return CHARACTER_WIDTH * len(text)


def shorten(text: str, max_length: int) -> str:
    """Replace the middle of a text that is too long by an ellipsis, since names often differ at their ends."""
    if len(text) <= max_length:
        return text
    end = (max_length - 1) * 2 // 5
    return text[: max_length - 1 - end].rstrip() + "…" + (text[-end:].lstrip() if end else "")


def draw_label(name: str, text: Any, max_length: int, **attributes: Any) -> Markup:
    """Return an element with a text of at most `max_length` characters; the whole text is its tooltip."""
    text = str(text)
    short = shorten(text, max_length)
    return el(name, short, title=None if short == text else text, **attributes)


def to_python(value: Any) -> Any:
    """Return NumPy and tensor scalars as Python ones, and integers beyond the range of floats as text."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    return str(value) if isinstance(value, int) and value.bit_length() > 1000 else value


def is_number(value: Any) -> bool:
    """Return whether a value is a number, and not a truth value."""
    return isinstance(value := to_python(value), (int, float)) and not isinstance(value, bool)


def format_number(value: Any, decimals: int | None = None) -> str:
    """Format a number for people: `0.9861`, `12,345`, `1.23 M`, `3·10⁻⁵`; missing values and NaN are `–`."""
    value = to_python(value)
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if abs(value) == math.inf:
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if decimals is not None and size < 1e4:
        text = f"{size:.{decimals}f}"
    elif size >= 1e15 or 0 < size < 1e-4:
        text = format_power(size)
    elif size >= 1e7:
        unit, name = next((u, n) for u, n in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if size >= u)
        text = f"{size / unit:.3g}" if size / unit < 999.5 else f"{size / unit:.0f}"
        text = f"{text} {name}"
    elif size >= 1e4:
        text = f"{size:,.0f}"
    else:
        text = str(size) if isinstance(value, int) else f"{size:.4g}"
    return f"−{text}" if value < 0 and text.strip("0.") else text


def format_power(size: float) -> str:
    """Format a positive number in scientific notation: 3·10⁻⁵."""
    size = float(min(size, 10**308))
    mantissa, exponent = f"{size:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa}·10{raised}"


def choose_decimals(values: Sequence[float]) -> int | None:
    """Return the number of decimals that aligns the decimal points of a column, or None if sizes differ too much."""
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    if not sizes or max(sizes) >= 1e4 or min(sizes) < 1e-4 or max(sizes) / min(sizes) > 1e4:
        return None
    exponent = math.floor(math.log10(max(sizes)))
    max_decimals = 3 - exponent if exponent >= 0 else 2 - exponent
    return max(len(f"{v:.{max_decimals}f}".rstrip("0").partition(".")[2]) for v in sizes)
