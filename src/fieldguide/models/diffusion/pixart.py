"""PixArt: a DiT for texts, trained at a tenth of the usual cost (Chen et al. 2023, arXiv:2310.00426).

New here: attention to the states of T5 in each block of DiT; one modulation layer for all blocks, each of which adds a table of its own
(adaLN-single), which saves a quarter of the parameters; training in stages, with texts that a vision-language model wrote.
PixArt-alpha for 1,024 pixels is also told height, width and aspect ratio. PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692) is the same
network without these, with SDXL's autoencoder.

Initialization: Glorot uniform matrices, zero biases; zero for the output of the attention to the text and for the last layer; N(0,
1/D) for the tables; N(0, 0.02) for the embedding of time, as in the authors' code.
Shapes: B batch, C channels of the latents, H W height and width, P side of a patch, N patches, D width, T tokens, K width of their
states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.diffusion._shared.attention import Attention
from fieldguide.models.diffusion._shared.embeddings import embed_time, position_embedding
from fieldguide.models.diffusion._shared.patches import count_patches, join_patches
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Joined, Row

EMBEDDING_DIM = 256  # sines and cosines of times and sizes
EPS = 1e-6  # of the norms, all of which have no parameters
PIXELS_PER_LATENT = 8  # along a side
SIZED_SIDE = 128  # side of latents for which a configuration without `use_additional_conditions` means them


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 4  # C
    image: int = 128  # side of the latents that it was trained with; others work, too
    patch: int = 2  # P
    text_dim: int = 4096  # K
    dim: int = 1152  # D
    depth: int = 28
    heads: int = 16
    sizes: int = 3  # numbers that it is told: height, width and aspect ratio; or 0
    interpolation: float = 2.0  # how much closer positions are than their number
    variance: bool = True  # whether the last layer also predicts variances, as in the authors' checkpoints


class Block(nn.Module):
    """Self-attention, attention to the text and an MLP; the first and the last are modulated."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(6, dim))  # added to shift, scale and gate of the self-attention, then of the MLP
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)  # of both
        self.attn1, self.attn2 = Attention(dim, dim, heads, bias=True), Attention(dim, dim, heads, bias=True)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(
        self, x: Tensor, condition: Tensor, text: Tensor, mask: Tensor | None
    ) -> Tensor:  # B N D, B 6 D, B T D -> B N D
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + condition).split(1, 1)
        y = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(y, y)
        x = x + self.attn2(x, text, mask)
        y = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))


class SizeEmbedding(nn.Module):
    """Two layers on the sines and cosines of each number."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(EMBEDDING_DIM, dim), nn.Linear(dim, dim)

    def forward(self, numbers: Tensor) -> Tensor:  # B N -> B N*D/3
        x = embed_time(numbers.flatten(), EMBEDDING_DIM).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(x))).unflatten(0, (-1, numbers.shape[1])).flatten(1)


class PixArt(nn.Module):
    """PixArt: noisy latents, their time (0 .. 999), the states of a text -> the predicted noise.

    Raises `SettingsError` for invalid sizes, and `DataError` for latents whose sides are not multiples of `patch`.
    """

    places: Tensor  # N D

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % 4 or c.dim % c.heads or (c.sizes and c.dim % 3) or c.sizes not in (0, 3):
            raise SettingsError(
                f"dim={c.dim} must be a multiple of 4, of heads={c.heads} and, with sizes, of 3; sizes={c.sizes} must be 0 or 3"
            )
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.time1, self.time2 = nn.Linear(EMBEDDING_DIM, c.dim), nn.Linear(c.dim, c.dim)
        self.resolution = SizeEmbedding(c.dim // 3) if c.sizes else None
        self.aspect = SizeEmbedding(c.dim // 3) if c.sizes else None
        self.condition = nn.Linear(c.dim, 6 * c.dim)
        self.text1, self.text2 = nn.Linear(c.text_dim, c.dim), nn.Linear(c.dim, c.dim)
        self.register_buffer("places", self.embed_places(c.image // c.patch, c.image // c.patch), persistent=False)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads) for _ in range(c.depth))
        self.norm, self.table = nn.LayerNorm(c.dim, eps=EPS, elementwise_affine=False), nn.Parameter(torch.empty(2, c.dim))
        self.head = nn.Linear(c.dim, c.patch**2 * c.channels * (1 + c.variance))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name == "head" or name.endswith("attn2.proj"):
                    nn.init.zeros_(module.weight)
                elif name.startswith(("time", "condition", "resolution", "aspect", "text")):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
        for name, parameter in self.named_parameters():
            if name.endswith("table"):
                nn.init.normal_(parameter, std=self.config.dim**-0.5)

    def embed_places(self, rows: int, columns: int) -> Tensor:  # -> N D
        c = self.config
        return position_embedding(rows, columns, c.dim, c.image // c.patch, c.interpolation)

    def embed_condition(self, latent: Tensor, time: Tensor, sizes: Tensor | None) -> Tensor:  # B C H W, B, B 3 -> B D
        """Return the embedding of the time plus that of the sizes, by default those of the latents in pixels."""
        x = self.time2(F.silu(self.time1(embed_time(time, EMBEDDING_DIM).to(self.time1.weight.dtype))))
        if self.resolution is None or self.aspect is None:
            return x
        if sizes is None:
            height, width = (PIXELS_PER_LATENT * side for side in latent.shape[2:])
            sizes = torch.tensor([[height, width, height / width]], device=latent.device)
        x = x + torch.cat([self.resolution(sizes[:, :2]), self.aspect(sizes[:, 2:])], 1)
        return x

    def predict_all(
        self, latent: Tensor, time: Tensor, text: Tensor, text_mask: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:  # B C H W, B, B T K, B T, B 3 -> B C' H W
        """Return all channels of the last layer, as DiT does."""
        rows, columns = count_patches(latent, self.config.patch)
        side = self.config.image // self.config.patch
        places = self.places if (rows, columns) == (side, side) else self.embed_places(rows, columns).to(latent)
        x = self.patch(latent).flatten(2).mT.contiguous() + places
        condition = self.embed_condition(latent, time, sizes)
        each = self.condition(F.silu(condition)).unflatten(1, (6, -1))
        text = self.text2(F.gelu(self.text1(text), approximate="tanh"))
        for block in self.blocks:
            x = block(x, each, text, text_mask)
        shift, scale = (self.table + condition[:, None]).split(1, 1)
        return join_patches(self.head(self.norm(x) * (1 + scale) + shift), rows, columns, self.config.patch)

    def forward(
        self, latent: Tensor, time: Tensor, text: Tensor, text_mask: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:  # B C H W, B, B T K, B T, B 3 -> B C H W
        return self.predict_all(latent, time, text, text_mask, sizes)[:, : self.config.channels]


BLOCK = "transformer_blocks.{i}."
DIFFUSERS: dict[str, Row] = {
    "pos_embed.proj.*": "patch.*",
    "adaln_single.emb.timestep_embedder.linear_{k}.*": "time{k}.*",
    "adaln_single.emb.resolution_embedder.linear_{k}.*": "resolution.linear{k}.*",
    "adaln_single.emb.aspect_ratio_embedder.linear_{k}.*": "aspect.linear{k}.*",
    "adaln_single.linear.*": "condition.*",
    "caption_projection.linear_{k}.*": "text{k}.*",
    f"{BLOCK}scale_shift_table": "blocks.{i}.table",
    f"{BLOCK}attn{{k}}.to_q.*": "blocks.{i}.attn{k}.q.*",
    f"{BLOCK}attn{{k}}.to_k.*": "blocks.{i}.attn{k}.k.*",
    f"{BLOCK}attn{{k}}.to_v.*": "blocks.{i}.attn{k}.v.*",
    f"{BLOCK}attn{{k}}.to_out.0.*": "blocks.{i}.attn{k}.proj.*",
    f"{BLOCK}ff.net.0.proj.*": "blocks.{i}.up.*",
    f"{BLOCK}ff.net.2.*": "blocks.{i}.down.*",
    "scale_shift_table": "table",
    "proj_out.*": "head.*",
}


OFFICIAL: dict[str, Row] = {  # PixArt-alpha/PixArt-alpha and PixArt-sigma
    "pos_embed": Dropped("fixed sines and cosines"),
    "x_embedder.proj.*": "patch.*",
    "t_embedder.mlp.0.*": "time1.*",
    "t_embedder.mlp.2.*": "time2.*",
    "csize_embedder.mlp.0.*": "resolution.linear1.*",
    "csize_embedder.mlp.2.*": "resolution.linear2.*",
    "ar_embedder.mlp.0.*": "aspect.linear1.*",
    "ar_embedder.mlp.2.*": "aspect.linear2.*",
    "t_block.1.*": "condition.*",
    "y_embedder.y_embedding": Dropped("T5's states of an empty caption, which are computed when they are needed"),
    "y_embedder.y_proj.fc{k}.*": "text{k}.*",
    "blocks.{i}.scale_shift_table": "blocks.{i}.table",
    "blocks.{i}.attn.qkv.*": Joined(tuple(f"blocks.{{i}}.attn1.{name}.*" for name in "qkv"), (1, 1, 1)),
    "blocks.{i}.attn.proj.*": "blocks.{i}.attn1.proj.*",
    "blocks.{i}.cross_attn.q_linear.*": "blocks.{i}.attn2.q.*",
    "blocks.{i}.cross_attn.kv_linear.*": Joined(("blocks.{i}.attn2.k.*", "blocks.{i}.attn2.v.*"), (1, 1)),
    "blocks.{i}.cross_attn.proj.*": "blocks.{i}.attn2.proj.*",
    "blocks.{i}.mlp.fc1.*": "blocks.{i}.up.*",
    "blocks.{i}.mlp.fc2.*": "blocks.{i}.down.*",
    "final_layer.scale_shift_table": "table",
    "final_layer.linear.*": "head.*",
}


def parse_rest(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that follow from several keys of diffusers. Raises `WeightsError` for unsupported channels."""
    channels, outputs, side = raw["in_channels"], raw.get("out_channels") or raw["in_channels"], raw["sample_size"]
    if outputs not in (channels, 2 * channels):
        raise WeightsError(f"out_channels={outputs} must be in_channels={channels} or twice as much")
    sized = raw.get("use_additional_conditions")
    return {
        "dim": raw["num_attention_heads"] * raw["attention_head_dim"],
        "variance": outputs == 2 * channels,
        "interpolation": float(raw.get("interpolation_scale") or max(side // 64, 1)),
        "sizes": 3 if (side == SIZED_SIDE if sized is None else sized) else 0,
    }


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("PixArtTransformer2DModel"),
    "norm_type": Expect("ada_norm_single", among=("ada_norm_single",)),
    "sample_size": "image",
    "patch_size": "patch",
    "in_channels": "channels",
    "num_layers": "depth",
    "num_attention_heads": "heads",
    "caption_channels": "text_dim",
    "attention_head_dim": Derived(parse_rest, lambda c: c.dim // c.heads),
    "out_channels": Expect(lambda c: c.channels * (1 + c.variance)),
    "cross_attention_dim": Expect(lambda c: c.dim),
    "interpolation_scale": Derived(lambda raw: {}, lambda c: c.interpolation),
    "use_additional_conditions": Derived(lambda raw: {}, lambda c: c.sizes > 0),
    "norm_eps": Expect(EPS),
    "activation_fn": Expect("gelu-approximate"),
    "attention_bias": Expect(True),
    "norm_elementwise_affine": Expect(False),
    "dropout": Expect(0.0),
}
# Files from before PixArt had a class of its own in diffusers.
CONFIG_2023 = {**CONFIG, "_class_name": Expect("Transformer2DModel")}

CARD = Card(
    name="pixart",
    model=PixArt,
    config=Config,
    paper="arXiv:2310.00426",
    year=2023,
    input_type="noisy-latent",
    output_type="image",
    optional_inputs=("text_mask", "sizes"),
    sizes={
        "pixart-xl2-1024": Size(params=611_349_152, source="PixArt-alpha/PixArt-XL-2-1024-MS"),
        "pixart-xl2-512": Size(
            image=64, sizes=0, interpolation=1.0, params=610_856_096, source="PixArt-alpha/PixArt-XL-2-512x512"
        ),
        "pixart-sigma-xl2-1024": Size(sizes=0, params=610_856_096, source="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
        "pixart-test": Size(image=8, text_dim=10, dim=24, depth=2, heads=2, channels=2),
    },
    weights={"official": OFFICIAL, "diffusers": DIFFUSERS, "diffusers-2023": DIFFUSERS},
    configs={"diffusers": CONFIG, "diffusers-2023": CONFIG_2023},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 3e-2, "grad_clip": 1.0, "ema": 0.9999},
)
