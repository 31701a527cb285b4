"""docs/catalogue.md is up to date, and its claims about the guide's ranges hold."""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cases import CASES
from fieldguide.automl import index
from fieldguide.automl.catalogue import build_index, show
from fieldguide.models.registry import cards

DOCS = Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("catalogue_page", DOCS / "catalogue.py")
PAGE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PAGE)
DATA = PAGE.read()
EXACT = {name: size.params for card in cards().values() for name, size in card.sizes.items()}


def number(text: str) -> float:
    """Return 60,000 or 5.3M as a number."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1], 1)
    return float(text.rstrip("KMB").replace(",", "")) * scale


def test_the_index_is_up_to_date():
    """`make catalogue` writes what listing commands and early checks read without importing torch."""
    stored = index.load_index()
    assert stored is not None, "make catalogue"
    assert stored == json.loads(json.dumps(build_index()))
    described = json.loads(gzip.decompress(index.DESCRIPTIONS.read_bytes()))
    assert described.keys() == {name for name, model in stored["models"].items() if not model["test"]}
    for name in ("lenet5-modern", "resnet18", "gpt2"):
        stored_one, fresh = (json.loads(json.dumps(asdict(d), default=str)) for d in (index.describe(name, {}), show(name)))
        assert stored_one == fresh, "make catalogue"


def test_the_page_is_up_to_date():
    assert (DOCS / "catalogue.md").read_text("utf-8") == PAGE.page(DATA), "make catalogue"


def test_every_architecture_is_on_the_page_once():
    text = PAGE.page(DATA)
    for card in cards().values():
        named = [size for size in card.sizes if card.sizes[size].params] or [card.name]
        assert all(text.count(f"\n| `{size}` |") == 1 for size in named)


@pytest.mark.parametrize("name", DATA["architecture"])
def test_proof_file_mentions_the_architecture(name):
    file = DOCS.parent / DATA["architecture"][name]["proof"]
    words = {name, name.partition("-")[0], cards()[name].model.__name__, name.replace("-", "_")}
    assert name in CASES and any(word in file.read_text("utf-8") for word in words)


@pytest.mark.parametrize("error", [error for error in DATA["error"] if "range" in error], ids=lambda error: error["claim"])
def test_sizes_outside_of_the_guides_range_are_outside(error):
    low, high = error["range"]
    assert error["outside"] and all(not low <= EXACT[name] <= high for name in error["outside"])


@pytest.mark.parametrize("name", [name for name, said in DATA["size"].items() if "published" in said])
def test_published_figures_are_near_the_exact_ones(name):
    """Within 5 %: a larger difference means another network or another way of counting."""
    assert EXACT[name] == pytest.approx(number(DATA["size"][name]["published"]), rel=0.05)
