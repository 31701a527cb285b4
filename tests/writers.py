"""The encoder-decoders of transformers, configured like ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.checkpoints.config_mapping import to_public_config
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.models.registry import card_of
from tied import Tied
from tv import transformers

KINDS = {
    "t5": "T5",
    "t5gemma": "T5Gemma",
    "marian": "Marian",
    "pegasus": "Pegasus",
    "bart": "Bart",
    "mbart": "MBart",
    "m2m_100": "M2M100",
    "nllb-moe": "NllbMoe",
    "whisper": "Whisper",
}
moe = transformers.models.nllb_moe.modeling_nllb_moe


def two_experts(self: nn.ModuleDict, x: Tensor, first: Tensor, shares: Tensor) -> Tensor:
    """Return the sum over the chosen experts of weight times output (GShard, algorithm 1), token by token.

    In transformers 5.23 expert 0 serves every token's second choice and expert 1 its first, whichever were chosen: it uses
    the zeros and ones of a mask as indices of experts.
    """
    rows = [
        sum((share * self[f"expert_{e}"](one[None])[0] for e, share in enumerate(given) if share), 0 * one)
        for one, given in zip(x, shares)
    ]
    out = torch.stack(rows)
    return out if self.training or not self.moe_token_dropout else out * (1 - self.moe_token_dropout)


moe.NllbMoeExperts.forward = two_experts


class Pairs(Tied):
    """A peer with the inputs and outputs of ours, in the given precision; tied tensors have one name."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer
        for module in peer.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # it would keep the gradient of one token from its embedding

    def forward(self, source: Tensor, source_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        from cases import unrounded  # which imports this module

        double = next(self.parameters()).dtype == torch.float64
        for module in self.modules():
            if isinstance(module, moe.NllbMoeTop2Router):
                module.dtype = torch.float64 if double else torch.float32
        with unrounded():
            return self.peer(
                input_ids=source,
                attention_mask=source_mask.long(),
                decoder_input_ids=tokens,
                decoder_attention_mask=mask.long(),
                use_cache=False,
            ).logits


def configuration(model: nn.Module, **other: Any) -> Any:
    """Return our config as that of transformers."""
    card = card_of(model)
    theirs = to_public_config(card, card.configs["huggingface"], model.config) | other
    kind = theirs.pop("model_type")
    kept = {key: value for key, value in theirs.items() if key != "architectures"}
    return transformers.AutoConfig.for_model(kind, **kept, bos_token_id=0, attn_implementation="eager")


def network(model: nn.Module, **other: Any) -> nn.Module:
    config = configuration(model, **other)
    suffix = "MTModel" if config.model_type == "marian" else "ForConditionalGeneration"
    peer = getattr(transformers, KINDS[config.model_type] + suffix)(config)
    for module in peer.modules():  # computed positions are parameters there, which files lack
        if type(module).__name__.endswith("SinusoidalPositionalEmbedding") and isinstance(module, nn.Embedding):
            table = module.weight.detach()
            del module.weight
            module.register_buffer("weight", table, persistent=False)
    if not getattr(model.config, "tie_embeddings", True):  # transformers 5 ties every T5's head; those of version 1.1 are not
        peer.lm_head.weight = nn.Parameter(peer.lm_head.weight.detach().clone())
    return peer


class Transcripts(Pairs):
    """A peer that reads features instead of a source."""

    def __init__(self, peer: nn.Module):
        super().__init__(peer)
        positions = peer.model.encoder.embed_positions  # parameters there that are not trained
        table = positions.weight.detach()
        del positions.weight
        positions.register_buffer("weight", table)

    def forward(self, features: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.peer(
            input_features=features.transpose(1, 2),
            decoder_input_ids=tokens,
            decoder_attention_mask=mask.long(),
            use_cache=False,
        ).logits


def writer(model: nn.Module, pairs: type[Pairs] = Pairs, **other: Any) -> tuple[nn.Module, Any]:
    """Return the peer of an encoder-decoder and the function that renames our tensors."""
    peer, table = pairs(network(model, **other)), get_tables(model)["huggingface"]
    there = {key for key in peer.state_dict() if key not in peer.tied()}

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {f"peer.{key}": x for key, x in translate(state, table, reverse=True).items()}
        return {key: x for key, x in names.items() if key in there or key not in peer.tied()}

    return peer, rename
