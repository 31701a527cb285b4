"""CLIP text encoder alone, as image generators read texts (Radford et al. 2021, arXiv:2103.00020).

New here: nothing; it is CLIP's encoder of texts without that of images. Image generators attend to its states at all tokens, also those
of padding: Stable Diffusion 1 to the last ones, version 2 to those of the last but one block (files hold 23 of 24 blocks), SDXL to
those of the last but one block, not normalized, and to one vector at the end of the text.

Initialization: as CLIP's.
Shapes: B batch, T tokens, D width, E width of the vector of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.padding import lengths, select_position
from fieldguide.models.transformer._shared.clip_text_checkpoints import CONFIG, HUGGINGFACE, openai_keys
from fieldguide.models.transformer.clip import Block, init_tower


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 49_408
    length: int = 77  # maximum text length, in tokens
    end: int = 49_407  # ID of the end token, at which a text is read as one vector
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    embed: int = 0  # E; 0 means no projection, so that E = D
    quick: bool = True  # x sigmoid(1.702 x) instead of GELU, as in OpenAI's code; open_clip's own models use GELU


class CLIPText(nn.Module):
    """CLIP text encoder: tokens, padded on the right -> the normalized states of the last block.

    Raises `DataError` for more tokens than `length`.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.embed, self.pos = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.length, c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.quick, causal=True) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim)
        self.proj = nn.Linear(c.dim, c.embed, bias=False) if c.embed else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_tower(self, self.config.depth)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.pos.weight, std=0.01)

    def states(self, tokens: Tensor) -> list[Tensor]:  # B T -> 1 + depth times B T D
        """Return the embedded tokens, and the states after each block, not normalized."""
        c = self.config
        if (steps := tokens.shape[1]) > c.length:
            raise DataError(f"A text of {steps} tokens exceeds the model's length={c.length}. Truncate the text.")
        found = [self.embed(tokens) + self.pos.weight[:steps]]
        for block in self.blocks:
            found.append(block(found[-1]))  # causal attention never reaches the padding on the right
        return found

    def pool(self, states: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T D, B T, B T -> B E
        """Return the vectors of texts from the last states: those at the first end token or, with a mask, at the last real token."""
        ends = tokens == self.config.end
        last = torch.where(ends.any(1), ends.int().argmax(1), tokens.shape[1] - 1) if mask is None else lengths(mask) - 1
        return self.proj(self.norm(select_position(states, last)))

    def encode(
        self, tokens: Tensor, mask: Tensor | None = None, skip: int = 0, normalize: bool = True
    ) -> tuple[Tensor, Tensor]:  # B T, B T -> B T D, B E
        """Return the states that image generators attend to, and the vectors of the texts.

        The states are those before the last `skip` blocks; the vectors are always of the last block. Raises `SettingsError` if there
        are fewer blocks.
        """
        if not 0 <= skip <= self.config.depth:
            raise SettingsError(f"skip={skip} must be 0 to {self.config.depth}, the number of blocks")
        found = self.states(tokens)
        states = found[-1 - skip]
        return self.norm(states) if normalize else states, self.pool(found[-1], tokens, mask)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # B T, B T -> B T D
        return self.norm(self.states(tokens)[-1])


H = {"dim": 1024, "heads": 16, "quick": False}

CARD = Card(
    name="clip-text",
    model=CLIPText,
    config=Config,
    paper="arXiv:2103.00020",
    year=2021,
    input_type="tokens",
    output_type="sequence",
    sizes={
        "clip-l14-text": Size(params=123_060_480, source="openai/clip-vit-large-patch14; Stable Diffusion 1, SDXL, FLUX"),
        "clip-l14-text-projected": Size(embed=768, params=123_650_304, source="Stable Diffusion 3"),
        "clip-h14-text-23": Size(**H, depth=23, params=340_387_840, source="stabilityai/stable-diffusion-2-1"),
        "clip-g14-text": Size(
            dim=1280, depth=32, heads=20, embed=1280, quick=False, params=694_659_840, source="SDXL, Stable Diffusion 3"
        ),
        "clip-text-test": Size(vocab_size=30, length=12, end=29, dim=12, depth=3, heads=3),
    },
    weights={"huggingface": HUGGINGFACE, "openai": openai_keys},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.2, "grad_clip": 1.0, "warmup": 0.1},
)
