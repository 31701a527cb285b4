"""HunyuanVideo: FLUX's blocks for videos, with a refined text (Kong et al. 2024, arXiv:2412.03603).

New here: the text comes from a language model, whose causal states a small Transformer refines in both directions before the blocks of
FLUX read them; its gates follow the time and the mean of the states. Patches of all frames rotate by frame, row and column, with a
base of 256, and the network is told the scale of classifier-free guidance whose result it computes in one call.

Initialization: Glorot uniform matrices, zero biases; zero for the modulation layers and the last layer; N(0, 0.02) for the embeddings of
time, guidance and vector, as in FLUX.
Shapes: B batch, F frames, C channels of the latents, H W height and width, N = F * H/2 * W/2 patches, D width, T tokens, K width of their
states, E width of the vector of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.diffusion._shared.attention import Attention, place_mask
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.diffusion._shared.patches import count_patches
from fieldguide.models.diffusion._shared.rotary import make_rotation, place_grid
from fieldguide.models.diffusion.flux import DIFFUSERS as FLUX
from fieldguide.models.diffusion.flux import GUIDANCE_SCALE, PATCH, TIME_DIM, Block, SingleBlock, modulate
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Reshaped, Row

EPS = 1e-6  # of the norms
DEFAULT_GUIDANCE = 6.0  # that the authors recommend


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 16  # C
    extra: int = 0  # channels of the input that are not predicted
    frames: int = 33  # of latents, four frames of a video each, the first one alone; other numbers work, too
    image: int = 120  # side of square latents of about the size that it was trained with; others work, too
    text_dim: int = 4096  # K
    pooled_dim: int = 768  # E
    dim: int = 3072  # D
    depth: int = 20  # blocks with two streams
    single: int = 40  # blocks with one stream
    refiner: int = 2  # blocks that refine the text
    heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)  # parts of a head that rotate by frame, row and column
    rope_theta: float = 256.0
    guidance: bool = True  # whether it is told the guidance scale


class Embedding(nn.Module):
    """Two layers with SiLU between them."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(inputs, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B K -> B D
        return self.linear2(F.silu(self.linear1(x)))

    def embed(self, number: Tensor) -> Tensor:  # B -> B D
        """Return the embedding of times, of which the inputs are the sines and cosines."""
        return self(embed_time(number, TIME_DIM).to(self.linear1.weight.dtype))


class RefinerBlock(nn.Module):
    """Self-attention of the text and an MLP, with gates."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=EPS), nn.LayerNorm(c.dim, eps=EPS)
        self.attn, self.condition = Attention(c.dim, c.dim, c.heads, bias=True), nn.Linear(c.dim, 2 * c.dim)
        self.up, self.down = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:  # B T D, B D, B T -> B T D
        gate1, gate2 = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        y = self.norm1(x)
        x = x + gate1 * self.attn(y, y, mask)
        return x + gate2 * self.down(F.silu(self.up(self.norm2(x))))


class Refiner(nn.Module):
    """The states of a language model -> those that the blocks read."""

    def __init__(self, c: Config):
        super().__init__()
        self.time, self.mean, self.proj = Embedding(TIME_DIM, c.dim), Embedding(c.text_dim, c.dim), nn.Linear(c.text_dim, c.dim)
        self.blocks = nn.ModuleList(RefinerBlock(c) for _ in range(c.refiner))

    def forward(self, text: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:  # B T K, B, B T -> B T D
        weight = torch.ones_like(text[..., :1]) if mask is None else mask[..., None].to(text.dtype)
        condition = self.time.embed(time) + self.mean((text * weight).sum(1) / weight.sum(1).clamp(min=1))
        x = self.proj(text)
        for block in self.blocks:
            x = block(x, condition, mask)
        return x


class HunyuanVideo(nn.Module):
    """HunyuanVideo: noisy latents of a video, their time (0 .. 1000), the states of a text and its vector -> the predicted velocity, noise
    minus data.

    Raises `SettingsError` for invalid sizes, and `DataError` for latents with odd sides.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if sum(c.axes) * c.heads != c.dim or len(c.axes) != 3 or any(part % 2 for part in c.axes):
            raise SettingsError(f"axes={c.axes} must be three even numbers whose sum is dim / heads = {c.dim} / {c.heads}")
        self.patch = nn.Linear((c.channels + c.extra) * PATCH**2, c.dim)
        self.time, self.pooled = Embedding(TIME_DIM, c.dim), Embedding(c.pooled_dim, c.dim)
        self.guidance = Embedding(TIME_DIM, c.dim) if c.guidance else None
        self.text = Refiner(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.singles = nn.ModuleList(SingleBlock(c) for _ in range(c.single))
        self.condition, self.head = nn.Linear(c.dim, 2 * c.dim), nn.Linear(c.dim, c.channels * PATCH**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if name.endswith("condition") or name == "head":
                    nn.init.zeros_(module.weight)
                elif "linear" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        pooled: Tensor,
        text_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:  # B F C' H W, B, B T K, B E, B T, B -> B F C H W
        c, frames, tokens = self.config, latent.shape[1], text.shape[1]
        rows, columns = count_patches(latent.flatten(0, 1), PATCH)
        x = self.patch(F.pixel_unshuffle(latent, PATCH).flatten(3).mT.flatten(1, 2))
        condition = self.time.embed(time) + self.pooled(pooled)
        if self.guidance is not None:
            scale = torch.full_like(time, DEFAULT_GUIDANCE) if guidance is None else guidance
            condition = condition + self.guidance.embed(scale * GUIDANCE_SCALE)
        text = self.text(text, time, text_mask)
        places = F.pad(place_grid(frames, rows, columns), (0, 0, tokens, 0))  # T+N 3
        rotate, mask = make_rotation(places, c.axes, x, c.rope_theta), place_mask(text_mask, x, first=True)
        for block in self.blocks:
            x, text = block(x, text, condition, mask, rotate)
        x = torch.cat([text, x], 1)
        for single in self.singles:
            x = single(x, condition, mask, rotate)
        scale, shift = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        x = self.head(modulate(x[:, tokens:], shift, scale)).unflatten(1, (frames, rows * columns))
        return F.pixel_shuffle(x.mT.unflatten(3, (rows, columns)), PATCH)


def diffusers_keys(c: Any) -> dict[str, Row]:
    """Return the key table of diffusers: that of FLUX for the blocks, and patches with an axis for frames."""
    inputs, refiner, block = c.channels + c.extra, "context_embedder.", "context_embedder.token_refiner.refiner_blocks.{i}."
    names: dict[str, Row] = {
        name: row for name, row in FLUX.items() if "transformer_blocks" in name or name in ("norm_out.linear.*", "proj_out.*")
    }
    names |= {
        "x_embedder.proj.weight": Reshaped("patch.weight", (-1, inputs * PATCH**2), (-1, inputs, 1, PATCH, PATCH)),
        "x_embedder.proj.bias": "patch.bias",
        "time_text_embed.timestep_embedder.linear_{k}.*": "time.linear{k}.*",
        "time_text_embed.guidance_embedder.linear_{k}.*": "guidance.linear{k}.*",
        "time_text_embed.text_embedder.linear_{k}.*": "pooled.linear{k}.*",
        f"{refiner}time_text_embed.timestep_embedder.linear_{{k}}.*": "text.time.linear{k}.*",
        f"{refiner}time_text_embed.text_embedder.linear_{{k}}.*": "text.mean.linear{k}.*",
        f"{refiner}proj_in.*": "text.proj.*",
        f"{block}norm{{k}}.*": "text.blocks.{i}.norm{k}.*",
        f"{block}norm_out.linear.*": "text.blocks.{i}.condition.*",
        f"{block}attn.to_out.0.*": "text.blocks.{i}.attn.proj.*",
        f"{block}ff.net.0.proj.*": "text.blocks.{i}.up.*",
        f"{block}ff.net.2.*": "text.blocks.{i}.down.*",
    }
    return names | {f"{block}attn.to_{part}.*": f"text.blocks.{{i}}.attn.{part}.*" for part in "qkv"}


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("HunyuanVideoTransformer3DModel"),
    "in_channels": Derived(lambda raw: {"extra": raw["in_channels"] - raw["out_channels"]}, lambda c: c.channels + c.extra),
    "out_channels": "channels",
    "num_attention_heads": "heads",
    "attention_head_dim": Derived(
        lambda raw: {"dim": raw["num_attention_heads"] * raw["attention_head_dim"]}, lambda c: c.dim // c.heads
    ),
    "num_layers": "depth",
    "num_single_layers": "single",
    "num_refiner_layers": "refiner",
    "mlp_ratio": Expect(4.0),
    "patch_size": Expect(PATCH),
    "patch_size_t": Expect(1),
    "qk_norm": Expect("rms_norm"),
    "guidance_embeds": WithDefault("guidance", True),
    "text_embed_dim": "text_dim",
    "pooled_projection_dim": "pooled_dim",
    "rope_theta": WithDefault("rope_theta", 256.0),
    "rope_axes_dim": WithDefault("axes", (16, 56, 56)),
    "image_condition_type": Expect(None),
}

CARD = Card(
    name="hunyuan-video",
    model=HunyuanVideo,
    config=Config,
    paper="arXiv:2412.03603",
    year=2024,
    input_type="noisy-latent-video-pooled",
    output_type="video",
    optional_inputs=("text_mask", "guidance"),
    sizes={
        "hunyuan-video-13b": Size(params=12_821_012_544, source="hunyuanvideo-community/HunyuanVideo"),
        "hunyuan-video-test": Size(
            frames=3,
            image=4,
            channels=2,
            text_dim=10,
            pooled_dim=6,
            dim=16,
            depth=2,
            single=2,
            refiner=2,
            heads=2,
            axes=(2, 2, 4),
        ),
    },
    weights={"diffusers": diffusers_keys},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
