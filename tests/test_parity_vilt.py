"""ViLT against transformers: published size, other image sizes, attention; and questions that need image and text."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cases import huggingface_vilt
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.weights import translate
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data.loader import Batches
from fieldguide.models.registry import card, create
from fieldguide.models.transformer.vilt import HUGGINGFACE
from fieldguide.objectives import Classification, Supervised
from test_loop import trainer
from test_models import batch, tiny

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def pair():
    ours = tiny("vilt")
    peer, rename = huggingface_vilt(ours)
    peer.double().load_state_dict(rename(ours.state_dict()))
    return ours, peer.eval()


def test_names_and_shapes_of_the_published_size():
    with torch.device("meta"):
        model = create("vilt-b32-vqa")
        peer, rename = huggingface_vilt(model)
    theirs = {key: x.shape for key, x in peer.state_dict().items() if not key.endswith("_ids")}
    assert {key: x.shape for key, x in rename(model.state_dict()).items()} == theirs


@torch.no_grad()
@pytest.mark.parametrize("shape", [(12, 12), (8, 8), (16, 24), (20, 4)])
def test_other_image_sizes_equal_transformers(shape):
    """Position embeddings are interpolated to the image."""
    ours, peer = pair()
    _, tokens, mask = batch("vilt", 3)
    torch.manual_seed(0)
    image = torch.randn(3, 2, *shape, dtype=torch.float64)
    torch.testing.assert_close(ours(image, tokens, mask), peer(image, tokens, mask), **EXACT)


@torch.no_grad()
def test_attention_rollout_equals_transformers():
    ours, peer = pair()
    image, tokens, mask = batch("vilt", 4)
    torch.manual_seed(0)
    image = torch.randn(4, 2, 12, 8, dtype=torch.float64)
    peer.peer.set_attn_implementation("eager")
    # There, patches come in an order drawn by chance; here, in theirs.
    maps = in_order(peer, image, tokens, mask)
    flow = torch.eye(maps[0].shape[-1], dtype=torch.float64).repeat(4, 1, 1)
    for layer in maps:
        step = (layer.mean(1) + torch.eye(layer.shape[-1])) / 2
        flow = torch.stack([step[i] @ flow[i] for i in range(4)])
    seen = flow[:, 0, tokens.shape[1] + 1 :]
    found = ours.attention(image, tokens, mask)
    assert found.shape == (4, 3, 2)
    torch.testing.assert_close(found, (seen / seen.sum(1, keepdim=True)).view(4, 3, 2), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(4, dtype=torch.float64))
    alone = ours.attention(image[:1], tokens[:1, : int(mask[0].sum())])
    torch.testing.assert_close(alone[0], found[0], rtol=1e-6, atol=1e-8)  # padding is not looked at


def in_order(peer, image: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Return the attention weights of transformers with patches from the top left on."""
    drawn = torch.multinomial
    torch.multinomial = lambda weights, count, **_: torch.arange(count)
    try:
        return peer.peer(pixel_values=image, input_ids=tokens, attention_mask=mask.long(), output_attentions=True).attentions
    finally:
        torch.multinomial = drawn


@torch.no_grad()
def test_transformers_files(tmp_path):
    ours = tiny("vilt", torch.float32)
    state = translate(ours.state_dict(), HUGGINGFACE, reverse=True)
    other = create("vilt-test")
    extra = {"vilt.embeddings.text_embeddings.position_ids": torch.arange(12)[None]}
    assert weights.load(other, state | extra) == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
    back = weights.read(weights.save(ours, tmp_path / "x.safetensors", "huggingface"))
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())
    fewer = create("vilt-test", num_classes=9)  # other answers: the last layer stays fresh
    assert set(weights.load(fewer, state, head="skip")) == {"head.weight", "head.bias"}


@torch.no_grad()
def test_output_depends_on_image_and_question():
    model, (image, tokens, mask) = tiny("vilt"), batch("vilt", 3)
    before = model(image, tokens, mask)
    for changed in ((image.flip(2), tokens), (image, (tokens + 1) % 30), (image, tokens.flip(0))):
        assert not torch.allclose(model(*changed, mask), before)


def test_invalid_inputs_are_rejected():
    model = create("vilt-test")
    with pytest.raises(DataError, match="multiples of patch=4"):
        model(torch.zeros(1, 2, 12, 13), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(DataError, match="length=12"):
        model(torch.zeros(1, 2, 12, 12), torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(SettingsError, match="divisible by patch=4"):
        create("vilt-test", image=13)


@pytest.mark.slow
def test_learns_to_answer_about_unseen_images():
    """Four squares of four colors; the question names a square, the answer is its color."""
    colours = torch.tensor(list(itertools.product(range(4), repeat=4)))  # all 256 pictures
    colours = colours[torch.randperm(256, generator=torch.Generator().manual_seed(0))].repeat_interleave(4, 0)
    place = torch.arange(4).repeat(256)
    image = torch.nn.functional.one_hot(colours.view(-1, 2, 2), 4).permute(0, 3, 1, 2).float()
    image = image.repeat_interleave(4, 2).repeat_interleave(4, 3) - 0.25
    tokens = torch.stack([torch.full_like(place, 20), place, torch.full_like(place, 21)], 1)
    target = colours.gather(1, place[:, None])[:, 0]
    torch.manual_seed(0)
    model = create("vilt-test", image=8, channels=4, dim=64, heads=4)
    columns = {"image": image, "tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool), "target": target}
    data = Batches(800, lambda i, _: {name: x[i] for name, x in columns.items()})  # of 200 pictures
    objective = Supervised(model, card("vilt").inputs, Classification())
    trainer(objective, data, steps=400, batch=64, lr=2e-3, weight_decay=0.0).train()
    with torch.no_grad():
        said = objective.outputs({name: x[800:] for name, x in columns.items()})["probabilities"].argmax(1)
        looked = model.attention(image[800:], tokens[800:])
    assert (said == target[800:]).float().mean() > 0.95
    assert looked.shape == (224, 2, 2)
