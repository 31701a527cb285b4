"""A frozen reference model: an objective such as DPO needs one objective and one task, in training and on resume."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fieldguide.automl import fit as fitting
from fieldguide.automl.callbacks import NullCallback
from fieldguide.data import read
from fieldguide.objectives import Classification, Supervised
from fieldguide.tasks import tasks
from fieldguide.tasks.tabular.tables import TabularClassification
from fieldguide.training.state import Interrupted

SETTINGS = {"steps": 6, "eval_steps": 2, "batch_size": 16, "precision": "float32"}


class StayClose(Supervised):
    """Cross-entropy plus the divergence from the reference's predictions."""

    def __init__(self, model, inputs, loss, reference=None):
        super().__init__(model, inputs, loss)
        self.held = (reference,)  # in a tuple: no part of the module, neither trained nor stored

    def forward(self, batch, phase="train"):
        losses = super().forward(batch, phase)
        logits = self.compute_predictions(batch)
        with torch.no_grad():
            target = self.held[0](*(batch[name] for name in self.inputs)).softmax(-1)
        drift = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        return {"loss": losses["loss"] + drift, "drift": drift}


class Preference(TabularClassification):
    name = "preference"
    needs_reference = True

    @classmethod
    def match(cls, data):
        return None

    def objective(self, model, card, settings, reference=None, **parts):
        return StayClose(model, card.inputs, Classification(0.0, None), reference)


@pytest.fixture
def preference(monkeypatch):
    monkeypatch.setitem(tasks(), "preference", Preference)


class Stop(NullCallback):
    def on_step(self, step, losses):
        if step == 3:
            import signal

            signal.raise_signal(signal.SIGINT)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def test_reference_is_the_initial_network_and_stays_frozen(preference):
    plan = fitting.build_plan(read("iris"), task="preference", model="mlp-test", settings=SETTINGS)
    reference, initial = plan.objective.held[0], weights(plan.objective.model)
    assert all(torch.equal(a, b) for a, b in zip(weights(reference), initial))
    fitting.train(plan, fitting.build_trainer(plan, NullCallback()))
    assert all(torch.equal(a, b) for a, b in zip(weights(reference), initial))
    assert not all(torch.equal(a, b) for a, b in zip(weights(plan.objective.model), initial))
    assert not any(p.requires_grad for p in reference.parameters())
    assert not any("held" in name for name, _ in plan.objective.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True])
def test_resumed_run_has_the_same_reference(preference, tmp_path, pretrained):
    start = (
        {"weights": fitting.fit("iris", model="mlp-test", settings=SETTINGS, out=tmp_path / "first").path} if pretrained else {}
    )
    arguments = {"task": "preference", "model": "mlp-test", "settings": SETTINGS, **start}
    whole = fitting.fit("iris", out=tmp_path / "whole", **copy.copy(arguments))
    with pytest.raises(Interrupted):
        fitting.fit("iris", out=tmp_path / "stopped", callback=Stop(), **arguments)
    again = fitting.resume(tmp_path / "stopped")
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
    assert whole.scores == again.scores
