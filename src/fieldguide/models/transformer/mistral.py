"""Mistral: a LLaMA that attends to a sliding window (Jiang et al. 2023, arXiv:2310.06825).

New here: each token attends to the 4,096 before it only; over the layers, what it reads reaches further back. Eight key/value
heads for 32 query heads. Later versions have no window but longer sequences, and heads whose width is independent of D.

Initialization: N(0, 0.02).
Shapes: B batch, T tokens, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.gqa import GroupedAttention
from fieldguide.models.layers.kv_cache import Cache, causal_mask
from fieldguide.models.mapping.config_rules import Derived, Expect
from fieldguide.models.transformer import llama


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 32_000
    length: int = 32_768  # maximum sequence length, in tokens
    dim: int = 4096  # D
    depth: int = 32
    heads: int = 32
    kv_heads: int = 8  # number of key/value heads
    width: int = 128  # d
    hidden: int = 14_336  # hidden width of the gated MLPs
    window: int = 0  # attention window, including the token itself; 0 = unlimited
    rope_theta: float = 1_000_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()
    eps: float = 1e-5
    tie_embeddings: bool = False  # the output head shares the weights of the embedding


class Block(llama.Block):
    """The LLaMA block with heads of any width."""

    def make_attention(self, c: Config) -> GroupedAttention:
        return GroupedAttention(c.dim, c.heads, c.kv_heads, c.width)


class Mistral(llama.Llama):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`."""

    block = Block

    def mask_keys(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> Tensor | None:
        """Return which keys each new token attends to: those of the window."""
        return causal_mask(steps, mask, cache, device, self.config.window)


def read_width(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Return the width of the heads, by default D divided by their number."""
    return {"width": theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]}


WINDOW = Derived(lambda t: {"window": t.get("sliding_window") or 0}, lambda c: c.window or None)
CONFIG = {
    "model_type": Expect("mistral"),
    "architectures": Expect(["MistralForCausalLM"]),
    **llama.SHARED,
    "head_dim": Derived(read_width, lambda c: c.width),
    "sliding_window": WINDOW,
}

CARD = Card(
    name="mistral",
    model=Mistral,
    config=Config,
    paper="arXiv:2310.06825",
    year=2023,
    input_type="tokens",
    output_type="tokens",
    sizes={
        "mistral-7b": Size(vocab_size=32_768, params=7_248_023_552, source="mistralai/Mistral-7B-v0.3"),
        "mistral-7b-v0.1": Size(window=4096, rope_theta=10_000.0, params=7_241_732_096, source="mistralai/Mistral-7B-v0.1"),
        "mistral-7b-v0.2": Size(params=7_241_732_096, source="mistralai/Mistral-7B-Instruct-v0.2"),
        "mistral-nemo-12b": Size(
            vocab_size=131_072,
            length=131_072,
            dim=5120,
            depth=40,
            params=12_247_782_400,
            source="mistralai/Mistral-Nemo-Base-2407",
        ),
        "mistral-small-24b": Size(
            vocab_size=131_072,
            dim=5120,
            depth=40,
            hidden=32_768,
            rope_theta=100_000_000.0,
            params=23_572_403_200,
            source="mistralai/Mistral-Small-24B-Base-2501",
        ),
        "mistral-test": Size(
            vocab_size=30, length=12, dim=12, depth=2, heads=4, kv_heads=2, width=4, hidden=10, window=4, rope_theta=1e4
        ),
    },
    weights={"huggingface": llama.HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=llama.CARD.recipe,
)
