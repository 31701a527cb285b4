"""WGAN's own networks: scores instead of probabilities, clipped weights, the authors' files, and training through `fit`."""

from __future__ import annotations

import pytest
import torch

from fieldguide import create
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.core.settings import Settings
from fieldguide.data import samples
from fieldguide.models.registry import card
from fieldguide.objectives import build_adversarial
from test_gan import pictures
from test_loop import trainer
from test_models import tiny

KINDS = ("wgan", "wgan-mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_critics_return_unbounded_scores_of_each_image(kind):
    """The authors return the mean over the batch, which is what the loss takes of them."""
    critic = tiny(f"{kind}-discriminator")
    side = critic.config.image
    x = torch.randn(6, 2, side, side, dtype=torch.float64)
    scores, large = critic(x), critic(100 * x)
    assert scores.shape == (6, 1) and large.abs().max() > 1 and large.min() < 0
    assert not [module for module in critic.modules() if isinstance(module, torch.nn.Sigmoid)]
    if kind == "wgan":
        torch.testing.assert_close(critic.forward_logits(x), scores)
    loss = build_adversarial(create(f"{kind}-test"), critic, Settings().with_(card(kind).recipe), noise=6, real="image").loss
    assert loss.critic(scores, large)["real"].item() == pytest.approx(-scores.mean().item())


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_clips_weights_and_takes_five_steps_of_the_critic(kind):
    torch.manual_seed(0)
    nets = create(kind, image=16, channels=1, noise=8), create(f"{kind}-discriminator", image=16, channels=1)
    recipe = {**card(kind).recipe, "lr": 1e-2}
    objective = build_adversarial(*nets, Settings().with_(recipe), noise=8, real="image")
    run = trainer(objective, pictures()[1], steps=2, batch=8, evaluate=None, **recipe)
    run.train_step(run.make_batch_stream())
    assert run.batches_per_step == 5 and run.settings.beta1 == 0
    assert max(p.abs().max().item() for p in objective.critic.parameters()) <= 0.01
    assert max(p.abs().max().item() for p in objective.model.parameters()) > 0.01


NAMES = {
    "wgan": (
        "main.initial:100-512:convt.weight", "main.initial:512:batchnorm.weight", "main.pyramid:512-256:convt.weight",
        "main.pyramid:256:batchnorm.running_var", "main.pyramid:128-64:convt.weight", "main.final:64-3:convt.weight",
    ),
    "wgan-discriminator": (
        "main.initial:3-64:conv.weight", "main.pyramid:64-128:conv.weight", "main.pyramid:128:batchnorm.bias",
        "main.pyramid:256-512:conv.weight", "main.final:512-1:conv.weight",
    ),
    "wgan-mlp": ("main.0.weight", "main.6.bias"),
    "wgan-mlp-discriminator": ("main.0.weight", "main.6.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_authors_load_and_are_written(name, tmp_path):
    torch.manual_seed(0)
    model = create(name).eval()
    x = torch.randn(2, 3, 64, 64) if "discriminator" in name else torch.randn(2, 100)
    model.train()(x)
    model.eval()
    state = weights.read(weights.save(model, tmp_path / "model.safetensors", "fieldguide" if "mlp" in name else "authors"))
    assert set(NAMES[name]) <= set(state) and len(state) == len(model.state_dict())
    other = create(name).eval()
    assert weights.load(other, state) == [] and torch.equal(other(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "floor"), [("wgan", 0.75), ("wgan-mlp", 0.7)])
def test_wgan_learns_figures(tmp_path, kind, floor):
    """A CNN that is trained on generated digits of each class alone recognizes real ones (chance: 0.1)."""
    size = {"model.dim": 32} if kind == "wgan" else {"model.hidden": 256}
    run = fit(
        samples.path("figures"),
        task="image-generation",
        model=kind,
        out=tmp_path / "run",
        settings={"steps": 700, "batch": 64, "evaluate": 100, "lr": 1e-3, "ema": 0.98, "weight_clip": 0.05, "critic_steps": 3,
                  "minutes": 0, "precision": "float32", **size},
    )  # fmt: skip
    assert run.record["settings"]["loss"] == "wasserstein" and run.scores["classifier_accuracy"] > floor
