"""The contrastive objective: its equations, two processes, its temperature, and what it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fieldguide import create
from fieldguide.core.errors import SettingsError
from fieldguide.data.loader import Batches
from fieldguide.objectives import Contrastive
from test_distributed import torchrun
from test_loop import trainer
from test_models import batch, tiny

HERE = Path(__file__).parent


def slow_loss(pictures: Tensor, texts: Tensor, scale: Tensor, same: list[int], shown: list[int]) -> Tensor:
    """Compute the loss pair by pair in both directions; examples with equal text or image share the target."""
    total, count = 0.0, len(pictures)
    for i in range(count):
        right = [j for j in range(count) if same[j] == same[i] or shown[j] == shown[i]]
        for one, all_ in ((pictures[i], texts), (texts[i], pictures)):
            power = [torch.exp(scale * (one * other).sum()) for other in all_]
            total = total - sum(torch.log(power[j] / sum(power)) for j in right) / len(right)
    return total / (2 * count)


@pytest.mark.parametrize(
    ("same", "shown"),
    [(range(5), range(5)), ([0, 1, 0, 0, 1], range(5)), (range(5), [0, 0, 1, 2, 2]), ([0, 1, 0, 2, 3], [0, 0, 1, 2, 2])],
    ids=["all differ", "equal texts", "several texts of a picture", "both"],
)
def test_loss_equals_the_equations(same, shown):
    model = tiny("clip")
    inputs = dict(zip(("image", "tokens", "mask"), batch("clip")))
    given = inputs | {name: torch.tensor(x) for name, x in (("text", same), ("picture", shown)) if len(set(x)) < 5}
    parts = Contrastive(model)(given)
    grads = torch.autograd.grad(parts["loss"], list(model.parameters()))
    want = slow_loss(
        model.encode_image(inputs["image"]),
        model.encode_text(inputs["tokens"], inputs["mask"]),
        model.logit_scale.exp(),
        same,
        shown,
    )
    torch.testing.assert_close(parts["loss"], want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close((parts["image"] + parts["text"]) / 2, parts["loss"])
    for ours, theirs in zip(grads, torch.autograd.grad(want, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["texts", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "sigmoid", "pairs"))]
)
def test_two_processes_equal_one_process(kind, tmp_path):
    """Six SGD steps in float64 with 11 rows on two processes: losses and weights equal those of the joint batch."""
    for processes in (1, 2):
        torchrun(processes, str(HERE / "contrastive_worker.py"), str(tmp_path / f"{processes}.pt"), kind)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert (one["world"], two["world"]) == (1, 2)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=1e-6)  # logged in float32
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-9, atol=1e-11)
    assert (one["losses"][0] - one["losses"][-1]).abs().max() > 1e-3


def test_logit_scale_is_clamped_at_100():
    model = tiny("clip", torch.float32)
    objective, inputs = Contrastive(model), dict(zip(("image", "tokens", "mask"), batch("clip", dtype=torch.float32)))
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    parts = objective(inputs)
    assert parts["scale"].item() == pytest.approx(100.0) and model.logit_scale.item() == pytest.approx(math.log(100))
    parts["loss"].backward()
    assert model.logit_scale.grad != 0  # random pairs want a lower scale, and are heard
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    objective(inputs)
    assert model.logit_scale.item() == 2.0


def test_half_precision_logits_are_accurate():
    model = tiny("clip", torch.float32)
    objective, inputs = Contrastive(model), dict(zip(("image", "tokens", "mask"), batch("clip", dtype=torch.float32)))
    pairs = model(*inputs.values()).detach() * 3

    class Given(torch.nn.Module):
        logit_scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, *_):
            return pairs

    objective.model = Given()
    logits = pairs[:, 0].double() @ pairs[:, 1].double().T
    want = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(objective(inputs)["loss"].double(), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_outputs_are_unit_vectors():
    model = tiny("clip")
    inputs = dict(zip(("image", "tokens", "mask"), batch("clip")))
    found = Contrastive(model).outputs(inputs)
    assert set(found) == {"image", "text"}
    torch.testing.assert_close(found["image"], model.encode_image(inputs["image"]))
    torch.testing.assert_close(found["text"], model.encode_text(inputs["tokens"], inputs["mask"]))


def test_batch_of_one_is_rejected():
    inputs = {name: x[:1] for name, x in zip(("image", "tokens", "mask"), batch("clip"))}
    with pytest.raises(SettingsError, match="batch_size=2"):
        Contrastive(tiny("clip"))(inputs)


@pytest.mark.slow
def test_learns_to_match_digits_and_names():
    """Unseen images of digits find their name among ten."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    y = torch.from_numpy(found.target)
    names = torch.stack([torch.full((10,), 20), torch.arange(10), torch.full((10,), 29)], 1)  # "a", the digit, end
    mask = torch.ones(1, 3, dtype=torch.bool)
    seen = np.arange(1400)
    torch.manual_seed(0)
    model = create("clip-test", image=8, patch=2, channels=1, dim=32, text_dim=32, text_heads=2, embed=16)
    data = Batches(
        1400,
        lambda i, _: {"image": x[seen[i]], "tokens": names[y[seen[i]]], "mask": mask.expand(len(i), -1), "text": y[seen[i]]},
    )
    trainer(Contrastive(model), data, steps=250, batch=64, lr=3e-3, weight_decay=0.0).train()
    with torch.no_grad():
        scores = model.encode_image(x[1400:]) @ model.encode_text(names, mask.expand(10, -1)).T
    assert (scores.argmax(1) == y[1400:]).float().mean() > 0.8
