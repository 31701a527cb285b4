"""Cross-encoders of transformers as rerankers without training: scores, ranks, evaluation, serving."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch

from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.inference.pipeline import pipeline
from fieldguide.inference.pretrained_task import PretrainedTask
from test_folders import settled
from test_text_files import wordpieces
from tv import transformers

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 1}
SIZES = {
    "Bert": {"max_position_embeddings": 40},
    "XLMRoberta": {"max_position_embeddings": 44, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "ModernBert": {"max_position_embeddings": 40, "local_attention": 8, "classifier_pooling": "mean"},
}
PAIRS = [
    ("the cat sat", "the mat ran"),
    ("the cat sat", "the cat sat"),
    ("don't", "the cat ran to the mat and sat"),
    ("don't", "mat"),
]


def cross_encoder(path, kind: str, **said):
    """A tiny network with one output, and its tokenizer."""
    vocab = wordpieces(path)
    torch.manual_seed(0)
    ids = {"pad_token_id": transformers.BertTokenizerFast.from_pretrained(path).pad_token_id}
    if kind == "ModernBert":
        ids |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **SIZES[kind], **ids, vocab_size=vocab, **said)
    theirs = settled(getattr(transformers, f"{kind}ForSequenceClassification")(config))
    theirs.save_pretrained(path)
    return theirs, transformers.BertTokenizerFast.from_pretrained(path)


@torch.no_grad()
def score(theirs, words, pairs):
    made = words(*map(list, zip(*pairs)), return_tensors="pt", padding=True)
    if theirs.config.model_type != "bert":
        made.pop("token_type_ids")
    return theirs(**made).logits[:, 0].numpy()


def write(path, pairs=PAIRS, **more):
    rows = {"query": [q for q, _ in pairs], "passage": [p for _, p in pairs], **more}
    pl.DataFrame(rows).write_csv(path)
    return path


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_scores_equal_transformers(kind, activation, tmp_path):
    stated = {} if activation is None else {"sentence_transformers": {"activation_fn": activation}}
    theirs, words = cross_encoder(tmp_path, kind, **stated)
    logits = score(theirs, words, PAIRS)
    want = logits if activation else 1 / (1 + np.exp(-logits))
    found = pipeline(tmp_path).predict(write(tmp_path / "pairs.csv"))
    assert [r["score"] for r in found] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert [r["rank"] for r in found[:2]] == np.argsort(np.argsort(-logits[:2])).__add__(1).tolist()
    again = pipeline(tmp_path).predict([{"query": q, "passage": p} for q, p in PAIRS])
    assert [r["score"] for r in again] == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_evaluation(tmp_path):
    theirs, words = cross_encoder(tmp_path, "Bert")
    pairs = [*PAIRS, ("the mat", "cat"), ("the mat", "the mat ran")]
    file = write(tmp_path / "pairs.csv", pairs, label=[0, 1, 1, 0, 0, 1])
    result = PretrainedTask.load(tmp_path).evaluate(file)
    logits = score(theirs, words, pairs)
    first = [logits[1] > logits[0], logits[2] > logits[3], logits[5] > logits[4]]
    assert result["rows"] == 3 and result["scores"]["recall_1"] == pytest.approx(np.mean(first))
    assert result["scores"]["mrr_10"] == pytest.approx(np.mean([1.0 if right else 0.5 for right in first]))


def test_columns_and_refusals(tmp_path):
    theirs, words = cross_encoder(tmp_path, "Bert")
    pl.DataFrame({"frage": ["the cat"], "text": ["the mat"]}).write_csv(tmp_path / "pairs.csv")
    found = PretrainedTask.load(tmp_path, columns="frage,text").predict(tmp_path / "pairs.csv")
    assert found[0]["score"] == pytest.approx(1 / (1 + np.exp(-score(theirs, words, [("the cat", "the mat")])[0])), rel=1e-4)
    with pytest.raises(SettingsError, match="a reranker reads two columns"):
        PretrainedTask.load(tmp_path, columns="frage")
    with pytest.raises(DataError, match="is one text, but this run reads queries with passages"):
        PretrainedTask.load(tmp_path).predict("the cat")
    with pytest.raises(DataError, match="passage"):
        PretrainedTask.load(tmp_path).predict(pl.DataFrame({"query": ["the cat"], "number": [1]}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sbert_ce_default_activation_function": "torch.nn.Softsign"}))
    with pytest.raises(WeightsError, match="the activation Softsign of a cross-encoder is not supported"):
        PretrainedTask.load(tmp_path)


def test_signature(tmp_path):
    cross_encoder(tmp_path, "Bert")
    signature = PretrainedTask.load(tmp_path).signature
    assert signature.task == "reranking" and [f.name for f in signature.inputs] == ["query", "passage"]
    assert [f.name for f in signature.record] == ["score", "rank"]
