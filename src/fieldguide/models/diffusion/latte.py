"""Latte: a diffusion Transformer for videos, variant 1 (Ma et al. 2024, arXiv:2401.03048).

New here: blocks alternate between spatial and temporal attention, which is cheaper than attention over all patches of all
frames. The blocks are those of DiT (Peebles and Xie 2022, arXiv:2212.09748): time and label determine the scale, shift and
gate of each block, with gates that start at zero (adaLN-Zero). The mean over the tokens of a caption, encoded by a small
Transformer, can take the place of the label. Frames may have times of their own: a frame of time 0 is known, and the others are
generated to continue it, as in Open-Sora (Zheng et al. 2024, arXiv:2412.20404) and Diffusion Forcing (Chen et al. 2024,
arXiv:2407.01392).

Initialization: Glorot uniform matrices, zero biases; zero for the modulation layers and the last layer, so that an untrained
network outputs zero. Label embeddings are N(0, 1) and the time layers preserve the variance; with the authors' N(0, 0.02)
for both, classes are not learned within hundreds of steps.
Shapes: B batch, F frames, C channels, S side, P side of a patch, N = (S/P)^2 patches of a frame, D width, T tokens, M moments
with a time of their own: 1, or F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.diffusion._shared.caption_encoder import CaptionEncoder
from fieldguide.models.diffusion._shared.embeddings import embed_time, position_embedding, sinusoidal_embedding
from fieldguide.models.layers.attention import Attention
from fieldguide.models.mapping.key_rules import Dropped, Row

TIME_EMBEDDING_DIM = 256  # sines and cosines of the time embedding


@dataclass(frozen=True, kw_only=True)
class Config:
    frames: int = 16  # F, at most
    channels: int = 4  # C: 3 for pixels, 4 for the latents of Stable Diffusion's VAE
    image: int = 32  # S
    patch: int = 2  # P
    num_classes: int = 101  # labels are 1 .. num_classes; 0 means unconditional
    dim: int = 1152  # D
    depth: int = 28  # blocks: space, time, space, time, ...
    heads: int = 16
    variance: bool = False  # whether the output includes variances, as in the authors' checkpoints; they are not used
    vocab_size: int = 0  # size of the caption vocabulary, instead of labels; 0 means no captions
    length: int = 64  # maximum length of a caption in tokens
    words: int = 128  # width of the caption encoder
    layers: int = 2  # of the caption encoder


class Modulated(nn.Module):
    """Layer norm without parameters, with scale and shift from the condition (adaLN)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # B F N D, B M 1 D, B M 1 D -> B F N D
        return self.norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """DiT block: attention over the patches of each frame, or over the frames of each patch, then a two-layer MLP."""

    def __init__(self, c: Config, over_time: bool):
        super().__init__()
        self.over_time = over_time
        self.condition = nn.Linear(c.dim, 6 * c.dim)  # shift, scale and gate of the attention, then of the MLP
        self.norm1, self.attn = Modulated(c.dim), Attention(c.dim, c.heads)
        self.norm2 = Modulated(c.dim)
        self.mlp = nn.ModuleDict({"up": nn.Linear(c.dim, 4 * c.dim), "down": nn.Linear(4 * c.dim, c.dim)})

    def attend(self, x: Tensor) -> Tensor:  # B F N D -> B F N D
        if self.over_time:
            x = x.transpose(1, 2)
        x = self.attn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x.transpose(1, 2) if self.over_time else x

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # B F N D, B M D -> B F N D
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(condition))[:, :, None].chunk(6, -1)
        x = x + gate1 * self.attend(self.norm1(x, shift1, scale1))
        y = F.gelu(self.mlp["up"](self.norm2(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * self.mlp["down"](y)


class Latte(nn.Module):
    """Latte: a noisy video, its time (0 .. 999 in the paper), its label or caption -> the predicted noise, or v if trained for it.

    The time is one number, or one for each frame. Raises `SettingsError` for invalid sizes, and `DataError` for videos of another side
    or with more frames than configured.
    """

    places: Tensor  # N D
    moments: Tensor  # F D

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.image % c.patch:
            raise SettingsError(f"image={c.image} must be a multiple of patch={c.patch}")
        if c.depth % 2:
            raise SettingsError(f"depth={c.depth} must be even: spatial and temporal blocks alternate")
        if c.dim % 4:
            raise SettingsError(
                f"dim={c.dim} must be a multiple of 4: positions are encoded by sines and cosines of rows and columns"
            )
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.time1, self.time2 = nn.Linear(TIME_EMBEDDING_DIM, c.dim), nn.Linear(c.dim, c.dim)
        self.label = nn.Embedding(c.num_classes + 1, c.dim) if c.num_classes else None  # the last row is for no label
        self.caption = CaptionEncoder(c.vocab_size, c.length, c.words, c.layers, c.dim, 0.0) if c.vocab_size else None
        self.register_buffer("places", position_embedding(c.image // c.patch, c.image // c.patch, c.dim), persistent=False)
        self.register_buffer("moments", sinusoidal_embedding(torch.arange(c.frames), c.dim), persistent=False)
        self.blocks = nn.ModuleList(Block(c, over_time=bool(i % 2)) for i in range(c.depth))
        self.norm, self.condition = Modulated(c.dim), nn.Linear(c.dim, 2 * c.dim)
        self.head = nn.Linear(c.dim, c.patch**2 * c.channels * (1 + c.variance))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("caption."):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith("condition") or name == "head":
                    nn.init.zeros_(module.weight)
                elif isinstance(module, nn.Linear) and name in ("time1", "time2"):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                else:  # queries, keys and values as one matrix, as in the authors' code
                    nn.init.xavier_uniform_(module.weight.flatten(1))
        if self.label is not None:
            nn.init.normal_(self.label.weight)
        if self.caption is not None:
            self.caption.reset_parameters()

    def embed_condition(self, time: Tensor, label: Tensor | None) -> Tensor:  # B or B F, B or B T -> B M D
        """Return the embedding of the times plus that of the label or caption."""
        x = embed_time(time.flatten(), TIME_EMBEDDING_DIM).to(self.time1.weight.dtype)
        x = self.time2(F.silu(self.time1(x))).unflatten(0, (time.shape[0], -1))
        none = torch.zeros(time.shape[0], dtype=torch.int64, device=time.device)
        if self.caption is not None:
            return x + self.caption(none[:, None] if label is None else label)[:, None]
        if self.label is None:
            return x
        label = none if label is None else label
        return x + self.label((label - 1) % (self.config.num_classes + 1))[:, None]  # 0 -> the last row

    def forward(
        self, video: Tensor, time: Tensor, label: Tensor | None = None
    ) -> Tensor:  # B F C S S, B (F), B (T) -> B F C S S
        c = self.config
        if video.shape[3:] != (c.image, c.image) or video.shape[1] > c.frames:
            raise DataError(
                f"the videos have {video.shape[1]} frames of {video.shape[4]} x {video.shape[3]} pixels, but the network "
                f"was created for at most frames={c.frames} of image={c.image}"
            )
        condition = self.embed_condition(time, label)
        x = self.patch(video.flatten(0, 1)).flatten(2).mT.unflatten(0, video.shape[:2]) + self.places
        for i, block in enumerate(self.blocks):
            if i == 1:  # temporal positions are added before the first temporal block
                x = x + self.moments[: video.shape[1], None]
            x = block(x, condition)
        shift, scale = self.condition(F.silu(condition))[:, :, None].chunk(2, -1)
        x = self.head(self.norm(x, shift, scale))  # B F N P*P*C
        side = c.image // c.patch
        x = x.unflatten(-1, (c.patch, c.patch, -1)).unflatten(2, (side, side))  # B F rows columns P P C
        x = x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return x[:, :, : c.channels]


OFFICIAL: dict[str, Row] = {  # Vchitect/Latte, class-conditional (extras = 2)
    "x_embedder.proj.*": "patch.*",
    "t_embedder.mlp.0.*": "time1.*",
    "t_embedder.mlp.2.*": "time2.*",
    "y_embedder.embedding_table.weight": "label.weight",
    "pos_embed": Dropped("fixed sines and cosines"),
    "temp_embed": Dropped("fixed sines and cosines"),
    "blocks.{i}.attn.qkv.*": "blocks.{i}.attn.qkv.*",
    "blocks.{i}.attn.proj.*": "blocks.{i}.attn.proj.*",
    "blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.up.*",
    "blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.down.*",
    "blocks.{i}.adaLN_modulation.1.*": "blocks.{i}.condition.*",
    "final_layer.adaLN_modulation.1.*": "condition.*",
    "final_layer.linear.*": "head.*",
}

CARD = Card(
    name="latte",
    model=Latte,
    config=Config,
    paper="arXiv:2401.03048",
    year=2024,
    input_type="noisy-video",
    output_type="video",
    sizes={
        # The authors' counts include the fixed position embeddings: 313,344 for XL/2, 674,112,416 in total.
        "latte-xl2": Size(variance=True, params=673_799_072, source="Vchitect/Latte, UCF101, without fixed sines"),
        "latte-l2": Size(dim=1024, depth=24, variance=True),
        "latte-b2": Size(dim=768, depth=12, heads=12, variance=True),
        "latte-s2": Size(dim=384, depth=12, heads=6, variance=True),
        # On pixels, for training from scratch: 16 frames of 64 pixels, 8 of 32.
        "latte-pixels-64": Size(channels=3, image=64, patch=8, num_classes=0, dim=256, depth=8, heads=4),
        "latte-pixels-32": Size(channels=3, image=32, patch=4, frames=8, num_classes=0, dim=128, depth=6, heads=2),
        "latte-pixels-16": Size(channels=1, image=16, patch=8, frames=8, num_classes=0, dim=128, depth=4, heads=2),
        "latte-test": Size(frames=3, channels=2, image=8, patch=2, num_classes=3, dim=16, depth=4, heads=2),
    },
    weights={"official": OFFICIAL},
    # A color patch of 8 x 8 has 192 values, more than the width 128 of the small networks.
    adapt=lambda need: {"patch": 4} if need["channels"] == 3 and need["image"] <= 32 else {},
    # Moving digits, 2.5 minutes on one core, accuracy of the generated actions: adamw at 1e-3 .24 after 478 steps, muon .46
    # after 265; with patches of 8 instead of 4, .82 after 998 steps.
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.0, "grad_clip": 1.0, "ema": 0.999},
)
