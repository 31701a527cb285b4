"""Write docs/catalogue.md from the cards, docs/catalogue.toml and the closed systems: python docs/catalogue.py [--index]."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fieldguide.automl import index
from fieldguide.automl.catalogue import build_index, show
from fieldguide.core.card import Card
from fieldguide.models import registry

HERE = Path(__file__).parent
INTRO = """# Catalogue

All architectures with their sizes and the tests that prove them. Written by `make catalogue` from the cards in
`src/fieldguide/models` and from `docs/catalogue.toml`; a test keeps it up to date.

*Exact* is the number of parameters, which `tests/test_models.py` counts for every size. The same file compares every network
with its peer on random weights and inputs: outputs, gradients, and buffers after training; the named file contains further
comparisons. *Guide* and *published* are the numbers given by the guide and by the paper.
"""


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(*heads: str) -> list[str]:
    return [row(*heads), row(*("---:" if head in ("exact", "guide", "published") else "---" for head in heads))]


def lines(card: Card, data: dict[str, Any]) -> list[str]:
    about = data["architecture"].get(card.name, {})
    proof = f"{about['peer']}; `{about['proof']}`" if about else "`tests/cases.py`"
    sizes = [(name, size) for name, size in card.sizes.items() if size.params] or [(card.name, None)]
    rows = []
    for i, (name, size) in enumerate(sizes):
        said = data["size"].get(name, {})
        once = (card.paper, proof, about.get("note", "")) if not i else ("", "", "")
        rows.append(
            row(f"`{name}`", f"{size.params:,}" if size else "by data", said.get("guide", ""), said.get("published", ""), *once)
        )
    return rows


def page(data: dict[str, Any]) -> str:
    """Return the page. Raises `KeyError` for a size or an architecture that does not exist."""
    cards, placed = registry.cards(), [name for names in data["section"].values() for name in names]
    exact = {name: size.params for card in cards.values() for name, size in card.sizes.items()}
    unknown = [name for name in (*placed, *data["architecture"]) if name not in cards]
    if unknown := unknown + [name for name in data["size"] if name not in exact]:
        raise KeyError(unknown[0])
    out = [INTRO]
    others = {
        f"Others: {family}": [c.name for c in cards.values() if c.family == family and c.name not in placed]
        for family in dict.fromkeys(card.family for card in cards.values())
    }
    for title, names in (data["section"] | others).items():
        if names:
            out += [
                f"## {title}",
                "",
                *table("size", "exact", "guide", "published", "paper", "peer and proof", "note"),
                *(line for name in names for line in lines(cards[name], data)),
                "",
            ]
    out += [
        "## Closed systems",
        "",
        "The weights of these systems are not available. What is published about them:",
        "",
        *table("system", "maker", "published", "source", "most similar model here"),
    ]
    out += [
        row(s.title, f"{s.maker}, {s.year}", s.published, s.source, f"`{s.stand_in}`: {s.why}")
        for s in dict.fromkeys(registry.closed_systems().values())
    ]
    out += ["", "## Errors in the guide", ""]
    for error in data["error"]:
        seen = [f"`{name}` {exact[name]:,}" for name in (*error.get("outside", ()), *error.get("exact", ()))]
        out.append(f"- *{error['claim']}.* {error['why']}" + (f" {', '.join(seen)}." if seen else ""))
    return "\n".join(out) + "\n"


def read() -> dict[str, Any]:
    return tomllib.loads((HERE / "catalogue.toml").read_text("utf-8"))


def describe(name: str) -> dict[str, Any] | str:
    """Return the description of a size, or the error."""
    try:
        return asdict(show(name))
    except Exception as error:  # noqa: BLE001  all of them are listed
        return f"{type(error).__name__}: {error}"


def write_index() -> None:
    """Write the index that listing commands read without importing torch."""
    index.INDEX.write_text(json.dumps(build_index(), indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_descriptions() -> None:
    """Write the descriptions of all sizes; needs minutes."""
    built = build_index()
    names = [name for name, model in built["models"].items() if not model["test"]]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = dict(zip(names, pool.map(describe, names, chunksize=4)))
    if failed := {name: text for name, text in found.items() if isinstance(text, str)}:
        raise SystemExit("\n".join(f"{name} cannot be described: {text}" for name, text in failed.items()))
    described = found
    content = json.dumps(described, ensure_ascii=False, default=str).encode()
    index.DESCRIPTIONS.write_bytes(gzip.compress(content, mtime=0))


if __name__ == "__main__":
    (HERE / "catalogue.md").write_text(page(read()), "utf-8")
    write_index()
    if "--index" not in sys.argv:  # enough if no network has changed
        write_descriptions()
