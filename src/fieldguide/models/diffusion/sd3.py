"""Stable Diffusion 3: images and texts as two streams with joint attention (Esser et al. 2024, arXiv:2403.03206).

New here: MMDiT; each modality has its own weights, also for the states of the text, and both attend to both. Time and one vector of the
text modulate each block as in DiT. It predicts the velocity of a straight path between data and noise, trained mostly at middle
times. Texts are states of two CLIP encoders side by side, padded with zeros, followed by those of T5. In version 3.5, queries and keys
are normalized, and the medium size has a second self-attention of the image in its first blocks.

Initialization: Glorot uniform matrices, zero biases; zero for the modulation layers and the last layer; N(0, 0.02) for the embeddings
of time and vector.
Shapes: B batch, C channels of the latents, H W height and width, P side of a patch, N patches, D width, T tokens, K width of their
states, E width of the vector of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.diffusion._shared.attention import Stream, attend_jointly, place_mask
from fieldguide.models.diffusion._shared.embeddings import embed_time, position_embedding
from fieldguide.models.diffusion._shared.patches import count_patches, join_patches
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Joined, Reshaped, Row, Swapped

TIME_DIM = 256  # sines and cosines of times
EPS = 1e-6  # of the norms, most of which have no parameters


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 16  # C
    image: int = 128  # side of the latents whose positions have a distance of 1
    largest: int = 192  # patches per side for which there are positions; latents are in the center
    patch: int = 2  # P
    text_dim: int = 4096  # K
    pooled_dim: int = 2048  # E
    dim: int = 1536  # D
    depth: int = 24
    heads: int = 24
    normed: bool = False  # whether queries and keys are normalized
    dual: int = 0  # number of first blocks with a second self-attention of the image


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # B N D, B 1 D, B 1 D -> B N D
    """Return normalized vectors, scaled and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Side(nn.Module):
    """The part of a block for one modality: modulation, its share in the joint attention, an MLP.

    The text of the `last` block is only attended to. `dual` is for a second attention of the modality alone.
    """

    def __init__(self, c: Config, last: bool = False, dual: bool = False):
        super().__init__()
        self.condition = nn.Linear(c.dim, (2 if last else 9 if dual else 6) * c.dim)
        self.attn = Stream(c.dim, c.heads, c.normed, output=not last)
        self.attn2 = Stream(c.dim, c.heads, c.normed) if dual else None
        self.mlp = None if last else nn.ModuleDict({"up": nn.Linear(c.dim, 4 * c.dim), "down": nn.Linear(4 * c.dim, c.dim)})

    def split_condition(self, condition: Tensor) -> tuple[Tensor, ...]:  # B D -> B 1 D each
        """Return shift and scale before the attention, then what follows it. Files hold the scale first if there are only two."""
        parts = self.condition(F.silu(condition))[:, None].chunk(self.condition.out_features // self.condition.in_features, -1)
        return parts if len(parts) > 2 else parts[::-1]

    def forward(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:  # B N D, B N D -> B N D
        """Return what follows the joint attention. `parts` are shift, scale and gate of both, then of a second attention."""
        assert self.mlp is not None
        before, x = x, x + parts[2] * self.attn.proj(attended)
        if self.attn2 is not None:
            y = modulate(before, parts[6], parts[7])
            x = x + parts[8] * self.attn2.proj(attend_jointly([self.attn2(y)])[0])
        y = F.gelu(self.mlp["up"](modulate(x, parts[3], parts[4])), approximate="tanh")
        return x + parts[5] * self.mlp["down"](y)


class Block(nn.Module):
    """Joint attention of image and text, then an MLP for each."""

    def __init__(self, c: Config, index: int):
        super().__init__()
        self.last = index == c.depth - 1
        self.image, self.text = Side(c, dual=index < c.dual), Side(c, self.last)

    def forward(
        self, x: Tensor, text: Tensor, condition: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # B N D, B T D, B D, B N+T -> B N D, B T D
        ours, theirs = self.image.split_condition(condition), self.text.split_condition(condition)
        both = [self.image.attn(modulate(x, *ours[:2])), self.text.attn(modulate(text, *theirs[:2]))]
        seen, read = attend_jointly(both, mask)
        return self.image(x, seen, ours), text if self.last else self.text(text, read, theirs)


class SD3(nn.Module):
    """Stable Diffusion 3: noisy latents, their time (0 .. 1000), the states of a text and its vector -> the predicted velocity, noise
    minus data.

    Raises `SettingsError` for invalid sizes, and `DataError` for latents whose sides are not multiples of `patch`, or too large.
    """

    places: Tensor  # largest*largest D: stored in files

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % 4 or c.dual > c.depth:
            raise SettingsError(f"dim={c.dim} must be a multiple of 4, and dual={c.dual} at most depth={c.depth}")
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.register_buffer("places", position_embedding(c.largest, c.largest, c.dim, c.image // c.patch))
        self.time1, self.time2 = nn.Linear(TIME_DIM, c.dim), nn.Linear(c.dim, c.dim)
        self.pooled1, self.pooled2 = nn.Linear(c.pooled_dim, c.dim), nn.Linear(c.dim, c.dim)
        self.text = nn.Linear(c.text_dim, c.dim)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.depth))
        self.condition, self.head = nn.Linear(c.dim, 2 * c.dim), nn.Linear(c.dim, c.patch**2 * c.channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith("condition") or name == "head":
                    nn.init.zeros_(module.weight)
                elif name.startswith(("time", "pooled")):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))

    def crop_places(self, rows: int, columns: int) -> Tensor:  # -> N D
        """Return the embeddings of positions in the center. Raises `DataError` if there are not enough."""
        side = self.config.largest
        if max(rows, columns) > side:
            raise DataError(f"latents of {rows} x {columns} patches are too large: there are positions for {side} x {side}")
        top, left = (side - rows) // 2, (side - columns) // 2
        return self.places.unflatten(0, (side, side))[top : top + rows, left : left + columns].flatten(0, 1)

    def embed_condition(self, time: Tensor, pooled: Tensor) -> Tensor:  # B, B E -> B D
        """Return the embedding of the time plus that of the text's vector."""
        x = self.time2(F.silu(self.time1(embed_time(time, TIME_DIM).to(self.time1.weight.dtype))))
        return x + self.pooled2(F.silu(self.pooled1(pooled)))

    def forward(
        self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:  # B C H W, B, B T K, B E, B T -> B C H W
        rows, columns = count_patches(latent, self.config.patch)
        x = self.patch(latent).flatten(2).mT.contiguous() + self.crop_places(rows, columns)
        condition, text = self.embed_condition(time, pooled), self.text(text)
        mask = place_mask(text_mask, x, first=False)
        for block in self.blocks:
            x, text = block(x, text, condition, mask)
        scale, shift = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        return join_patches(self.head(modulate(x, shift, scale)), rows, columns, self.config.patch)


def diffusers_keys(c: Config) -> dict[str, Row]:
    """Return the key table of diffusers for a config."""
    block = "transformer_blocks.{i}."
    places = Reshaped("places", (c.largest**2, c.dim), (1, c.largest**2, c.dim))
    names: dict[str, Row] = {
        "pos_embed.proj.*": "patch.*",
        "pos_embed.pos_embed": places,
        "time_text_embed.timestep_embedder.linear_{k}.*": "time{k}.*",
        "time_text_embed.text_embedder.linear_{k}.*": "pooled{k}.*",
        "context_embedder.*": "text.*",
        "norm_out.linear.*": "condition.*",
        "proj_out.*": "head.*",
        f"{block}norm1.linear.*": "blocks.{i}.image.condition.*",
        f"{block}norm1_context.linear.*": "blocks.{i}.text.condition.*",
        f"{block}attn.to_out.0.*": "blocks.{i}.image.attn.proj.*",
        f"{block}attn.to_add_out.*": "blocks.{i}.text.attn.proj.*",
        f"{block}attn2.to_out.0.*": "blocks.{i}.image.attn2.proj.*",
    }
    for part in "qkv":
        names |= {
            f"{block}attn.to_{part}.*": f"blocks.{{i}}.image.attn.{part}.*",
            f"{block}attn.add_{part}_proj.*": f"blocks.{{i}}.text.attn.{part}.*",
            f"{block}attn2.to_{part}.*": f"blocks.{{i}}.image.attn2.{part}.*",
            f"{block}attn.norm_{part}.weight": f"blocks.{{i}}.image.attn.norm_{part}.weight",
            f"{block}attn.norm_added_{part}.weight": f"blocks.{{i}}.text.attn.norm_{part}.weight",
            f"{block}attn2.norm_{part}.weight": f"blocks.{{i}}.image.attn2.norm_{part}.weight",
        }
    for theirs, ours in (("ff", "image"), ("ff_context", "text")):
        names |= {
            f"{block}{theirs}.net.0.proj.*": f"blocks.{{i}}.{ours}.mlp.up.*",
            f"{block}{theirs}.net.2.*": f"blocks.{{i}}.{ours}.mlp.down.*",
        }
    return names


def official_keys(c: Config) -> dict[str, Row]:
    """Return the key table of the authors' files for a config. They hold the shift before the scale where there are only two."""
    block, last = "joint_blocks.{i}.", c.depth - 1
    names: dict[str, Row] = {
        "x_embedder.proj.*": "patch.*",
        "pos_embed": Reshaped("places", (c.largest**2, c.dim), (1, c.largest**2, c.dim)),
        "t_embedder.mlp.0.*": "time1.*",
        "t_embedder.mlp.2.*": "time2.*",
        "y_embedder.mlp.0.*": "pooled1.*",
        "y_embedder.mlp.2.*": "pooled2.*",
        "context_embedder.*": "text.*",
        "final_layer.adaLN_modulation.1.*": Swapped("condition.*"),
        "final_layer.linear.*": "head.*",
        f"joint_blocks.{last}.context_block.adaLN_modulation.1.*": Swapped(f"blocks.{last}.text.condition.*"),
    }
    for theirs, ours in (("x_block", "image"), ("context_block", "text")):
        side, here = f"{block}{theirs}.", f"blocks.{{i}}.{ours}."
        names |= {
            f"{side}adaLN_modulation.1.*": f"{here}condition.*",
            f"{side}mlp.fc1.*": f"{here}mlp.up.*",
            f"{side}mlp.fc2.*": f"{here}mlp.down.*",
        }
        for attn in ("attn", "attn2"):
            names[f"{side}{attn}.qkv.*"] = Joined(tuple(f"{here}{attn}.{part}.*" for part in "qkv"), (1, 1, 1))
            names[f"{side}{attn}.proj.*"] = f"{here}{attn}.proj.*"
            names |= {f"{side}{attn}.ln_{part}.weight": f"{here}{attn}.norm_{part}.weight" for part in "qk"}
    return names


def parse_dual(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return width and number of blocks with a second attention. Raises `WeightsError` if these are not the first ones."""
    dual = tuple(raw.get("dual_attention_layers") or ())
    if dual != tuple(range(len(dual))):
        raise WeightsError(f"dual_attention_layers={list(dual)} is not supported: they must be the first blocks")
    return {"dim": raw["num_attention_heads"] * raw["attention_head_dim"], "dual": len(dual)}


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("SD3Transformer2DModel"),
    "sample_size": "image",
    "patch_size": "patch",
    "in_channels": "channels",
    "out_channels": Expect(lambda c: c.channels, absent=16),
    "num_layers": "depth",
    "num_attention_heads": "heads",
    "attention_head_dim": Derived(parse_dual, lambda c: c.dim // c.heads),
    "dual_attention_layers": Derived(lambda raw: {}, lambda c: list(range(c.dual))),
    "joint_attention_dim": "text_dim",
    "caption_projection_dim": Expect(lambda c: c.dim),
    "pooled_projection_dim": "pooled_dim",
    "pos_embed_max_size": "largest",
    "qk_norm": ValueMap("normed", {None: False, "rms_norm": True}),
}

CARD = Card(
    name="sd3",
    model=SD3,
    config=Config,
    paper="arXiv:2403.03206",
    year=2024,
    input_type="noisy-latent-pooled",
    output_type="image",
    optional_inputs=("text_mask",),
    sizes={
        "sd3-medium": Size(params=2_028_328_000, source="stabilityai/stable-diffusion-3-medium-diffusers"),
        # The published 2.5 billion include the fixed positions, 226,492,416.
        "sd3.5-medium": Size(
            largest=384, normed=True, dual=13, params=2_243_171_520, source="stabilityai/stable-diffusion-3.5-medium"
        ),
        "sd3.5-large": Size(
            dim=2432, depth=38, heads=38, normed=True, params=8_056_627_520, source="stabilityai/stable-diffusion-3.5-large"
        ),
        "sd3-test": Size(
            image=8, largest=9, channels=2, text_dim=10, pooled_dim=6, dim=16, depth=3, heads=2, normed=True, dual=2
        ),
    },
    weights={"diffusers": diffusers_keys, "official": official_keys},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
