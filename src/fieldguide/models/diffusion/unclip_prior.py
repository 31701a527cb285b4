"""unCLIP prior: embeddings of images by diffusion, given a text (Ramesh et al. 2022, arXiv:2204.06125).

New here: images are generated in two steps; this causal Transformer denoises CLIP's embedding of an image, given a text, and a decoder
turns it into pixels. Its tokens are the states of the text, its embedding, the time, the noisy embedding, and a learned one, at whose
position it predicts the embedding without noise. OpenAI's own weights are not public; those of Karlo and of Kandinsky 2 are.

Initialization: torch's defaults; N(0, 0.02) for positions and the learned token.
Shapes: B batch, E width of the embeddings, also seen as E channels of an image of one position, T tokens, K = E width of the states
of the text, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError
from fieldguide.models.diffusion._shared.attention import Stream
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.config_rules import ConfigRow, Constant, Derived, Expect
from fieldguide.models.mapping.key_rules import Row

ADDED = 4  # tokens after those of the text


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 768  # E
    image: int = 1  # positions per side
    length: int = 77  # T
    dim: int = 2048  # D
    depth: int = 20
    heads: int = 32

    @property
    def text_dim(self) -> int:
        return self.channels

    @property
    def pooled_dim(self) -> int:
        return self.channels


class Block(nn.Module):
    """Causal attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Stream(dim, heads, norm=False)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # B N D, B 1 N N -> B N D
        q, k, v = self.attn(self.norm1(x))
        y = dot_product_attention(q, k, v, mask)
        x = x + self.attn.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class UnCLIPPrior(nn.Module):
    """unCLIP prior: noisy embedding of an image, time (0 .. 999), states of a text and its embedding -> embedding without noise.

    Raises `DataError` for texts that do not have `length` tokens: padding is masked, not left out.
    """

    clip_mean: Tensor  # 1 E: of embeddings of images
    clip_std: Tensor  # 1 E

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.time1, self.time2 = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, c.dim)
        self.latent, self.pooled, self.text = (nn.Linear(c.channels, c.dim) for _ in range(3))
        self.pos, self.query = nn.Parameter(torch.empty(1, c.length + ADDED, c.dim)), nn.Parameter(torch.empty(1, 1, c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.heads) for _ in range(c.depth))
        self.norm, self.head = nn.LayerNorm(c.dim), nn.Linear(c.dim, c.channels)
        self.register_buffer("clip_mean", torch.zeros(1, c.channels))
        self.register_buffer("clip_std", torch.ones(1, c.channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.pos, std=0.02)
        nn.init.normal_(self.query, std=0.02)

    def normalize(self, embedding: Tensor) -> Tensor:  # B E -> B E
        """Return embeddings of images as diffusion works on them."""
        return (embedding - self.clip_mean) / self.clip_std

    def denormalize(self, embedding: Tensor) -> Tensor:  # B E -> B E
        """Return embeddings as CLIP gives them."""
        return embedding * self.clip_std + self.clip_mean

    def forward(
        self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:  # B E 1 1, B, B T E, B E, B T -> B E 1 1
        if text.shape[1] != self.config.length:
            raise DataError(f"the text has {text.shape[1]} tokens, but must be padded to length={self.config.length}")
        when = self.time2(F.silu(self.time1(embed_time(time, self.config.dim).to(self.time1.weight.dtype))))
        rows = [self.pooled(pooled)[:, None], when[:, None], self.latent(latent.flatten(1))[:, None]]
        x = torch.cat([self.text(text), *rows, self.query.expand(latent.shape[0], -1, -1)], 1) + self.pos
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
        if text_mask is not None:
            mask = mask & F.pad(text_mask, (0, ADDED), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, -1]))[:, :, None, None]


BLOCK = "transformer_blocks.{i}."
DIFFUSERS: dict[str, Row] = {
    "time_embedding.linear_{k}.*": "time{k}.*",
    "proj_in.*": "latent.*",
    "embedding_proj.*": "pooled.*",
    "encoder_hidden_states_proj.*": "text.*",
    "positional_embedding": "pos",
    "prd_embedding": "query",
    f"{BLOCK}norm1.*": "blocks.{i}.norm1.*",
    f"{BLOCK}norm3.*": "blocks.{i}.norm2.*",
    f"{BLOCK}attn1.to_q.*": "blocks.{i}.attn.q.*",
    f"{BLOCK}attn1.to_k.*": "blocks.{i}.attn.k.*",
    f"{BLOCK}attn1.to_v.*": "blocks.{i}.attn.v.*",
    f"{BLOCK}attn1.to_out.0.*": "blocks.{i}.attn.proj.*",
    f"{BLOCK}ff.net.0.proj.*": "blocks.{i}.up.*",
    f"{BLOCK}ff.net.2.*": "blocks.{i}.down.*",
    "norm_out.*": "norm.*",
    "proj_to_clip_embeddings.*": "head.*",
    "clip_mean": "clip_mean",
    "clip_std": "clip_std",
}
CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("PriorTransformer"),
    "embedding_dim": "channels",
    "num_embeddings": "length",
    "num_layers": "depth",
    "num_attention_heads": "heads",
    "attention_head_dim": Derived(
        lambda raw: {"dim": raw["num_attention_heads"] * raw["attention_head_dim"]}, lambda c: c.dim // c.heads
    ),
    "additional_embeddings": Expect(ADDED),
    "dropout": Expect(0.0),
    "time_embed_act_fn": Expect("silu"),
    "norm_in_type": Expect(None),
    "embedding_proj_norm_type": Expect(None),
    "encoder_hid_proj_type": Expect("linear"),
    "added_emb_type": Expect("prd"),
    "time_embed_dim": Expect(None),
    "embedding_proj_dim": Expect(None),
    "clip_embed_dim": Expect(None),
    "<an embedding has one position>": Constant("image", 1),
}


def adapt_to_embedding(needs: Mapping[str, Any]) -> dict[str, int]:
    """Return the fields that follow from the embeddings of the data, whose images have other channels."""
    return {"channels": needs["embedding"], "image": 1} if needs.get("embedding") else {}


CARD = Card(
    name="unclip-prior",
    model=UnCLIPPrior,
    config=Config,
    paper="arXiv:2204.06125",
    year=2022,
    input_type="noisy-latent-pooled",
    output_type="image",
    optional_inputs=("text_mask",),
    adapt=adapt_to_embedding,
    sizes={
        # diffusers counts mean and standard deviation of the embeddings as parameters: 1,536 more.
        "karlo-prior": Size(params=1_022_028_544, source="kakaobrain/karlo-v1-alpha"),
        "kandinsky2-prior": Size(channels=1280, params=1_026_223_360, source="kandinsky-community/kandinsky-2-2-prior"),
        "unclip-prior-mini": Size(dim=128, depth=4, heads=4),  # for training from scratch, next to a small decoder
        "unclip-prior-test": Size(channels=10, length=5, dim=16, depth=2, heads=2),
    },
    weights={"diffusers": DIFFUSERS},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 6e-2, "grad_clip": 1.0, "ema": 0.9999},
)
