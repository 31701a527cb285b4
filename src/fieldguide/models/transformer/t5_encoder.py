"""T5 encoder alone, as image generators read texts (Raffel et al. 2019, arXiv:1910.10683).

New here: nothing; it is T5's encoder without the decoder. PixArt, Stable Diffusion 3 and FLUX attend to its states, which know more of
long captions than CLIP's. The last two attend to those of padding as well.

Initialization: as T5's.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import Expect, ValueMap
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import t5


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 32_128
    length: int = 512  # sequence length in pre-training, in tokens; longer inputs are possible
    dim: int = 4096  # D
    depth: int = 24
    heads: int = 64
    width: int = 64  # of a head
    hidden: int = 10_240  # hidden width of the MLPs
    buckets: int = 32  # number of relative position buckets
    far: int = 128  # distances from this one on share a bucket
    gated: bool = True  # version 1.1: gated MLPs
    dropout: float = 0.1
    eps: float = 1e-6
    pad: int = 0


class T5Encoder(nn.Module):
    """T5 encoder: tokens, padded on the right -> the normalized states of the last block."""

    def __init__(self, config: Config):
        super().__init__()
        c: Any = config
        self.config = config
        self.embed, self.encoder_bias = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.buckets, c.heads)
        self.encoder = nn.ModuleList(t5.EncoderBlock(c) for _ in range(c.depth))
        self.encoder_norm, self.dropout = RMSNorm(c.dim, c.eps), nn.Dropout(c.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        t5.init_matrices(self)
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.encoder_bias.weight, std=self.config.dim**-0.5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B T D
        return t5.encode(self, tokens, mask)


def huggingface(c: Config) -> dict[str, Row]:
    """Return the weight names of transformers."""
    table = t5.huggingface(c)  # type: ignore[arg-type]  # which reads only `gated`
    return {name: row for name, row in table.items() if name.startswith(("shared.", "encoder."))}


CONFIG: Mapping[str, Any] = {
    "model_type": Expect("t5"),
    "chronos_config": Expect(None, written=False, among=(None,)),
    "architectures": Expect(["T5EncoderModel"], among=(["T5EncoderModel"],)),
    "vocab_size": "vocab_size",
    "n_positions": "length",
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
    name="t5-encoder",
    model=T5Encoder,
    config=Config,
    paper="arXiv:1910.10683",
    year=2019,
    input_type="tokens",
    output_type="sequence",
    sizes={
        "t5-v1.1-xxl-encoder": Size(params=4_762_310_656, source="PixArt, Stable Diffusion 3, FLUX"),
        "t5-encoder-test": Size(
            vocab_size=30, length=12, dim=16, depth=2, heads=2, width=6, hidden=24, buckets=6, far=5, dropout=0.0
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "grad_clip": 1.0, "warmup": 0.1},
)
