"""LLaVA-1.5: a language model with image input (Liu et al. 2023, arXiv:2310.03744; v1: arXiv:2304.08485).

New here: a pre-trained ViT and a pre-trained LLaMA are connected by a two-layer MLP only. The patch features of
CLIP's image encoder, one block before its end, are projected to the width of the language model and replace the image
tokens in its input; the model then generates text.

Initialization: those of CLIP and LLaMA; N(0, 0.02) and zero biases for the two projection layers, as in transformers.
Shapes: B batch, C channels, S image side, N = (S/P)^2 patches, T tokens, V width of the image encoder, D width of the
language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import OPENAI as SCALE
from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.mapping.config_rules import ConfigRow, Constant, Derived, Expect, ValueMap, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer import clip, llama
from fieldguide.models.transformer._shared import clip_checkpoints
from fieldguide.models.transformer._shared.image_decoder import ImageConditionedDecoder


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 336  # S
    patch: int = 14  # P
    seen_dim: int = 1024  # V
    seen_depth: int = 24
    seen_heads: int = 16
    quick: bool = True  # x sigmoid(1.702 x) instead of GELU in the image encoder
    above: int = 1  # last blocks of the image encoder, which files contain but the model does not use
    vocab_size: int = 32_064
    length: int = 4096  # maximum sequence length, in tokens and patches
    dim: int = 4096  # D
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32  # number of key/value heads
    hidden: int = 11_008  # hidden width of the gated MLPs
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()  # as in `llama.Config`
    eps: float = 1e-5
    picture: int = 32_000  # ID of the image token; may be beyond the vocabulary


class Tower(clip.Vision):
    """CLIP's image encoder without its projection, read `above` blocks before its end, without the class token. Raises
    `SettingsError` if no block is left.
    """

    def __init__(self, c: Config):
        if not 0 <= c.above < c.seen_depth:
            raise SettingsError(f"above={c.above} must be at least 0 and less than seen_depth={c.seen_depth}.")
        super().__init__(
            clip.Config(
                channels=c.channels,
                image=c.image,
                patch=c.patch,
                dim=c.seen_dim,
                depth=c.seen_depth,
                heads=c.seen_heads,
                quick=c.quick,
                embed=1,
            )
        )
        del self.proj
        self.read = c.seen_depth - c.above
        for unread in (*self.blocks[self.read :], self.norm):
            unread.requires_grad_(False)  # otherwise distributed training would wait for their gradients

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B N V
        x = self.tokens(image)
        for block in self.blocks[: self.read]:
            x = block(x)
        return x[:, 1:]


class LLaVA(nn.Module):
    """A decoder that returns the logits of the next token at each position, given images and tokens.

    `image` is B C S S or, with several images in a row, B I C S S. A sequence has the token `picture` once per patch (see
    `expand_image_tokens`), for all images of the row, its first ones, or none. Padding may be on either side. For generation
    see `with_images`. Raises `DataError` for sequences longer than `length`, images of another size, and sequences with another number
    of image tokens.
    """

    frozen_parts: ClassVar[tuple[str, ...]] = ("vision",)  # in fine-tuning, as published

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.vision = Tower(c)
        self.bridge = nn.ModuleDict({"up": nn.Linear(c.seen_dim, c.dim), "down": nn.Linear(c.dim, c.dim)})
        self.language = llama.Llama(
            llama.Config(
                vocab_size=c.vocab_size,
                length=c.length,
                dim=c.dim,
                depth=c.depth,
                heads=c.heads,
                kv_heads=c.kv_heads,
                hidden=c.hidden,
                rope_theta=c.rope_theta,
                rope_scaling=c.rope_scaling,
                eps=c.eps,
            )
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.vision.reset_parameters()
        self.language.reset_parameters()
        for layer in self.bridge.values():
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    @property
    def patches(self) -> int:
        """Number N of patches of an image."""
        return self.vision.grid**2

    def expand_image_tokens(self, tokens: Sequence[int], sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Return the sequence with the image token repeated once per patch. All images have the same size."""
        return [token for one in tokens for token in [one] * (self.patches if one == self.config.picture else 1)]

    def embed_image(self, image: Tensor) -> Tensor:  # B C S S -> B N D
        """Return the projected patch features."""
        return self.bridge["down"](F.gelu(self.bridge["up"](self.vision(image))))

    def embed(self, image: Tensor | None, tokens: Tensor, mask: Tensor | None) -> Tensor:  # B (I) C S S, B T, B T -> B T D
        """Return the token embeddings, with patch features in place of the image tokens."""
        named = tokens == self.config.picture if mask is None else (tokens == self.config.picture) & mask
        x = self.language.embed(tokens.masked_fill(named, 0))
        image = image[:, None] if image is not None and image.ndim == 4 else image
        count = 0 if image is None else image.shape[1]
        if not (torch.compiler.is_compiling() or tokens.is_meta):
            wanted = {number * self.patches for number in range(count + 1)}
            if unexpected := sorted(set(named.sum(1).tolist()) - wanted):
                raise DataError(
                    f"A sequence has the image token {self.config.picture} {unexpected[0]} times, but each of the "
                    f"{len(tokens) * count} images has {self.patches} patches. Use expand_image_tokens(tokens) to repeat the image token."
                    if image is not None
                    else f"A sequence has the image token {self.config.picture}, but no image was passed."
                )
        if image is None:
            return x
        place = (named.cumsum(1) - 1).clamp(0, count * self.patches - 1)  # index of the patch at each image token
        seen = self.embed_image(image.flatten(0, 1)).unflatten(0, image.shape[:2]).flatten(1, 2).to(x.dtype)  # B I*N D
        return torch.where(named[..., None], seen.gather(1, place[..., None].expand(-1, -1, seen.shape[2])), x)

    def features(
        self, image: Tensor | None, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:  # B (I) C S S, B T, B T -> B T D
        """Return the final hidden states of the language model."""
        return self.language.forward_blocks(self.embed(image, tokens, mask), mask, cache)

    def forward(self, image: Tensor | None, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # ..., B T -> B T vocab
        return self.language.head(self.features(image, tokens, mask))

    def with_images(self, image: Tensor) -> ImageConditionedDecoder:
        """Return the model with these images, B (I) C S S, as a decoder for `fieldguide.models.generation.generate` with B
        prompts.
        """
        return ImageConditionedDecoder(self, image)


def prefix_row(row: Row, part: str) -> Row:
    """Return a rule of CLIP's or LLaMA's table with a prefix before our name."""
    if isinstance(row, Fused):
        return Fused(f"{part}{row.ours}", row.part, row.parts, row.pairs)
    return row if isinstance(row, Dropped) else f"{part}{row}"


def map_weights(tower: str, words: str, head: str, bridge: tuple[str, str]) -> dict[str, Row]:
    """Return the public names, given the prefixes of CLIP's image encoder and of LLaMA's body, the head, and the two
    projection layers.
    """
    names: dict[str, Row] = {
        tower + key.removeprefix("vision_model."): prefix_row(row, "")
        for key, row in clip_checkpoints.HUGGINGFACE.items()
        if key.startswith("vision_model.")
    }
    names |= {
        words + key.removeprefix("model."): prefix_row(row, "language.")
        for key, row in llama.HUGGINGFACE.items()
        if key.startswith("model.")
    }
    return names | {head: "language.head.weight", f"{bridge[0]}.*": "bridge.up.*", f"{bridge[1]}.*": "bridge.down.*"}


LINEAR = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
BODY = ("language_model.model.", "language_model.lm_head.weight", LINEAR)
HUGGINGFACE = (
    map_weights("vision_tower.vision_model.", *BODY)
    | map_weights("vision_tower.", *BODY)
    | map_weights(
        "model.vision_tower.", "model.language_model.", "lm_head.weight", (f"model.{LINEAR[0]}", f"model.{LINEAR[1]}")
    )
)
# The authors' files. The image encoder is in a separate file, that of CLIP, whose names get the first of these
# prefixes.
OFFICIAL = map_weights(
    "model.vision_tower.vision_tower.vision_model.",
    "model.",
    "lm_head.weight",
    ("model.mm_projector.0", "model.mm_projector.2"),
)


def nest_row(row: ConfigRow) -> ConfigRow:
    """Return a rule of LLaMA's table, read from `text_config`; missing numbers have the defaults of transformers."""
    if isinstance(row, Derived):
        return Derived(lambda t: row.read({"num_attention_heads": 32, **(t.get("text_config") or {})}), row.write)
    return (
        {
            "vocab_size": WithDefault("vocab_size", 32_000),
            "length": WithDefault("length", 2048),
            "eps": WithDefault("eps", 1e-6),
        }.get(row, row)
        if isinstance(row, str)
        else row
    )


def read_feature_layer(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of unused blocks from the index of the hidden state that is read (-1 = last). Raises
    `WeightsError` for several.
    """
    index = theirs.get("vision_feature_layer", -2)
    if not isinstance(index, int):
        raise WeightsError(f"vision_feature_layer={index!r} is not supported. It must be a single integer.")
    depth = (theirs.get("vision_config") or {}).get("num_hidden_layers", 24)
    return {"above": depth - index if index >= 0 else -1 - index}


LANGUAGE = {key: row for key, row in llama.SHARED.items() if key != "tie_word_embeddings"}
ARCHITECTURES = {name: Expect([name], among=([name],)) for name in ("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM")}
CONFIG: dict[str, ConfigRow] = {  # keys of transformers
    "model_type": Expect("llava"),
    "architectures": ARCHITECTURES["LlavaForConditionalGeneration"],
    "image_token_index": WithDefault("picture", 32_000),
    "image_seq_length": Derived(lambda t: {}, lambda c: (c.image // c.patch) ** 2),
    "projector_hidden_act": Expect("gelu"),
    "multimodal_projector_bias": Expect(True),
    "vision_feature_select_strategy": Expect("default"),
    "vision_feature_layer": Derived(read_feature_layer, lambda c: -1 - c.above),
    "tie_word_embeddings": Expect(False),
    **clip_checkpoints.map_tower_config("vision", "seen_dim", "seen_depth", "seen_heads"),
    "vision_config.num_channels": "channels",
    "vision_config.image_size": "image",
    "vision_config.patch_size": "patch",
    "vision_config.hidden_act": ValueMap("quick", clip_checkpoints.ACTS),
    "text_config.model_type": Expect("llama"),
    **{f"text_config.{key}": nest_row(row) for key, row in LANGUAGE.items()},
}
OFFICIAL_CONFIG: dict[str, ConfigRow] = {  # keys of the authors, whose files of 1.5 all use CLIP L/14
    "architectures": ARCHITECTURES["LlavaLlamaForCausalLM"],
    "mm_projector_type": Expect("mlp2x_gelu"),
    "mm_vision_tower": Expect("openai/clip-vit-large-patch14-336"),
    "mm_vision_select_layer": Derived(
        lambda t: read_feature_layer({"vision_feature_layer": t.get("mm_vision_select_layer", -2)}), lambda c: -1 - c.above
    ),
    "mm_vision_select_feature": Expect("patch"),
    "mm_use_im_start_end": Expect(False),
    "mm_hidden_size": "seen_dim",
    "<the image token is not in the vocabulary>": Constant("picture", 32_000),
    **LANGUAGE,
}

CARD = Card(
    name="llava",
    model=LLaVA,
    config=Config,
    paper="arXiv:2310.03744",
    year=2023,
    input_type="captioned",
    output_type="tokens",
    sizes={
        "llava-1.5-7b": Size(params=7_063_427_072, source="llava-hf/llava-1.5-7b-hf"),
        "llava-1.5-13b": Size(
            dim=5120, depth=40, heads=40, kv_heads=40, hidden=13_824, params=13_351_494_656, source="llava-hf/llava-1.5-13b-hf"
        ),
        "llava-test": Size(
            image=8,
            patch=4,
            channels=2,
            seen_dim=16,
            seen_depth=2,
            seen_heads=2,
            vocab_size=32,
            length=24,
            dim=16,
            depth=2,
            heads=4,
            kv_heads=2,
            hidden=12,
            picture=31,
        ),
    },
    weights={"huggingface": HUGGINGFACE, "official": OFFICIAL},
    configs={"huggingface": CONFIG, "official": OFFICIAL_CONFIG},
    scale=SCALE,
    # Section 4.1 and table 9, the second training stage: learning rate 2e-5, cosine schedule, 3 % warm-up, no weight
    # decay.
    recipe={"optimizer": "adamw", "lr": 2e-5, "weight_decay": 0.0, "warmup": 0.03, "grad_clip": 1.0},
)
