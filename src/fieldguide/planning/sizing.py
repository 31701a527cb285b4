"""How many parameters suit the data, and what networks of 7 and 70 billion parameters need: the tables of docs/sizing.md.

`python -m fieldguide.planning.sizing docs/sizing.md` writes the tables anew, between the marks of that page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fieldguide.core.errors import SettingsError
from fieldguide.core.files import write_atomically
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.models.initialization import make_on_meta
from fieldguide.planning.estimate import Estimate, estimate
from fieldguide.planning.sources import DTYPE_BYTES

TOKENS_PER_PARAMETER = 20  # of compute-optimal training (Hoffmann et al. 2022, arXiv:2203.15556, table 3)
NETWORKS = ("llama2-7b", "llama3.1-8b", "llama2-70b", "llama3.1-70b")
REQUESTS, CONTEXT = 16, 8192
DEVICES = (1, 2, 4, 8)
MACHINE = "h100-80g"
TRAINED_LENGTH = 2048
GB = 1e9
DATA = (
    ("a book", 1e5),
    ("tinyshakespeare in characters", 1.1e6),
    ("a billion words of text", 1.3e9),
    ("Chinchilla's data", 1.4e12),
)
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def suggest_parameters(tokens: float) -> float:
    """Return the parameters for which a number of tokens is compute-optimal."""
    return tokens / TOKENS_PER_PARAMETER


def describe_tokens(tokens: float) -> str:
    """Return a sentence on the size of a language model that is trained on these tokens from scratch."""
    return f"your {tokens:,.0f} tokens suit about {format_count(suggest_parameters(tokens))} parameters (20 tokens for each)"


def format_count(count: float) -> str:
    for unit, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def count_parameters(name: str) -> int:
    card, size = registry.find(name)
    return sum(p.numel() for p in make_on_meta(card, card.resolve_config(size)).parameters())


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tabulate_data() -> str:
    rows = [[name, f"{tokens:,.0f}", format_count(suggest_parameters(tokens))] for name, tokens in DATA]
    return format_table(["data", "tokens", "parameters"], rows)


def tabulate_weights() -> str:
    """Return the weights in 16 bits, and the cache of a sequence."""
    rows = []
    for name in NETWORKS:
        count = count_parameters(name)
        cache = count_cache(name)
        rows.append(
            [
                f"`{name}`",
                f"{count / 1e9:.2f} billion",
                f"{DTYPE_BYTES['bfloat16'] * count / GB:.1f} GB",
                f"{cache / 1024:,.0f} KiB",
                f"{cache * CONTEXT * REQUESTS / GB:.1f} GB",
            ]
        )
    return format_table(
        ["network", "parameters", "weights", "cache per token", f"cache of {REQUESTS} x {CONTEXT:,} tokens"], rows
    )


def count_cache(name: str) -> int:
    """Return the bytes of keys and values of one token in bfloat16."""
    card, size = registry.find(name)
    network: Any = make_on_meta(card, card.resolve_config(size)).to(torch.bfloat16)
    with torch.device("meta"):
        cache = network.new_cache(1, 1)
    return sum(t.nbytes for t in cache.tensors)


def tabulate_serving() -> str:
    """Return the memory of each device and the tokens per second of a server."""

    def plan(name: str, devices: int) -> Estimate:
        fields = {"length": CONTEXT} if name.startswith("llama2") else {}
        strategy = "tensor" if devices > 1 else "ddp"
        return estimate(
            name, mode="serve", batch=REQUESTS, length=CONTEXT - 512, new_tokens=512, machine=MACHINE, dtype="bfloat16",
            devices=devices, strategy=strategy, search=False, fields=fields,
        )  # fmt: skip

    rows = []
    for name in NETWORKS:
        plans = [plan(name, devices) for devices in DEVICES]
        rows.append([f"`{name}`", *(format_plan(each) for each in plans)])
        served = [each.serving or {} for each in plans]
        rows.append(["tokens per second", *(f"{s['tokens_per_second']:,.0f}" for s in served)])
    return format_table(["network", *(f"{n} x H100" for n in DEVICES)], rows)


def tabulate_training() -> str:
    """Return the memory of each device in training."""
    base = {"precision": "bfloat16", "optimizer": "adamw", "grad_clip": 1.0, "gradient_checkpointing": True}
    rows = []
    for name in ("llama2-7b", "llama2-70b"):
        for title, changes, dtype in (("AdamW", {}, "float32"), ("LoRA, rank 8", {"finetune": "lora"}, "float32")):
            settings = Settings().with_({**base, **changes})
            plans = [
                estimate(
                    name, mode="train", batch=1, length=TRAINED_LENGTH, machine=MACHINE, dtype=dtype, devices=devices,
                    strategy="fsdp", settings=settings, search=False,
                )
                for devices in DEVICES
            ]  # fmt: skip
            rows.append([f"`{name}`, {title}", *map(format_plan, plans)])
    return format_table(["training", *(f"{n} x H100" for n in DEVICES)], rows)


def format_plan(plan: Estimate) -> str:
    return f"{plan.peak / GB:.0f} GB{'' if plan.fits else ' (too much)'}"


TABLES: dict[str, Callable[[], str]] = {
    "data": tabulate_data,
    "weights": tabulate_weights,
    "serving": tabulate_serving,
    "training": tabulate_training,
}


def fill(text: str, names: Sequence[str] = tuple(TABLES)) -> str:
    """Return a page with its tables made anew. Raises `SettingsError` if a table has no mark."""
    missing = set(names) - {match[2] for match in MARK.finditer(text)}
    if missing:
        raise SettingsError(f"no mark for the tables {', '.join(sorted(missing))}.")
    return MARK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}" if match[2] in names else match[0], text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    write_atomically(page, fill(page.read_text(encoding="utf-8")).encode())
