"""Pre-training on hidden frames: what is hidden, both losses against slow equations, MFCCs and clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dct

import fieldguide
from fieldguide.core.errors import DataError
from fieldguide.data.preprocessing.frame_clusters import FrameClusters, compute_deltas, compute_mfcc, locate_mfcc, pad_clusters
from fieldguide.data.preprocessing.speech import LogMel
from fieldguide.data.preprocessing.waveform import FrameGrid
from fieldguide.models.registry import create
from fieldguide.objectives.contrastive_frames import ContrastiveFrames, find_right
from fieldguide.objectives.hidden_frames import sample_hidden_frames
from fieldguide.objectives.masked_clusters import MaskedClusters, align_frames
from tv import transformers

LENGTHS = torch.tensor([41, 30, 23])


def build(name="hubert", output="clusters", dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = create(f"{name}-test", output_type=output, mask_time=0.2, **fields).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make_batch(dtype=torch.float64, **more):
    torch.manual_seed(1)
    return {"waveform": torch.randn(3, 41, dtype=dtype), "lengths": LENGTHS, **more}


# What is hidden


def test_spans_are_as_long_as_each_recording_allows():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([40, 6, 0])
    for _ in range(20):
        hidden = sample_hidden_frames(counts, 40, generator, share=0.05, length=10)
        runs = "".join("x" if h else "." for h in hidden[0].tolist()).split(".")
        assert all(len(run) >= 10 for run in runs if run), "no span is shortened by another recording"
        assert hidden[1, :6].all() and not hidden[1, 6:].any() and not hidden[2].any()


def test_spans_begin_everywhere():
    many = torch.stack([sample_hidden_frames(torch.tensor([30]), 30, None, share=0.04, length=10)[0] for _ in range(300)])
    begins = many[:, 1:] & ~many[:, :-1]
    assert begins[:, 19].any() and not begins[:, 20:].any() and many[:, 0].any()


def test_scored_frames_depend_on_the_recording_alone():
    objective = ContrastiveFrames(build("wav2vec2", "contexts"), distractors=4).eval()
    batch = make_batch(seed=torch.tensor([5, 6, 7]))
    whole = objective.hide(batch)
    frames = objective.model.frames(23)
    alone = objective.hide({"waveform": batch["waveform"][2:, :23], "lengths": LENGTHS[2:], "seed": torch.tensor([7])})
    assert torch.equal(alone["hidden"][0], whole["hidden"][2, :frames]) and not whole["hidden"][2, frames:].any()
    assert torch.equal(alone["distractors"][0], whole["distractors"][2, :frames])
    outputs, again = objective.outputs(batch), objective.outputs(batch)
    assert all(torch.equal(outputs[name], again[name]) for name in outputs)
    torch.manual_seed(3)
    first = objective.train().hide(batch)
    torch.manual_seed(3)
    assert torch.equal(first["hidden"], objective.hide(batch)["hidden"])  # resumed training draws the same


def test_frames_of_a_grid_equal_those_of_the_network():
    model = create("hubert-base", dim=16, depth=1, heads=2, hidden=8, pos_groups=2, stem_dims=(4,) * 7)
    grid = FrameGrid()
    assert (grid.stride, grid.field) == (model.stride, model.field) == (320, 400)
    samples = torch.arange(0, 3000, 7)
    assert torch.equal(grid.frames(samples), model.frames(samples))
    assert grid.frames(399) == 0 and grid.frames(400) == 1


# Contrastive loss


def test_a_single_code_is_no_better_than_chance():
    logits = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.5], [1.0, -torch.inf, -torch.inf], [1.0, -torch.inf, 0.0]])
    assert find_right(logits).tolist() == pytest.approx([0, 1, 1 / 3, 1 / 2])
    model = build("wav2vec2", "contexts")
    with torch.no_grad():
        model.quantizer.choose.weight.zero_()
        model.quantizer.choose.bias.zero_()
    outputs = ContrastiveFrames(model, distractors=9).eval().outputs(make_batch(seed=torch.arange(3)))
    torch.testing.assert_close(outputs["right"] / outputs["count"], torch.full((3,), 0.1, dtype=torch.float64))
    assert (outputs["used"].sum(-1) == outputs["count"][:, None]).all()


@torch.no_grad()
def test_convolutions_are_penalized():
    """The mean square over real frames; the penalty changes the loss by its factor."""
    model, batch = build("wav2vec2", "contexts").eval(), make_batch(seed=torch.arange(3))
    plain, penalized = ContrastiveFrames(model).eval()(batch), ContrastiveFrames(model, penalty=10.0).eval()(batch)
    squares, count = 0.0, 0
    for wave, length in zip(batch["waveform"], LENGTHS.tolist()):
        frames = model.run_stem(wave[None, :length], None)[0].detach()
        squares, count = squares + float(frames.square().sum()) / frames.shape[1], count + len(frames)
    assert float(penalized["magnitude"]) == pytest.approx(squares / count, rel=1e-9)
    assert float(penalized["loss"] - plain["loss"]) == pytest.approx(10 * squares / count, rel=1e-9)


def test_temperature_falls_as_published():
    """2 x 0.999995^step, at least 0.5, for 400,000 steps (arXiv:2006.11477, section 4.2)."""
    model = build("wav2vec2", "contexts")
    objective = ContrastiveFrames(model).train()
    for step in (0, 50_000, 200_000, 300_000, 400_000):
        objective.progress = step / 400_000
        objective(make_batch())
        assert model.quantizer.temperature == pytest.approx(max(2 * 0.999995**step, 0.5), rel=0.02)


# Clusters


def predict_slowly(model, waveform, lengths, hidden, clusters, first, step):
    """Equations 2 and 3 of arXiv:2106.07447, one hidden frame after another; the mean, and the features' mean square."""
    losses, squares, frames = [], [], 0
    for row in range(len(waveform)):
        wave = waveform[row : row + 1, : lengths[row]]
        count = model.frames(wave.shape[1])
        convolved = model.run_stem(wave, None)
        squares.append(convolved.square().mean(-1).sum())
        frames += count
        x = model.proj(model.stem_out(convolved)).clone()
        x[0, hidden[row, :count]] = model.mask_embed
        x = x + model.pos(x)
        x = x if model.config.pre_norm else model.norm(x)
        for block in model.blocks:
            x = block(x, None)
        x = model.norm(x) if model.config.pre_norm else x
        for s in hidden[row, :count].nonzero()[:, 0].tolist():
            middle = s * model.stride + model.field / 2
            places = torch.tensor([abs(middle - first - t * step) for t in range(int((clusters[row] >= 0).sum()))])
            target = int(clusters[row, places.argmin()])
            o = model.clusters.proj(x[0, s])
            scores = [F.cosine_similarity(o, e, 0) / 0.1 for e in model.clusters.vectors]
            losses.append(torch.stack(scores).logsumexp(0) - scores[target])
    return torch.stack(losses).mean(), torch.stack(squares).sum() / frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("form", [{}, {"pre_norm": False, "stem_norm": "group", "stem_bias": False}], ids=["layer", "group"])
def test_prediction_of_clusters_equals_equations(form, dtype):
    model = build(dtype=dtype, **form).eval()
    clusters = pad_clusters([np.random.default_rng(i).integers(0, 6, n) for i, n in enumerate((19, 14, 10))])
    where = {"first": 2.0, "step": 2.0}
    batch = make_batch(dtype, seed=torch.arange(3), clusters=clusters)
    objective = MaskedClusters(model, **where, share=0.2, length=2, penalty=10.0).eval()
    hidden = objective.hide(batch)["hidden"]
    losses = objective(batch)
    found = torch.autograd.grad(losses["loss"], list(model.parameters()), allow_unused=True)
    nats, square = predict_slowly(model, batch["waveform"], LENGTHS.tolist(), hidden, clusters, **where)
    expected = torch.autograd.grad(nats + 10 * square, list(model.parameters()), allow_unused=True)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(losses["nats"], nats.detach(), **close)
    torch.testing.assert_close(losses["magnitude"], square.detach(), **close)
    for (name, _), a, b in zip(model.named_parameters(), found, expected):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, **close, msg=lambda m, name=name: f"{name}: {m}")
    outputs = objective.outputs(batch)
    torch.testing.assert_close(outputs["nats"].sum() / outputs["count"].sum(), nats.detach(), **close)
    assert torch.equal(outputs["count"], hidden.sum(1)) and int(outputs["used"].sum()) == int(hidden.sum())
    assert float(outputs["right"].sum() / outputs["count"].sum()) == pytest.approx(float(losses["accuracy"]))


def test_frames_are_aligned():
    """At 16 kHz, every second MFCC frame of 10 ms belongs to a frame of 20 ms, as in the authors' code."""
    where = locate_mfcc(16_000)
    assert where == (200.0, 160.0)
    assert align_frames(5, 400, 320, *where).tolist() == [0, 2, 4, 6, 8]
    assert align_frames(3, 400, 160, first=300.0, step=160.0).tolist() == [0, 0, 1]


def test_features_equal_slow_equations():
    rng = np.random.default_rng(0)
    wave = (rng.standard_normal(4000) * 3000).astype(np.int16)
    found = compute_mfcc(wave, 8000)
    loud = LogMel(rate=8000, bands=23).spectrogram(torch.from_numpy(wave / 32768.0)[None])[0].numpy()
    frames = 1 + (4000 - 200) // 80
    assert found.shape == (frames, 39) and found.dtype == np.float32
    for t in (0, 7, frames - 1):
        for k in range(13):
            value = sum(loud[t, b] * math.cos(math.pi * k * (b + 0.5) / 23) for b in range(23))
            value *= math.sqrt((1 if k == 0 else 2) / 23) * (1 + 11 * math.sin(math.pi * k / 22))
            assert found[t, k] == pytest.approx(value, rel=1e-3, abs=1e-3)
    at = lambda t: found[min(max(t, 0), frames - 1), :13].astype(float)
    for t in (0, 1, 9, frames - 1):
        slope = sum(n * (at(t + n) - at(t - n)) for n in (1, 2)) / 10
        np.testing.assert_allclose(found[t, 13:26], slope, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[:, 26:], compute_deltas(found[:, 13:26]), rtol=1e-3, atol=1e-3)
    assert dct(np.ones(23), norm="ortho")[0] == pytest.approx(math.sqrt(23))


def test_clusters_are_found_and_saved(tmp_path):
    rng = np.random.default_rng(0)
    middles = np.array([[0.0, 0], [10, 0], [0, 10]])
    rows = [middles[rng.integers(0, 3, 50)] + rng.normal(0, 0.5, (50, 2)) for _ in range(4)]
    found = FrameClusters.fit(rows, 3, first=200.0, step=160.0)
    assert np.abs(np.sort(found.centers, 0) - np.sort(middles, 0)).max() < 0.5
    for row in rows:
        slow = [int(np.argmin([np.square(x - c).sum() for c in found.centers])) for x in row]
        assert found.assign(row.astype(np.float32)).tolist() == slow
    found.save(tmp_path)
    again = FrameClusters.load(tmp_path, found.to_json())
    assert np.array_equal(again.centers, found.centers) and (again.first, again.step) == (200.0, 160.0)
    with pytest.raises(DataError, match=r"200 frames, too few for task\.clusters=300"):
        FrameClusters.fit(rows, 300, first=0.0, step=1.0)


def test_states_of_blocks_equal_transformers(tmp_path):
    """Of a network that predicts clusters, whose files transformers reads as the bare encoder."""
    model = build(dtype=torch.float32, pre_norm=False, stem_norm="group", stem_bias=False).eval()
    fieldguide.save(model, tmp_path, "hf")
    waveform = make_batch(torch.float32)["waveform"]
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    states = theirs(waveform, output_hidden_states=True).hidden_states
    for a, b in zip(model.list_states(waveform), states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    again = fieldguide.load(tmp_path)
    assert again.config == model.config and torch.equal(again(waveform), model(waveform))
