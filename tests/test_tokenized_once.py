"""No text is tokenized twice in a fit, although training, validation, test and baselines all need its tokens."""

from __future__ import annotations

from collections import Counter

import polars as pl
import tokenizers

import fieldguide
from fieldguide.data.preprocessing import TextTokenizer

TEXTS = [f"Row {i} is about {'rain and wind' if i % 2 else 'bread and soup'} on day {i * 7}." for i in range(60)]


def test_a_fit_tokenizes_each_text_once(tmp_path, monkeypatch):
    counts: Counter[str] = Counter()
    encode = tokenizers.Tokenizer.encode_batch

    def counting(self, texts, **options):
        counts.update(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(tokenizers.Tokenizer, "encode_batch", counting)
    pl.DataFrame({"text": TEXTS}).write_csv(tmp_path / "texts.csv")
    settings = {"steps": 4, "eval_steps": 2, "precision": "float32", "task.vocab_size": 300, "task.length": 16}
    fieldguide.fit(tmp_path / "texts.csv", task="text-generation", model="gpt2-test", out=tmp_path / "run", settings=settings)
    times = Counter(counts[text] for text in TEXTS)  # a few are tokenized again, as prompts of the samples
    assert set(times) <= {1, 2} and times[1] >= 55


def test_kept_tokens_belong_to_their_texts():
    text = TextTokenizer.fit_exact(TEXTS, size=300)
    first, other = text.encode_exact(TEXTS[:3]), text.encode_exact(TEXTS[3:6])
    assert all((a == b).all() for a, b in zip(text.encode_exact(TEXTS[:3]), first))
    assert [text.tokenizer.decode(ids.tolist()) for ids in other] == TEXTS[3:6]
    for n in range(10):
        text.encode_exact(TEXTS[n : n + 2])
    assert len(text.recent) <= 4
