"""Gemma 1 and 2: soft caps, windows, generation equal to transformers, and supported configurations."""

from __future__ import annotations

import json

import pytest
import torch

import fieldguide
from fieldguide.core.errors import WeightsError
from fieldguide.models.generation import Sampling, generate
from fieldguide.models.transformer.gemma2 import softcap
from test_models import tiny
from test_pretrained import settled
from tv import transformers

SHAPE = {
    "vocab_size": 30,
    "max_position_embeddings": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
OWN = {
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
}


def theirs(kind, **changes):
    torch.manual_seed(0)
    return settled(
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **{**SHAPE, **OWN[kind], **changes})
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", OWN)
def test_generation_with_a_cache_equals_transformers(kind, tmp_path):
    peer = theirs(kind)
    peer.model.norm.weight.normal_(0, 3)  # else a head that is the embedding says each token again
    peer.save_pretrained(tmp_path)
    ours, said = fieldguide.load(tmp_path), set()
    for prompt in torch.randint(30, (6, 1, 7), generator=torch.Generator().manual_seed(3)):
        want = peer.generate(prompt, max_new_tokens=12, do_sample=False)[0, 7:].tolist()
        steps = generate(ours, [prompt[0].tolist()], 12, sampling=Sampling(temperature=0.0), eos_token_ids=(), seed=0)
        assert [int(step) for step in steps] == want
        said |= set(want)
    assert len(said) > 3
    tokens = torch.randint(30, (3, 9))
    torch.testing.assert_close(ours.last(tokens), ours(tokens)[:, -1])


@torch.no_grad()
def test_gemma2_soft_caps_and_windows():
    model, tokens = tiny("gemma2", cap=0.5), torch.randint(30, (2, 9))
    assert model(tokens).abs().max() < model.config.cap == 0.5
    assert softcap(torch.tensor([1e6, -1e6, 0.0]), 3.0).tolist() == [3.0, -3.0, 0.0]
    assert not torch.allclose(model(tokens), tiny("gemma2", cap=0.5, attn_cap=50.0)(tokens))
    local, whole = model.masks(9, None, None, tokens.device)[:2]
    assert local is not None and int(local[..., 8, :].sum()) == 3 and whole is None
    assert len(model.masks(9, None, None, tokens.device)) == 3


@torch.no_grad()
def test_original_gemma_configurations(tmp_path):
    """As google/gemma-2b was published: gelu means its tanh approximation, and rotation keys are missing."""
    peer = theirs("gemma")
    peer.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said |= {"hidden_act": "gelu", "hidden_activation": None, "rope_theta": said.pop("rope_parameters")["rope_theta"]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    tokens = torch.randint(30, (2, 9))
    torch.testing.assert_close(fieldguide.load(tmp_path)(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gemma", {"hidden_act": "relu"}, "Gemma uses gelu_pytorch_tanh"),
        ("gemma", {"attention_bias": True}, "attention_bias=True"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "must alternate"),
        ("gemma2", {"hidden_activation": "silu"}, "gelu_pytorch_tanh"),
        ("gemma", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='yarn'"),
    ],
)
def test_unsupported_configurations_are_rejected(kind, changes, said, tmp_path):
    theirs(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=said):
        fieldguide.load(tmp_path)
