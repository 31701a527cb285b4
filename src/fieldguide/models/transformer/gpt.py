"""GPT: a Transformer decoder, pre-trained as a language model, then fine-tuned (Radford et al. 2018, OpenAI).

New here: unsupervised pre-training on whole books, then fine-tuning of the whole model on each task; before, only
word vectors were transferred. Layers normalize after the residual connection (post-norm), as in the original
Transformer; GPT-2 changed this. Positions are learned, and the output head is tied to the embedding.

Initialization: N(0, 0.02) for matrices, embeddings and positions, zero biases (section 4.1).
Shapes: B batch, T tokens, D width, K tokens seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.mapping.config_rules import Expect
from fieldguide.models.mapping.key_rules import Dropped, Transposed
from fieldguide.models.transformer import gpt2


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 40_478
    length: int = 512  # maximum sequence length, in tokens
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    dropout: float = 0.1  # of embeddings and of what is added to the residual stream
    attn_dropout: float = 0.0  # of attention weights; slow on CPUs


class Block(gpt2.Block):
    """A post-norm Transformer block: attention and MLP (tanh GELU), each with a residual connection, then normalization."""

    def forward(self, x: Tensor, seen: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        x = self.norm1(x + self.dropout(self.attn(x, seen, cache, layer)))
        y = F.gelu(self.mlp["up"](x), approximate="tanh")
        return self.norm2(x + self.dropout(self.mlp["down"](y)))


class GPT(gpt2.GPT2):
    """A decoder that returns the logits of the next token at each position, with padding and `cache` as in `GPT2`."""

    block, last_norm = Block, nn.Identity

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


OWN = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}  # names that differ from those of GPT-2
NAMES = {OWN.get(theirs, theirs): ours for theirs, ours in gpt2.NAMES.items() if not theirs.startswith("ln_f")}
HUGGINGFACE = (
    {  # linear layers are Conv1D (transposed); the first files had no prefix
        prefix + theirs: Transposed(ours) if ".c_" in theirs else ours
        for prefix in ("transformer.", "")
        for theirs, ours in NAMES.items()
    }
    | gpt2.SHARED
    | {f"{prefix}position_ids": Dropped("0, 1, 2, ...") for prefix in ("transformer.", "")}
)

CONFIG = {
    "model_type": Expect("openai-gpt"),
    "architectures": Expect(["OpenAIGPTLMHeadModel"]),
    "vocab_size": "vocab_size",
    "n_positions": "length",
    "n_embd": "dim",
    "n_layer": "depth",
    "n_head": "heads",
    "resid_pdrop": "dropout",
    "embd_pdrop": Expect(lambda c: c.dropout),
    "attn_pdrop": "attn_dropout",
    "afn": Expect("gelu"),  # means the tanh approximation there
    "layer_norm_epsilon": Expect(1e-5),
    "tie_word_embeddings": Expect(True),
}

CARD = Card(
    name="gpt",
    model=GPT,
    config=Config,
    year=2018,
    input_type="tokens",
    output_type="tokens",
    paper="https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf",
    sizes={
        "gpt1": Size(attn_dropout=0.1, params=116_534_784, source="openai-community/openai-gpt"),
        "gpt-test": Size(vocab_size=30, length=12, dim=8, depth=2, heads=2, dropout=0.0),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe=gpt2.CARD.recipe,
)
