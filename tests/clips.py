"""CLIP as described by its authors, built from torch's attention, with the names of OpenAI's files."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A block with the names of OpenAI's file, using torch's fused attention (tokens first)."""

    def __init__(self, dim: int, heads: int, quick: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(dim, 4 * dim), act=Quick() if quick else nn.GELU(), c_proj=nn.Linear(4 * dim, dim))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # T B D -> T B D
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, dim: int, heads: int, depth: int, quick: bool):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(dim, heads, quick) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # B T D -> B T D
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return x.transpose(0, 1)


class Patches(nn.Module):
    """The ViT of figure 3."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c.channels, c.dim, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        self.positional_embedding = nn.Parameter(torch.zeros((c.image // c.patch) ** 2 + 1, c.dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.transformer = Blocks(c.dim, c.heads, c.depth, c.quick)
        self.proj = nn.Parameter(torch.zeros(c.dim, c.embed))

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B E
        x = self.conv1(image).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding + torch.zeros_like(x[:, :1]), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
        self.avgpool, self.downsample = nn.AvgPool2d(stride), None
        if stride > 1 or inputs != planes * 4:
            wider = nn.Conv2d(inputs, planes * 4, 1, bias=False)
            self.downsample = nn.Sequential(
                OrderedDict({"-1": nn.AvgPool2d(stride), "0": wider, "1": nn.BatchNorm2d(planes * 4)})
            )

    def forward(self, x: Tensor) -> Tensor:  # B D H W -> B D' H/stride W/stride
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.avgpool(torch.relu(self.bn2(self.conv2(y))))
        return torch.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


class AttentionPool(nn.Module):
    """Attention pooling built from torch's attention, with one matrix for queries, keys and values."""

    def __init__(self, side: int, dim: int, heads: int, embed: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(side**2 + 1, dim))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.c_proj = nn.Linear(dim, embed)

    def forward(self, x: Tensor) -> Tensor:  # B D h h -> B E
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None]
        found, _ = F.multi_head_attention_forward(
            x[:1],
            x,
            x,
            x.shape[-1],
            self.heads,
            None,
            torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            None,
            None,
            False,
            0.0,
            self.c_proj.weight,
            self.c_proj.bias,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )
        return found[0]


class ModifiedResNet(nn.Module):
    """Section 2.4 with the names of OpenAI's file: stride 1 in the first level, 2 in the first block of the others."""

    def __init__(self, c):
        super().__init__()
        half, inputs = c.dim // 2, c.dim
        self.conv1, self.bn1 = nn.Conv2d(c.channels, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, 1, 1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, c.dim, 3, 1, 1, bias=False), nn.BatchNorm2d(c.dim)
        for level, depth in enumerate(c.depths, 1):
            planes = c.dim * 2 ** (level - 1)
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(inputs, planes, 2 if level > 1 and i == 0 else 1))
                inputs = planes * 4
            setattr(self, f"layer{level}", nn.Sequential(*blocks))
        self.levels = len(c.depths)
        self.attnpool = AttentionPool(c.image // 2 ** (self.levels + 1), inputs, c.heads, c.embed)

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B E
        x = torch.relu(self.bn1(self.conv1(image)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = nn.functional.avg_pool2d(torch.relu(self.bn3(self.conv3(x))), 2)
        for level in range(self.levels):
            x = getattr(self, f"layer{level + 1}")(x)
        return self.attnpool(x)


class Official(nn.Module):
    """Figure 3 of the paper, with names and shapes of OpenAI's file; projections are applied as x @ matrix."""

    def __init__(self, c):
        super().__init__()
        self.visual = Patches(c) if hasattr(c, "patch") else ModifiedResNet(c)
        self.transformer = Blocks(c.text_dim, c.text_heads, c.text_depth, c.quick)
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_dim)
        self.positional_embedding = nn.Parameter(torch.zeros(c.length, c.text_dim))
        self.ln_final = nn.LayerNorm(c.text_dim)
        self.text_projection = nn.Parameter(torch.zeros(c.text_dim, c.embed))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:  # B C S S, B T -> B B, pictures by texts
        pictures, texts = self.encoded(image, tokens)
        return self.logit_scale.exp() * pictures @ texts.T

    def encoded(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:  # B C S S, B T -> B E, B E, of length 1
        pictures, steps = self.visual(image), tokens.shape[1]
        ahead = torch.full((steps, steps), -torch.inf, dtype=pictures.dtype).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding[:steps], ahead))
        texts = x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection  # the end has the highest number
        return pictures / pictures.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)


class Pairs(nn.Module):
    """An official network with the interface of ours: B 2 E, both times the root of the scale."""

    def __init__(self, c):
        super().__init__()
        self.peer = Official(c)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:  # B C S S, B T, B T -> B 2 E
        found = self.peer.encoded(image, torch.where(mask, tokens, 0))  # as its tokenizer pads
        return torch.stack(found, 1) * (self.peer.logit_scale / 2).exp()


def official(model: nn.Module):
    """Build a peer for `cases`."""
    from fieldguide.checkpoints.weights import get_tables, translate

    return Pairs(model.config), lambda state: {
        f"peer.{name}": x for name, x in translate(state, get_tables(model)["openai"], reverse=True).items()
    }
