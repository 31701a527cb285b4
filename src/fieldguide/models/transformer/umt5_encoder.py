"""UMT5 encoder: T5 for 107 languages, with position biases in each block (Chung et al. 2023, arXiv:2304.09151).

New here: languages are sampled so that each has at most a given number of repetitions in training (UniMax). The network is that of T5
1.1, but blocks do not share the table of position biases. Wan 2.1 attends to its states.

Initialization: as T5's.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import Expect, ValueMap
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import t5, t5_encoder


@dataclass(frozen=True, kw_only=True)
class Config(t5_encoder.Config):
    vocab_size: int = 256_384


class UMT5Encoder(nn.Module):
    """UMT5 encoder: tokens, padded on the right -> the normalized states of the last block."""

    def __init__(self, config: Config):
        super().__init__()
        c: Any = config
        self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.biases = nn.ModuleList(nn.Embedding(c.buckets, c.heads) for _ in range(c.depth))
        self.encoder = nn.ModuleList(t5.EncoderBlock(c) for _ in range(c.depth))
        self.encoder_norm, self.dropout = RMSNorm(c.dim, c.eps), nn.Dropout(c.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        t5.init_matrices(self)
        nn.init.normal_(self.embed.weight)
        for table in self.biases:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=self.config.dim**-0.5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B T D
        x = self.dropout(self.embed(tokens))
        for table, block in zip(self.biases, self.encoder):
            assert isinstance(table, nn.Embedding)
            bias = t5.position_bias(self.config, table, tokens.shape[1], tokens.shape[1], True)
            if mask is not None:
                bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
            x = block(x, bias)
        return self.dropout(self.encoder_norm(x))


def huggingface(c: Config) -> dict[str, Row]:
    """Return the weight names of transformers."""
    table = t5_encoder.huggingface(c)
    table = {name: row for name, row in table.items() if row != "encoder_bias.weight"}
    return {**table, "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight": "biases.{i}.weight"}


CONFIG: Mapping[str, Any] = {
    "model_type": Expect("umt5"),
    "architectures": Expect(["UMT5EncoderModel"], among=(["UMT5EncoderModel"],)),
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "num_layers": "depth",
    "num_heads": "heads",
    "d_kv": "width",
    "d_ff": "hidden",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "far",
    "feed_forward_proj": ValueMap("gated", {"relu": False, "gated-gelu": True}),
    "dropout_rate": "dropout",
    "layer_norm_epsilon": "eps",
    "pad_token_id": "pad",
}

CARD = Card(
    name="umt5-encoder",
    model=UMT5Encoder,
    config=Config,
    paper="arXiv:2304.09151",
    year=2023,
    input_type="tokens",
    output_type="sequence",
    sizes={
        "umt5-xxl-encoder": Size(params=5_680_910_336, source="Wan 2.1"),
        "umt5-encoder-test": Size(vocab_size=30, dim=16, depth=2, heads=2, width=6, hidden=24, buckets=6, far=5, dropout=0.0),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "grad_clip": 1.0, "warmup": 0.1},
)
