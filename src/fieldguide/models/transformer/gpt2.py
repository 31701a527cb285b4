"""GPT-2: a Transformer decoder trained only to predict the next token (Radford et al. 2019, OpenAI).

New here: one model and one objective, next-token prediction; every task is expressed as text to be continued. Layers
are pre-norm, with one more normalization before the head; the output head is tied to the embedding. Positions are
learned.

Initialization: N(0, 0.02), positions N(0, 0.01) as in the released code; projections that are added to the residual
stream are divided by the square root of the number of such additions (section 2.3); zero biases.
Shapes: B batch, T tokens, D width, K tokens seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError
from fieldguide.models.layers.causal import CausalAttention
from fieldguide.models.layers.kv_cache import Cache, causal_mask, token_positions
from fieldguide.models.mapping.config_rules import Expect
from fieldguide.models.mapping.key_rules import Dropped, Transposed


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 50_257
    length: int = 1024  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    dropout: float = 0.1  # of embeddings and of what is added to the residual stream
    attn_dropout: float = 0.0  # of attention weights; slow on CPUs


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP (tanh GELU), each with a residual connection."""

    def __init__(self, dim: int, heads: int, dropout: float, attn_dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, heads, attn_dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"up": nn.Linear(dim, 4 * dim), "down": nn.Linear(4 * dim, dim)})
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        x = x + self.dropout(self.attn(self.norm1(x), seen, cache, layer))
        y = F.gelu(self.mlp["up"](self.norm2(x)), approximate="tanh")
        return x + self.dropout(self.mlp["down"](y))


class GPT2(nn.Module):
    """A decoder that returns the logits of the next token at each position. Raises `DataError` for sequences longer than
    `length`.

    Padding may be on either side: positions count real tokens. With a `cache` (see `new_cache`) only the new tokens
    are passed, and the result equals that of the whole sequence.
    """

    block: type[nn.Module] = Block
    last_norm: type[nn.Module] = nn.LayerNorm

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)  # also the output head
        self.pos = nn.Embedding(config.length, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        c = config
        self.blocks = nn.ModuleList(self.block(c.dim, c.heads, c.dropout, c.attn_dropout) for _ in range(c.depth))
        self.norm = self.last_norm(config.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                added = name.endswith(("proj", "down"))
                nn.init.normal_(module.weight, std=0.02 * ((2 * self.config.depth) ** -0.5 if added else 1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.pos.weight, std=0.01)

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Return a cache for `length` tokens per row, by default and at most the model's own `length`."""
        c, weight = self.config, self.embed.weight
        return Cache(
            rows,
            min(length or c.length, c.length),
            c.depth,
            c.heads,
            c.dim // c.heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    def mask_layers(self, steps: int, mask: Tensor | None, cache: Cache | None, device: torch.device) -> list[Tensor | None]:
        """Return the attention mask of each layer."""
        return [causal_mask(steps, mask, cache, device)] * len(self.blocks)

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        """Return the final hidden states."""
        steps = tokens.shape[1]
        if (total := steps + (cache.used if cache else 0)) > self.config.length:
            raise DataError(
                f"A sequence of {total} tokens exceeds the model's length={self.config.length}. "
                "Truncate the input or create the model with a larger length."
            )
        if cache is not None:
            cache.reserve(steps, mask)
        masks = self.mask_layers(steps, mask, cache, tokens.device)
        x = self.dropout(self.embed(tokens) + self.pos(token_positions(steps, mask, cache, tokens.device)))
        for layer, (block, seen) in enumerate(zip(self.blocks, masks)):
            x = block(x, seen, cache, layer)
        return self.norm(x)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T vocab
        return F.linear(self.features(tokens, mask, cache), self.embed.weight)

    def last(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B vocab
        """Return the logits of the last position only, which is all that generation needs and saves time for long prompts."""
        return F.linear(self.features(tokens, mask, cache)[:, -1], self.embed.weight)


NAMES = {
    "wte.weight": "embed.weight",
    "wpe.weight": "pos.weight",
    "h.{i}.ln_1.*": "blocks.{i}.norm1.*",
    "h.{i}.attn.c_attn.*": "blocks.{i}.attn.qkv.*",
    "h.{i}.attn.c_proj.*": "blocks.{i}.attn.proj.*",
    "h.{i}.ln_2.*": "blocks.{i}.norm2.*",
    "h.{i}.mlp.c_fc.*": "blocks.{i}.mlp.up.*",
    "h.{i}.mlp.c_proj.*": "blocks.{i}.mlp.down.*",
    "ln_f.*": "norm.*",
}
SHARED = {
    "lm_head.weight": "embed.weight",  # tied; absent from most files
    "h.{i}.attn.bias": Dropped("the causal mask"),
    "h.{i}.attn.masked_bias": Dropped("the value of masked scores"),
    "transformer.h.{i}.attn.bias": Dropped("the causal mask"),
    "transformer.h.{i}.attn.masked_bias": Dropped("the value of masked scores"),
}
HUGGINGFACE = {  # linear layers are Conv1D (transposed); the first files had no prefix
    prefix + theirs: Transposed(ours) if ".c_" in theirs else ours
    for prefix in ("transformer.", "")
    for theirs, ours in NAMES.items()
} | SHARED
# The same names with tensors that are not transposed; load such files with origin="nanogpt".
NANOGPT = {f"transformer.{theirs}": ours for theirs, ours in NAMES.items()} | SHARED

CONFIG = {
    "model_type": Expect("gpt2"),
    "architectures": Expect(["GPT2LMHeadModel"]),
    "vocab_size": "vocab_size",
    "n_positions": "length",
    "n_embd": "dim",
    "n_layer": "depth",
    "n_head": "heads",
    "n_inner": Expect(None),
    "resid_pdrop": "dropout",
    "embd_pdrop": Expect(lambda c: c.dropout),
    "attn_pdrop": "attn_dropout",
    "activation_function": Expect("gelu_new"),
    "layer_norm_epsilon": Expect(1e-5),
    "scale_attn_weights": Expect(True),
    "scale_attn_by_inverse_layer_idx": Expect(False),
    "add_cross_attention": Expect(False),
    "tie_word_embeddings": Expect(True),
}

# The shapes of GPT-3: layers, width, heads, parameters. Its weights were never released, and every other layer uses
# banded attention of an unpublished width, so these are its sizes, not its exact architecture. Two rows of the table
# are inconsistent (24 heads of 128 at a width of 2048, 40 of 128 at 5140) and are given here as heads times 128.
GPT3 = {
    "125m": (12, 768, 12, 125_226_240),
    "350m": (24, 1024, 16, 355_871_744),
    "760m": (24, 1536, 16, 760_300_032),
    "1.3b": (24, 2048, 16, 1_315_723_264),
    "2.7b": (32, 2560, 32, 2_651_553_280),
    "6.7b": (32, 4096, 32, 6_658_404_352),
    "13b": (40, 5120, 40, 12_853_386_240),
    "175b": (96, 12288, 96, 174_604_259_328),
}

CARD = Card(
    name="gpt2",
    model=GPT2,
    config=Config,
    year=2019,
    paper="https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf",
    input_type="tokens",
    output_type="tokens",
    sizes={
        "gpt2": Size(attn_dropout=0.1, params=124_439_808, source="openai-community/gpt2"),
        "gpt2-medium": Size(
            attn_dropout=0.1, dim=1024, depth=24, heads=16, params=354_823_168, source="openai-community/gpt2-medium"
        ),
        "gpt2-large": Size(
            attn_dropout=0.1, dim=1280, depth=36, heads=20, params=774_030_080, source="openai-community/gpt2-large"
        ),
        "gpt2-xl": Size(
            attn_dropout=0.1, dim=1600, depth=48, heads=25, params=1_557_611_200, source="openai-community/gpt2-xl"
        ),
        **{
            f"gpt3-{name}": Size(
                length=2048,
                dim=dim,
                depth=depth,
                heads=heads,
                dropout=0.0,
                params=params,
                source="counted from the shapes of table 2.1 of arXiv:2005.14165",
            )
            for name, (depth, dim, heads, params) in GPT3.items()
        },
        # Small sizes for training from scratch. gpt2-baby and gpt2-nano are nanoGPT's for characters.
        "gpt2-mini": Size(vocab_size=8192, length=256, dim=512, depth=8, heads=8, dropout=0.0),
        "gpt2-baby": Size(vocab_size=65, length=256, dim=384, depth=6, heads=6, dropout=0.2),
        "gpt2-micro": Size(vocab_size=65, length=256, dim=256, depth=4, heads=4, dropout=0.0),
        "gpt2-nano": Size(vocab_size=65, length=64, dim=128, depth=4, heads=4, dropout=0.0),
        "gpt2-test": Size(vocab_size=30, length=12, dim=8, depth=2, heads=2, dropout=0.0),
    },
    weights={"huggingface": HUGGINGFACE, "nanogpt": NANOGPT},
    configs={"huggingface": CONFIG},
    recipe={
        "optimizer": "muon",
        "lr": 1e-2,
        "momentum": 0.95,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "warmup": 0.05,
        "schedule": "linear",
    },
)
