"""The training loop: accumulation, phases, averages, optimizers, schedules, early stopping, and non-finite losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fieldguide.automl.fit import NullCallback, build_plan
from fieldguide.core.errors import SettingsError, TrainingError
from fieldguide.core.settings import Settings, parse
from fieldguide.data import read
from fieldguide.data.loader import Batches, iterate_in_order, make_generator, mix_seeds, plan_batches, steps_per_epoch
from fieldguide.objectives import Adversarial, Classification, Objective, Phase, Regression, Supervised
from fieldguide.training.ema import ExponentialMovingAverage
from fieldguide.training.optim import Muon, build_optimizers, get_lr_factor, orthogonalize
from fieldguide.training.trainer import Trainer


def line(count: int = 64) -> Batches:
    """Return points on a plane, without noise."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    return Batches(count, lambda index, _: {"vector": x[index], "target": y[index]})


def regression() -> Supervised:
    torch.manual_seed(0)
    return Supervised(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), ("vector",), Regression())


def settled(**changes) -> Settings:
    return Settings().with_(
        {"steps": 20, "batch": 16, "evaluate": 5, "precision": "float32", "channels_last": False, "minutes": 0} | changes
    )


def trainer(objective, batches=None, folder=None, evaluate=None, **changes) -> Trainer:
    return Trainer(
        objective,
        batches or line(),
        settled(**changes),
        device=torch.device("cpu"),
        callback=NullCallback(),
        folder=folder,
        evaluate=evaluate,
    )


def weights(objective) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in objective.parameters()])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(accumulate):
    whole, parts = regression().double(), regression().double()
    batches = line()
    double = Batches(64, lambda i, g: {k: t.double() for k, t in batches.make(i, g).items()})
    trainer(whole, double, optimizer="sgd", lr=0.1).train()
    trainer(parts, double, optimizer="sgd", lr=0.1, accumulate=accumulate).train()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-11)


def test_other_optimizers_have_their_own_learning_rate():
    """A learning rate of 0.01 suits Muon, but AdamW would diverge."""
    recipe = Settings(optimizer="muon", lr=1e-2)
    assert recipe.override({"optimizer": "adamw"}).lr == 1e-3
    assert recipe.override({"optimizer": "adamw", "lr": "0.003"}).lr == 3e-3
    assert recipe.override({"optimizer": "muon"}) == recipe.override({}) == recipe
    with pytest.raises(SettingsError, match="none of adamw"):
        recipe.override({"optimizer": "adam"})
    made = build_plan(read("iris"), model="mlp-test", settings={"optimizer": "sgd", "steps": 2, "precision": "float32"})
    assert (made.settings.optimizer, made.settings.lr) == ("sgd", 0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_every_optimizer_learns(optimizer):
    objective = regression()
    trainer(objective, optimizer=optimizer, lr=0.03, steps=300, weight_decay=0.0).train()
    batch = line().make(np.arange(64), None)
    assert objective(batch)["loss"] < 0.1 < regression()(batch)["loss"]


def test_muon_equals_torch():
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4), [torch.randn(6, 4) for _ in range(4)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1)
    peer = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        peer.step()
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)  # theirs iterates in bfloat16


@pytest.mark.parametrize("shape", [(3, 12, 14), (3, 14, 12), (2, 8, 40), (2, 40, 8), (1, 6, 12)])
def test_orthogonalization_equals_the_published_iteration(shape):
    """For singular values from 1 to 1e-4, compared with the published equation in float64, on both code paths."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(0, -4, shape[-1])
    expected = x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True)
    for _ in range(5):
        square = expected @ expected.mT
        expected = 3.4445 * expected - 4.7750 * square @ expected + 2.0315 * square @ square @ expected
    torch.testing.assert_close(orthogonalize(x, dtype=torch.float32).double(), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 32, 96), (2, 96, 32)])
def test_orthogonalization_in_bfloat16_is_close(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    exact, quick = orthogonalize(x, dtype=torch.float32), orthogonalize(x, dtype=torch.bfloat16)
    assert quick.dtype == torch.bfloat16
    assert (quick.float() - exact).norm() < 0.03 * exact.norm()


def test_muon_orthogonalizes_kernels_as_matrices():
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 16, 40)).float())
    assert (singular > 0.5).all() and (singular < 1.4).all()
    kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
    before, kernel.grad = kernel.detach().clone(), torch.randn(8, 3, 3, 3)
    Muon([kernel], lr=0.1).step()
    singular = torch.linalg.svdvals((before - kernel.detach()).flatten(1))
    assert singular.min() > 0.5 * singular.max()


def test_no_weight_decay_for_vectors_and_embeddings():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    made = build_optimizers(net, net.named_parameters(), settled(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for o in made for g in o.param_groups for p in g["params"]}
    assert {n: decay[id(p)] for n, p in net.named_parameters()} == {
        "0.weight": 0,
        "1.weight": 0.5,
        "1.bias": 0,
        "2.weight": 0,
        "2.bias": 0,
    }


def test_schedule_warms_up_then_decays():
    s = settled(steps=100, warmup=0.1)
    rates = [get_lr_factor(s, i) for i in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert np.all(np.diff(rates[10:]) <= 0) and rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_ema_follows_and_restores_the_weights():
    net = nn.Linear(2, 2)
    first = net.weight.detach().clone()
    average = ExponentialMovingAverage(net, decay=0.9)
    with torch.no_grad():
        net.weight += 1
    average.update(1000)
    with average.average_parameters():
        torch.testing.assert_close(net.weight.detach(), first + 0.1)
    torch.testing.assert_close(net.weight.detach(), first + 1)


def test_best_weights_and_early_stopping():
    objective, seen = regression(), []

    def evaluate(o):
        seen.append(weights(o))
        return {"loss": abs(len(seen) - 3)}  # the third evaluation is best

    t = trainer(objective, evaluate=evaluate, steps=1000, patience=4)
    state = t.train()
    assert state.best_step == 15 and state.step == 35 and "loss has not improved" in state.stopped
    torch.testing.assert_close(weights(objective), seen[2])


def gan() -> Adversarial:
    from fieldguide import create

    torch.manual_seed(0)
    return Adversarial(create("simple-gan", img_dim=64, z_dim=16), create("simple-gan-discriminator", img_dim=64), noise=16)


def digits() -> tuple[torch.Tensor, Batches]:
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data).float() / 8 - 1
    return x, Batches(len(x), lambda index, _: {"vector": x[index]})


class Clock:
    """A clock that advances by `seconds` per step, independent of the machine."""

    def __init__(self, monkeypatch, seconds: float):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr("fieldguide.training.trainer.time", self)

    def monotonic(self) -> float:
        return self.now

    def objective(self) -> Supervised:
        made = regression()
        made.register_forward_pre_hook(lambda *_: setattr(self, "now", self.now + self.seconds))
        return made


@pytest.mark.parametrize("planned", [30, 400, 4000])
def test_steps_are_replanned_after_a_wrong_estimate(planned, monkeypatch):
    clock = Clock(monkeypatch, 0.1)  # one minute holds 600 steps
    loop = Trainer(
        clock.objective(),
        line(),
        settled(steps=planned, minutes=1, evaluate=25),
        device=torch.device("cpu"),
        callback=NullCallback(),
        evaluate=lambda _: {"loss": 1.0 - clock.now},
        metric=("loss", "min"),
        max_steps=5000,
    )
    state = loop.train()
    assert 50 < clock.now < 62 and not state.stopped and state.step == loop.settings.steps
    assert loop.runners[0].lr < 1e-3 * loop.settings.lr  # the rate has come down


def test_short_load_does_not_replan_repeatedly(monkeypatch):
    clock = Clock(monkeypatch, 0.1)
    objective, said = clock.objective(), []
    pauses = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.02  # one step in fifty takes 2.1 s
    objective.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 2.0 * bool(pauses[loop.state.step])))
    callback = NullCallback()
    callback.log, callback.on_replan = lambda text: None, said.append
    loop = Trainer(
        objective,
        line(),
        settled(steps=600, minutes=1, evaluate=10),
        device=torch.device("cpu"),
        callback=callback,
        evaluate=lambda _: {"loss": 1.0 - clock.now},
        metric=("loss", "min"),
        max_steps=5000,
    )
    state = loop.train()
    assert 50 < clock.now < 61 and not state.stopped and state.step == loop.settings.steps
    assert len(said) <= 6


def test_all_processes_follow_the_plan_of_the_first(monkeypatch):
    clock = Clock(monkeypatch, 1.0)  # this one's minutes are nearly over
    loop = Trainer(
        clock.objective(),
        line(),
        settled(steps=100, minutes=1),
        device=torch.device("cpu"),
        callback=NullCallback(),
        max_steps=5000,
    )
    loop.state.step, loop.state.seconds, loop.pace_start = 50, 59.0, (25, 34.0)
    monkeypatch.setattr("fieldguide.core.distributed.broadcast", lambda value: (30.0, 250))
    assert loop.replan_steps() and loop.settings.steps == 300
    loop.state.step = 75
    monkeypatch.setattr("fieldguide.core.distributed.broadcast", lambda value: (-1.0, 1))
    assert not loop.replan_steps() and loop.settings.steps == 300


def test_resumed_run_keeps_the_replanned_steps(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, 0.1)
    make = lambda: Trainer(
        clock.objective(),
        line(),
        settled(steps=30, minutes=1, evaluate=25),
        device=torch.device("cpu"),
        callback=NullCallback(),
        folder=tmp_path,
        max_steps=5000,
    )
    first, second = make(), make()
    first.train()
    assert second.resume() and second.settings == first.settings and second.settings.steps > 400
    assert second.runners[0].settings.steps == second.settings.steps


@pytest.mark.parametrize("most, expected", [(0, 30), (100, 100)])
def test_fixed_or_sufficient_steps_are_not_replanned(most, expected, monkeypatch):
    clock = Clock(monkeypatch, 0.1)
    loop = Trainer(
        clock.objective(),
        line(),
        settled(steps=30, minutes=1),
        device=torch.device("cpu"),
        callback=NullCallback(),
        max_steps=most,
    )
    assert loop.train().step == expected


def test_two_phases_equal_a_plain_gan_loop():
    """The guide's GAN in the loop and in a plain loop with two optimizers: equal weights after each step."""
    pixels, data = digits()
    ours, theirs = gan(), gan()
    trainer(ours, data, steps=12, batch=32, lr=1e-3, schedule="constant", warmup=0.0, clip=0, weight_decay=0.0).train()
    bce, adam = nn.functional.binary_cross_entropy, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
    critic, generator_ = (torch.optim.AdamW(m.parameters(), **adam) for m in (theirs.critic, theirs.model))
    for step, index in plan_batches(len(pixels), 32, seed=0, stop=12):
        torch.manual_seed(mix_seeds(0, step, 0))
        real, one, zero = pixels[index], torch.ones(32, 1), torch.zeros(32, 1)
        fake = theirs.model(torch.randn(32, 16))
        critic.zero_grad()
        (bce(theirs.critic(real), one) + bce(theirs.critic(fake.detach()), zero)).backward()
        critic.step()
        generator_.zero_grad()
        bce(theirs.critic(theirs.model(torch.randn(32, 16))), one).backward()
        generator_.step()
    # Two orders of summation: CPUs without vector units differ by up to 2e-6 after the steps.
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_guide_gan_learns_digits():
    """Generated images approach the mean and standard deviation of real ones."""
    pixels, data = digits()
    objective = gan()
    batch = data.make(np.arange(512), None)

    def gap() -> float:
        torch.manual_seed(1)
        fake = objective.outputs(batch)["samples"].detach()
        return float((fake.mean(0) - pixels.mean(0)).abs().mean() + (fake.std(0) - pixels.std(0)).abs().mean())

    before = gap()
    t = trainer(objective, data, steps=600, batch=64, lr=2e-4, weight_decay=0.0, clip=0, schedule="constant")
    t.train()
    assert [r.phase.name for r in t.runners] == ["critic", "generator"]
    assert gap() < 0.75 * before


def test_phase_trains_its_own_parameters_only():
    class Two(Objective):
        phases = (Phase("first", ("model",), times=2), Phase("second", ("other",), settings=(("lr", 0.5),)))
        keep = ("model", "other")

        def __init__(self):
            super().__init__()
            self.model, self.other, self.frozen = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 3)
            self.frozen.requires_grad_(False)
            self.calls = []

        def forward(self, batch, phase="first"):
            self.calls.append((phase, self.model.weight.requires_grad, self.other.weight.requires_grad))
            x = self.frozen(batch["vector"])
            return {"loss": (self.model(x) - self.other(x)).square().mean()}

    torch.manual_seed(0)
    objective = Two()
    frozen = objective.frozen.weight.clone()
    t = trainer(objective, steps=1, warmup=0.0, optimizer="sgd", lr=0.1)
    t.train()
    assert objective.calls == [("first", True, False)] * 2 + [("second", False, True)]
    assert torch.equal(objective.frozen.weight, frozen)
    assert t.runners[1].lr == pytest.approx(0.5) and t.runners[0].lr == pytest.approx(0.1)


@pytest.mark.parametrize("where", ["batch", "weights"])
def test_non_finite_loss_stops_and_saves_the_batch(where, tmp_path):
    batches, objective = line(), regression()

    def make(index, rng):
        batch = batches.make(index, rng)
        make.calls += 1
        if where == "batch" and make.calls == 8:
            batch["vector"] = batch["vector"].clone()
            batch["vector"][3, 1] = float("nan")
        return batch

    make.calls = 0
    t = trainer(objective, Batches(64, make), folder=tmp_path)
    if where == "weights":
        objective.model.register_forward_hook(lambda m, a, out: out * (float("inf") if make.calls == 8 else 1))
    with pytest.raises(TrainingError, match=r"at step 7.*(NaN or infinity in vector|batch is finite)"):
        t.train()
    from safetensors.torch import load_file

    kept = load_file(next(tmp_path.glob("nonfinite-step-7*.safetensors")))
    assert kept["0.vector"].shape == (16, 3)
    assert bool(kept["0.vector"].isnan().any()) == (where == "batch")
    again = trainer(regression(), folder=tmp_path)
    assert again.resume() and again.state.step == 7
    assert weights(again.objective).isfinite().all()


def test_epochs_are_reshuffled_and_any_step_can_be_resumed():
    whole = list(plan_batches(50, 8, seed=3, stop=30))
    each = steps_per_epoch(50, 8)
    first = np.concatenate([i for s, i in whole[:each]])
    assert len(set(first)) == len(first) == each * 8
    assert not np.array_equal(whole[0][1], whole[each][1])
    for start in (1, 6, 7, 17, 29):
        for (s, i), (t, j) in zip(plan_batches(50, 8, seed=3, start=start, stop=30), whole[start:], strict=True):
            assert s == t and np.array_equal(i, j)


def test_batches_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 500, 2000)
    batches = [i for _, i in plan_batches(2000, 16, seed=0, lengths=lengths, stop=125)]
    assert np.mean([np.ptp(lengths[i]) for i in batches]) < 0.2 * np.ptp(lengths)
    assert len(set(np.concatenate(batches))) == 2000
    order = [lengths[i].mean() for i in batches]
    assert np.corrcoef(order[:-1], order[1:])[0, 1] < 0.5  # long ones do not come all at once


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_make_the_same_batches():
    from fieldguide.data.loader import iterate_training_batches

    batches = Batches(40, lambda index, rng: {"x": torch.rand(len(index), generator=rng) + torch.from_numpy(index)})
    alone, helped = (
        [b["x"] for _, b in iterate_training_batches(batches, batch=8, seed=1, start=2, stop=9, workers=w)] for w in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_evaluation_yields_every_example_once():
    lengths = np.array([5, 1, 4, 2, 3])
    batches = Batches(5, lambda index, _: {"x": torch.from_numpy(index)}, lengths)
    got = list(iterate_in_order(batches, 2))
    assert [lengths[i].tolist() for i, _ in got] == [[1, 2], [3, 4], [5]]
    assert all(np.array_equal(i, b["x"].numpy()) for i, b in got)


def test_generators_depend_on_all_seeds():
    draw = lambda *n: torch.rand(1, generator=make_generator(*n)).item()
    assert len({draw(0, 1), draw(1, 0), draw(0, 0), draw(0, 1, 0)}) >= 3 and draw(5, 7) == draw(5, 7)


def test_ensemble_members_are_trained_on_the_mean_loss():
    logits, target = torch.randn(5, 4, 3), torch.tensor([0, 2, 1, 1, 0])
    loss = Classification(smoothing=0.1)
    apart = torch.stack([loss(logits[:, k], target)["loss"] for k in range(4)]).mean()
    torch.testing.assert_close(loss(logits, target)["loss"], apart)
    torch.testing.assert_close(loss.outputs(logits)["probabilities"], logits.softmax(-1).mean(1))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("lrr", 1, "Did you mean 'lr'"),
        ("lr", "fast", "not a float"),
        ("batch_size", 2.5, "not an integer"),
        ("optimizer", "adam", "none of adamw"),
        ("batch_size", 0, "at least 1"),
        ("label_smoothing", 1.0, r"must be in \[0, 1\)"),
        ("class_weights", "maybe", "not a bool"),
    ],
)
def test_invalid_settings_are_rejected(key, value, complaint):
    with pytest.raises(SettingsError, match=complaint):
        parse(key, value)


def test_settings_are_parsed_from_text():
    s = Settings().with_({"lr": "1e-2", "steps": "50", "class_weights": "true", "batch": "auto"})
    assert (s.lr, s.steps, s.class_weights, s.batch_size) == (0.01, 50, True, None)


def test_tensorboard_equals_metrics_jsonl(tmp_path):
    import json

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = trainer(regression(), folder=tmp_path, track="tensorboard", evaluate=lambda o: {"loss": 0.5})
    t.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(logged, rel=1e-6)
    assert [e.step for e in events.Scalars("scores/loss")] == [5, 10, 15, 20]
