"""Numbers as text for people."""

from __future__ import annotations


def format_plain(value: float, digits: int = 4) -> str:
    """Return a number with about `digits` significant digits and without an exponent: 0.9861, 12,346, 4,000,000,000,000."""
    if value == value and 10**digits <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
