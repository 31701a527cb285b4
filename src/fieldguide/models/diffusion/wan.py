"""Wan: videos by a diffusion Transformer on all patches of all frames (Wan Team 2025, arXiv:2503.20314).

New here: each patch of the latents of a video attends to all others, of all frames, with rotations by frame, row and column; the text
comes in by cross-attention. Queries and keys are normalized over all heads together. One modulation layer serves all blocks, as in
PixArt. For image to video, the latents have 20 channels more (the encoded image followed by empty frames, and a mask of four channels
that says which frames are given), and Wan 2.1 also attends to the states of CLIP for the image.

Texts are padded with zeros to 512 tokens, and padding is attended to as in training: there is no mask.

Initialization: Glorot uniform matrices, zero biases; N(0, 0.02) for the layers of text and time; N(0, 1/D) for the tables; zero for the
last layer, as in the authors' code.
Shapes: B batch, F frames, C channels of the latents, H W height and width, N = F * H/2 * W/2 patches, D width, T tokens, K width of their
states, I positions of the image encoder, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.diffusion._shared.patches import count_patches, join_patches
from fieldguide.models.diffusion._shared.rotary import Rotate, make_rotation, place_grid
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Reshaped, Row

PATCH = 2  # side of a patch, which spans one frame
TIME_DIM = 256  # sines and cosines of times
EPS = 1e-6  # of the norms
IMAGE_EPS = 1e-5  # of those around the states of an image


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 16  # C
    extra: int = 0  # channels of the input that are not predicted: 20 for image to video
    frames: int = 21  # of latents, four frames of a video each, the first one alone; other numbers work, too
    image: int = 80  # side of square latents of about the size that it was trained with; others work, too
    text_dim: int = 4096  # K
    image_dim: int = 0  # width of the states of an image encoder; 0 = none
    dim: int = 5120  # D
    hidden: int = 13824  # of the MLPs
    depth: int = 40
    heads: int = 40


class Attention(nn.Module):
    """Attention to given states, with queries and keys normalized over all heads; to those of an image, too, if `image`."""

    def __init__(self, c: Config, image: bool):
        super().__init__()
        self.heads = c.heads
        self.q, self.k, self.v, self.proj = (nn.Linear(c.dim, c.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(c.dim, eps=EPS), RMSNorm(c.dim, eps=EPS)
        self.image_k = nn.Linear(c.dim, c.dim) if image else None
        self.image_v = nn.Linear(c.dim, c.dim) if image else None
        self.image_norm_k = RMSNorm(c.dim, eps=EPS) if image else None

    def split(self, x: Tensor) -> Tensor:  # B N D -> B heads N d
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Tensor, states: Tensor, rotate: Rotate = lambda x: x, image: Tensor | None = None
    ) -> Tensor:  # B N D, B T D, B I D -> B N D
        q, k = rotate(self.split(self.norm_q(self.q(x)))), rotate(self.split(self.norm_k(self.k(states))))
        y = dot_product_attention(q, k, self.split(self.v(states)))
        if image is not None and self.image_k is not None and self.image_v is not None and self.image_norm_k is not None:
            k = self.split(self.image_norm_k(self.image_k(image)))
            y = y + dot_product_attention(q, k, self.split(self.image_v(image)))
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, attention to the text and an MLP; the first and the last are modulated."""

    def __init__(self, c: Config):
        super().__init__()
        self.table = nn.Parameter(
            torch.empty(6, c.dim)
        )  # added to shift, scale and gate of the self-attention, then of the MLP
        self.norm1, self.norm3 = (nn.LayerNorm(c.dim, eps=EPS, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(c.dim, eps=EPS)
        self.attn1, self.attn2 = Attention(c, image=False), Attention(c, image=c.image_dim > 0)
        self.up, self.down = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)

    def forward(
        self, x: Tensor, condition: Tensor, text: Tensor, image: Tensor | None, rotate: Rotate
    ) -> Tensor:  # B N D, B 6 D, B T D, B I D -> B N D
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + condition).split(1, 1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(y, y, rotate)
        x = x + self.attn2(self.norm2(x), text, image=image)
        y = self.norm3(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))


class ImageStates(nn.Module):
    """Two layers between norms on the states of an image encoder."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(inputs, eps=IMAGE_EPS), nn.LayerNorm(dim, eps=IMAGE_EPS)
        self.up, self.down = nn.Linear(inputs, inputs), nn.Linear(inputs, dim)

    def forward(self, x: Tensor) -> Tensor:  # B I K -> B I D
        return self.norm2(self.down(F.gelu(self.up(self.norm1(x)))))


class Wan(nn.Module):
    """Wan: noisy latents of a video, their time (0 .. 1000), the states of a text -> the predicted velocity, noise minus data.

    Raises `SettingsError` for invalid sizes, and `DataError` for latents with odd sides and for states of an image that it cannot use.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % (2 * c.heads):
            raise SettingsError(f"dim={c.dim} must be a multiple of two times heads={c.heads}")
        self.patch = nn.Conv2d(c.channels + c.extra, c.dim, PATCH, PATCH)
        self.time1, self.time2 = nn.Linear(TIME_DIM, c.dim), nn.Linear(c.dim, c.dim)
        self.condition = nn.Linear(c.dim, 6 * c.dim)
        self.text1, self.text2 = nn.Linear(c.text_dim, c.dim), nn.Linear(c.dim, c.dim)
        self.image = ImageStates(c.image_dim, c.dim) if c.image_dim else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm, self.table = nn.LayerNorm(c.dim, eps=EPS, elementwise_affine=False), nn.Parameter(torch.empty(2, c.dim))
        self.head = nn.Linear(c.dim, c.channels * PATCH**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
                if name == "head":
                    nn.init.zeros_(module.weight)
                elif name.startswith(("time", "text")):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
        for name, parameter in self.named_parameters():
            if name.endswith("table"):
                nn.init.normal_(parameter, std=self.config.dim**-0.5)

    def forward(
        self, latent: Tensor, time: Tensor, text: Tensor, image_states: Tensor | None = None
    ) -> Tensor:  # B F C' H W, B, B T K, B I K' -> B F C H W
        c, frames = self.config, latent.shape[1]
        if image_states is not None and self.image is None:
            raise DataError("this network does not read the states of an image: its image_dim is 0. Leave image_states out.")
        rows, columns = count_patches(latent.flatten(0, 1), PATCH)
        x = self.patch(latent.flatten(0, 1)).flatten(2).mT.unflatten(0, (-1, frames)).flatten(1, 2)
        width = c.dim // c.heads
        third = 2 * (width // 6)
        rotate = make_rotation(place_grid(frames, rows, columns), (width - 2 * third, third, third), x)
        condition = self.time2(F.silu(self.time1(embed_time(time, TIME_DIM).to(x.dtype))))
        each = self.condition(F.silu(condition)).unflatten(1, (6, -1))
        text = self.text2(F.gelu(self.text1(text), approximate="tanh"))
        image = None if image_states is None or self.image is None else self.image(image_states)
        for block in self.blocks:
            x = block(x, each, text, image, rotate)
        shift, scale = (self.table + condition[:, None]).split(1, 1)
        x = self.head(self.norm(x) * (1 + scale) + shift).unflatten(1, (frames, -1)).flatten(0, 1)
        return join_patches(x, rows, columns, PATCH).unflatten(0, (-1, frames))


def diffusers_keys(c: Any) -> dict[str, Row]:
    """Return the key table of diffusers, whose patches have an axis for frames."""
    embedder, inputs = "condition_embedder.", c.channels + c.extra
    names: dict[str, Row] = {
        "patch_embedding.weight": Reshaped("patch.weight", (-1, inputs, PATCH, PATCH), (-1, inputs, 1, PATCH, PATCH)),
        "patch_embedding.bias": "patch.bias",
        f"{embedder}time_embedder.linear_{{k}}.*": "time{k}.*",
        f"{embedder}time_proj.*": "condition.*",
        f"{embedder}text_embedder.linear_{{k}}.*": "text{k}.*",
        f"{embedder}image_embedder.norm{{k}}.*": "image.norm{k}.*",
        f"{embedder}image_embedder.ff.net.0.proj.*": "image.up.*",
        f"{embedder}image_embedder.ff.net.2.*": "image.down.*",
        "blocks.{i}.scale_shift_table": Reshaped("blocks.{i}.table", (6, -1), (1, 6, -1)),
        "blocks.{i}.norm2.*": "blocks.{i}.norm2.*",
        "blocks.{i}.attn{k}.to_out.0.*": "blocks.{i}.attn{k}.proj.*",
        "blocks.{i}.attn{k}.norm_added_k.weight": "blocks.{i}.attn{k}.image_norm_k.weight",
        "blocks.{i}.ffn.net.0.proj.*": "blocks.{i}.up.*",
        "blocks.{i}.ffn.net.2.*": "blocks.{i}.down.*",
        "scale_shift_table": Reshaped("table", (2, -1), (1, 2, -1)),
        "proj_out.*": "head.*",
    }
    names |= {f"blocks.{{i}}.attn{{k}}.to_{part}.*": f"blocks.{{i}}.attn{{k}}.{part}.*" for part in "qkv"}
    names |= {f"blocks.{{i}}.attn{{k}}.norm_{part}.weight": f"blocks.{{i}}.attn{{k}}.norm_{part}.weight" for part in "qk"}
    names |= {f"blocks.{{i}}.attn{{k}}.add_{part}_proj.*": f"blocks.{{i}}.attn{{k}}.image_{part}.*" for part in "kv"}
    return names


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("WanTransformer3DModel"),
    "patch_size": Expect([1, PATCH, PATCH]),
    "num_attention_heads": "heads",
    "attention_head_dim": Derived(
        lambda raw: {"dim": raw["num_attention_heads"] * raw["attention_head_dim"]}, lambda c: c.dim // c.heads
    ),
    "in_channels": Derived(lambda raw: {"extra": raw["in_channels"] - raw["out_channels"]}, lambda c: c.channels + c.extra),
    "out_channels": "channels",
    "text_dim": "text_dim",
    "freq_dim": Expect(TIME_DIM),
    "ffn_dim": "hidden",
    "num_layers": "depth",
    "cross_attn_norm": Expect(True),
    "qk_norm": Expect("rms_norm_across_heads"),
    "eps": Expect(EPS),
    "image_dim": Derived(lambda raw: {"image_dim": raw.get("image_dim") or 0}, lambda c: c.image_dim or None),
    "added_kv_proj_dim": Expect(lambda c: c.dim if c.image_dim else None, absent=None),
    "rope_max_seq_len": Expect(1024),
    "pos_embed_seq_len": Expect(None),
}

CARD = Card(
    name="wan",
    model=Wan,
    config=Config,
    paper="arXiv:2503.20314",
    year=2025,
    input_type="noisy-latent-video",
    output_type="video",
    optional_inputs=("image_states",),
    sizes={
        "wan2.1-t2v-1.3b": Size(
            dim=1536, hidden=8960, depth=30, heads=12, params=1_418_996_800, source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        ),
        "wan2.1-t2v-14b": Size(params=14_288_491_584, source="Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        "wan2.1-i2v-14b": Size(extra=20, image_dim=1280, params=16_394_878_784, source="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        "wan2.2-i2v-a14b": Size(
            extra=20, params=14_288_901_184, source="Wan-AI/Wan2.2-I2V-A14B-Diffusers, each of its two networks"
        ),
        "wan-test": Size(frames=3, image=4, channels=2, text_dim=10, dim=32, hidden=24, depth=2, heads=2),
    },
    weights={"diffusers": diffusers_keys},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
