"""The text encoders of transformers, configured like ours, with each of their heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.models.registry import card_of
from tied import Tied
from tv import transformers

KIND = {
    "words": "ForMaskedLM",
    "label": "ForSequenceClassification",
    "labels": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "vector": "Model",
    "replaced": "ForPreTraining",
}
STEM = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "electra": "Electra",
    "albert": "Albert",
    "deberta": "Deberta",
    "deberta-v2": "DebertaV2",
    "modernbert": "ModernBert",
}
POOLED = ("bert", "roberta", "mpnet", "albert")  # whose encoders alone have a pooling layer, which can be left out
RELATIVE = {
    "relative_attention": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_dropout": 0.0,
    "pooler_hidden_act": "gelu",
    "layer_norm_eps": 1e-7,
    "pad_token_id": 0,
}


def exact_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate without conversion to float32, which transformers applies at any precision."""
    turn = lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def exact_norm(self: nn.Module, x: Tensor) -> Tensor:
    """Normalize without conversion to float32."""
    return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.variance_epsilon)


for version in (transformers.models.deberta.modeling_deberta, transformers.models.deberta_v2.modeling_deberta_v2):
    version.scaled_size_sqrt = lambda x, factor: torch.tensor(x.shape[-1] * factor, dtype=torch.float64).sqrt()
transformers.models.modernbert.modeling_modernbert.apply_rotary_pos_emb = exact_rotation
transformers.models.deberta.modeling_deberta.DebertaLayerNorm.forward = exact_norm


def configuration(name: str, c: Any, **other: Any) -> Any:
    """Return the configuration of transformers that corresponds to ours."""
    classes = 2 if c.output_type == "span" else c.num_classes
    known = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "num_labels": classes,
        "max_position_embeddings": c.length,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
    }
    known |= {
        "bert": lambda: {"pad_token_id": None},
        "distilbert": lambda: {
            "hidden_dim": c.hidden,
            "dropout": c.dropout,
            "attention_dropout": c.dropout,
            "seq_classif_dropout": c.head_dropout,
            "qa_dropout": 0.0,
        },
        "mpnet": lambda: {
            "pad_token_id": c.pad,
            "max_position_embeddings": c.length + c.pad + 1,
            "layer_norm_eps": 1e-5,
        },
        "electra": lambda: {"embedding_size": c.embed, "summary_last_dropout": c.dropout},
        "albert": lambda: {
            "embedding_size": c.embed,
            "classifier_dropout_prob": c.head_dropout,
            "hidden_act": "gelu_new" if c.tanh_gelu else "gelu",
            "pad_token_id": None,
        },
        "roberta": lambda: {
            "pad_token_id": c.pad,
            "max_position_embeddings": c.length + c.pad + 1,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        },
        "deberta": lambda: (
            RELATIVE | {"pos_att_type": ["c2p", "p2c"], "max_relative_positions": c.far, "pooler_hidden_size": c.dim}
        ),
        "deberta-v2": lambda: (
            RELATIVE
            | {
                "pos_att_type": ["c2p", "p2c"],
                "max_relative_positions": c.far,
                "position_buckets": c.buckets,
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "conv_kernel_size": c.conv,
                "conv_act": "gelu",
                "pooler_hidden_size": c.dim,
            }
        ),
        "modernbert": lambda: {
            "global_attn_every_n_layers": c.every,
            "local_attention": c.window,
            "global_rope_theta": c.turn,
            "local_rope_theta": c.turn_near,
            "attention_dropout": c.dropout,
            "embedding_dropout": c.dropout,
            "mlp_dropout": c.dropout,
            "classifier_dropout": c.dropout,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "cls_token_id": None,
            "sep_token_id": None,
        },
    }[name]()
    return getattr(transformers, STEM[name] + "Config")(**known | other)


def network(name: str, c: Any, kind: str = "", **other: Any) -> nn.Module:
    """Build the network of transformers that corresponds to ours, with our head unless `kind` is given."""
    kind = kind or KIND[c.output_type]
    built = getattr(transformers, STEM[name] + kind)
    plain = {"add_pooling_layer": False} if kind == "Model" and name in POOLED else {}
    return built(configuration(name, c, **other), **plain)


class Answers(Tied):
    """A peer with the inputs and outputs of ours; tied tensors have one name, as in files."""

    def __init__(self, peer: nn.Module, gives: str):
        super().__init__()
        self.peer, self.output_type = peer, gives
        for module in peer.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # it would keep the gradient of one token from its embedding

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        more = {} if segments is None else {"token_type_ids": segments}
        found = self.peer(input_ids=tokens, attention_mask=None if mask is None else mask.long(), **more)
        if self.output_type == "span":
            return torch.stack([found.start_logits, found.end_logits], -1)
        if self.output_type == "vector":  # as sentence-transformers does it
            x, real = found.last_hidden_state, mask[..., None].to(found.last_hidden_state.dtype)
            return F.normalize((x * real).sum(1) / real.sum(1).clamp(min=1e-9), dim=1)
        return found.logits[..., None] if self.output_type == "replaced" else found.logits


def encoder(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the peer of an encoder and the function that renames our tensors."""
    name = card_of(model).name
    peer = Answers(network(name, model.config), model.config.output_type)
    table = get_tables(model)["huggingface"]
    real = {key for key, _ in peer.named_parameters()}

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs = translate(state, table, reverse=True)
        # A file of the encoder alone has no prefix.
        named = {key: key if f"peer.{key}" in real else key.partition(".")[2] for key in theirs}
        return {f"peer.{named[key]}": tensor for key, tensor in theirs.items()}

    return peer, rename


class NoSegments(nn.Module):
    """Stands for token types that do not exist."""

    def forward(self, kinds: Tensor) -> float:
        return 0.0


class MaskedItems(Tied):
    """transformers' BERT without token types as BERT4Rec, which is what the authors' code is made from."""

    def __init__(self, c: Any):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=c.items,
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            intermediate_size=c.hidden,
            max_position_embeddings=c.length,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout,
            pad_token_id=None,
        )
        self.peer = transformers.BertForMaskedLM(config)
        self.peer.bert.embeddings.token_type_embeddings = NoSegments()

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        return self.peer(input_ids=items, attention_mask=mask.long()).logits


def bert4rec(model: nn.Module) -> Any:
    """Return transformers' network and the translation of our names."""
    from fieldguide.models.transformer.bert import map_layers

    table = {
        "peer.bert.embeddings.word_embeddings.weight": "embed.weight",
        "peer.bert.embeddings.position_embeddings.weight": "pos.weight",
        "peer.cls.predictions.bias": "bias",
        "peer.cls.predictions.transform.dense.*": "dense.*",
        "peer.cls.predictions.transform.LayerNorm.*": "last_norm.*",
        "peer.bert.embeddings.LayerNorm.*": "norm.*",
        **{name: row for name, row in map_layers("peer.bert.").items() if "gamma" not in name and "beta" not in name},
    }
    return MaskedItems(model.config), lambda state: translate(state, table, reverse=True)
