"""Training of autoencoders: the equations of VQGAN, runs from folders, exact resume, a perceptual distance."""

from __future__ import annotations

import io
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fieldguide
from fieldguide.automl.fit import NullCallback, fit, resume
from fieldguide.core.errors import SettingsError
from fieldguide.models.registry import card
from fieldguide.objectives.autoencoding import Autoencoding, compare_features
from fieldguide.objectives.gan_losses import NonSaturating
from fieldguide.tasks.vision.reference_networks import FeatureNetwork
from fieldguide.training.state import Interrupted

WEIGHTS = {"kl": 0.01, "commitment": 0.25, "codebook": 1.0}
QUICK = {"steps": 8, "batch_size": 8, "eval_steps": 4, "precision": "float32", "threads": 1}


def build(name: str, seed: int = 0, **changes):
    """Return a tiny network in float64."""
    torch.manual_seed(seed)
    known = card(name)
    return known.make(known.resolve_config(known.tiny, **changes)).double()


def draw_images(count: int = 3, channels: int = 2, side: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def build_critic(channels: int = 2) -> torch.nn.Module:
    torch.manual_seed(5)
    layers = torch.nn.Conv2d(channels, 4, 3, 2, 1), torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(4, 1, 3, 1, 1)
    return torch.nn.Sequential(*layers).double()


# Equations


@pytest.mark.parametrize("squared", [False, True])
def test_terms_of_kl_autoencoders(squared):
    """L1 or L2 of images from drawn latents, and the divergence of independent normal distributions."""
    model, image = build("autoencoder-kl"), draw_images()
    torch.manual_seed(3)
    found = Autoencoding(model, weights=WEIGHTS, squared=squared)({"image": image})
    torch.manual_seed(3)
    mean, logvar = model.encode(image)
    latent = torch.distributions.Normal(mean, (logvar / 2).exp())
    made = model.decode(mean + latent.stddev * torch.randn_like(mean))
    error = F.mse_loss(made, image) if squared else F.l1_loss(made, image)
    divergence = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(found["kl"], divergence / (2 * 8 * 8))
    torch.testing.assert_close(found["loss"], error + 0.01 * divergence / 128)


def test_terms_of_vqgan():
    """Equation 4: the nearest code of each latent, its distance for the encoder and for the codebook; straight-through gradients."""
    model, image = build("vqgan"), draw_images()
    with torch.no_grad():
        model.codebook.weight.mul_(3)
    found = Autoencoding(model, weights=WEIGHTS)({"image": image})
    found["loss"].backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    z = model.encode(image)
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    nearest = torch.stack(
        [min(model.codebook.weight, key=lambda code, v=v: float(((code - v).detach() ** 2).sum())) for v in flat]
    )
    codes = nearest.view(*z.shape[:1], *z.shape[2:], -1).permute(0, 3, 1, 2)
    made = model.decode(z + (codes - z).detach(), quantize=False)
    loss = (made - image).abs().mean() + ((z.detach() - codes) ** 2).mean() + 0.25 * ((z - codes.detach()) ** 2).mean()
    torch.testing.assert_close(found["loss"], loss)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert ours["codebook.weight"].abs().max() > 0 and ours["encoder.conv_in.weight"].abs().max() > 0


@pytest.mark.parametrize("name", ["autoencoder-kl", "vqgan"])
def test_adaptive_weight(name):
    """Equations 6 and 7: the adversarial term gets the ratio of both gradients at the last layer, and no gradient through it."""
    model, critic, image = build(name), build_critic(), draw_images()
    objective = Autoencoding(model, critic, weights=WEIGHTS, adversarial=0.5, start=0.3)
    objective.progress = 0.29
    torch.manual_seed(3)
    before = objective({"image": image})
    idle = objective({"image": image}, "critic")["loss"]
    idle.backward()
    assert "adversarial" not in before and idle == 0 and all(not p.grad.any() for p in critic.parameters())
    objective.progress = 0.3
    torch.manual_seed(3)
    found = objective({"image": image})
    torch.manual_seed(3)
    made, terms = model.reconstruct(image)
    rebuilt, adversarial = (made - image).abs().mean(), -critic(made).mean()
    last = model.decoder.conv_out.weight
    by_error, by_critic = (torch.autograd.grad(x, last, retain_graph=True)[0] for x in (rebuilt, adversarial))
    ratio = by_error.norm() / (by_critic.norm() + 1e-6)
    expected = rebuilt + sum(WEIGHTS[key] * term for key, term in terms.items()) + 0.5 * ratio.detach() * adversarial
    torch.testing.assert_close(found["loss"], expected)
    ours, theirs = (torch.autograd.grad(x, last)[0] for x in (found["loss"], expected))
    torch.testing.assert_close(ours, theirs)
    torch.manual_seed(4)
    judged = objective({"image": image}, "critic")
    torch.manual_seed(4)
    made = model.reconstruct(image)[0].detach()
    hinge = F.relu(1 - critic(image)).mean() + F.relu(1 + critic(made)).mean()  # the authors halve it, which Adam does not see
    torch.testing.assert_close(judged["loss"] / hinge, torch.ones((), dtype=torch.float64))
    other = Autoencoding(model, critic, weights=WEIGHTS, start=0.0, loss=NonSaturating())
    torch.manual_seed(4)
    assert other({"image": image})["adversarial"].isfinite() and other.keep == ("model", "critic")
    with torch.no_grad():
        assert other({"image": image})["loss"].isfinite()  # of validation images


def test_a_clamped_weight():
    model, image = build("autoencoder-kl"), draw_images()
    objective = Autoencoding(model, build_critic(), weights=WEIGHTS)
    made = model(image)
    assert objective.compute_adaptive_weight(made.abs().mean(), 0 * made.mean()) == 1e4


def test_perceptual_distance(tmp_path):
    """Unit vectors of each position, squared differences, means over positions, sums over layers; of normalized images."""
    torch.manual_seed(0)
    network = fieldguide.create("resnet-test", channels=3)
    network.eval()
    source, channels = str(fieldguide.save(network, tmp_path / "classifier", "hf")), network.config.channels
    features = FeatureNetwork.load(source).compute_maps
    made, real = (draw_images(2, channels, 32).float() * scale for scale in (1.0, 0.7))
    found = compare_features(features, made, real)
    expected = torch.zeros(2)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet
    maps = [network.features((0.5 * image + 0.5 - mean) / std) for image in (made, real)]
    for name in maps[0]:
        a, b = (x[name].detach() / x[name].detach().norm(dim=1, keepdim=True).clamp(min=1e-10) for x in maps)
        expected += ((a - b) ** 2).sum(1).flatten(1).mean(1)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    assert (compare_features(features, real, real) == 0).all()


# Runs


def write_images(folder: Path, count: int, side: int = 12) -> Path:
    """Write images of two gray levels, divided at a random place."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((side, side), rng.integers(0, 100), np.uint8)
        pixels[:, rng.integers(2, side - 2) :] = rng.integers(150, 255)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


class StopAt(NullCallback):
    def on_step(self, step, losses):
        if step == 5:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("compression") / "images", 40)


@pytest.mark.slow
def test_a_run_with_a_critic_resumes_exactly(folder, tmp_path):
    settings = QUICK | {"task.adversarial": 0.8, "task.start": 0.4}
    start = lambda name, callback: fit(
        folder, task="image-compression", model="vqgan-test", settings=settings, out=tmp_path / name, callback=callback
    )
    run = start("run", NullCallback())
    with pytest.raises(Interrupted):
        start("stopped", StopAt())
    again = resume(tmp_path / "stopped", callback=NullCallback())
    for key, x in run.objective.state_dict().items():
        assert torch.equal(x, again.objective.state_dict()[key]), key
    losses = [line for line in run.losses() if "critic.loss" in line]
    assert losses[0]["critic.loss"] == 0 and losses[-1]["critic.loss"] > 0
    assert run.scores.keys() == {"l1", "psnr", "ssim", "codes_used"} and 0 < run.scores["codes_used"] <= 1
    names = [baseline["name"] for baseline in run.record["scores"]["baselines"]]
    assert names == ["mean image", "principal components"]
    made = fieldguide.pipeline(tmp_path / "run").predict(str(folder / "0.png"))
    with Image.open(io.BytesIO(made[0]["image"].content)) as image:
        assert image.size == (8, 8)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Random sample" in report and "standard deviation of the latents" in report


def test_a_perceptual_run(folder, tmp_path):
    torch.manual_seed(0)
    source = fieldguide.save(fieldguide.create("resnet-test", channels=3), tmp_path / "classifier", "hf")
    settings = QUICK | {"task.features": str(source), "task.side": 32}
    run = fit(
        folder,
        task="image-compression",
        model="autoencoder-kl-test",
        settings=settings,
        out=tmp_path / "run",
        callback=NullCallback(),
    )
    first = next(line for line in run.losses() if "loss" in line)
    assert first["loss"] == pytest.approx(first["reconstruction"] + first["perceptual"] + 1e-6 * first["kl"], rel=1e-3)
    shutil.rmtree(source)  # only training needs it
    assert len(fieldguide.pipeline(tmp_path / "run").predict(str(folder))) == 40
    text = fieldguide.save(fieldguide.create("bert-test"), tmp_path / "text", "hf")
    with pytest.raises(SettingsError, match="is no image classifier"):
        FeatureNetwork.load(str(text))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder-kl-test", "vqgan-test"])
def test_rebuilt_digits(name, tmp_path):
    """Digits are rebuilt better than as their mean."""
    settings = {"steps": 400, "batch_size": 64, "precision": "float32"}
    run = fit("digits", task="image-compression", model=name, settings=settings, out=tmp_path / "run", callback=NullCallback())
    mean = next(b for b in run.record["scores"]["baselines"] if b["name"] == "mean image")
    assert run.scores["l1"] < 0.6 * mean["scores"]["l1"] and math.isfinite(run.scores["psnr"])
