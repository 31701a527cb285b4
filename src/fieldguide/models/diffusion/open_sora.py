"""Open-Sora 2.0: FLUX.1, trained further on videos (Peng et al. 2025, arXiv:2503.09642).

New here: FLUX's first rotation, which is 0 for images, is by frame, so that a network that was trained on images begins with the frames of
a video as images. A second linear layer, zero at first, adds what is given: a mask of frames and their latents, for videos that begin or
end with an image, or go on from another video; all zeros for a video of a text alone. Latents are those of HunyuanVideo's autoencoder.

The public file rotates the first half of each head with the second one, where FLUX has neighboring pairs, and keeps values and the first
layer of the MLP of a block with one stream in one matrix. Padding of the text is attended to: there is no mask.

Initialization: as FLUX, and zero for the layer of what is given.
Shapes: B batch, F frames, C channels of the latents, H W height and width, N = F * H/2 * W/2 patches, D width, T tokens, K width of their
states, E width of the vector of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.diffusion._shared.attention import EPS, attend_jointly
from fieldguide.models.diffusion._shared.patches import count_patches
from fieldguide.models.diffusion._shared.rotary import Rotate, make_rotation, place_grid
from fieldguide.models.diffusion.flux import PATCH, TIME_DIM, Block, modulate, stream_keys
from fieldguide.models.diffusion.hunyuan_video import Embedding
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.key_rules import Row


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 16  # C
    extra: int = 17  # channels of the input that are not predicted: 1 for given frames and 0 for others, then their latents
    frames: int = 33  # of latents, four frames of a video each, the first one alone; other numbers work, too
    image: int = 96  # side of square latents of about the size that it was trained with; others work, too
    text_dim: int = 4096  # K
    pooled_dim: int = 768  # E
    dim: int = 3072  # D
    depth: int = 19  # blocks with two streams
    single: int = 38  # blocks with one stream
    heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)  # parts of a head that rotate by frame, row and column


class SingleBlock(nn.Module):
    """Attention and MLP side by side, as in FLUX, with one matrix for values and the first layer of the MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.condition = c.heads, nn.Linear(c.dim, 3 * c.dim)
        self.q, self.k, self.v_up = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, c.dim), nn.Linear(c.dim, 5 * c.dim)
        self.norm_q, self.norm_k = (RMSNorm(c.dim // c.heads, eps=EPS) for _ in range(2))
        self.down = nn.Linear(5 * c.dim, c.dim)

    def forward(self, x: Tensor, condition: Tensor, rotate: Rotate) -> Tensor:  # B T+N D, B D -> B T+N D
        shift, scale, gate = self.condition(F.silu(condition))[:, None].chunk(3, -1)
        y, dim = modulate(x, shift, scale), x.shape[-1]
        v, up = self.v_up(y).split([dim, 4 * dim], -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(y), self.k(y), v))
        (attended,) = attend_jointly([(self.norm_q(q), self.norm_k(k), v)], rotate=rotate)
        return x + gate * self.down(torch.cat([attended, F.gelu(up, approximate="tanh")], -1))


class OpenSora(nn.Module):
    """Open-Sora 2.0: noisy latents of a video and given frames, their time (0 .. 1000), the states of a text and its vector -> the
    predicted velocity, noise minus data.

    Raises `SettingsError` for invalid sizes, and `DataError` for latents with odd sides or another number of channels.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if sum(c.axes) * c.heads != c.dim or len(c.axes) != 3 or any(part % 2 for part in c.axes):
            raise SettingsError(f"axes={c.axes} must be three even numbers whose sum is dim / heads = {c.dim} / {c.heads}")
        self.patch, self.given = nn.Linear(c.channels * PATCH**2, c.dim), nn.Linear(c.extra * PATCH**2, c.dim)
        self.time, self.pooled = Embedding(TIME_DIM, c.dim), Embedding(c.pooled_dim, c.dim)
        self.text = nn.Linear(c.text_dim, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.singles = nn.ModuleList(SingleBlock(c) for _ in range(c.single))
        self.condition, self.head = nn.Linear(c.dim, 2 * c.dim), nn.Linear(c.dim, c.channels * PATCH**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if name.endswith("condition") or name in ("head", "given"):
                    nn.init.zeros_(module.weight)
                elif "linear" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)

    def forward(
        self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor
    ) -> Tensor:  # B F C' H W, B, B T K, B E -> B F C H W
        c, frames, tokens = self.config, latent.shape[1], text.shape[1]
        if latent.shape[2] != c.channels + c.extra:
            raise DataError(
                f"the latents have {latent.shape[2]} channels, but the network takes {c.channels + c.extra}: {c.channels} noisy ones, "
                f"and {c.extra} for given frames, which are zeros for none"
            )
        rows, columns = count_patches(latent.flatten(0, 1), PATCH)
        noisy, given = F.pixel_unshuffle(latent, PATCH).flatten(3).mT.flatten(1, 2).split([c.channels * 4, c.extra * 4], -1)
        x, text = self.patch(noisy) + self.given(given), self.text(text)
        condition = self.time.embed(time) + self.pooled(pooled)
        places = F.pad(place_grid(frames, rows, columns), (0, 0, tokens, 0))  # T+N 3
        rotate = make_rotation(places, c.axes, x, halves=True)
        for block in self.blocks:
            x, text = block(x, text, condition, None, rotate)
        x = torch.cat([text, x], 1)
        for single in self.singles:
            x = single(x, condition, rotate)
        shift, scale = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        x = self.head(modulate(x[:, tokens:], shift, scale)).unflatten(1, (frames, rows * columns))
        return F.pixel_shuffle(x.mT.unflatten(3, (rows, columns)), PATCH)


def attention_keys(theirs: str, ours: str) -> dict[str, Row]:
    """Return the rows of queries, keys and values of one stream of the blocks with two."""
    return {f"double_blocks.{{i}}.{theirs}_attn.{part}_proj.*": f"blocks.{{i}}.{ours}.attn.{part}.*" for part in "qkv"}


OFFICIAL: dict[str, Row] = {  # Open_Sora_v2.safetensors
    "img_in.*": "patch.*",
    "cond_in.*": "given.*",
    "time_in.in_layer.*": "time.linear1.*",
    "time_in.out_layer.*": "time.linear2.*",
    "vector_in.in_layer.*": "pooled.linear1.*",
    "vector_in.out_layer.*": "pooled.linear2.*",
    "txt_in.*": "text.*",
    "single_blocks.{i}.modulation.lin.*": "singles.{i}.condition.*",
    "single_blocks.{i}.q_proj.*": "singles.{i}.q.*",
    "single_blocks.{i}.k_proj.*": "singles.{i}.k.*",
    "single_blocks.{i}.v_mlp.*": "singles.{i}.v_up.*",
    "single_blocks.{i}.norm.query_norm.scale": "singles.{i}.norm_q.weight",
    "single_blocks.{i}.norm.key_norm.scale": "singles.{i}.norm_k.weight",
    "single_blocks.{i}.linear2.*": "singles.{i}.down.*",
    "final_layer.adaLN_modulation.1.*": "condition.*",
    "final_layer.linear.*": "head.*",
    **stream_keys("img", "image"),
    **stream_keys("txt", "text"),
    **attention_keys("img", "image"),
    **attention_keys("txt", "text"),
}

CARD = Card(
    name="open-sora",
    model=OpenSora,
    config=Config,
    paper="arXiv:2503.09642",
    year=2025,
    input_type="noisy-latent-video-pooled",
    output_type="video",
    sizes={
        "open-sora-2": Size(params=11_891_390_528, source="hpcai-tech/Open-Sora-v2"),
        "open-sora-test": Size(
            channels=2,
            extra=3,
            frames=3,
            image=4,
            text_dim=10,
            pooled_dim=6,
            dim=16,
            depth=2,
            single=2,
            heads=2,
            axes=(2, 2, 4),
        ),
    },
    weights={"official": OFFICIAL},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
