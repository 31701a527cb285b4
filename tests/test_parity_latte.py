"""Latte: parameter counts, a block against diffusers, files, what each kind of block attends to, and learned motion."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import references
from cases import Equations
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.weights import translate
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data.loader import Batches
from fieldguide.models.diffusion._shared.embeddings import position_embedding, sinusoidal_embedding
from fieldguide.models.diffusion.latte import OFFICIAL
from fieldguide.models.registry import create
from fieldguide.objectives import DDIM, Diffusion, DiscreteProcess
from test_loop import trainer
from test_models import batch, tiny

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def part(name: str):
    """Return a module of diffusers' networks."""
    from tv import diffusers

    return importlib.import_module(f"{diffusers.__name__}.models.{name}")


def test_parameter_names_and_counts_equal_the_authors_xl2():
    with torch.device("meta"):
        model = create("latte-xl2")
    fixed = {"pos_embed": (1, 256, 1152), "temp_embed": (1, 16, 1152)}  # there, parameters without a gradient
    assert sum(p.numel() for p in model.parameters()) + 256 * 1152 + 16 * 1152 == 674_112_416
    names = translate(model.state_dict(), OFFICIAL, reverse=True)
    assert not names.keys() & fixed.keys()
    shapes = {name: tuple(x.shape) for name, x in names.items()}
    assert shapes["y_embedder.embedding_table.weight"] == (102, 1152) and shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2) and shapes["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["t_embedder.mlp.0.weight"] == (1152, 256) and len(shapes) == 28 * 10 + 2 + 4 + 1 + 2 + 2


def test_position_and_time_embeddings_equal_diffusers():
    embeddings = part("embeddings")
    theirs = embeddings.get_2d_sincos_pos_embed(16, 5, base_size=5, output_type="pt")
    torch.testing.assert_close(position_embedding(5, 5, 16), theirs.float().view(25, 16), rtol=1e-5, atol=1e-6)
    theirs = embeddings.get_1d_sincos_pos_embed_from_grid(16, torch.arange(7), output_type="pt")
    torch.testing.assert_close(sinusoidal_embedding(torch.arange(7), 16), theirs.float(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_spatial_block_equals_diffusers():
    """DiT's block in diffusers computes its condition internally, so the same six vectors are compared."""
    model = tiny("latte")
    ours, dim = model.blocks[0], 16
    peer = (
        part("attention")
        .BasicTransformerBlock(
            dim,
            2,
            8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
        .double()
        .eval()
    )
    mine = ours.state_dict()
    q, k, v = mine["attn.qkv.weight"].chunk(3)
    bq, bk, bv = mine["attn.qkv.bias"].chunk(3)
    peer.load_state_dict(
        {
            **{name: x for name, x in peer.state_dict().items() if name.startswith("norm1.emb")},
            "norm1.linear.weight": mine["condition.weight"],
            "norm1.linear.bias": mine["condition.bias"],
            "attn1.to_q.weight": q,
            "attn1.to_k.weight": k,
            "attn1.to_v.weight": v,
            "attn1.to_q.bias": bq,
            "attn1.to_k.bias": bk,
            "attn1.to_v.bias": bv,
            "attn1.to_out.0.weight": mine["attn.proj.weight"],
            "attn1.to_out.0.bias": mine["attn.proj.bias"],
            "ff.net.0.proj.weight": mine["mlp.up.weight"],
            "ff.net.0.proj.bias": mine["mlp.up.bias"],
            "ff.net.2.weight": mine["mlp.down.weight"],
            "ff.net.2.bias": mine["mlp.down.bias"],
        }
    )
    time, label = torch.tensor([3, 700]), torch.tensor([1, 4])
    what = peer.norm1.emb(time, label, hidden_dtype=torch.float64)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, dim, dtype=torch.float64)
    want = torch.stack([peer(x[:, f], timestep=time, class_labels=label) for f in range(3)], 1)
    torch.testing.assert_close(ours(x, what[:, None]), want, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_blocks_attend_along_their_own_axis_only():
    model = tiny("latte")
    torch.manual_seed(0)
    x, what = torch.randn(1, 3, 4, 16, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)
    other = x.clone()
    other[0, 1, 2] = torch.randn(16, dtype=torch.float64)
    for block, inside in ((model.blocks[0], lambda f, n: f == 1), (model.blocks[1], lambda f, n: n == 2)):
        changed = (block(other, what[:, None]) - block(x, what[:, None])).abs().amax(-1)[0] > 1e-12
        assert all(bool(changed[f, n]) == inside(f, n) for f in range(3) for n in range(4))
    whole = model(*batch("latte", 2))
    video, time, label = batch("latte", 2)
    video[:, 0, 0, 0, 0] += 1
    assert ((model(video, time, label) - whole).abs() > 1e-12).all()  # together, everything sees everything


@torch.no_grad()
def test_fewer_frames_and_variance_output():
    model = tiny("latte")
    video, time, label = batch("latte", 2)
    peer = Equations(model, references.latte(model.config)).double()
    peer.load_state_dict(Equations.translate(model.state_dict()))
    torch.testing.assert_close(model(video[:, :2], time, label), peer(video[:, :2], time, label), **EXACT)
    wide = tiny("latte", variance=True)
    peer = Equations(wide, references.latte(wide.config)).double()
    peer.load_state_dict(Equations.translate(wide.state_dict()))
    torch.testing.assert_close(wide(video, time, label), peer(video, time, label), **EXACT)


def test_times_of_frames():
    model = tiny("latte")
    video, time, label = batch("latte", 2)
    peer = Equations(model, references.latte(model.config)).double()
    peer.load_state_dict(Equations.translate(model.state_dict()))
    times = torch.stack([torch.zeros_like(time), time, (time + 300) % 1000], 1)
    found, want = model(video, times, label), peer(video, times, label)
    torch.testing.assert_close(found, want, **EXACT)
    torch.testing.assert_close(model(video, time[:, None].repeat(1, 3), label), model(video, time, label), **EXACT)
    (found**2).sum().backward()
    (want**2).sum().backward()
    grads = Equations.translate({name: p.grad for name, p in model.named_parameters()})
    assert grads.keys() == dict(peer.named_parameters()).keys()
    for name, p in peer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_captions_take_the_place_of_labels():
    """The vector of a caption is added where that of a label is; the encoder itself is that of ddpm-unet."""
    model = tiny("latte", num_classes=0, vocab_size=11, length=5, words=8)
    video, time, _ = batch("latte", 2)
    tokens = torch.tensor([[3, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    labelled = tiny("latte", num_classes=1)
    labelled.load_state_dict({k: x for k, x in model.state_dict().items() if "caption" not in k}, strict=False)
    labelled.label.weight.copy_(model.caption(tokens))  # row 0 is class 1, the last row is no class
    torch.testing.assert_close(model(video, time, tokens), labelled(video, time, torch.tensor([1, 0])), **EXACT)
    torch.testing.assert_close(model(video, time), model(video, time, torch.zeros_like(tokens)), **EXACT)
    assert not torch.allclose(model(video, time, tokens)[0], model(video, time, tokens.flip(1))[0])


@torch.no_grad()
def test_author_files(tmp_path):
    ours = tiny("latte", torch.float32)
    state = translate(ours.state_dict(), OFFICIAL, reverse=True)
    fixed = {"pos_embed": torch.zeros(1, 16, 16), "temp_embed": torch.zeros(1, 3, 16)}
    other = create("latte-test")
    assert weights.load(other, state | fixed) == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), ours.state_dict().values()))
    back = weights.read(weights.save(ours, tmp_path / "x.safetensors", "official"))
    assert back.keys() == state.keys() and all(torch.equal(back[key], x) for key, x in state.items())


@torch.no_grad()
def test_missing_label_and_zero_output_before_training():
    model, (video, time, label) = tiny("latte"), batch("latte", 3)
    torch.testing.assert_close(model(video, time), model(video, time, torch.zeros_like(label)))
    answers = [model(video[:1], time[:1], torch.tensor([number])) for number in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    assert not torch.allclose(model(video, time, label), model(video, time + 1, label))
    fresh = create("latte-test")
    assert not fresh(video.float(), time.float(), label).any()
    x = torch.randn(2, 3, 16, 16)
    assert all(torch.equal(block(x, torch.randn(2, 1, 16)), x) for block in fresh.blocks)  # "zero": blocks begin as nothing
    plain = create("latte-test", num_classes=0)
    assert plain(video.float(), time.float()).shape == video.shape


def test_invalid_inputs_are_rejected():
    model = tiny("latte", torch.float32)
    with pytest.raises(DataError, match="at most frames=3"):
        model(torch.zeros(1, 4, 2, 8, 8), torch.zeros(1))
    with pytest.raises(DataError, match="image=8"):
        model(torch.zeros(1, 3, 2, 8, 10), torch.zeros(1))
    for wrong, words in (
        ({"image": 9}, "multiple of patch=2"),
        ({"depth": 3}, "even"),
        ({"dim": 18}, "multiple of 4"),
        ({"heads": 3}, "heads=3"),
    ):
        with pytest.raises(SettingsError, match=words):
            create("latte-test", **wrong)


def moving(count: int) -> tuple[Tensor, Tensor]:
    """Return a bright square of 3 x 3 on black 8 x 8 that moves one pixel per frame: label 1 right, 2 down."""
    torch.manual_seed(0)
    video, label = torch.full((count, 4, 1, 8, 8), -1.0), torch.randint(1, 3, (count,))
    for i in range(count):
        top, left = torch.randint(0, 3, (2,)).tolist()
        for f in range(4):
            y, x = top + f * (label[i] == 2), left + f * (label[i] == 1)
            video[i, f, 0, y : y + 3, x : x + 3] = 1.0
    return video, label


def centres(video: Tensor) -> Tensor:  # B F 1 S S -> B F 2: row and column of the brightness
    bright = (video[:, :, 0] + 1).clamp(min=0)
    place = torch.arange(8.0)
    total = bright.sum((2, 3)).clamp(min=1e-3)
    return torch.stack([(bright.sum(3) * place).sum(2) / total, (bright.sum(2) * place).sum(2) / total], -1)


@pytest.mark.slow  # test_task_video.py films in `make test`
def test_learns_the_requested_motion():
    video, label = moving(512)
    torch.manual_seed(0)
    model = create("latte-test", frames=4, channels=1, image=8, patch=4, num_classes=2, dim=64, depth=4, heads=4)
    objective = Diffusion(model, DiscreteProcess("cosine", predicts="v"), data="video")
    data = Batches(512, lambda i, _: {"video": video[i], "label": label[i]})
    trainer(objective, data, steps=400, batch=32, lr=2e-3, ema=0.98, weight_decay=0.0).train()
    asked = torch.arange(40) % 2 + 1
    drawn = objective.sample(asked, (4, 1, 8, 8), DDIM(steps=20), guidance=2.0, seed=1)
    moved = centres(drawn)[:, -1] - centres(drawn)[:, 0]
    down = moved[:, 0] > moved[:, 1]
    assert (down == (asked == 2)).float().mean() >= 0.9
