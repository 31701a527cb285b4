"""Nothing is read, decoded or tokenized twice in a fit."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import polars as pl
import tokenizers
from PIL import Image

import fieldguide
from fieldguide.automl.request import read_for
from fieldguide.data.media import images
from fieldguide.data.preprocessing import TextTokenizer

TEXTS = [f"Row {i} is about {'rain and wind' if i % 2 else 'bread and soup'} on day {i * 7}." for i in range(60)]


def test_fit_tokenizes_each_text_once(tmp_path, monkeypatch):
    counts: Counter[str] = Counter()
    encode = tokenizers.Tokenizer.encode_batch

    def counting(self, texts, **options):
        counts.update(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(tokenizers.Tokenizer, "encode_batch", counting)
    pl.DataFrame({"text": TEXTS}).write_csv(tmp_path / "texts.csv")
    settings = {"steps": 4, "eval_steps": 2, "precision": "float32", "task.vocab_size": 300, "task.length": 16}
    fieldguide.fit(tmp_path / "texts.csv", task="text-generation", model="gpt2-test", out=tmp_path / "run", settings=settings)
    # A few are tokenized again: as prompts of the samples, for the validation loss (one batch) and to measure the latency.
    times = Counter(counts[text] for text in TEXTS)
    assert set(times) <= {1, 2} and times[1] >= 45


def test_cached_tokens_belong_to_their_texts():
    text = TextTokenizer.fit_exact(TEXTS, size=300)
    first, other = text.encode_exact(TEXTS[:3]), text.encode_exact(TEXTS[3:6])
    assert all((a == b).all() for a, b in zip(text.encode_exact(TEXTS[:3]), first))
    assert [text.tokenizer.decode(ids.tolist()) for ids in other] == TEXTS[3:6]
    for n in range(10):
        text.encode_exact(TEXTS[n : n + 2])
    assert len(text.recent) <= 4


def test_inferred_task_with_its_own_columns_reads_files_once(tmp_path, monkeypatch):
    """Detection is inferred from a first interpretation of the columns; the second one reuses the files and their facts."""
    loads, decoded = [], Counter()
    module = sys.modules["fieldguide.data.read"]
    load_raw, check_one = module.load_raw, images.check_one
    monkeypatch.setattr(module, "load_raw", lambda *args: loads.append(args[0]) or load_raw(*args))
    monkeypatch.setattr(images, "check_one", lambda path: decoded.update([str(path)]) or check_one(path))
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 2, (16, 16), dtype=np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    request = dict.fromkeys(("target", "kinds", "group", "time", "roles", "task"))
    request |= {"data": str(tmp_path), "allow_bad": False}
    data, task, _ = read_for(request)
    assert task.name == "image-segmentation" and request["task"] == task.name and len(data) == 12
    assert len(loads) == 1 and len(decoded) == 24 and set(decoded.values()) == {1}
