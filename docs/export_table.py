"""Write docs/export_table.md: which architectures can be exported as a graph, tried on their test sizes: python docs/export_table.py.

python docs/export_table.py NAME...   # try these only, and print
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from fieldguide.core.errors import FieldguideError
from fieldguide.exporting.network import build_network_graph, flatten
from fieldguide.exporting.onnx_file import check_sizes, trace
from fieldguide.models import registry

PAGE = Path(__file__).with_name("export_table.md")
HEAD = """# Architectures that can be exported

Each architecture in its test size, with random weights: traced by torch, then run by onnxruntime for two other numbers of rows and two
other sizes of every dynamic axis, and compared with the network. Written by `python docs/export_table.py`. What a task adds around the
network is described in [export.md](export.md).

"""
MAX_REASON = 160  # characters
MAX_SECONDS = 150  # of tracing and comparing


def stop(*_: object) -> None:
    raise TimeoutError(f"tracing takes more than {MAX_SECONDS} s")


def try_export(name: str) -> str:
    """Return the reason why an architecture cannot be exported, or ""."""
    torch.manual_seed(0)
    card = registry.cards()[name]
    network = registry.create(card.tiny).eval()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        graph = build_network_graph(card, card.resolve_config(card.tiny), network)
        with torch.no_grad():
            outputs = flatten(graph.module(*graph.build_example().values()))
        graph.outputs = tuple(f"output_{i}" for i in range(len(outputs)))
        check_sizes(graph, trace(graph))
    except (FieldguideError, RuntimeError, ValueError, OSError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
    finally:
        signal.alarm(0)
    return ""


def main() -> None:
    names = sys.argv[1:] or sorted(registry.cards())
    rows, counts = [], Counter()
    for number, name in enumerate(names, 1):
        reason = try_export(name)
        counts["no" if reason else "yes"] += 1
        shown = reason.replace("|", "\\|")
        rows.append(f"| `{name}` | {registry.cards()[name].family} | {'no' if reason else 'yes'} | {shown} |")
        print(f"{number}/{len(names)} {name}: {reason or 'yes'}", flush=True)
    if not sys.argv[1:]:
        columns = "| architecture | family | ONNX | reason |\n| --- | --- | --- | --- |\n"
        head = f"{HEAD}{counts['yes']} of {len(names)} architectures.\n\n{columns}"
        PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
