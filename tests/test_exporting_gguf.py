"""GGUF files of language models: names and metadata of Gemma, and the perplexity of a text in llama.cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import fieldguide
from fieldguide.core import gguf as reader
from fieldguide.core.errors import WeightsError
from fieldguide.data import samples
from fieldguide.data.preprocessing import TextTokenizer, sentencepiece
from fieldguide.exporting.gguf import make_probes, write_gguf
from fieldguide.exporting.graph import ExportError
from fieldguide.models import registry

SCRIPT = Path(__file__).with_name("llama_cpp_odds.mjs")
LENGTH, TEXTS = 128, 4  # tokens of a text, and parts of the unseen text
SIZES = {"model.dim": 64, "model.hidden": 128, "model.heads": 4, "model.depth": 2}
GEMMA = {**SIZES, "model.kv_heads": 2, "model.width": 32}
MODELS = {
    "llama-test": SIZES,
    "qwen3-test": {**SIZES, "model.kv_heads": 2, "model.width": 32},
    "gemma-test": GEMMA,
    "gemma2-test": {**GEMMA, "model.scale": 32, "model.window": 24, "model.attn_cap": 2.0, "model.cap": 5.0},
    "gemma3-test": {**GEMMA, "model.depth": 7, "model.scale": 32, "model.window": 24, "model.every": 6, "model.factor": 2.0},
}


@pytest.fixture(scope="module")
def byte_text():
    """A byte-level tokenizer."""
    return TextTokenizer.fit_exact(["the name of the function"] * 4, size=280)


@pytest.mark.parametrize("name", ["qwen3", "gemma", "gemma2", "gemma3"])
def test_files_give_the_outputs_of_the_network(name, byte_text, tmp_path):
    """Heads may be wider than the model. In files of Gemma, weights of norms are 1 + w, and there is no output matrix."""
    torch.manual_seed(0)
    changes = {key.removeprefix("model."): value for key, value in MODELS[f"{name}-test"].items()}
    network = fieldguide.create(f"{name}-test", vocab_size=byte_text.size, length=64, **changes).eval()
    for own, parameter in network.named_parameters():
        if "norm" in own or "post" in own:
            torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "model.gguf"
    write_gguf(network, registry.cards()[name], byte_text, path, "float32")
    tensors, metadata = reader.read_tensors(path), reader.read_metadata(path)
    assert metadata["general"]["architecture"] == name
    assert metadata[name]["attention"]["key_length"] == metadata[name]["attention"]["value_length"] == 32
    assert ("output.weight" in tensors) == (name == "qwen3")
    offset = 0 if name == "qwen3" else 1
    torch.testing.assert_close(tensors["blk.0.attn_norm.weight"], offset + network.blocks[0].norm1.weight.detach())
    loaded, tokens = fieldguide.load(path).eval(), torch.randint(0, byte_text.size, (2, 40))
    assert loaded.config == network.config
    torch.testing.assert_close(loaded(tokens), network(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, change", [("gemma2", {"scale": 5}), ("gemma3", {"scale": 32, "every": 2})])
def test_what_llama_cpp_computes_otherwise_is_an_error(name, change, byte_text, tmp_path):
    changes = {key.removeprefix("model."): value for key, value in MODELS[f"{name}-test"].items()} | change
    network = fieldguide.create(f"{name}-test", vocab_size=byte_text.size, **changes)
    with pytest.raises(WeightsError, match="no form in GGUF files"):
        write_gguf(network, registry.cards()[name], byte_text, tmp_path / "model.gguf", "float32")


PIECES = Path(__file__).parent / "golden" / "pieces"


def write_pieces(kind, folder):
    """Write a network with a SentencePiece tokenizer to a GGUF file, and return the tokenizer."""
    shutil.copy(PIECES / f"{kind}.model", folder / "tokenizer.model")
    text = TextTokenizer.load(folder)
    torch.manual_seed(0)
    changes = {key.removeprefix("model."): value for key, value in MODELS["gemma-test"].items()}
    network = fieldguide.create("gemma-test", vocab_size=text.size + 3, length=64, **changes).eval()
    begin = text.tokenizer.encode("").ids[0]
    write_gguf(network, registry.cards()["gemma"], text, folder / "model.gguf", "float32", begin=begin)
    return text


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_pieces_are_written_with_scores_and_types(kind, tmp_path):
    """Llama's tokenizer puts a space before texts, Gemma's does not. Tokens of the file are those of SentencePiece's library."""
    text = write_pieces(kind, tmp_path)
    ggml = reader.read_metadata(tmp_path / "model.gguf")["tokenizer"]["ggml"]
    stored = sentencepiece.parse_file(PIECES / f"{kind}.model").pieces
    assert ggml["model"] == "llama" and ggml["add_space_prefix"] == (kind == "Llama")
    assert [kind for _, _, kind in stored] == ggml["token_type"][: len(stored)] and ggml["token_type"][len(stored) :] == [5] * 3
    merged = [(ours, theirs) for ours, (piece, theirs, kind) in zip(ggml["scores"], stored) if kind == 1 and len(piece) > 1]
    assert sorted(merged) == sorted(merged, key=lambda pair: pair[1]) and len(merged) > 50
    loaded = TextTokenizer.load(tmp_path / "model.gguf")
    for one, ids, _ in json.loads((PIECES / "encoded.json").read_text(encoding="utf-8"))[kind]:
        assert loaded.encode_exact([one])[0].tolist() == ids == text.encode_exact([one])[0].tolist(), one
    assert loaded.tokenizer.encode("a").ids == text.tokenizer.encode("a").ids


def test_tokenizers_without_bytes_are_an_error(byte_text, tmp_path):
    shutil.copy(PIECES / "T5.model", tmp_path / "spiece.model")
    text = TextTokenizer.load(tmp_path)
    network = fieldguide.create("gemma-test", vocab_size=text.size, length=64)
    with pytest.raises(ExportError, match="the tokenizer is Unigram; GGUF files get byte-level BPE or SentencePiece's BPE"):
        write_gguf(network, registry.cards()["gemma"], text, tmp_path / "model.gguf", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_llama_cpp_gives_the_pieces(kind, tmp_path):
    """The token ids of 1,000 texts. Needs `npm install node-llama-cpp` in the folder that NODE_LLAMA_CPP names."""
    if not os.environ.get("NODE_LLAMA_CPP"):
        pytest.skip("NODE_LLAMA_CPP names no folder with node-llama-cpp")
    text = write_pieces(kind, tmp_path)
    texts, begin = make_probes(text), text.tokenizer.encode("").ids[0]
    (tmp_path / "request.json").write_text(json.dumps({"texts": texts, "prompt": [begin], "count": 1}))
    script = Path(__file__).with_name("llama_cpp.mjs")
    command = ["node", script, tmp_path / "model.gguf", tmp_path / "request.json", tmp_path / "answer.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["tokens"] == [ids.tolist() for ids in text.encode_exact(texts)] and answer["begin"] == begin


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_has_the_perplexity_of_the_run(name, tmp_path):
    """Within 1 % of the network's in float32, for a text that was not used in training, longer than local windows.

    Needs `npm install node-llama-cpp` in the folder that NODE_LLAMA_CPP names.
    """
    if not os.environ.get("NODE_LLAMA_CPP"):
        pytest.skip("NODE_LLAMA_CPP names no folder with node-llama-cpp")
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(samples.path("manual").glob("*.txt"))}
    unseen = texts.pop("assignment.txt")
    (tmp_path / "text.txt").write_text("\n\n".join(texts.values()), encoding="utf-8")
    settings = {"steps": 60, "precision": "float32", "task.vocab": 600, "task.length": LENGTH, **MODELS[name]}
    run = fieldguide.fit(tmp_path / "text.txt", task="text-generation", model=name, out=tmp_path / "run", settings=settings)
    begin, whole = run.task.prompt([("", "")])[:1], run.task.text.encode_exact([unseen])[0].tolist()
    ids = [[*begin, *whole[i * (LENGTH - 1) :][: LENGTH - 1]] for i in range(TEXTS)]
    with torch.no_grad():
        logp = run.objective.model.eval()(torch.tensor(ids)).float().log_softmax(-1)  # text token vocab
    want = float(-logp[:, :-1].gather(2, torch.tensor(ids)[:, 1:, None]).mean())
    (tmp_path / "tokens.json").write_text(json.dumps(ids))
    for precision in ("float16", "int8"):
        path = run.export("gguf", out=tmp_path / precision, precision=precision).path
        command = ["node", SCRIPT, path, tmp_path / "tokens.json", tmp_path / "odds.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        odds = np.array(json.loads((tmp_path / "odds.json").read_text()))
        ratio = np.exp(-odds.mean() - want)
        print(f"{name} {precision}: perplexity {np.exp(want):.4f}, llama.cpp {np.exp(-odds.mean()):.4f}, ratio {ratio:.6f}")
        assert len(odds) == TEXTS * (LENGTH - 1) and abs(ratio - 1) < 0.01
