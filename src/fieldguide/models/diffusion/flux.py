"""FLUX.1: two streams, then one, with rotary positions, for 12 billion parameters (Black Forest Labs 2024).

New here: after blocks with a stream each for image and text as in Stable Diffusion 3, the larger part of the blocks has one for both, and
computes attention and MLP side by side; positions are rotations by row and column. FLUX.1 [dev] is distilled to give the result of
classifier-free guidance in one call, for a scale that it is told; FLUX.1 [schnell] needs four steps and no guidance.

Initialization: Glorot uniform matrices, zero biases; zero for the modulation layers and the last layer; N(0, 0.02) for the embeddings
of time, guidance and vector.
Shapes: B batch, C channels of the latents, H W height and width, N = H/2 * W/2 patches, D width, T tokens, K width of their states,
E width of the vector of the text, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.diffusion._shared.attention import Stream, attend_jointly, place_mask
from fieldguide.models.diffusion._shared.embeddings import embed_time
from fieldguide.models.diffusion._shared.patches import count_patches
from fieldguide.models.diffusion._shared.rotary import Rotate, make_rotation, place_grid
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Joined, Row, Swapped

PATCH = 2  # side of a patch
TIME_DIM = 256  # sines and cosines of times and of the guidance scale
EPS = 1e-6  # of the norms without parameters
GUIDANCE_SCALE = 1000.0  # of guidance scales in their embedding
DEFAULT_GUIDANCE = 3.5  # that the authors recommend for images of [dev]


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 16  # C
    extra: int = 0  # channels of the input that are not predicted, such as latents of an image to edit
    image: int = 128  # side of the latents of images that it was trained with; others work, too
    text_dim: int = 4096  # K
    pooled_dim: int = 768  # E
    dim: int = 3072  # D
    depth: int = 19  # blocks with two streams
    single: int = 38  # blocks with one stream
    heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)  # parts of d that rotate by a number that is 0 here, the row and the column
    guidance: bool = True  # whether it is told the guidance scale


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # B N D, B 1 D, B 1 D -> B N D
    """Return normalized vectors, scaled and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Side(nn.Module):
    """The part of a block for one modality: modulation, its share in the joint attention, an MLP."""

    def __init__(self, c: Any):
        super().__init__()
        self.condition, self.attn = nn.Linear(c.dim, 6 * c.dim), Stream(c.dim, c.heads, norm=True)
        self.up, self.down = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)

    def forward(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:  # B N D, B N D -> B N D
        """Return what follows the joint attention. `parts` are shift, scale and gate of both."""
        x = x + parts[2] * self.attn.proj(attended)
        return x + parts[5] * self.down(F.gelu(self.up(modulate(x, parts[3], parts[4])), approximate="tanh"))


class Block(nn.Module):
    """Joint attention of text and image, then an MLP for each."""

    def __init__(self, c: Any):
        super().__init__()
        self.image, self.text = Side(c), Side(c)

    def forward(
        self, x: Tensor, text: Tensor, condition: Tensor, mask: Tensor | None, rotate: Rotate
    ) -> tuple[Tensor, Tensor]:  # B N D, B T D, B D, B T+N -> B N D, B T D
        ours, theirs = (side.condition(F.silu(condition))[:, None].chunk(6, -1) for side in (self.image, self.text))
        both = [self.text.attn(modulate(text, *theirs[:2])), self.image.attn(modulate(x, *ours[:2]))]
        read, seen = attend_jointly(both, mask, rotate)
        return self.image(x, seen, ours), self.text(text, read, theirs)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, from one norm and into one output layer."""

    def __init__(self, c: Any):
        super().__init__()
        self.condition, self.attn = nn.Linear(c.dim, 3 * c.dim), Stream(c.dim, c.heads, norm=True, output=False)
        self.up, self.down = nn.Linear(c.dim, 4 * c.dim), nn.Linear(5 * c.dim, c.dim)

    def forward(
        self, x: Tensor, condition: Tensor, mask: Tensor | None, rotate: Rotate
    ) -> Tensor:  # B T+N D, B D, B T+N -> B T+N D
        shift, scale, gate = self.condition(F.silu(condition))[:, None].chunk(3, -1)
        y = modulate(x, shift, scale)
        (attended,) = attend_jointly([self.attn(y)], mask, rotate)
        return x + gate * self.down(torch.cat([attended, F.gelu(self.up(y), approximate="tanh")], -1))


class Flux(nn.Module):
    """FLUX.1: noisy latents, their time (0 .. 1000), the states of a text and its vector -> the predicted velocity, noise minus data.

    Raises `SettingsError` for invalid sizes, and `DataError` for latents with odd sides.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if sum(c.axes) * c.heads != c.dim or any(part % 2 for part in c.axes):
            raise SettingsError(f"axes={c.axes} must be even numbers whose sum is dim / heads = {c.dim} / {c.heads}")
        self.patch = nn.Linear((c.channels + c.extra) * PATCH**2, c.dim)
        self.time1, self.time2 = nn.Linear(TIME_DIM, c.dim), nn.Linear(c.dim, c.dim)
        self.pooled1, self.pooled2 = nn.Linear(c.pooled_dim, c.dim), nn.Linear(c.dim, c.dim)
        self.guidance1 = nn.Linear(TIME_DIM, c.dim) if c.guidance else None
        self.guidance2 = nn.Linear(c.dim, c.dim) if c.guidance else None
        self.text = nn.Linear(c.text_dim, c.dim)
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
                elif name.startswith(("time", "pooled", "guidance")):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)

    def rotation(self, tokens: int, rows: int, columns: int, like: Tensor) -> Rotate:
        """Return a function that rotates pairs of neighboring values of queries and keys, B heads T+N d, by their positions: those
        of patches by row and column, those of tokens by nothing.
        """
        places = F.pad(place_grid(1, rows, columns), (0, 0, tokens, 0))  # T+N 3
        return make_rotation(places, self.config.axes, like)

    def embed_condition(self, time: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:  # B, B E, B -> B D
        """Return the sum of the embeddings of time, guidance scale and text's vector."""
        dtype = self.time1.weight.dtype
        x = self.time2(F.silu(self.time1(embed_time(time, TIME_DIM).to(dtype))))
        if self.guidance1 is not None and self.guidance2 is not None:
            scale = torch.full_like(time, DEFAULT_GUIDANCE) if guidance is None else guidance
            x = x + self.guidance2(F.silu(self.guidance1(embed_time(scale * GUIDANCE_SCALE, TIME_DIM).to(dtype))))
        return x + self.pooled2(F.silu(self.pooled1(pooled)))

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        pooled: Tensor,
        text_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:  # B C' H W, B, B T K, B E, B T, B -> B C H W
        rows, columns = count_patches(latent, PATCH)
        x, text = self.patch(F.pixel_unshuffle(latent, PATCH).flatten(2).mT), self.text(text)
        condition, tokens = self.embed_condition(time, pooled, guidance), text.shape[1]
        rotate, mask = self.rotation(tokens, rows, columns, x), place_mask(text_mask, x, first=True)
        for block in self.blocks:
            x, text = block(x, text, condition, mask, rotate)
        x = torch.cat([text, x], 1)
        for single in self.singles:
            x = single(x, condition, mask, rotate)
        scale, shift = self.condition(F.silu(condition))[:, None].chunk(2, -1)
        x = self.head(modulate(x[:, tokens:], shift, scale))
        return F.pixel_shuffle(x.mT.unflatten(2, (rows, columns)), PATCH)


BLOCK, SINGLE = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."
DIFFUSERS: dict[str, Row] = {
    "x_embedder.*": "patch.*",
    "time_text_embed.timestep_embedder.linear_{k}.*": "time{k}.*",
    "time_text_embed.guidance_embedder.linear_{k}.*": "guidance{k}.*",
    "time_text_embed.text_embedder.linear_{k}.*": "pooled{k}.*",
    "context_embedder.*": "text.*",
    "norm_out.linear.*": "condition.*",
    "proj_out.*": "head.*",
    f"{BLOCK}norm1.linear.*": "blocks.{i}.image.condition.*",
    f"{BLOCK}norm1_context.linear.*": "blocks.{i}.text.condition.*",
    f"{BLOCK}attn.to_out.0.*": "blocks.{i}.image.attn.proj.*",
    f"{BLOCK}attn.to_add_out.*": "blocks.{i}.text.attn.proj.*",
    f"{BLOCK}ff.net.0.proj.*": "blocks.{i}.image.up.*",
    f"{BLOCK}ff.net.2.*": "blocks.{i}.image.down.*",
    f"{BLOCK}ff_context.net.0.proj.*": "blocks.{i}.text.up.*",
    f"{BLOCK}ff_context.net.2.*": "blocks.{i}.text.down.*",
    f"{SINGLE}norm.linear.*": "singles.{i}.condition.*",
    f"{SINGLE}proj_mlp.*": "singles.{i}.up.*",
    f"{SINGLE}proj_out.*": "singles.{i}.down.*",
    **{f"{BLOCK}attn.to_{part}.*": f"blocks.{{i}}.image.attn.{part}.*" for part in "qkv"},
    **{f"{BLOCK}attn.add_{part}_proj.*": f"blocks.{{i}}.text.attn.{part}.*" for part in "qkv"},
    **{f"{BLOCK}attn.norm_{part}.weight": f"blocks.{{i}}.image.attn.norm_{part}.weight" for part in "qk"},
    **{f"{BLOCK}attn.norm_added_{part}.weight": f"blocks.{{i}}.text.attn.norm_{part}.weight" for part in "qk"},
    **{f"{SINGLE}attn.to_{part}.*": f"singles.{{i}}.attn.{part}.*" for part in "qkv"},
    **{f"{SINGLE}attn.norm_{part}.weight": f"singles.{{i}}.attn.norm_{part}.weight" for part in "qk"},
}


def stream_keys(theirs: str, ours: str) -> dict[str, Row]:
    """Return the rows of one stream of the blocks with two, without queries, keys and values, in the authors' names."""
    block, here = f"double_blocks.{{i}}.{theirs}_", f"blocks.{{i}}.{ours}."
    return {
        f"{block}mod.lin.*": f"{here}condition.*",
        f"{block}attn.norm.query_norm.scale": f"{here}attn.norm_q.weight",
        f"{block}attn.norm.key_norm.scale": f"{here}attn.norm_k.weight",
        f"{block}attn.proj.*": f"{here}attn.proj.*",
        f"{block}mlp.0.*": f"{here}up.*",
        f"{block}mlp.2.*": f"{here}down.*",
    }


OFFICIAL: dict[str, Row] = {  # flux1-dev.safetensors, flux1-schnell.safetensors
    "img_in.*": "patch.*",
    "time_in.in_layer.*": "time1.*",
    "time_in.out_layer.*": "time2.*",
    "vector_in.in_layer.*": "pooled1.*",
    "vector_in.out_layer.*": "pooled2.*",
    "guidance_in.in_layer.*": "guidance1.*",
    "guidance_in.out_layer.*": "guidance2.*",
    "txt_in.*": "text.*",
    "single_blocks.{i}.modulation.lin.*": "singles.{i}.condition.*",
    "single_blocks.{i}.norm.query_norm.scale": "singles.{i}.attn.norm_q.weight",
    "single_blocks.{i}.norm.key_norm.scale": "singles.{i}.attn.norm_k.weight",
    "single_blocks.{i}.linear1.*": Joined(
        (*(f"singles.{{i}}.attn.{part}.*" for part in "qkv"), "singles.{i}.up.*"), (1, 1, 1, 4)
    ),
    "single_blocks.{i}.linear2.*": "singles.{i}.down.*",
    "final_layer.adaLN_modulation.1.*": Swapped("condition.*"),
    "final_layer.linear.*": "head.*",
}
for theirs, ours in (("img", "image"), ("txt", "text")):
    OFFICIAL |= stream_keys(theirs, ours)
    OFFICIAL[f"double_blocks.{{i}}.{theirs}_attn.qkv.*"] = Joined(
        tuple(f"blocks.{{i}}.{ours}.attn.{part}.*" for part in "qkv"), (1, 1, 1)
    )


def parse_channels(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return width and channels of a configuration of diffusers, which counts channels of patches. Raises `WeightsError` if these are
    not multiples of the pixels of a patch.
    """
    inputs, outputs = raw["in_channels"], raw.get("out_channels") or raw["in_channels"]
    if inputs % PATCH**2 or outputs % PATCH**2 or inputs < outputs:
        raise WeightsError(f"in_channels={inputs} and out_channels={outputs} must be multiples of 4, the first not smaller")
    return {
        "dim": raw["num_attention_heads"] * raw["attention_head_dim"],
        "channels": outputs // PATCH**2,
        "extra": (inputs - outputs) // PATCH**2,
    }


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("FluxTransformer2DModel"),
    "patch_size": Expect(1),
    "in_channels": Derived(parse_channels, lambda c: (c.channels + c.extra) * PATCH**2),
    "out_channels": Derived(lambda raw: {}, lambda c: c.channels * PATCH**2),
    "num_layers": "depth",
    "num_single_layers": "single",
    "num_attention_heads": "heads",
    "attention_head_dim": Derived(lambda raw: {}, lambda c: c.dim // c.heads),
    "joint_attention_dim": "text_dim",
    "pooled_projection_dim": "pooled_dim",
    "guidance_embeds": WithDefault("guidance", False),
    "axes_dims_rope": WithDefault("axes", (16, 56, 56)),  # missing in the first files
}

CARD = Card(
    name="flux",
    model=Flux,
    config=Config,
    paper="https://github.com/black-forest-labs/flux",
    year=2024,
    input_type="noisy-latent-pooled",
    output_type="image",
    optional_inputs=("text_mask", "guidance"),
    sizes={
        "flux1-dev": Size(params=11_901_408_320, source="black-forest-labs/FLUX.1-dev"),
        "flux1-schnell": Size(guidance=False, params=11_891_178_560, source="black-forest-labs/FLUX.1-schnell"),
        "flux-test": Size(image=8, channels=2, text_dim=10, pooled_dim=6, dim=16, depth=2, single=2, heads=2, axes=(2, 2, 4)),
    },
    weights={"diffusers": DIFFUSERS, "official": OFFICIAL},
    configs={"diffusers": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-2, "grad_clip": 1.0, "ema": 0.9999},
)
