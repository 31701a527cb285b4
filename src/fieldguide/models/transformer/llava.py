"""LLaVA-1.5: a language model that sees (Liu et al. 2023, arXiv:2310.03744; the first one: arXiv:2304.08485).

New here: a trained ViT and a trained LLaMA are joined by two layers alone. What CLIP's tower knows of each patch, one block
before its end, becomes a token of the language model's width; these stand in its row where the picture was named, and it
goes on in words.

Initialisation: those of CLIP and LLaMA; N(0, 0.02) and zero biases for the two layers between, as in transformers.
Shapes: B batch, C channels, S side of a picture, N = (S/P)^2 patches of it, T tokens, V their width there, D here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import OPENAI as SCALE
from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.mapping.config_rules import Absent, ConfigRow, Derived, Fixed, Is, Known
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer import clip, llama
from fieldguide.models.transformer._shared import clip_checkpoints


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 336  # S
    patch: int = 14  # P
    seen_dim: int = 1024  # V
    seen_depth: int = 24
    seen_heads: int = 16
    quick: bool = True  # x sigmoid(1.702 x) in place of GELU in the tower
    above: int = 1  # blocks at the tower's end, which its files have and nothing reads
    vocab_size: int = 32_064
    length: int = 4096  # longest row, tokens and patches
    dim: int = 4096  # D
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32  # of heads that share keys and values
    hidden: int = 11_008  # width inside the gated networks
    rope_theta: float = 10_000.0  # of the rotation's wavelengths
    rope_scaling: tuple[float, ...] = ()  # as in LLaMA
    eps: float = 1e-5
    picture: int = 32_000  # the token in whose places a picture stands; the vocabulary may end before it


class Tower(clip.Vision):
    """CLIP's network of pictures without its last matrix, read some blocks before its end, the class token left out."""

    def __init__(self, c: Config):
        if not 0 <= c.above < c.seen_depth:
            raise SettingsError(f"above={c.above} leaves none of the seen_depth={c.seen_depth} blocks that look at pictures")
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
            unread.requires_grad_(False)  # so that processes which train together do not wait for them

    def forward(self, image: Tensor) -> Tensor:  # B C S S -> B N V
        x = self.tokens(image)
        for block in self.blocks[: self.read]:
            x = block(x)
        return x[:, 1:]


class LLaVA(nn.Module):
    """Pictures and tokens -> logits of the token that follows each. A row has the token `picture` once for each patch (see
    `spelt`), or not at all. Padding may stand on either side. For generation see `seeing`.

    Raises `DataError` for rows longer than `length`, pictures of another side, and rows with some other number of places.
    """

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
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    @property
    def patches(self) -> int:
        """N: places that a picture fills."""
        return self.vision.grid**2

    def spelt(self, tokens: Sequence[int]) -> list[int]:
        """A row in which the picture is one token, with as many of it as the picture has patches."""
        return [token for one in tokens for token in [one] * (self.patches if one == self.config.picture else 1)]

    def see(self, image: Tensor) -> Tensor:  # B C S S -> B N D
        return self.bridge["down"](F.gelu(self.bridge["up"](self.vision(image))))

    def embed(self, image: Tensor | None, tokens: Tensor, mask: Tensor | None) -> Tensor:  # B C S S, B T, B T -> B T D
        named = tokens == self.config.picture if mask is None else (tokens == self.config.picture) & mask
        x = self.language.embed(tokens.masked_fill(named, 0))
        if not (torch.compiler.is_compiling() or tokens.is_meta):
            wanted = {0} if image is None else {0, self.patches}
            if strange := sorted(set(named.sum(1).tolist()) - wanted):
                raise DataError(
                    f"a row has the token {self.config.picture} {strange[0]} times, and {len(tokens)} pictures "
                    f"of {self.patches} patches each are given: spelt(tokens) writes one as often as it must stand"
                    if image is not None
                    else f"a row has the token {self.config.picture}, in whose place a picture stands, and no picture"
                )
        if image is None:
            return x
        place = (named.cumsum(1) - 1).clamp(0, self.patches - 1)  # the patch that stands at each
        seen = self.see(image).to(x.dtype)
        return torch.where(named[..., None], seen.gather(1, place[..., None].expand(-1, -1, seen.shape[2])), x)

    def features(
        self, image: Tensor | None, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:  # B C S S, B T, B T -> B T D
        return self.language.through(self.embed(image, tokens, mask), mask, cache)

    def forward(self, image: Tensor | None, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # ..., B T -> B T vocab
        return self.language.head(self.features(image, tokens, mask))

    def seeing(self, image: Tensor) -> Seeing:
        """The network before these pictures, B C S S: what `fieldguide.models.generation.generate` makes go on from B prompts."""
        return Seeing(self, image)


class Seeing:
    """A LLaVA before pictures: takes and gives what language models do (`new_cache`, `last`, `config`, `parameters`)."""

    def __init__(self, network: LLaVA, image: Tensor):
        self.network, self.image, self.config = network, image, network.config

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        return self.network.language.new_cache(rows, length)

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # B T -> B vocab
        """The logits of each row's last place; the pictures are looked at with the first tokens. Raises `DataError` where these
        do not name them, as those of a row that was cut to the network's length."""
        first = cache is None or not cache.used
        if first and not (tokens == self.config.picture).any(1).all():
            raise DataError(
                "a row does not name its picture, or has lost it: prompt and answer together must be no longer "
                f"than length={self.config.length} tokens"
            )
        x = self.network.features(self.image if first else None, tokens, mask, cache)
        return self.network.language.head(x[:, -1])


def moved(row: Row, part: str) -> Row:
    """A row of CLIP's or LLaMA's table, whose own name stands in this part of the network."""
    if isinstance(row, Fused):
        return Fused(f"{part}{row.ours}", row.part, row.parts, row.pairs)
    return row if isinstance(row, Dropped) else f"{part}{row}"


def named(tower: str, words: str, head: str, bridge: tuple[str, str]) -> dict[str, Row]:
    """Public names: what stands before those of CLIP's tower and of LLaMA's body; the head; the two layers between."""
    names: dict[str, Row] = {
        tower + key.removeprefix("vision_model."): moved(row, "")
        for key, row in clip_checkpoints.HUGGINGFACE.items()
        if key.startswith("vision_model.")
    }
    names |= {
        words + key.removeprefix("model."): moved(row, "language.")
        for key, row in llama.HUGGINGFACE.items()
        if key.startswith("model.")
    }
    return names | {head: "language.head.weight", f"{bridge[0]}.*": "bridge.up.*", f"{bridge[1]}.*": "bridge.down.*"}


LINEAR = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
BODY = ("language_model.model.", "language_model.lm_head.weight", LINEAR)
HUGGINGFACE = (
    named("vision_tower.vision_model.", *BODY)
    | named("vision_tower.", *BODY)
    | named("model.vision_tower.", "model.language_model.", "lm_head.weight", (f"model.{LINEAR[0]}", f"model.{LINEAR[1]}"))
)
# The authors' own, whose tower lies in another file: that of CLIP, whose names get the first of these before them.
OFFICIAL = named(
    "model.vision_tower.vision_tower.vision_model.",
    "model.",
    "lm_head.weight",
    ("model.mm_projector.0", "model.mm_projector.2"),
)


def inside(row: ConfigRow) -> ConfigRow:
    """A row of LLaMA's table, read from the part of the configuration that is the language model's; numbers that stand
    nowhere are those that transformers takes then."""
    if isinstance(row, Derived):
        return Derived(lambda t: row.read({"num_attention_heads": 32, **(t.get("text_config") or {})}), row.write)
    return (
        {"vocab_size": Absent("vocab_size", 32_000), "length": Absent("length", 2048), "eps": Absent("eps", 1e-6)}.get(row, row)
        if isinstance(row, str)
        else row
    )


def layer(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Which of the tower's states is read: -1 is the last."""
    said = theirs.get("vision_feature_layer", -2)
    if not isinstance(said, int):
        raise WeightsError(f"vision_feature_layer={said!r}: one state of the tower is read here, not several")
    depth = (theirs.get("vision_config") or {}).get("num_hidden_layers", 24)
    return {"above": depth - said if said >= 0 else -1 - said}


LANGUAGE = {key: row for key, row in llama.SHARED.items() if key != "tie_word_embeddings"}
ARCHITECTURES = {name: Is([name], among=([name],)) for name in ("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM")}
CONFIG: dict[str, ConfigRow] = {  # of transformers
    "model_type": Is("llava"),
    "architectures": ARCHITECTURES["LlavaForConditionalGeneration"],
    "image_token_index": Absent("picture", 32_000),
    "image_seq_length": Derived(lambda t: {}, lambda c: (c.image // c.patch) ** 2),
    "projector_hidden_act": Is("gelu"),
    "multimodal_projector_bias": Is(True),
    "vision_feature_select_strategy": Is("default"),
    "vision_feature_layer": Derived(layer, lambda c: -1 - c.above),
    "tie_word_embeddings": Is(False),
    **clip_checkpoints.tower("vision", "seen_dim", "seen_depth", "seen_heads"),
    "vision_config.num_channels": "channels",
    "vision_config.image_size": "image",
    "vision_config.patch_size": "patch",
    "vision_config.hidden_act": Known("quick", clip_checkpoints.ACTS),
    "text_config.model_type": Is("llama"),
    **{f"text_config.{key}": inside(row) for key, row in LANGUAGE.items()},
}
OFFICIAL_CONFIG: dict[str, ConfigRow] = {  # of the authors, whose files of 1.5 all have the tower of CLIP L/14
    "architectures": ARCHITECTURES["LlavaLlamaForCausalLM"],
    "mm_projector_type": Is("mlp2x_gelu"),
    "mm_vision_tower": Is("openai/clip-vit-large-patch14-336"),
    "mm_vision_select_layer": Derived(
        lambda t: layer({"vision_feature_layer": t.get("mm_vision_select_layer", -2)}), lambda c: -1 - c.above
    ),
    "mm_vision_select_feature": Is("patch"),
    "mm_use_im_start_end": Is(False),
    "mm_hidden_size": "seen_dim",
    "<the token of pictures is no word>": Fixed("picture", 32_000),
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
    # Section 4.1 and table 9, the second of two trainings: rate 2e-5, a cosine, 3 % of warm-up, no decay.
    recipe={"optimizer": "adamw", "lr": 2e-5, "weight_decay": 0.0, "warmup": 0.03, "grad_clip": 1.0},
)
