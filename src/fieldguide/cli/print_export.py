"""Output of `fieldguide export`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from fieldguide.cli.console import echo

if TYPE_CHECKING:
    from fieldguide.exporting.export import Export


def print_export(done: Export, as_json: bool) -> None:
    """Print where an export is and how its verification ended."""
    found = done.verification
    if as_json:
        about = {"path": str(done.path), "format": done.format, "passed": done.passed, "note": done.note}
        echo(json.dumps({**about, "verification": None if found is None else found.to_json()}))
        return
    if found is None:
        echo(f"written to {done.path}, {done.note}")
    elif found.passed:
        kind = "all answers equal" if found.agreement == 1 else f"{100 * found.agreement:.1f} % of the answers equal"
        echo(
            f"written to {done.path}\nverified without {done.without} on {found.rows:,} rows of {found.source}, in batches of "
            f"{', '.join(map(str, found.batches))}: {kind}, largest difference {found.largest:.1g}"
        )
        if found.quantized:
            echo(found.quantized)
        if found.scores and (found.quantized or found.agreement < 1):
            name, (before, after) = next(iter(found.scores.items()))
            echo(f"{name}: {before:.4g} before, {after:.4g} as exported")
        echo(f"Run: python {done.path}/run.py INPUT...")
    else:
        lines = "\n".join(f"  {problem}" for problem in found.problems)
        print(f"{done.path} differs from the original and must not be used:\n{lines}", file=sys.stderr)
        if found.quantized:
            print(f"The answers change with {found.quantized}. Export it with --precision float32.", file=sys.stderr)
