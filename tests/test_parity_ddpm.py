"""The DDPM U-Net of published size against diffusers, and its files, including those of 2022."""

from __future__ import annotations

import pytest
import torch

from cases import diffusers_unet
from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError
from fieldguide.models.registry import create
from fieldguide.models.transformer.encoder_classifier import TORCH
from test_models import batch, tiny


@pytest.mark.parametrize("size", ["ddpm-cifar10", "ddpm-256", "ddpm-28"])
def test_names_and_shapes_of_published_sizes(size):
    with torch.device("meta"):
        model = create(size)
        peer, rename = diffusers_unet(model)
    renamed, theirs = rename(model.state_dict()), peer.state_dict()
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in theirs.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [{}, {"attend": (16, 8), "image": 16, "growth": (1, 2, 1), "num_classes": 0, "depth": 2}],
    ids=["tiny", "three levels"],
)
def test_diffusers_files(tmp_path, shape):
    """With current names and those of old files; the network is identified by them."""
    ours = tiny("ddpm-unet", torch.float32, **shape)
    peer, rename = diffusers_unet(ours)
    peer.load_state_dict(rename(ours.state_dict()))
    image, time, label = (
        torch.randn(2, 2, 16, 16),
        torch.tensor([0.0, 999.0]),
        torch.tensor([0, min(1, ours.config.num_classes)]),
    )
    torch.testing.assert_close(ours(image, time, label), peer.eval()(image, time, label), rtol=1e-4, atol=1e-4)
    state = peer.peer.state_dict()
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): x
        for key, x in state.items()
    }
    assert old.keys() != state.keys()
    for form, origin in ((state, "diffusers"), (old, "diffusers-2022")):
        other = create("ddpm-unet-test", **shape)
        assert weights.load(other, form) == []
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
        back = weights.read(weights.save(ours, tmp_path / f"{origin}.safetensors", origin))
        assert back.keys() == form.keys() and all(torch.equal(back[key], x) for key, x in form.items())


@torch.no_grad()
def test_missing_label_equals_label_zero():
    model, (image, time, label) = tiny("ddpm-unet"), batch("ddpm-unet", 3)
    torch.testing.assert_close(model(image, time), model(image, time, torch.zeros_like(label)))
    assert not torch.allclose(model(image, time), model(image, time, label))
    assert not torch.allclose(model(image, time), model(image, time + 1))


def test_indivisible_sides_are_rejected():
    with pytest.raises(DataError, match="multiples of 2"):
        tiny("ddpm-unet")(torch.zeros(1, 2, 8, 9, dtype=torch.float64), torch.zeros(1))


@torch.no_grad()
def test_patches_equal_the_plain_network_on_patches():
    """Each 2 x 2 square is one pixel with four times the channels."""
    ours = tiny("ddpm-unet", patch=2, image=16)
    plain = tiny("ddpm-unet", channels=8)
    plain.load_state_dict(ours.state_dict())
    image, time, label = torch.randn(3, 2, 16, 16).double(), torch.tensor([0.0, 500.0, 999.0]), torch.tensor([0, 1, 3])
    squares = lambda x: x.reshape(3, 2, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(3, 8, 8, 8)
    torch.testing.assert_close(squares(ours(image, time, label)), plain(squares(image), time, label))
    with pytest.raises(DataError, match="multiples of 4"):
        ours(torch.zeros(1, 2, 18, 16, dtype=torch.float64), torch.zeros(1))


# Captions

CAPTIONED = {"num_classes": 0, "vocab_size": 30, "length": 9, "words": 16, "layers": 2}
CAPTIONS = torch.tensor([[5, 7, 7, 0, 0], [1, 2, 3, 4, 29], [9, 0, 0, 0, 0], [0, 0, 0, 0, 0]])


def torch_reader(model):
    """Return torch's encoder with our weights, applied row by row: the vector added to the time embedding."""
    ours, width = model.caption, model.config.words
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, torch.nn.functional.gelu, batch_first=True, norm_first=True),
        2,
        enable_nested_tensor=False,
    )
    state = {name.removeprefix("blocks."): x for name, x in ours.state_dict().items() if name.startswith("blocks.")}
    theirs = weights.translate(
        {f"blocks.{k}": x for k, x in state.items()}, {k: v for k, v in TORCH.items() if k != "norm.*"}, reverse=True
    )
    encoder.double().load_state_dict(theirs)

    def read(tokens):
        rows = []
        for row in tokens:
            real = row[: max(int((row > 0).sum()), 1)]  # none at all: the vector of token 0
            places = torch.arange(len(real), dtype=torch.float64)
            angle = places[:, None] * torch.tensor([10_000 ** (-2 * (i // 2) / width) for i in range(width)]).double()
            pos = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
            x = encoder((ours.embed.weight[real] * width**0.5 + pos)[None])[0].mean(0)
            rows.append(ours.head.weight @ x + ours.head.bias)
        return torch.stack(rows)

    return read


def test_captions_equal_torch_and_diffusers():
    """The output of torch's encoder replaces the label embedding in diffusers' network; gradients agree, too."""
    model = tiny("ddpm-unet", **CAPTIONED)
    peer, rename = diffusers_unet(tiny("ddpm-unet", num_classes=0))
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("caption.")}
    peer.double().eval().load_state_dict(rename(state))
    peer.peer.class_embedding = torch.nn.Identity()
    image, time = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.tensor([0.0, 999, 3, 500], dtype=torch.float64)
    vector = torch_reader(model)(CAPTIONS)
    ours, theirs = model(image, time, CAPTIONS), peer.peer(image, time, class_labels=vector).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # diffusers' sinusoids are of float32
    wanted, got = (torch.autograd.grad((y**2).sum(), model.caption.embed.weight)[0] for y in (theirs, ours))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert got[[0, 1, 5, 7, 29]].abs().sum(1).min() > 0 and got[10:29].abs().max() == 0


@torch.no_grad()
def test_missing_caption_equals_zeros():
    model = tiny("ddpm-unet", **CAPTIONED)
    image, time = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.full((4,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(model(image, time), model(image, time, torch.zeros(4, 6, dtype=torch.int64)))
    torch.testing.assert_close(model(image, time, CAPTIONS), model(image, time, torch.nn.functional.pad(CAPTIONS, (0, 3))))
    assert not torch.allclose(model(image, time, CAPTIONS), model(image, time))
    assert not torch.allclose(model(image, time, CAPTIONS), model(image, time, CAPTIONS.flip(1)))  # order matters
    with pytest.raises(DataError, match="a caption has 10 tokens, more than length=9"):
        model(image, time, torch.ones(4, 10, dtype=torch.int64))


def test_caption_differences_start_at_the_scale_of_labels():
    torch.manual_seed(0)
    model = create("ddpm-unet-test", **{**CAPTIONED, "dim": 32, "words": 64})
    tokens = torch.randint(1, 30, (200, 8))
    tokens[:, :5] = torch.arange(1, 6)  # most words are shared
    with torch.no_grad():
        assert 0.7 < model.eval().caption(tokens).std(0).mean() < 1.4
