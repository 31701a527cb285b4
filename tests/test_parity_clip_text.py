"""CLIP's text encoder alone, as pipelines of diffusers use it, against transformers."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

import latents
from fieldguide.checkpoints import load as checkpoints
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.registry import create
from fieldguide.models.transformer.clip_text import CARD
from test_models import batch, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
L14 = {  # text_encoder/config.json of Stable Diffusion 1
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
H14 = L14 | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
G14 = H14 | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
PUBLISHED = {
    "clip-l14-text": L14,
    "clip-l14-text-projected": L14 | {"architectures": ["CLIPTextModelWithProjection"]},
    "clip-h14-text-23": H14,
    "clip-g14-text": G14,
}


def peer_of(model):
    """Return transformers' encoder with our weights."""
    peer = latents.clip_text_model(model).to(next(model.parameters()).dtype).eval()
    state = translate(model.state_dict(), get_tables(model)["huggingface"], reverse=True)
    projected = "text_projection.weight" in state
    peer.load_state_dict({name if projected else name.removeprefix("text_model."): x for name, x in state.items()})
    return peer


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations(size):
    from tv import transformers

    found, origin, table = identify_config(PUBLISHED[size])
    assert (found.name, origin) == ("clip-text", "huggingface")
    assert found.config(**to_config_fields(found, table, PUBLISHED[size], "config.json")) == CARD.resolve_config(size)
    (name,) = PUBLISHED[size]["architectures"]
    with torch.device("meta"):
        peer = getattr(transformers, name)(transformers.CLIPTextConfig(**PUBLISHED[size]))
    assert sum(p.numel() for p in peer.parameters()) == CARD.sizes[size].params


def test_end_token_of_enlarged_vocabularies():
    """Textual inversion adds tokens after the end token; where it is wrong in the configuration, it is CLIP's."""
    found, _, table = identify_config(L14)
    more = to_config_fields(found, table, L14 | {"vocab_size": 49_410}, "config.json")
    assert (more["vocab_size"], more["end"]) == (49_410, 49_407)
    assert to_config_fields(found, table, L14 | {"vocab_size": 1000}, "config.json")["end"] == 999
    assert to_config_fields(found, table, L14 | {"eos_token_id": 7}, "config.json")["end"] == 7


@torch.no_grad()
@pytest.mark.parametrize(("embed", "quick"), [(0, True), (8, False)])
def test_states_and_vectors(embed, quick):
    """The last states, those of earlier blocks with and without norm, and the vector of the text."""
    ours = tiny("clip-text", embed=embed, quick=quick)
    peer = peer_of(ours)
    text = torch.randint(1, 29, (4, 9))
    text[0, 4], text[1, 8], text[2, 2:] = 29, 29, 29  # padded with other tokens, full, padded with the end token
    text[3, 8] = 29
    found = peer(text, output_hidden_states=True)
    norm = (peer.text_model if embed else peer).final_layer_norm
    states, vector = ours.encode(text)
    torch.testing.assert_close(states, found.last_hidden_state, **CLOSE)
    torch.testing.assert_close(states, ours(text), **CLOSE)
    torch.testing.assert_close(vector, found.text_embeds if embed else found.pooler_output, **CLOSE)
    for skip in (1, 2, 3):
        plain, same = ours.encode(text, skip=skip, normalize=False)
        torch.testing.assert_close(plain, found.hidden_states[-1 - skip], **CLOSE)
        torch.testing.assert_close(ours.encode(text, skip=skip)[0], norm(found.hidden_states[-1 - skip]), **CLOSE)
        assert torch.equal(same, vector)
    mask = torch.arange(9) < torch.tensor([5, 9, 3, 9])[:, None]
    torch.testing.assert_close(ours.encode(text, mask)[1], vector, **CLOSE)
    assert not torch.allclose(ours.encode(text, torch.ones_like(mask))[1], vector)


@torch.no_grad()
@pytest.mark.parametrize("embed", [0, 8])
def test_files(tmp_path, embed):
    """Of transformers, with the prefix `text_model` and without, and of open_clip by diffusers' conversion."""
    from tv import diffusers

    ours, (tokens, mask) = tiny("clip-text", torch.float32, embed=embed), batch("clip-text", 3)
    checkpoints.save(ours, tmp_path / "ours", "huggingface")
    assert "text_model.final_layer_norm.bias" in weights.read(tmp_path / "ours")
    peer = latents.clip_text_model(ours).from_pretrained(tmp_path / "ours").eval()
    theirs = peer(tokens, mask.long()).last_hidden_state
    torch.testing.assert_close(theirs[mask], ours(tokens, mask)[mask], rtol=1e-4, atol=1e-5)
    peer.save_pretrained(tmp_path / "theirs")
    again = checkpoints.load(tmp_path / "theirs")
    assert again.config == ours.config and torch.equal(again(tokens), ours(tokens))
    old = weights.read(tmp_path / "ours") | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    bare = {name.removeprefix("text_model."): x for name, x in old.items()}
    single = translate(ours.state_dict(), get_tables(ours)["openai"], reverse=True)
    single |= {"logit_scale": torch.ones(()), "attn_mask": torch.zeros(12, 12)}
    for form in (old, bare, single):
        other = create("clip-text-test", embed=embed)
        assert weights.load(other, form) == []
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
    module = importlib.import_module(f"{diffusers.__name__}.loaders.single_file_utils")
    named = {f"p.{name}": x for name, x in single.items() if name not in ("logit_scale", "attn_mask")}
    named |= {} if embed else {"p.text_projection": torch.eye(12)}  # by which diffusers splits queries, keys and values
    if not embed:  # its rule that the projection is as wide as the states holds for all published files
        found = module.convert_open_clip_checkpoint(peer, named, prefix="p.")
        want = {name: x for name, x in old.items() if "position_ids" not in name}
        found.pop("text_projection.weight", None)
        assert found.keys() == want.keys() and all(torch.equal(found[name], x) for name, x in want.items())


@torch.no_grad()
def test_single_files_hold_an_unused_block(tmp_path):
    """Stable Diffusion 2 uses 23 of 24 blocks, and no projection."""
    whole, ours = tiny("clip-text", torch.float32, depth=3, embed=8), create("clip-text-test", depth=2)
    assert weights.load(ours, translate(whole.state_dict(), get_tables(whole)["openai"], reverse=True)) == []
    tokens = batch("clip-text", 3)[0]
    torch.testing.assert_close(ours(tokens), whole.encode(tokens, skip=1)[0])
    checkpoints.save(ours, tmp_path / "x", "huggingface")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["architectures"] == ["CLIPTextModel"]


def test_invalid_requests_are_rejected():
    model = tiny("clip-text")
    with pytest.raises(DataError, match="13 tokens exceeds the model's length=12"):
        model(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(SettingsError, match="skip=4 must be 0 to 3"):
        model.encode(torch.ones(1, 3, dtype=torch.int64), skip=4)
