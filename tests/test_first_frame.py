"""Videos whose first frame is known: what the network gets, what is trained, and what is sampled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fieldguide.objectives import DDIM, DPMSolver, build_process
from fieldguide.objectives.diffusion import Diffusion, FirstFrame, VideoDiffusion, insert_first_frame
from test_models import tiny


class Recorder(nn.Module):
    """A network that returns a part of its input and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(0.3)), []

    def forward(self, video, time, label=None):
        self.calls.append((video, time, label))
        return self.scale * video + 0.1 * label.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "edm"])
def test_first_frame_is_clean_and_has_the_time_of_the_least_noise(schedule):
    process = build_process(schedule, None)
    torch.manual_seed(0)
    video, first, time = torch.randn(3, 4, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.4, 0.5, 0.6])
    known = torch.tensor([True, False, True])
    x, times = insert_first_frame(process, video, time, first, known)
    assert torch.equal(x[:, 1:], video[:, 1:]) and torch.equal(x[1], video[1]) and torch.equal(times[1], time[1].repeat(4))
    assert torch.equal(times[:, 1:], time[:, None].repeat(1, 3))
    least = process.get_level(process.time_at(torch.zeros(1)), 1)
    scaled = first * process.get_input_scale(least)
    torch.testing.assert_close(x[[0, 2], 0], scaled[[0, 2]])
    assert times[0, 0] == times[2, 0] == least.time.item() and least.noise.item() < 0.05 * least.signal.item()
    assert not torch.equal(video[0], x[0])  # the input is not changed in place


def test_loss_counts_generated_frames_only():
    """Against the equation, frame by frame, with the same draws; the known frame has no gradient."""
    process, clean, label = build_process("cosine", "v"), torch.randn(6, 3, 1, 2, 2), torch.arange(6) % 3 + 1
    network = Recorder()
    objective = VideoDiffusion(network, process, given=0.5, drop=0.5)
    torch.manual_seed(1)
    loss = objective({"video": clean, "label": label})["loss"]
    torch.manual_seed(1)
    time = objective.times.draw(process, 6, clean.device)
    kept = torch.rand(6) >= 0.5
    known = torch.rand(6) < 0.5
    noise = torch.randn_like(clean)
    assert known.any() and not known.all() and kept.any() and not kept.all()
    errors = []
    for i in range(6):
        signal, scale, frames = process.signal[time[i]], process.noise[time[i]], []
        for f in range(3):
            if f == 0 and known[i]:
                continue
            x = signal * clean[i, f] + scale * noise[i, f]
            target = signal * noise[i, f] - scale * clean[i, f]
            frames.append(((0.3 * x + 0.1 * label[i] * kept[i] - target) ** 2).mean())
        errors.append(sum(frames) / len(frames))
    torch.testing.assert_close(loss, sum(errors) / 6)
    ((video, times, given),) = network.calls
    assert torch.equal(video[known, 0], clean[known, 0]) and not times[known, 0].any() and torch.equal(given, label * kept)


def test_without_known_frames_it_is_the_objective_of_other_data():
    clean, label, process = torch.randn(4, 3, 1, 2, 2), torch.arange(4), build_process("cosine", "v")
    losses = []
    for kind in (Diffusion(Recorder(), process, data="video"), VideoDiffusion(Recorder(), process)):
        torch.manual_seed(2)
        losses.append(kind({"video": clean, "label": label})["loss"])
        assert kind.model.calls[0][1].shape == (4,)  # one time for each video
    assert torch.equal(*losses)
    whole = VideoDiffusion(Recorder(), process, given=0.5)
    assert torch.equal(
        whole.outputs({"video": clean, "label": label})["loss"], kind.outputs({"video": clean, "label": label})["loss"]
    )


@torch.no_grad()
@pytest.mark.parametrize("sampler", [DDIM(steps=4), DPMSolver(steps=4, stochastic=True)])
def test_samples_start_with_the_known_frame(sampler):
    network = tiny("latte", torch.float32)
    objective = VideoDiffusion(network, build_process("cosine", "v"), given=0.25)
    first, known = torch.rand(3, 2, 8, 8) * 2 - 1, torch.tensor([True, False, True])
    label, shape = torch.tensor([1, 2, 3]), (3, 2, 8, 8)
    whole = objective.sample(label, shape, sampler, first=first, known=known, guidance=2.0)
    assert torch.equal(whole[known, 0], first[known]) and not torch.equal(whole[1, 0], first[1])
    plain = objective.sample(label, shape, sampler, guidance=2.0)
    torch.testing.assert_close(whole[1], plain[1])  # a row without a known frame
    assert not torch.allclose(whole[0, 1:], plain[0, 1:])
    alone = objective.sample(label[2:], shape, sampler, first=first[2:], known=known[2:], guidance=2.0, numbers=[2])
    torch.testing.assert_close(alone[0], whole[2])  # a sample does not depend on the batch
    other = objective.sample(label, shape, sampler, first=-first, known=known, guidance=2.0)
    assert not torch.allclose(other[0, 1:], whole[0, 1:])


@torch.no_grad()
def test_guidance_sees_the_known_frame_twice():
    network, process = Recorder(), build_process("cosine", "v")
    first, known = torch.randn(2, 1, 2, 2), torch.tensor([True, False])
    video, time, label = torch.randn(4, 3, 1, 2, 2), torch.full((4,), 500.0), torch.tensor([1, 2, 0, 0])
    FirstFrame(network, process, first, known)(video, time, label)
    x, times, given = network.calls[0]
    assert torch.equal(x[0, 0], first[0]) and torch.equal(x[2, 0], first[0]) and torch.equal(x[[1, 3]], video[[1, 3]])
    assert times[:, 0].tolist() == [0, 500, 0, 500] and torch.equal(given, label)
