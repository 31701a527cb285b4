"""Files that publishers ship next to weights are used or named: adapters, shards, output layers, sentence-transformers."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published_generation import llama, save

import fieldguide
from fieldguide.core.errors import WeightsError
from test_published import SENTENCES, texts
from tv import transformers

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.arange(12).reshape(2, 6) % 7 + 2


def logits(folder) -> torch.Tensor:
    model = fieldguide.load(folder)
    with torch.no_grad():
        return model(IDS, torch.ones_like(IDS, dtype=torch.bool))


def adapter(folder, targets, rank=4, alpha=8.0, transpose=False, prefix="base_model.model.", **config):
    """Write a LoRA adapter for modules {name: (out, in)} and return the updates by module."""
    folder.mkdir(exist_ok=True)
    tensors, updates = {}, {}
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    for name, (out, into) in targets.items():
        a, b = torch.randn(rank, into, generator=GENERATOR), torch.randn(out, rank, generator=GENERATOR)
        tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
        updates[name] = scale * (b @ a).T if transpose else scale * b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    record = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "fan_in_fan_out": transpose, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    return updates


def merged_reference(base, updates, folder):
    """Write the base model with the updates added, without an adapter."""
    shutil.copytree(base, folder)
    state = load_file(base / "model.safetensors")
    for name, update in updates.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + update
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return logits(folder)


LAYER = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def base(tmp_path):
    return save(llama(), tmp_path / "base")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_an_adapter_is_merged_into_the_base_that_it_names(base, tmp_path, config):
    updates = adapter(tmp_path / "lora", {LAYER[0]: (32, 32), LAYER[1]: (32, 40)}, base_model_name_or_path=str(base), **config)
    want = merged_reference(base, updates, tmp_path / "merged")
    assert torch.allclose(logits(tmp_path / "lora"), want, atol=1e-5) and not torch.allclose(want, logits(base), atol=1e-2)


def test_an_adapter_in_the_folder_of_its_base_is_merged(base, tmp_path):
    plain = logits(base)
    updates = adapter(tmp_path / "lora", {LAYER[0]: (32, 32)})
    want = merged_reference(base, updates, tmp_path / "merged")
    for file in (tmp_path / "lora").iterdir():
        shutil.copy(file, base / file.name)
    lines = []
    found = fieldguide.checkpoints.load.inspect_checkpoint(base, callback=lines.append)
    assert "merged the LoRA adapter" in lines[0] and found.card.name == "llama"
    assert torch.allclose(logits(base), want, atol=1e-5) and not torch.allclose(plain, want, atol=1e-2)


def test_an_adapter_of_transposed_weights(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    name = "transformer.h.0.attn.c_proj"  # square: the shape does not tell
    updates = adapter(tmp_path / "lora", {name: (16, 16)}, transpose=True, base_model_name_or_path="../base")
    assert torch.allclose(logits(tmp_path / "lora"), merged_reference(tmp_path / "base", updates, tmp_path / "m"), atol=1e-5)


def test_rank_and_alpha_patterns_and_modules_saved_as_a_whole(base, tmp_path):
    updates = adapter(
        tmp_path / "lora", {LAYER[0]: (32, 32)}, base_model_name_or_path=str(base), alpha_pattern={"q_proj": 16.0}
    )
    updates = {name: 2 * update for name, update in updates.items()}
    file = tmp_path / "lora" / "adapter_model.safetensors"
    norm = torch.rand(32, generator=GENERATOR)
    save_file(load_file(file) | {"base_model.model.model.norm.weight": norm}, file)
    want = merged_reference(
        base, updates | {"model.norm": norm - load_file(base / "model.safetensors")["model.norm.weight"]}, tmp_path / "m"
    )
    assert torch.allclose(logits(tmp_path / "lora"), want, atol=1e-5)


def test_biases_that_were_trained_with_an_adapter(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    name, bias = "transformer.h.0.attn.c_proj", torch.rand(16, generator=GENERATOR)
    updates = adapter(tmp_path / "lora", {name: (16, 16)}, transpose=True, bias="all", base_model_name_or_path="../base")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}.base_layer.bias": bias}, file)
    merged_reference(tmp_path / "base", updates, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    save_file(load_file(weights) | {f"{name}.bias": bias}, weights, {"format": "pt"})
    assert torch.allclose(logits(tmp_path / "lora"), logits(tmp_path / "m"), atol=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "org/other"}, r"adapter of another model: hf:org/other is not among the downloads"),
    ],
)
def test_other_adapters_are_named(base, tmp_path, config, message):
    adapter(tmp_path / "lora", {LAYER[0]: (32, 32)}, **{"base_model_name_or_path": str(base), **config})
    with pytest.raises(WeightsError, match=message):
        fieldguide.load(tmp_path / "lora")


def test_an_adapter_of_another_model_is_rejected(base, tmp_path):
    adapter(tmp_path / "lora", {"model.layers.7.self_attn.q_proj": (32, 32)}, base_model_name_or_path=str(base))
    with pytest.raises(WeightsError, match="belongs to no tensor"):
        fieldguide.load(tmp_path / "lora")
    adapter(tmp_path / "lora", {LAYER[0]: (48, 32)}, base_model_name_or_path=str(base))
    with pytest.raises(WeightsError, match="has the shape"):
        fieldguide.load(tmp_path / "lora")


def test_shards_without_an_index_are_read_together(base, tmp_path):
    want, state = logits(base), load_file(base / "model.safetensors")
    names = sorted(state)
    for i, some in enumerate((names[::2], names[1::2]), 1):
        save_file({name: state[name] for name in some}, base / f"model-{i:05d}-of-00002.safetensors")
    (base / "model.safetensors").unlink()
    assert torch.equal(logits(base), want)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of 2 shards; missing: model-00002-of-00002\.safetensors"):
        fieldguide.load(base)


def test_a_missing_output_layer_is_not_replaced_by_the_embedding(tmp_path):
    base = save(llama(tie_word_embeddings=False), tmp_path)
    state = load_file(base / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks the output layer \(lm_head.weight\)"):
        fieldguide.load(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert fieldguide.load(base).config.tie_embeddings


# sentence-transformers


def publish(folder, modes, dense=None, prompt="", include_prompt=True):
    """Write the files of sentence-transformers next to an encoder of width 16."""
    words = texts(folder, "Model")[1]
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 16, "include_prompt": include_prompt, **{f"pooling_mode_{m}": True for m in modes}}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    if dense:
        (folder / "2_Dense").mkdir(exist_ok=True)
        weight, bias = torch.randn(8, 16 * len(modes), generator=GENERATOR), torch.randn(8, generator=GENERATOR)
        save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense/model.safetensors")
        config = {"in_features": 16 * len(modes), "out_features": 8, "bias": True, "activation_function": dense}
        (folder / "2_Dense/config.json").write_text(json.dumps(config))
        modules.append({"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    modules.append({"idx": 3, "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    if prompt:
        record = {"prompts": {"query": prompt, "other": "no "}, "default_prompt_name": "query"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(record))
    return words


def token_vectors(folder, words, sentences):
    made = words(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        return transformers.BertModel.from_pretrained(folder)(**made).last_hidden_state, made.attention_mask[..., None].float()


def unit(x):
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


FORMULAS = {
    "cls_token": lambda x, m: x[:, 0],
    "max_tokens": lambda x, m: torch.where(m > 0, x, -1e9).max(1).values,
    "mean_tokens": lambda x, m: (x * m).sum(1) / m.sum(1),
    "mean_sqrt_len_tokens": lambda x, m: (x * m).sum(1) / m.sum(1).sqrt(),
    "weightedmean_tokens": lambda x, m: (x * m * torch.arange(1, x.shape[1] + 1)[None, :, None]).sum(1),
    "lasttoken": lambda x, m: torch.stack([row[int(k.sum()) - 1] for row, k in zip(x, m)]),
}


@pytest.mark.parametrize("mode", FORMULAS)
def test_pooling_modes(mode, tmp_path):
    words = publish(tmp_path, [mode])
    want = unit(FORMULAS[mode](*token_vectors(tmp_path, words, SENTENCES)))
    np.testing.assert_allclose(fieldguide.pipeline(tmp_path, output_type="vector").embed(SENTENCES), want, atol=2e-6)


@pytest.mark.parametrize("activation", ["torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"])
def test_dense_layers_after_several_poolings(activation, tmp_path):
    words = publish(tmp_path, ["mean_tokens", "cls_token"], activation)
    x, m = token_vectors(tmp_path, words, SENTENCES)
    state = load_file(tmp_path / "2_Dense/model.safetensors")
    both = torch.cat([FORMULAS["cls_token"](x, m), FORMULAS["mean_tokens"](x, m)], 1)
    out = both @ state["linear.weight"].T + state["linear.bias"]
    want = unit(out.tanh() if "Tanh" in activation else out)
    predictor = fieldguide.pipeline(tmp_path, output_type="vector")
    np.testing.assert_allclose(predictor.embed(SENTENCES), want, atol=2e-6)
    np.testing.assert_allclose([row["vector"] for row in predictor.predict(SENTENCES)], want, atol=2e-6)


@pytest.mark.parametrize("included", [True, False])
def test_the_default_prompt_is_put_before_each_text(included, tmp_path):
    words = publish(tmp_path, ["mean_tokens"], prompt="the cat: ", include_prompt=included)
    x, m = token_vectors(tmp_path, words, ["the cat: " + text for text in SENTENCES])
    if not included:
        m[:, : len(words("the cat: ").input_ids) - 1] = 0
    want = unit(FORMULAS["mean_tokens"](x, m))
    predictor = fieldguide.pipeline(tmp_path, output_type="vector")
    np.testing.assert_allclose(predictor.embed(SENTENCES), want, atol=2e-6)
    np.testing.assert_allclose([row["vector"] for row in predictor.predict(SENTENCES)], want, atol=2e-6)


def test_unknown_modules_are_named(tmp_path):
    publish(tmp_path, ["mean_tokens"], "torch.nn.modules.activation.Softshrink")
    with pytest.raises(WeightsError, match="activation Softshrink is not supported"):
        fieldguide.pipeline(tmp_path, output_type="vector")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.LSTM"}]))
    with pytest.raises(WeightsError, match=r"module sentence_transformers\.models\.LSTM is not supported"):
        fieldguide.pipeline(tmp_path, output_type="vector")
