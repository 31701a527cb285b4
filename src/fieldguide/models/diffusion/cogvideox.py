"""CogVideoX: videos and their texts in one sequence, modulated apart (Yang et al. 2024, arXiv:2408.06072).

New here: the tokens of the text and the patches of all frames pass through the same layers, with full attention between all of them;
only the modulation of the norms differs, by an expert for each modality (expert adaptive layer norm). The network of 2 billion parameters
adds sines and cosines of frame, row and column; the one of 5 billion rotates queries and keys by them, and stretches rows and columns
of other sizes to those that it was trained with. Both predict the velocity of a variance-preserving process.

Texts are padded to 226 tokens, and padding is attended to as in training: there is no mask.

Initialization: Glorot uniform matrices, zero biases; zero for the modulation layers and the last layer, as in DiT.
Shapes: B batch, F frames, C channels of the latents, H W height and width, N = F * H/2 * W/2 patches, D width, T tokens, K width of their
states, E width of the condition, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.diffusion._shared.embeddings import embed_time, sinusoidal_embedding
from fieldguide.models.diffusion._shared.patches import count_patches
from fieldguide.models.diffusion._shared.rotary import Rotate, make_rotation, place_grid
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Reshaped, Row

PATCH = 2  # side of a patch, which spans one frame
EPS = 1e-5  # of the norms
HEAD_EPS = 1e-6  # of those of queries and keys
FRAMES_PER_LATENT = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 16  # C
    extra: int = 0  # channels of the input that are not predicted, such as the latents of an image with which the video begins
    frames: int = 13  # of latents; other numbers work, too
    image: int = 60  # height of the latents that it was trained with; others work, too
    width: int = 90  # of these latents
    text_dim: int = 4096  # K
    length: int = 226  # tokens of a text, with padding
    dim: int = 1920  # D
    condition_dim: int = 512  # E
    depth: int = 30
    heads: int = 30
    rotary: bool = False  # whether positions rotate queries and keys; otherwise they are added
    interpolation: float = 1.875  # how much closer added positions of rows and columns are than their number
    learned: bool = (
        False  # whether positions are stored, which are added to texts and patches of one size, also if others rotate
    )


class Attention(nn.Module):
    """Self-attention with normalized queries and keys."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.LayerNorm(dim // heads, eps=HEAD_EPS) for _ in range(2))

    def forward(self, x: Tensor, rotate: Rotate) -> Tensor:  # B T+N D -> B T+N D
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = dot_product_attention(rotate(self.norm_q(q)), rotate(self.norm_k(k)), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class ExpertNorm(nn.Module):
    """One norm with shift, scale and gate for each modality."""

    def __init__(self, c: Config):
        super().__init__()
        self.condition, self.norm = nn.Linear(c.condition_dim, 6 * c.dim), nn.LayerNorm(c.dim, eps=EPS)

    def forward(self, x: Tensor, condition: Tensor, tokens: int) -> tuple[Tensor, Tensor]:  # B T+N D, B E -> B T+N D, B T+N D
        """Return the normalized vectors, and the gates of what is computed from them."""
        patches, text = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        count = x.shape[1] - tokens
        each = torch.cat([text.expand(-1, tokens, -1), patches.expand(-1, count, -1)], 1)  # B T+N 3*D
        shift, scale, gate = each.chunk(3, -1)
        return self.norm(x) * (1 + scale) + shift, gate


class Block(nn.Module):
    """Attention and an MLP on text and patches in one sequence."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn, self.norm2 = ExpertNorm(c), Attention(c.dim, c.heads), ExpertNorm(c)
        self.up, self.down = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)

    def forward(self, x: Tensor, condition: Tensor, tokens: int, rotate: Rotate) -> Tensor:  # B T+N D, B E -> B T+N D
        y, gate = self.norm1(x, condition, tokens)
        x = x + gate * self.attn(y, rotate)
        y, gate = self.norm2(x, condition, tokens)
        return x + gate * self.down(F.gelu(self.up(y), approximate="tanh"))


class CogVideoX(nn.Module):
    """CogVideoX: noisy latents of a video, their time (0 .. 999), the states of a text -> the predicted velocity.

    Raises `SettingsError` for invalid sizes, and `DataError` for latents with odd sides and, with stored positions, of another size.
    """

    places: Tensor  # T+N D, if they are stored

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % (16 * c.heads if c.rotary else 16) or c.dim % c.heads:
            raise SettingsError(f"dim={c.dim} must be a multiple of 16 and of heads={c.heads}, with rotary of 16 times heads")
        self.patch = nn.Conv2d(c.channels + c.extra, c.dim, PATCH, PATCH)
        self.text = nn.Linear(c.text_dim, c.dim)
        self.time1, self.time2 = nn.Linear(c.dim, c.condition_dim), nn.Linear(c.condition_dim, c.condition_dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=EPS), nn.LayerNorm(c.dim, eps=EPS)
        self.condition, self.head = nn.Linear(c.condition_dim, 2 * c.dim), nn.Linear(c.dim, c.channels * PATCH**2)
        if c.learned:
            places = self.embed_places(c.frames, c.image // PATCH, c.width // PATCH)
            self.register_buffer("places", F.pad(places, (0, 0, c.length, 0)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
                if name == "head" or name.endswith("condition"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))

    def embed_places(self, frames: int, rows: int, columns: int) -> Tensor:  # -> N D
        """Return sines and cosines of the frame, in a quarter of the values, the column and the row."""
        frame, row, column = place_grid(frames, rows, columns).float().unbind(1)
        quarter, scale = self.config.dim // 4, self.config.interpolation
        parts = ((frame, quarter), (column / scale, 3 * quarter // 2), (row / scale, 3 * quarter // 2))
        return torch.cat([sinusoidal_embedding(place, dim) for place, dim in parts], 1)

    def get_places(self, tokens: int, frames: int, rows: int, columns: int) -> Tensor:  # -> T+N D
        """Return what is added to texts and patches: the stored positions for the number of frames of training, else sines and
        cosines."""
        c = self.config
        if c.learned and (rows, columns) != (c.image // PATCH, c.width // PATCH):
            raise DataError(
                f"the latents have {rows * PATCH} x {columns * PATCH} elements, but the stored positions are for {c.image} x {c.width}"
            )
        if not c.learned or frames != c.frames:
            return F.pad(self.embed_places(frames, rows, columns), (0, 0, tokens, 0))
        if tokens != c.length:
            raise DataError(f"the text has {tokens} tokens, but must be padded to length={c.length}")
        return self.places

    def make_rotation(self, tokens: int, frames: int, rows: int, columns: int, like: Tensor) -> Rotate:
        """Return the rotation of patches by frame, row and column, in the middle of those of training; tokens are not rotated."""
        c, width = self.config, self.config.dim // self.config.heads
        sides = [
            torch.linspace(first, last * (count - 1) / count, count)
            for (first, last), count in zip(fit_grid(rows, columns, c.image // PATCH, c.width // PATCH), (rows, columns))
        ]
        places = torch.stack(torch.meshgrid(torch.arange(frames).float(), *sides, indexing="ij"), -1).flatten(0, 2)
        return make_rotation(F.pad(places, (0, 0, tokens, 0)), (width // 4, 3 * width // 8, 3 * width // 8), like)

    def forward(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:  # B F C' H W, B, B T K -> B F C H W
        c, frames, tokens = self.config, latent.shape[1], text.shape[1]
        rows, columns = count_patches(latent.flatten(0, 1), PATCH)
        x = self.patch(latent.flatten(0, 1)).flatten(2).mT.unflatten(0, (-1, frames)).flatten(1, 2)
        rotate: Rotate = lambda x: x
        if c.rotary:
            rotate = self.make_rotation(tokens, frames, rows, columns, x)
        condition = self.time2(F.silu(self.time1(embed_time(time, c.dim).to(x.dtype))))
        x = torch.cat([self.text(text), x], 1)
        if c.learned or not c.rotary:
            x = x + self.get_places(tokens, frames, rows, columns).to(x)
        for block in self.blocks:
            x = block(x, condition, tokens, rotate)
        shift, scale = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        x = self.head(self.norm2(self.norm1(x[:, tokens:])) * (1 + scale) + shift)
        x = x.unflatten(1, (frames, rows * columns)).flatten(0, 1).mT.unflatten(2, (rows, columns))
        return F.pixel_shuffle(x, PATCH).unflatten(0, (-1, frames))


def fit_grid(rows: int, columns: int, most_rows: int, most_columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first row and the one after the last, and the same for columns, of a grid that is enlarged in the middle of another
    one until it has as many rows or columns.
    """
    if rows / columns > most_rows / most_columns:
        height, width = most_rows, round(most_rows / rows * columns)
    else:
        height, width = round(most_columns / columns * rows), most_columns
    top, left = round((most_rows - height) / 2), round((most_columns - width) / 2)
    return (top, top + height), (left, left + width)


BLOCK = "transformer_blocks.{i}."
DIFFUSERS: dict[str, Row] = {
    "patch_embed.proj.*": "patch.*",
    "patch_embed.text_proj.*": "text.*",
    "time_embedding.linear_{k}.*": "time{k}.*",
    "norm_final.*": "norm1.*",
    "norm_out.linear.*": "condition.*",
    "norm_out.norm.*": "norm2.*",
    "proj_out.*": "head.*",
    f"{BLOCK}norm{{k}}.linear.*": "blocks.{i}.norm{k}.condition.*",
    f"{BLOCK}norm{{k}}.norm.*": "blocks.{i}.norm{k}.norm.*",
    f"{BLOCK}attn1.to_out.0.*": "blocks.{i}.attn.proj.*",
    f"{BLOCK}ff.net.0.proj.*": "blocks.{i}.up.*",
    f"{BLOCK}ff.net.2.*": "blocks.{i}.down.*",
    **{f"{BLOCK}attn1.to_{part}.*": f"blocks.{{i}}.attn.{part}.*" for part in "qkv"},
    **{f"{BLOCK}attn1.norm_{part}.*": f"blocks.{{i}}.attn.norm_{part}.*" for part in "qk"},
}


def diffusers_keys(c: Config) -> dict[str, Row]:
    """Return the key table of diffusers, with the positions if they are stored."""
    places = Reshaped("places", (-1, c.dim), (1, -1, c.dim))
    return DIFFUSERS | ({"patch_embed.pos_embedding": places} if c.learned else {})


def parse_frames(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of frames of latents for that of a video, of which the first one stands alone."""
    return {"frames": (raw["sample_frames"] - 1) // FRAMES_PER_LATENT + 1}


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("CogVideoXTransformer3DModel"),
    "num_attention_heads": "heads",
    "attention_head_dim": Derived(
        lambda raw: {"dim": raw["num_attention_heads"] * raw["attention_head_dim"]}, lambda c: c.dim // c.heads
    ),
    "in_channels": Derived(lambda raw: {"extra": raw["in_channels"] - raw["out_channels"]}, lambda c: c.channels + c.extra),
    "out_channels": "channels",
    "time_embed_dim": "condition_dim",
    "text_embed_dim": "text_dim",
    "num_layers": "depth",
    "sample_height": "image",
    "sample_width": "width",
    "sample_frames": Derived(parse_frames, lambda c: (c.frames - 1) * FRAMES_PER_LATENT + 1),
    "max_text_seq_length": "length",
    "use_rotary_positional_embeddings": WithDefault("rotary", False),
    "spatial_interpolation_scale": WithDefault("interpolation", 1.875),
    "temporal_interpolation_scale": Expect(1.0),
    "temporal_compression_ratio": Expect(FRAMES_PER_LATENT),
    "patch_size": Expect(PATCH),
    "patch_size_t": Expect(None),
    "patch_bias": Expect(True),
    "ofs_embed_dim": Expect(None),
    "use_learned_positional_embeddings": WithDefault("learned", False),
    "attention_bias": Expect(True),
    "dropout": Expect(0.0),
    "flip_sin_to_cos": Expect(True),
    "freq_shift": Expect(0),
    "activation_fn": Expect("gelu-approximate"),
    "timestep_activation_fn": Expect("silu"),
    "norm_elementwise_affine": Expect(True),
    "norm_eps": Expect(EPS),
}

CARD = Card(
    name="cogvideox",
    model=CogVideoX,
    config=Config,
    paper="arXiv:2408.06072",
    year=2024,
    input_type="noisy-latent-video",
    output_type="video",
    sizes={
        "cogvideox-2b": Size(params=1_693_783_872, source="THUDM/CogVideoX-2b"),
        "cogvideox-5b": Size(dim=3072, depth=42, heads=48, rotary=True, params=5_570_283_072, source="THUDM/CogVideoX-5b"),
        "cogvideox-5b-i2v": Size(
            extra=16,
            dim=3072,
            depth=42,
            heads=48,
            rotary=True,
            learned=True,
            params=5_570_479_680,
            source="THUDM/CogVideoX-5b-I2V",
        ),
        "cogvideox-test": Size(
            frames=3, image=4, width=6, channels=2, text_dim=10, length=5, dim=32, condition_dim=12, depth=2, heads=2
        ),
    },
    weights={"diffusers": diffusers_keys},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
