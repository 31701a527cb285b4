"""CLIP with a ResNet image encoder (Radford et al. 2021, arXiv:2103.00020).

New here: strided convolutions are replaced by 2 x 2 average pooling (Zhang 2019, arXiv:1904.11486); the stem has three small
convolutions (He et al. 2018, arXiv:1812.01187, section 4); and the last map is pooled by attention, with its mean as the
query, instead of being averaged (section 2.4).

Initialization: torch's default for convolutions, N(0, 1/D) for the attention pooling; the last norm of each block starts at
zero. The text encoder and the temperature are as in `clip`.
Shapes: B batch, C channels, S side of an image, h = S/32 that of the last map, D its width, N = 1 + h^2, E width of the
embeddings.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.mapping.config_rules import Expect
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import clip
from fieldguide.models.transformer._shared.clip_checkpoints import openai, openclip


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "embeddings"  # or "label": an answer to a question about the image
    num_classes: int = 0  # number of answers
    channels: int = 3  # C
    image: int = 224  # S
    dim: int = 64  # inner width of the first level; doubles with each level
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per level
    heads: int = 32  # of the attention pooling
    vocab_size: int = 49_408
    length: int = 77  # maximum length of a text in tokens
    end: int = 49_407  # end-of-text token, at which texts without a mask are pooled
    text_dim: int = 512
    text_depth: int = 12
    text_heads: int = 8
    embed: int = 1024  # E
    quick: bool = True  # x sigmoid(1.702 x) instead of GELU in the text encoder


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """Bottleneck block: 1x1, 3x3, 1x1 with four times the width. Strides are average poolings, also on the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1, self.norm1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut = (
            None
            if stride == 1 and inputs == 4 * width
            else nn.Sequential(OrderedDict(conv=conv(inputs, 4 * width, 1), norm=nn.BatchNorm2d(4 * width)))
        )

    def downsample(self, x: Tensor) -> Tensor:  # B D H W -> B D H/stride W/stride
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(self.downsample(y)))
        y += (
            x if self.shortcut is None else self.shortcut(self.downsample(x))
        )  # in place: the output of the norm is not needed for its gradient
        return F.relu(y, inplace=True)


class Pool(nn.Module):
    """Attention pooling: a multi-head attention over all positions with their mean as the query."""

    def __init__(self, side: int, dim: int, heads: int, embed: int):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"heads={heads} must divide the width {dim} of the last map")
        self.heads = heads
        self.pos = nn.Embedding(1 + side**2, dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, embed)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B D h h -> B heads 1 d, 2 of B heads N d
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.pos.weight
        q = self.q(x[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:  # B D h h -> B E
        return self.proj(F.scaled_dot_product_attention(*self.project_qkv(x)).flatten(1))

    def compute_attention(self, x: Tensor) -> Tensor:  # B D h h -> B heads N
        """Return the attention weights of the mean itself (first) and of each position."""
        q, k, _ = self.project_qkv(x)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]


class Vision(nn.Module):
    """ResNet image encoder: an image -> its embedding.

    Raises `DataError` for images of another side than `image`, and `SettingsError` if the total stride does not divide it.
    """

    def __init__(self, c: Config):
        super().__init__()
        stride = 4 * 2 ** (len(c.depths) - 1)
        if c.image % stride:
            raise SettingsError(f"image={c.image} must be a multiple of {stride}, the total stride")
        self.side, half = c.image, c.dim // 2
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=conv(c.channels, half, 3, 2),
                norm1=nn.BatchNorm2d(half),
                relu1=nn.ReLU(inplace=True),
                conv2=conv(half, half, 3),
                norm2=nn.BatchNorm2d(half),
                relu2=nn.ReLU(inplace=True),
                conv3=conv(half, c.dim, 3),
                norm3=nn.BatchNorm2d(c.dim),
                relu3=nn.ReLU(inplace=True),
                pool=nn.AvgPool2d(2),
            )
        )
        self.stages, inputs = nn.ModuleList(), c.dim
        for level, depth in enumerate(c.depths):
            width = c.dim * 2**level
            self.stages.append(
                nn.Sequential(
                    *(Bottleneck(4 * width if i else inputs, width, 1 if i or not level else 2) for i in range(depth))
                )
            )
            inputs = 4 * width
        self.pool = Pool(c.image // stride, inputs, c.heads, c.embed)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.pool.q.in_features**-0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)

    def features(self, image: Tensor) -> Tensor:  # B C S S -> B D h h
        clip.check_image_size(image, self.side)
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B E
        return self.pool(self.features(image))

    def patch_relevance(self, image: Tensor) -> Tensor:  # B C S S -> B h h
        """Return the attention weight of each position in the pooling, averaged over heads."""
        x = self.features(image)
        return self.pool.compute_attention(x).mean(1)[:, 1:].unflatten(1, tuple(x.shape[2:]))


class CLIPResNet(clip.CLIP):
    """CLIP with a ResNet image encoder; the interface is that of `CLIP`."""

    tower = Vision


def openai_keys() -> dict[str, Row]:
    """Return the key table of the checkpoints of OpenAI and of open_clip."""
    block, ours = "visual.layer{s+1}.{b}.", "vision.stages.{s}.{b}."
    table: dict[str, Row] = {
        "visual.conv{k}.weight": "vision.stem.conv{k}.weight",
        "visual.bn{k}.*": "vision.stem.norm{k}.*",
        block + "conv{k}.weight": ours + "conv{k}.weight",
        block + "bn{k}.*": ours + "norm{k}.*",
        block + "downsample.0.weight": ours + "shortcut.conv.weight",
        block + "downsample.1.*": ours + "shortcut.norm.*",
        "visual.attnpool.positional_embedding": "vision.pool.pos.weight",
        "visual.attnpool.q_proj.*": "vision.pool.q.*",
        "visual.attnpool.k_proj.*": Fused("vision.pool.kv.*", 0, 2),
        "visual.attnpool.v_proj.*": Fused("vision.pool.kv.*", 1, 2),
        "visual.attnpool.c_proj.*": "vision.pool.proj.*",
    }
    return table | openai("", (("text_model.", "", "text."),))


OPENAI = openai_keys()
CONFIG = openclip(32, {"width": "dim", "layers": "depths", "patch_size": Expect(None, among=(None,))})

CARD = Card(
    name="clip-resnet",
    model=CLIPResNet,
    config=Config,
    paper="arXiv:2103.00020",
    year=2021,
    input_type="captioned",
    output_type=("embeddings", "label"),
    sizes={
        "clip-rn50": Size(params=102_007_137, source="OpenAI's RN50.pt"),
        "clip-rn101": Size(depths=(3, 4, 23, 3), embed=512, params=119_688_033, source="OpenAI's RN101.pt"),
        "clip-rn50x4": Size(
            image=288,
            dim=80,
            depths=(4, 6, 10, 6),
            heads=40,
            text_dim=640,
            text_heads=10,
            embed=640,
            params=178_300_601,
            source="OpenAI's RN50x4.pt",
        ),
        "clip-rn50x16": Size(
            image=384,
            dim=96,
            depths=(6, 8, 18, 8),
            heads=48,
            text_dim=768,
            text_heads=12,
            embed=768,
            params=290_979_217,
            source="OpenAI's RN50x16.pt",
        ),
        "clip-rn50x64": Size(
            image=448,
            dim=128,
            depths=(3, 15, 36, 10),
            heads=64,
            text_dim=1024,
            text_heads=16,
            params=623_258_305,
            source="OpenAI's RN50x64.pt",
        ),
        "clip-resnet-test": Size(
            image=24,
            channels=2,
            dim=8,
            depths=(1, 2),
            heads=4,
            vocab_size=30,
            length=12,
            end=29,
            text_dim=12,
            text_depth=2,
            text_heads=3,
            embed=8,
        ),
    },
    weights={"openai": OPENAI, "openclip": OPENAI},
    configs={"openclip": CONFIG},
    recipe=clip.CARD.recipe,
    scale=clip.CARD.scale,
)
