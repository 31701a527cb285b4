"""CLIP against transformers, and against the authors' equations over torch's attention; files of three origins."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import huggingface_clip
from clips import Official
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.weights import translate
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.registry import create
from fieldguide.models.transformer.clip import HUGGINGFACE, OPENAI, OPENCLIP
from test_models import batch, tiny

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def logits(pairs: Tensor) -> Tensor:  # B 2 E -> B B
    return pairs[:, 0] @ pairs[:, 1].T


@pytest.mark.parametrize("quick", [True, False], ids=["quick gelu", "gelu"])
def test_logits_and_gradients_equal_the_official_networks(quick):
    ours = tiny("clip", quick=quick)
    peer = Official(ours.config).double()
    peer.load_state_dict(translate(ours.state_dict(), OPENAI, reverse=True))
    image, tokens, mask = batch("clip")
    tokens = torch.where(mask, tokens, 0)  # as its tokenizer pads
    torch.manual_seed(0)
    weight = torch.randn(5, 5, dtype=torch.float64)
    found, want = logits(ours(image, tokens, mask)), peer(image, tokens)
    torch.testing.assert_close(found, want, **EXACT)
    torch.testing.assert_close(logits(ours(image, tokens)), want, **EXACT)  # ends are found without the mask too
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    grads = translate({name: p.grad for name, p in ours.named_parameters()}, OPENAI, reverse=True)
    for name, p in peer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, **EXACT)


@torch.no_grad()
def test_logits_equal_those_of_transformers():
    ours = tiny("clip")
    peer, rename = huggingface_clip(ours)
    peer.double().load_state_dict(rename(ours.state_dict()))
    image, tokens, mask = batch("clip")
    found = peer.peer.eval()(pixel_values=image, input_ids=tokens, attention_mask=mask.long())
    torch.testing.assert_close(logits(ours(image, tokens, mask)), found.logits_per_image, **EXACT)
    torch.testing.assert_close(ours.encode_image(image), found.image_embeds, **EXACT)
    torch.testing.assert_close(ours.encode_text(tokens, mask), found.text_embeds, **EXACT)


@torch.no_grad()
def test_attention_maps_equal_those_of_transformers():
    ours = tiny("clip")
    peer, rename = huggingface_clip(ours)
    peer.double().load_state_dict(rename(ours.state_dict()))
    image = batch("clip")[0]
    vision = peer.peer.eval().vision_model
    vision.set_attn_implementation("eager")
    want = torch.stack(vision(image, output_attentions=True).attentions, 1)
    found = ours.vision.attention(image)
    assert found.shape == (5, 2, 2, 10, 10)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)  # there, softmax is in float32
    flow = torch.eye(10, dtype=torch.float64).repeat(5, 1, 1)
    for layer in range(2):
        step = (found[:, layer].mean(1) + torch.eye(10)) / 2
        flow = torch.stack([step[i] @ flow[i] for i in range(5)])
    seen = ours.attention(image)
    torch.testing.assert_close(seen, (flow[:, 0, 1:] / flow[:, 0, 1:].sum(1, keepdim=True)).view(5, 3, 3), **EXACT)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(5, dtype=torch.float64))


@torch.no_grad()
def test_attention_map_points_to_the_relevant_patch():
    """If the keys of one patch match every query, the map has its maximum at that row and column."""
    model = tiny("clip")
    for block in model.vision.blocks:
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
        block.attn.qkv.bias[:16] = 1.0  # every query is all ones
    model.vision.pos.weight.zero_()
    image = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    image[:, :, 4:8, 8:] = 3.0  # row 1, column 2
    marked = model.vision.tokens(image)[0]
    for block in model.vision.blocks:  # keys point to what sets this patch apart
        difference = block.norm1(marked[6]) - block.norm1(marked[1])
        block.attn.qkv.weight[16:32] = 5 * torch.ones(16, 1, dtype=torch.float64) @ difference[None]
    seen = model.attention(image)[0]
    assert divmod(int(seen.argmax()), 3) == (1, 2) and seen.max() > 0.4


@torch.no_grad()
@pytest.mark.parametrize(("origin", "table"), [("huggingface", HUGGINGFACE), ("openai", OPENAI), ("openclip-text", OPENCLIP)])
def test_files_of_every_origin(tmp_path, origin, table):
    """Identified by names, including additional entries; saved bit-exact."""
    ours = tiny("clip", torch.float32)
    state = translate(ours.state_dict(), table, reverse=True)
    extra = {
        "huggingface": {
            "vision_model.embeddings.position_ids": torch.arange(10)[None],
            "text_model.embeddings.position_ids": torch.arange(12)[None],
        },
        "openai": {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")},
        "openclip-text": {"text.attn_mask": torch.zeros(12, 12)},
    }[origin]
    other = create("clip-test")
    assert weights.load(other, state | extra) == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
    back = weights.read(weights.save(ours, tmp_path / "x.safetensors", origin))
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())


@pytest.mark.parametrize("size", ["clip-b32", "clip-b16", "clip-l14", "clip-l14-336"])
def test_names_and_shapes_of_published_sizes(size):
    with torch.device("meta"):
        model = create(size)
        peer, rename = huggingface_clip(model)
        official = Official(model.config)
    theirs = {key: x.shape for key, x in peer.state_dict().items() if not key.endswith("position_ids")}
    assert {key: x.shape for key, x in rename(model.state_dict()).items()} == theirs
    renamed = translate(model.state_dict(), OPENAI, reverse=True)
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in official.state_dict().items()}


@torch.no_grad()
def test_text_embedding_is_read_at_the_end_token():
    model = tiny("clip")
    end = model.config.end
    text = torch.tensor([[4, 5, end, 7, 8]])
    short = model.encode_text(text[:, :3])
    torch.testing.assert_close(model.encode_text(text), short, **EXACT)  # the first end counts
    torch.testing.assert_close(model.encode_text(text, torch.tensor([[True, True, True, False, False]])), short, **EXACT)
    assert not torch.allclose(model.encode_text(text, torch.ones(1, 5, dtype=torch.bool)), short)
    other = tiny("clip", end=3)  # an end that is not the highest token
    torch.testing.assert_close(
        other.encode_text(torch.tensor([[4, 9, 3, 3, 8]])),
        other.encode_text(torch.tensor([[4, 9, 3]]), torch.ones(1, 3, dtype=torch.bool)),
        **EXACT,
    )
    no_end = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(model.encode_text(no_end), model.encode_text(no_end, torch.ones(1, 3, dtype=torch.bool)))


@torch.no_grad()
def test_embeddings_have_length_1_and_logits_the_scale():
    model = tiny("clip", torch.float32)
    model.logit_scale.fill_(3.0)
    inputs = batch("clip", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode_image(inputs[0])
    assert half.dtype == torch.float32
    for vectors in (model.encode_image(inputs[0]), model.encode_text(*inputs[1:]), half):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(model(*inputs).norm(dim=2), torch.full((5, 2), torch.tensor(1.5).exp()))
    torch.testing.assert_close(
        logits(model(*inputs)), 20.0855369 * F.linear(model.encode_image(inputs[0]), model.encode_text(*inputs[1:]))
    )


@pytest.mark.parametrize("size", ["clip-test", "clip-resnet-test"])
def test_answer_head_uses_both_embeddings_and_their_product(size):
    """Computed by the equations from the embeddings of the same encoders."""
    torch.manual_seed(0)
    pairs = create(size).double()
    asked = create(size, output_type="label", num_classes=5).double()
    with pytest.warns(weights.WeightsWarning, match="logit_scale"):
        fresh = weights.load(asked, pairs.state_dict(), head="skip")
    assert {name.partition(".")[0] for name in fresh} == {"answers"}
    image, tokens, mask = batch("clip" if size == "clip-test" else "clip-resnet", 3)
    v, t = (
        x.numpy() * pairs.config.embed**0.5
        for x in (pairs.eval().encode_image(image).detach(), pairs.encode_text(tokens, mask).detach())
    )
    p = {name: x.detach().numpy() for name, x in asked.answers.named_parameters()}
    hidden = np.concatenate([v, t, v * t], 1) @ p["up.weight"].T + p["up.bias"]
    hidden = hidden * scipy.special.ndtr(hidden)
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    expected = (hidden * p["norm.weight"] + p["norm.bias"]) @ p["head.weight"].T + p["head.bias"]
    answers = asked.eval()(image, tokens, mask)
    np.testing.assert_allclose(answers.detach().numpy(), expected, rtol=1e-6, atol=1e-8)
    answers.square().sum().backward()
    assert all(x.grad is not None for x in asked.parameters())  # as several processes need it


def test_starts_at_the_temperature_of_the_paper():
    assert create("clip-test").logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_invalid_inputs_are_rejected():
    model = create("clip-test")
    with pytest.raises(DataError, match="image=12"):
        model.encode_image(torch.zeros(1, 2, 12, 13))
    with pytest.raises(DataError, match="length=12"):
        model.encode_text(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(SettingsError, match="divisible by patch=4"):
        create("clip-test", image=13)
    with pytest.raises(SettingsError, match="heads=5"):
        create("clip-test", heads=5)
