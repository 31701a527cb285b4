"""Prompts as the networks of image generators read them: states of one to three text encoders, a mask, a vector."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import read_json
from fieldguide.data.preprocessing import TextTokenizer

MAX_STATED_TOKENS = 100_000  # tokenizers without a limit state an enormous one
CLIP_TOKENS = 77
SD3_TOKENS, FLUX_TOKENS, SCHNELL_TOKENS, PIXART_TOKENS, SIGMA_TOKENS = 256, 512, 256, 120, 300  # of T5, by network
WAN_TOKENS = 512  # of UMT5


@dataclass
class TextEncoder:
    """A text encoder with its tokenizer; `limit` is the largest number of tokens that the tokenizer's files state."""

    network: Any
    tokenizer: TextTokenizer
    limit: int

    def tokenize(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor, int]:  # -> B T, B T, number truncated
        """Return prompts of exactly `length` tokens, the mask of those that are not padding, and how many prompts were longer.

        A truncated prompt keeps its end token.
        """
        ids, mask = torch.full((len(prompts), length), self.tokenizer.pad), torch.zeros(len(prompts), length, dtype=torch.bool)
        cut = 0
        for row, (seen, encoding) in enumerate(zip(mask, self.tokenizer.tokenizer.encode_batch(list(prompts)))):
            found = encoding.ids
            if len(found) > length:
                cut, found = cut + 1, [*found[: length - 1], found[-1]]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
            seen[: len(found)] = True
        device = next(self.network.parameters()).device
        return ids.to(device), mask.to(device), cut


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: the inputs of the network by name, and the number of prompts that were too long."""

    inputs: Mapping[str, Tensor]
    truncated: int = 0
    length: int = 0  # tokens that a prompt may have


def load_tokenizer(folder: Path) -> tuple[TextTokenizer, int]:
    """Return a tokenizer and the largest number of tokens that its files state."""
    stated = read_json(folder / "tokenizer_config.json", WeightsError) if (folder / "tokenizer_config.json").is_file() else {}
    limit = stated.get("model_max_length")
    return TextTokenizer.load(folder), int(limit) if isinstance(limit, int | float) and limit < MAX_STATED_TOKENS else 0


def encode_clip(
    encoder: TextEncoder, prompts: Sequence[str], skip: int, normalize: bool
) -> tuple[Tensor, Tensor, int, int]:  # -> B T K, B E, number truncated, T
    """Return the states and the vectors of prompts by a text encoder of CLIP."""
    length = min(encoder.limit or CLIP_TOKENS, encoder.network.config.length)
    tokens, _, cut = encoder.tokenize(prompts, length)
    return *encoder.network.encode(tokens, skip=skip, normalize=normalize), cut, length


def encode_stable_diffusion(encoders: Sequence[TextEncoder | None], prompts: Sequence[str], config: Any) -> Prompts:
    """Encode prompts for Stable Diffusion 1 and 2: the normalized last states."""
    states, _, cut, length = encode_clip(require(encoders, 0), prompts, 0, True)
    return Prompts({"text": states}, cut, length)


def encode_sdxl(encoders: Sequence[TextEncoder | None], prompts: Sequence[str], config: Any) -> Prompts:
    """Encode prompts for SDXL: the states of both encoders side by side, and the vector of the second. The refiner has only the
    second.
    """
    found = [encode_clip(encoder, prompts, 1, False) for encoder in (encoders[0], require(encoders, 1)) if encoder is not None]
    cut, length = max(x[2] for x in found), min(x[3] for x in found)
    return Prompts({"text": torch.cat([x[0] for x in found], -1), "pooled": found[-1][1]}, cut, length)


def encode_t5(
    encoder: TextEncoder | None, prompts: Sequence[str], length: int, width: int, like: Tensor
) -> tuple[Tensor, Tensor, int]:  # -> B T K, B T, number truncated
    """Return the states of prompts by T5 without a mask; zeros without an encoder."""
    if encoder is None:
        return like.new_zeros(len(prompts), length, width), like.new_ones(len(prompts), length, dtype=torch.bool), 0
    tokens, mask, cut = encoder.tokenize(prompts, length)
    return encoder.network(tokens), mask, cut


def encode_sd3(encoders: Sequence[TextEncoder | None], prompts: Sequence[str], config: Any) -> Prompts:
    """Encode prompts for Stable Diffusion 3: states of both CLIP encoders side by side, widened by zeros, then those of T5; and the
    vectors of the CLIP encoders. Without T5 its states are zeros.
    """
    first, second = (encode_clip(require(encoders, i), prompts, 1, False) for i in range(2))
    width = config.text_dim
    clip = torch.cat([first[0], second[0]], -1)
    long, _, cut = encode_t5(encoders[2], prompts, SD3_TOKENS, width, clip)
    text = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), long.to(clip)], 1)
    cut, length = (cut, SD3_TOKENS) if encoders[2] is not None else (first[2], first[3])  # T5 reads what CLIP cannot
    return Prompts({"text": text, "pooled": torch.cat([first[1], second[1]], -1)}, cut, length)


def encode_flux(encoders: Sequence[TextEncoder | None], prompts: Sequence[str], config: Any) -> Prompts:
    """Encode prompts for FLUX: the states of T5 and the vector of CLIP."""
    length = FLUX_TOKENS if config.guidance else SCHNELL_TOKENS
    _, vector, _, _ = encode_clip(require(encoders, 0), prompts, 0, True)
    states, _, cut = encode_t5(require(encoders, 1), prompts, length, config.text_dim, vector)
    return Prompts({"text": states, "pooled": vector.to(states)}, cut, length)


def encode_pixart(encoders: Sequence[TextEncoder | None], prompts: Sequence[str], config: Any, sigma: bool = False) -> Prompts:
    """Encode prompts for PixArt: the states of T5 at lowercase tokens, with a mask of those that are not padding."""
    encoder, length = require(encoders, 0), SIGMA_TOKENS if sigma else PIXART_TOKENS
    tokens, mask, cut = encoder.tokenize([prompt.lower().strip() for prompt in prompts], length)
    return Prompts({"text": encoder.network(tokens, mask), "text_mask": mask}, cut, length)


def encode_cogvideox(encoders: Sequence[TextEncoder | None], prompts: Sequence[str], config: Any) -> Prompts:
    """Encode prompts for CogVideoX: the states of T5 without a mask."""
    encoder = require(encoders, 0)
    tokens, _, cut = encoder.tokenize(prompts, config.length)
    return Prompts({"text": encoder.network(tokens)}, cut, config.length)


def encode_wan(encoders: Sequence[TextEncoder | None], prompts: Sequence[str], config: Any) -> Prompts:
    """Encode prompts for Wan: the states of UMT5, and zeros after the last token. Character references of HTML are replaced, and white
    space becomes single spaces.
    """
    encoder = require(encoders, 0)
    clean = [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts]
    tokens, mask, cut = encoder.tokenize(clean, WAN_TOKENS)
    return Prompts({"text": encoder.network(tokens, mask) * mask[..., None]}, cut, WAN_TOKENS)


def require(encoders: Sequence[TextEncoder | None], number: int) -> TextEncoder:
    """Return a text encoder. Raises `WeightsError` if it is missing."""
    found = encoders[number]
    if found is None:
        name = f"text_encoder{f'_{number + 1}' if number else ''}"
        raise WeightsError(f"the part {name} or its tokenizer is missing, without which this network cannot read texts.")
    return found
