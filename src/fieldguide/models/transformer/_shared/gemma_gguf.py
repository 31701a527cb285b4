"""What the Gemma models share in GGUF files of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.core.errors import WeightsError
from fieldguide.models.mapping.config_rules import ConfigRow, Derived
from fieldguide.models.mapping.key_rules import Fused, PlusOne, Row
from fieldguide.models.transformer import llama


def gguf_shared(c: Any) -> dict[str, Row]:
    """Return the names that all Gemmas have in GGUF files: rotary pairs are not adjacent, and weights of norms are 1 + w."""
    rows = llama.gguf(c) | {
        "blk.{i}.attn_q.weight": "blocks.{i}.attn.q.weight",
        "blk.{i}.attn_k.weight": Fused("blocks.{i}.attn.kv.weight", 0, 2),
    }
    return {name: PlusOne(row) if name.endswith("norm.weight") and isinstance(row, str) else row for name, row in rows.items()}


def gguf_post_norms(c: Any) -> dict[str, Row]:
    """Return the names in GGUF files of Gemmas whose sublayers are normalized before and after."""
    return gguf_shared(c) | {
        "blk.{i}.post_attention_norm.weight": PlusOne("blocks.{i}.post1.weight"),
        "blk.{i}.post_ffw_norm.weight": PlusOne("blocks.{i}.post2.weight"),
    }


def gguf_scale(c: Any, large: int) -> int:
    """Return what attention scores are divided by the square root of in llama.cpp: the width of a head, or of the share of a head
    in the largest size, whose depth is `large`.
    """
    return c.dim // c.heads if c.depth == large else c.width


def gguf_widths(architecture: str, large: int) -> dict[str, ConfigRow]:
    """Return the rows for the width of heads, from which llama.cpp derives the scale of attention scores."""

    def read(metadata: Mapping[str, Any]) -> dict[str, Any]:
        own = metadata[architecture]
        width = own["attention"].get("key_length", own["embedding_length"] // own["attention"]["head_count"])
        is_large = own["block_count"] == large
        return {"width": width, "scale": own["embedding_length"] // own["attention"]["head_count"] if is_large else width}

    def write(c: Any) -> int:
        if c.scale != gguf_scale(c, large):
            raise WeightsError(
                f"scale={c.scale} has no form in GGUF files: llama.cpp divides by the root of {gguf_scale(c, large)}."
            )
        return int(c.width)

    return {"attention.key_length": Derived(read, write), "attention.value_length": llama.VALUE_LENGTH}
