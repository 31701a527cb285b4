"""The number and size of training steps that fit into the minutes."""

import pytest
import torch
from torch import nn

from fieldguide.automl import time_budget
from fieldguide.automl.fit import NullCallback
from fieldguide.automl.time_budget import choose_batch_size, resolve_settings
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches
from fieldguide.objectives import Regression, Supervised

EACH = 1e-3  # seconds that passes take for an example


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Make passes take time in proportion to the rows, independent of the machine."""
    took = lambda batch: EACH * len(batch["x"])
    monkeypatch.setattr(
        time_budget,
        "choose_precision",
        lambda objective, batch, device, say, budget: ("float32", False, {"float32": took(batch)}),
    )
    monkeypatch.setattr(time_budget, "measure_step_seconds", lambda objective, batch, *how, **limits: took(batch))


def resolved(rows=4096, fewest=8, keep_optimizer=True, **settings):
    table = torch.randn(rows, 4)
    batches = Batches(rows, lambda index, generator=None: {"x": table[index], "target": table[index, :1]})
    chosen = choose_batch_size(Settings(**settings), rows, fewest, 64)
    objective = Supervised(nn.Linear(4, 1), ("x",), Regression())
    limits = {"min_batch_size": fewest, "keep_optimizer": keep_optimizer}
    return resolve_settings(chosen, objective, batches, 100, NullCallback(), **limits)


def test_minutes_determine_the_steps():
    """A tenth of a minute at one millisecond per example: fewer than 84 steps of 64."""
    chosen, seconds, most = resolved(rows=4096, fewest=64, minutes=0.1)
    assert chosen.batch_size == 64 and seconds == pytest.approx(0.064 * 1.1, rel=0.1)
    assert 6 * 0.9 / 2 / seconds - 1 <= chosen.steps <= 6 * 0.9 / seconds and chosen.steps < most


@pytest.mark.parametrize(("minutes", "batch"), [(0.1, 8), (0.5, 16)])
def test_few_minutes_give_smaller_batches(minutes, batch):
    """Half a minute allows a thousand steps of 16 examples, but not of 32."""
    chosen, _, most = resolved(minutes=minutes)
    assert chosen.batch_size == batch
    assert (chosen.steps >= min(time_budget.ENOUGH_STEPS, most)) == (batch == 16)


def test_batches_are_not_reduced_if_the_optimizer_dominates(monkeypatch):
    monkeypatch.setattr(time_budget, "measure_orthogonalization_seconds", lambda objective, device: 0.1)
    chosen, seconds, _ = resolved(minutes=0.1, optimizer="muon")
    assert chosen.batch_size == 64 and seconds == pytest.approx(0.064 * 1.1 + 0.1, rel=0.1)
    assert resolved(minutes=0.1)[0].batch_size == 8  # AdamW makes nothing orthogonal


@pytest.mark.parametrize(("update", "expected"), [(0.1, "adamw"), (0.01, "muon")])
def test_muon_is_replaced_if_its_update_dominates(update, expected, monkeypatch):
    """A step of 64 rows takes 64 ms. AdamW brings its own learning rate, and its steps take less time."""
    monkeypatch.setattr(time_budget, "measure_orthogonalization_seconds", lambda objective, device: update)
    chosen, seconds, _ = resolved(fewest=64, minutes=0.1, optimizer="muon", lr=0.02, keep_optimizer=False)
    assert chosen.optimizer == expected
    assert chosen.lr == (1e-3 if expected == "adamw" else 0.02)
    assert seconds == pytest.approx(0.064 * 1.1 + (0.01 if expected == "muon" else 0), rel=0.1)
    assert resolved(fewest=64, minutes=0.1, optimizer="muon")[0].optimizer == "muon"  # a user's choice


def test_more_rows_give_larger_batches():
    assert [choose_batch_size(Settings(), rows, 8, 64).batch_size for rows in (3, 100, 1000, 100_000)] == [3, 8, 32, 64]
    assert choose_batch_size(Settings(grad_accum_steps=4), 1000, 8, 64).batch_size % 4 == 0


def test_muon_time_grows_with_the_matrices():
    few, many = (
        time_budget.measure_orthogonalization_seconds(
            nn.Sequential(*[nn.Linear(256, 256) for _ in range(n)]), torch.device("cpu")
        )
        for n in (1, 50)
    )
    assert 0 < 5 * few < many
    assert (
        time_budget.measure_orthogonalization_seconds(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)), torch.device("cpu"))
        == 0
    )
