"""DiT: diffusion with a Transformer on patches instead of a U-Net (Peebles and Xie 2022, arXiv:2212.09748).

New here: time and label determine the scale, shift and gate of each block of a ViT, with gates that start at zero
(adaLN-Zero); quality follows the number of operations. It was trained on latents of Stable Diffusion's VAE, and learns
pixels of small images in the same way. SiT (Ma et al. 2024, arXiv:2401.08740) is the same network, trained to predict the
velocity of a straight path between noise and data; its times are 0 to 1. Labels are dropped by the objective, not here.

Initialization: Glorot uniform matrices, zero biases; zero for the modulation layers and the last layer, so that an untrained
network outputs zero. Label embeddings are N(0, 1) and the time layers preserve the variance; with the authors' N(0, 0.02)
for both, classes are learned late.
Shapes: B batch, C channels, S side, P side of a patch, N = (S/P)^2 patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.diffusion._shared.embeddings import embed_time, position_embedding
from fieldguide.models.diffusion._shared.patches import join_patches
from fieldguide.models.layers.attention import Attention
from fieldguide.models.mapping.config_rules import Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Repeated, Row

TIME_EMBEDDING_DIM = 256  # sines and cosines of the time embedding
EPS = 1e-6  # of the norms, all of which have no parameters


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 4  # C: 3 for pixels, 4 for the latents of Stable Diffusion's VAE
    image: int = 32  # S
    patch: int = 2  # P
    num_classes: int = 1000  # labels are 1 .. num_classes; 0 means unconditional
    dim: int = 1152  # D
    depth: int = 28
    heads: int = 16
    variance: bool = False  # whether the last layer also predicts variances, as in the authors' checkpoints


class Block(nn.Module):
    """Attention and a two-layer MLP, scaled, shifted and gated by the condition."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.condition = nn.Linear(dim, 6 * dim)  # shift, scale and gate of the attention, then of the MLP
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)  # of both
        self.attn = Attention(dim, heads)
        self.mlp = nn.ModuleDict({"up": nn.Linear(dim, 4 * dim), "down": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # B N D, B D -> B N D
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(condition))[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1)
        y = F.gelu(self.mlp["up"](self.norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.mlp["down"](y)


class DiT(nn.Module):
    """DiT: noisy latents or pixels, their time (0 .. 999 in the paper), their label -> the predicted noise, or whatever else
    it is trained to predict.

    Raises `SettingsError` for invalid sizes, and `DataError` for images of another side than configured.
    """

    places: Tensor  # N D

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.image % c.patch:
            raise SettingsError(f"image={c.image} must be a multiple of patch={c.patch}")
        if c.dim % 4:
            raise SettingsError(
                f"dim={c.dim} must be a multiple of 4: positions are encoded by sines and cosines of rows and columns"
            )
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.time1, self.time2 = nn.Linear(TIME_EMBEDDING_DIM, c.dim), nn.Linear(c.dim, c.dim)
        self.label = nn.Embedding(c.num_classes + 1, c.dim) if c.num_classes else None  # the last row is for no label
        self.register_buffer("places", position_embedding(c.image // c.patch, c.image // c.patch, c.dim), persistent=False)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads) for _ in range(c.depth))
        self.norm, self.condition = nn.LayerNorm(c.dim, eps=EPS, elementwise_affine=False), nn.Linear(c.dim, 2 * c.dim)
        self.head = nn.Linear(c.dim, c.patch**2 * c.channels * (1 + c.variance))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith("condition") or name == "head":
                    nn.init.zeros_(module.weight)
                elif name in ("time1", "time2"):
                    nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
                else:  # queries, keys and values as one matrix, as in the authors' code
                    nn.init.xavier_uniform_(module.weight.flatten(1))
        if self.label is not None:
            nn.init.normal_(self.label.weight)

    def embed_condition(self, time: Tensor, label: Tensor | None) -> Tensor:  # B, B -> B D
        """Return the embedding of the time plus that of the label."""
        x = self.time2(F.silu(self.time1(embed_time(time, TIME_EMBEDDING_DIM).to(self.time1.weight.dtype))))
        if self.label is None:
            return x
        label = torch.zeros_like(time, dtype=torch.int64) if label is None else label
        return x + self.label((label - 1) % (self.config.num_classes + 1))  # 0 -> the last row

    def predict_all(self, image: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:  # B C S S, B, B -> B C' S S
        """Return all channels of the last layer: the predicted noise and, if `variance`, as many channels that say where the
        logarithm of the variance of a step lies, -1 at its least and 1 at its largest (arXiv:2102.09672, equation 15).
        """
        c = self.config
        if image.shape[2:] != (c.image, c.image):
            raise DataError(
                f"the images have {image.shape[3]} x {image.shape[2]} pixels, but the network was created for image={c.image}"
            )
        condition = self.embed_condition(time, label)
        x = self.patch(image).flatten(2).mT.contiguous() + self.places
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        x = self.head(self.norm(x) * (1 + scale) + shift)  # B N P*P*C'
        return join_patches(x, c.image // c.patch, c.image // c.patch, c.patch)

    def forward(self, image: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:  # B C S S, B, B -> B C S S
        return self.predict_all(image, time, label)[:, : self.config.channels]


OFFICIAL: dict[str, Row] = {  # facebookresearch/DiT and willisma/SiT
    "x_embedder.proj.*": "patch.*",
    "t_embedder.mlp.0.*": "time1.*",
    "t_embedder.mlp.2.*": "time2.*",
    "y_embedder.embedding_table.weight": "label.weight",
    "pos_embed": Dropped("fixed sines and cosines"),
    "blocks.{i}.attn.qkv.*": "blocks.{i}.attn.qkv.*",
    "blocks.{i}.attn.proj.*": "blocks.{i}.attn.proj.*",
    "blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.up.*",
    "blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.down.*",
    "blocks.{i}.adaLN_modulation.1.*": "blocks.{i}.condition.*",
    "final_layer.adaLN_modulation.1.*": "condition.*",
    "final_layer.linear.*": "head.*",
}


def diffusers_keys(c: Config) -> dict[str, Row]:
    """Return the key table of diffusers, whose files hold the embeddings of time and label once for each block."""
    block = "transformer_blocks.{i}."
    return {
        "pos_embed.proj.*": "patch.*",
        "pos_embed.pos_embed": Dropped("fixed sines and cosines"),
        f"{block}norm1.emb.timestep_embedder.linear_1.*": Repeated("time1.*", "i", c.depth),
        f"{block}norm1.emb.timestep_embedder.linear_2.*": Repeated("time2.*", "i", c.depth),
        f"{block}norm1.emb.class_embedder.embedding_table.weight": Repeated("label.weight", "i", c.depth),
        f"{block}norm1.linear.*": "blocks.{i}.condition.*",
        f"{block}attn1.to_q.*": Fused("blocks.{i}.attn.qkv.*", 0, 3),
        f"{block}attn1.to_k.*": Fused("blocks.{i}.attn.qkv.*", 1, 3),
        f"{block}attn1.to_v.*": Fused("blocks.{i}.attn.qkv.*", 2, 3),
        f"{block}attn1.to_out.0.*": "blocks.{i}.attn.proj.*",
        f"{block}ff.net.0.proj.*": "blocks.{i}.mlp.up.*",
        f"{block}ff.net.2.*": "blocks.{i}.mlp.down.*",
        "proj_out_1.*": "condition.*",
        "proj_out_2.*": "head.*",
    }


def parse_outputs(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the width, and whether variances are predicted, for a configuration of diffusers."""
    channels, outputs = raw["in_channels"], raw.get("out_channels") or raw["in_channels"]
    if outputs not in (channels, 2 * channels) or raw.get("norm_eps", 1e-5) not in (1e-5, EPS):
        raise WeightsError(
            f"out_channels={outputs} must be in_channels={channels} or twice as much, and norm_eps {EPS} or, as written by "
            "mistake into the published files, 1e-5"
        )
    return {
        "dim": raw["num_attention_heads"] * raw["attention_head_dim"],
        "variance": outputs == 2 * channels,
    }


CONFIG = {  # of diffusers
    "_class_name": Expect("DiTTransformer2DModel"),
    "norm_type": Expect("ada_norm_zero", among=("ada_norm_zero",)),
    "sample_size": "image",
    "patch_size": "patch",
    "in_channels": "channels",
    "num_layers": "depth",
    "num_attention_heads": "heads",
    "num_embeds_ada_norm": "num_classes",
    "attention_head_dim": Derived(parse_outputs, lambda c: c.dim // c.heads),
    "out_channels": Expect(lambda c: c.channels * (1 + c.variance)),
    # Published files say 1e-5 (or nothing), with which diffusers computes one of two norms; the authors trained with this.
    "norm_eps": Derived(lambda raw: {}, lambda c: EPS),
    "activation_fn": Expect("gelu-approximate"),
    "attention_bias": Expect(True),
    "norm_elementwise_affine": Expect(False),
    "dropout": Expect(0.0),
}
# Files from before DiT had a class of its own in diffusers.
CONFIG_2023 = {**CONFIG, "_class_name": Expect("Transformer2DModel")}

XL, L, B, S = (
    {"dim": dim, "depth": depth, "heads": heads}
    for dim, depth, heads in ((1152, 28, 16), (1024, 24, 16), (768, 12, 12), (384, 12, 6))
)

CARD = Card(
    name="dit",
    model=DiT,
    config=Config,
    paper="arXiv:2212.09748",
    year=2022,
    input_type="noisy",
    output_type="image",
    sizes={
        # The authors count the fixed position embeddings, too: 294,912 for XL/2, 675,129,632 in total.
        "dit-xl2": Size(**XL, variance=True, params=674_834_720, source="facebookresearch/DiT, without fixed sines"),
        "dit-xl2-512": Size(**XL, image=64, variance=True, params=674_834_720, source="facebookresearch/DiT"),
        "dit-l2": Size(**L, variance=True, params=457_840_672, source="facebookresearch/DiT, without fixed sines"),
        "dit-b2": Size(**B, variance=True, params=130_315_808, source="facebookresearch/DiT, without fixed sines"),
        "dit-s2": Size(**S, variance=True, params=32_865_056, source="facebookresearch/DiT, without fixed sines"),
        "sit-xl2": Size(**XL, variance=True, params=674_834_720, source="willisma/SiT, without fixed sines"),
        # On pixels, for training from scratch: digits of 28 or 8 pixels, color images of 32.
        "dit-32": Size(channels=3, num_classes=0, dim=256, depth=8, heads=4),
        "dit-mini": Size(channels=1, image=28, patch=4, num_classes=0, dim=128, depth=4, heads=4),
        "dit-8": Size(channels=1, image=8, patch=2, num_classes=0, dim=128, depth=4, heads=4),
        "dit-test": Size(channels=2, image=8, num_classes=3, dim=16, depth=2, heads=2, variance=True),
    },
    weights={"official": OFFICIAL, "diffusers": diffusers_keys, "diffusers-2023": diffusers_keys},
    configs={"diffusers": CONFIG, "diffusers-2023": CONFIG_2023},
    recipe={"optimizer": "muon", "lr": 1e-2, "momentum": 0.95, "weight_decay": 0.0, "grad_clip": 1.0, "ema": 0.999},
)
