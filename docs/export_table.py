"""Write docs/export_table.md: every architecture and every format, tried on test sizes with random weights.

    python docs/export_table.py --out results.jsonl [NAME...]   # lines that exist are not tried again
    python docs/export_table.py --out results.jsonl --page

Formats of graphs are traced, executed, and compared with the network for other numbers of rows and other sizes of every dynamic axis.
Files of other libraries are written and read again, and the outputs compared.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fieldguide.checkpoints.load import load, save
from fieldguide.core.card import Card
from fieldguide.core.errors import FieldguideError
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.exporting.export import FORMATS, GGUF_TOLERANCES, load_format
from fieldguide.exporting.gguf import compare_outputs, write_gguf
from fieldguide.exporting.graph import ExportError
from fieldguide.exporting.huggingface import compare_networks
from fieldguide.exporting.network import build_network_graph, flatten
from fieldguide.models import registry

PAGE = Path(__file__).with_name("export_table.md")
HEAD = """# Architectures and formats of exports

Each architecture in its test size, with random weights. Graphs (onnx, torch, executorch) are traced, executed for two other numbers of
rows and two other sizes of every dynamic axis, and compared with the network. Files (huggingface, gguf) are written and read again, and
their outputs are compared. Written by `python docs/export_table.py`. What a task adds around the network is described in
[export.md](export.md).

"""
NOT_PUBLIC = "transformers and diffusers have no such network, or its names are not known here"
VOCABULARY = 300  # tokens: all bytes, and some of two
MAX_REASON = 160  # characters
MAX_SECONDS = 90  # of the processor, for one architecture and format


@contextmanager
def limit_seconds() -> Iterator[None]:
    """Raise `TimeoutError` if the block takes more than `MAX_SECONDS` of the processor."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"takes more than {MAX_SECONDS} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def try_graph(form: str, card: Card, network: nn.Module) -> None:
    graph = build_network_graph(card, card.resolve_config(card.tiny), network)
    with torch.no_grad():
        outputs = flatten(graph.module(*graph.build_example().values()))
    graph.outputs = tuple(f"output_{i}" for i in range(len(outputs)))
    with tempfile.TemporaryDirectory() as folder:
        load_format(form).write(graph, Path(folder) / f"model{load_format(form).suffix}", "float32")


def try_huggingface(card: Card, network: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(network, folder, "huggingface")
        compare_networks(card, network, load(folder))


def try_gguf(card: Card, network: nn.Module) -> None:
    if "gguf" not in card.configs:
        raise ExportError("llama.cpp has no such network, or its names are not known here")
    text = TextTokenizer.fit_exact([PAGE.with_name("export.md").read_text(encoding="utf-8")], size=network.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(network, card, text, path := Path(folder) / "model.gguf", "float32")
        compare_outputs(network, load(path), GGUF_TOLERANCES["float32"])


def try_export(name: str, form: str) -> str:
    """Return the reason why an architecture cannot be exported in a format, or ""."""
    torch.manual_seed(0)
    card = registry.cards()[name]
    attempts: dict[str, Callable[[Card, Any], None]] = {"huggingface": try_huggingface, "gguf": try_gguf}
    try:
        with limit_seconds():
            words = {"vocab_size": VOCABULARY, "length": 64} if form == "gguf" and "gguf" in card.configs else {}
            network = registry.create(card.tiny, **words).eval()
            attempts[form](card, network) if form in attempts else try_graph(form, card, network)
    except (
        FieldguideError,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        kind = "" if isinstance(error, FieldguideError) else f"{type(error).__name__}: "
        return kind + " ".join(str(error).split())[:MAX_REASON]
    return ""


def write_page(results: dict[tuple[str, str], str], forms: list[str]) -> None:
    """Write the table: a row for each architecture, its reasons numbered below."""
    names = [name for name in sorted(registry.cards()) if all((name, form) in results for form in forms)]
    counts = ", ".join(f"{form} {sum(not results[name, form] for name in names)}" for form in forms)
    lines = [f"Of {len(names)} architectures: {counts}.", "", f"| architecture | family | {' | '.join(forms)} |"]
    lines.append("| --- " * (len(forms) + 2) + "|")
    reasons: dict[str, int] = {}
    for name in names:
        cells = []
        for form in forms:
            reason = results[name, form]
            cells.append(f"no ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else "yes")
        lines.append(f"| `{name}` | {registry.cards()[name].family} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason.replace('|', chr(92) + '|')}" for reason, number in reasons.items())]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", action="store_true", help="write the page from the results alone")
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    options = parser.parse_args()
    lines = options.out.read_text("utf-8").splitlines() if options.out.exists() else []
    results = {(line["name"], line["format"]): line["reason"] for line in map(json.loads, lines)}
    results = {key: NOT_PUBLIC if "cannot be saved in the format" in reason else reason for key, reason in results.items()}
    if options.page:
        write_page(results, [form for form in FORMATS if any(other == form for _, other in results)])
        return
    for name in options.names or sorted(registry.cards()):
        for form in options.formats:
            if (name, form) not in results:
                reason = results[name, form] = try_export(name, form)
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, "format": form, "reason": reason}) + "\n")
                print(f"{name} {form}: {reason or 'yes'}", flush=True)


if __name__ == "__main__":
    main()
