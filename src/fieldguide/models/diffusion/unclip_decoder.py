"""unCLIP decoder: from embeddings of CLIP to images (Ramesh et al. 2022, arXiv:2204.06125).

New here: the embedding of an image, which a prior made of a text, is added to the time, and becomes four more tokens next to those of the
text (`TextProjection`). The network is that of GLIDE (Nichol et al. 2021, arXiv:2112.10741): ADM's U-Net, whose attention has keys and
values of the text besides those of the image. OpenAI's own weights are not public; those of Karlo are.

Initialization: torch's defaults; zero for the last layers of residual paths and of the network, as in the authors' code.
Shapes: B batch, C channels, H W height and width, D width of a level, E width of the time embedding, T tokens, K width of their states,
X width of CLIP's embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.diffusion._shared.levels import run_levels
from fieldguide.models.diffusion.consistency_unet import Block
from fieldguide.models.diffusion.super_resolution_unet import DIFFUSERS as RESIDUAL_KEYS
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Row

EXTRA_TOKENS = 4  # of the embedding of an image


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 64  # side of the images that it was trained with; others work, too
    text_dim: int = 1536  # K
    widths: tuple[int, ...] = (320, 640, 960, 1280)  # of each level; all but the first have attention
    depth: int = 3  # blocks per level on the way down; one more on the way up
    head_dim: int = 64  # width of a head of attention
    groups: int = 32  # of group norm
    variance: bool = True  # whether the last layer also predicts variances
    scaled = True  # times scale and shift features
    dropout = 0.0

    @property
    def dim(self) -> int:
        return self.widths[0]

    @property
    def pooled_dim(self) -> int:
        return 4 * self.dim


class Attention(nn.Module):
    """Attention of an image to a text and to itself, with a residual connection."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        if dim % c.head_dim:
            raise SettingsError(f"the width {dim} of a level with attention must be a multiple of head_dim={c.head_dim}")
        self.heads, self.norm = dim // c.head_dim, nn.GroupNorm(c.groups, dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.text_k, self.text_v = nn.Linear(c.text_dim, dim), nn.Linear(c.text_dim, dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:  # B D H W, B T K, B T -> B D H W
        y = self.norm(x).flatten(2).mT
        k, v = torch.cat([self.text_k(text), self.k(y)], 1), torch.cat([self.text_v(text), self.v(y)], 1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (self.q(y), k, v))
        allowed = None if mask is None else F.pad(mask, (0, y.shape[1]), value=True)[:, None, None]
        y = self.proj(dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2))
        return x + y.mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Blocks of one resolution, each followed by optional attention, and a block that changes the resolution."""

    def __init__(self, c: Config, inputs: list[int], dim: int, attend: bool, resize: Block | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(cast(Any, c), n, dim) for n in inputs)
        self.attns = nn.ModuleList(Attention(c, dim) for _ in (inputs if attend else []))
        self.resize = resize

    def forward(
        self, i: int, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None
    ) -> Tensor:  # index of a block, B D H W, B E, B T K, B T -> B D' H W
        x = self.blocks[i](x, time)
        return self.attns[i](x, text, mask) if len(self.attns) else x


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(cast(Any, c), dim, dim) for _ in range(2))
        self.attns = nn.ModuleList([Attention(c, dim)])

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:  # B D H W -> B D H W
        return self.blocks[1](self.attns[0](self.blocks[0](x, time), text, mask), time)


class UnCLIPDecoder(nn.Module):
    """unCLIP decoder: noisy image, time (0 .. 999), states of the tokens and a vector that is added to the time, both of which
    `TextProjection` makes of CLIP's states and embeddings -> the predicted noise.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        widths, last, shared = c.widths, len(c.widths) - 1, cast(Any, c)
        self.time1, self.time2 = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, 4 * c.dim)
        self.conv_in = nn.Conv2d(c.channels, c.dim, 3, padding=1)
        self.down, self.up, dim, skips = nn.ModuleList(), nn.ModuleList(), c.dim, [c.dim]
        for i, width in enumerate(widths):
            resize = Block(shared, width, width, "down") if i < last else None
            self.down.append(Level(c, [dim] + [width] * (c.depth - 1), width, i > 0, resize))
            skips += [width] * (c.depth + (i < last))
            dim = width
        self.mid = Middle(c, dim)
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(dim if j == 0 else width) + skips.pop() for j in range(c.depth + 1)]
            self.up.append(Level(c, inputs, width, i > 0, Block(shared, width, width, "up") if i else None))
            dim = width
        self.norm, self.conv_out = nn.GroupNorm(c.groups, dim), nn.Conv2d(dim, c.channels * (1 + c.variance), 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if name.endswith(("conv2", "proj", "conv_out")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    def predict_all(
        self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:  # -> B C H W or B 2C H W
        """Return all channels of the last layer."""
        embedded = embed_time(time, self.config.dim).to(self.time1.weight.dtype)
        condition = self.time2(F.silu(self.time1(embedded))) + pooled
        x = run_levels(self.down, self.mid, self.up, self.conv_in(latent), condition, text, text_mask)
        return self.conv_out(F.silu(self.norm(x)))

    def forward(
        self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:  # B C H W, B, B T K, B E, B T -> B C H W
        return self.predict_all(latent, time, text, pooled, text_mask)[:, : self.config.channels]


class TextProjection(nn.Module):
    """What the decoder reads, made of CLIP's states and embedding of a text and an embedding of its image: both embeddings added for
    the time, and that of the image as four tokens before those of the text (section 2.1).
    """

    def __init__(self, embedding: int = 768, time: int = 1280, text_dim: int = 1536, extra: int = EXTRA_TOKENS):
        super().__init__()
        self.extra = extra
        self.unconditional = nn.Parameter(torch.zeros(embedding))  # embedding of an image, for guidance
        self.pooled, self.image = nn.Linear(embedding, time), nn.Linear(embedding, time)
        self.tokens, self.text = nn.Linear(embedding, extra * text_dim), nn.Linear(embedding, text_dim)
        self.norm = nn.LayerNorm(text_dim)

    def forward(self, image: Tensor, pooled: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # B X, B X, B T X -> B 4+T K, B E
        """Return the states of all tokens, and what is added to the time."""
        tokens = self.tokens(image).unflatten(1, (-1, self.extra)).mT
        return torch.cat([tokens, self.norm(self.text(text))], 1), self.image(image) + self.pooled(pooled)


PROJECTION_KEYS: dict[str, Row] = {  # of diffusers' UnCLIPTextProjModel -> TextProjection
    "learned_classifier_free_guidance_embeddings": "unconditional",
    "embedding_proj.*": "pooled.*",
    "clip_image_embeddings_project_to_time_embeddings.*": "image.*",
    "clip_extra_context_tokens_proj.*": "tokens.*",
    "encoder_hidden_states_proj.*": "text.*",
    "text_encoder_hidden_states_norm.*": "norm.*",
}
DIFFUSERS: dict[str, Row] = {key: row for key, row in RESIDUAL_KEYS.items() if not key.startswith("time_proj")}
for _theirs, _ours in (("down_blocks.{i}", "down.{i}"), ("up_blocks.{i}", "up.{i}"), ("mid_block", "mid")):
    DIFFUSERS |= {
        f"{_theirs}.attentions.{{j}}.{theirs}.*": f"{_ours}.attns.{{j}}.{ours}.*"
        for theirs, ours in {
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "add_k_proj": "text_k",
            "add_v_proj": "text_v",
            "to_out.0": "proj",
        }.items()
    }


def parse_outputs(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether variances are predicted, for a configuration of diffusers. Raises `WeightsError` for other channels."""
    channels, outputs = raw["in_channels"], raw["out_channels"]
    if outputs not in (channels, 2 * channels):
        raise WeightsError(f"out_channels={outputs} must be in_channels={channels} or twice as much")
    return {"variance": outputs == 2 * channels}


def block_types(direction: str, c: Config) -> list[str]:
    """Return the block types of diffusers; `direction` is "Down" or "Up"."""
    return [f"Resnet{direction}sampleBlock2D", *[f"SimpleCrossAttn{direction}Block2D"] * (len(c.widths) - 1)]


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("UNet2DConditionModel"),
    "mid_block_type": Expect("UNetMidBlock2DSimpleCrossAttn", among=("UNetMidBlock2DSimpleCrossAttn",)),
    "class_embed_type": Expect("identity", among=("identity",)),
    "sample_size": "image",
    "in_channels": "channels",
    "out_channels": Derived(parse_outputs, lambda c: c.channels * (1 + c.variance)),
    "cross_attention_dim": "text_dim",
    "layers_per_block": "depth",
    "norm_num_groups": "groups",
    "attention_head_dim": "head_dim",
    "block_out_channels": Derived(lambda raw: {"widths": tuple(raw["block_out_channels"])}, lambda c: list(c.widths)),
    "down_block_types": Expect(lambda c: block_types("Down", c)),
    "up_block_types": Expect(lambda c: block_types("Up", c)[::-1]),
    "resnet_time_scale_shift": Expect("scale_shift"),
    "norm_eps": Expect(1e-5),
    "act_fn": Expect("silu"),
    "dropout": Expect(0.0),
    "flip_sin_to_cos": Expect(True),
    "freq_shift": Expect(0),
    "mid_block_scale_factor": Expect(1),
    "center_input_sample": Expect(False),
    "resnet_skip_time_act": Expect(False),
    "resnet_out_scale_factor": Expect(1.0),
    "time_embedding_type": Expect("positional"),
    "time_embedding_dim": Expect(None),
    "time_embedding_act_fn": Expect(None),
    "timestep_post_act": Expect(None),
    "time_cond_proj_dim": Expect(None),
    "num_class_embeds": Expect(None),
    "addition_embed_type": Expect(None),
    "encoder_hid_dim": Expect(None),
    "encoder_hid_dim_type": Expect(None),
    "num_attention_heads": Expect(None),
    "only_cross_attention": Expect(False),
    "cross_attention_norm": Expect(None),
    "dual_cross_attention": Expect(False),
    "conv_in_kernel": Expect(3),
    "conv_out_kernel": Expect(3),
}

CARD = Card(
    name="unclip-decoder",
    model=UnCLIPDecoder,
    config=Config,
    paper="arXiv:2204.06125",
    year=2022,
    input_type="noisy-latent-pooled",
    output_type="image",
    optional_inputs=("text_mask",),
    sizes={
        # 7,878,400 more in the projection of embeddings and states
        "karlo-decoder": Size(params=885_439_686, source="kakaobrain/karlo-v1-alpha"),
        "unclip-decoder-test": Size(image=8, channels=2, text_dim=10, widths=(8, 16), depth=1, head_dim=8, groups=4),
    },
    weights={"diffusers": DIFFUSERS},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "grad_clip": 1.0, "ema": 0.9999},
)
