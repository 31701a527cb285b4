"""SNGAN and WGAN-GP: published layers, the critic's slope, classes, and training through `fit`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fieldguide import create
from fieldguide.automl.fit import fit
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import samples
from fieldguide.models.initialization import make_on_meta
from fieldguide.models.registry import card, find
from fieldguide.objectives import build_adversarial


def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return kernel * kernel * inputs * outputs + outputs


def count_generator(first: int, widths: list[int], classes: int = 0) -> int:
    """Count the parameters of the authors' generator, layer by layer (a norm has two per channel and class)."""
    total = 128 * first**2 * widths[0] + first**2 * widths[0]
    for a, b in pairwise(widths):
        total += conv(a, b) + conv(b, b) + conv(a, b, 1) + 2 * (a + b) * max(classes, 1)
    return total + 2 * widths[-1] + conv(widths[-1], 3)


def count_critic(widths: list[int], halves: list[bool], classes: int = 0) -> int:
    """Count the parameters of the authors' critic, layer by layer."""
    total = conv(3, widths[0]) + conv(widths[0], widths[0]) + conv(3, widths[0], 1)
    for a, b, halved in zip(widths, widths[1:], halves[1:]):
        total += conv(a, a) + conv(a, b) + (conv(a, b, 1) if halved or a != b else 0)
    return total + widths[-1] + 1 + classes * widths[-1]


@pytest.mark.parametrize("classes", [0, 10])
def test_counts_equal_the_layers_of_the_authors(classes):
    def count(name: str, **config) -> int:
        made, size = find(name)
        network = make_on_meta(made, made.resolve_config(size, num_classes=classes, **config))
        return sum(p.numel() for p in network.parameters())

    noise = {"noise": 128 + classes}
    assert count("sngan-32", **noise) == count_generator(4, [256] * 4, classes)
    assert count("sngan-64", **noise) == count_generator(4, [1024, 512, 256, 128, 64], classes)
    assert count("sngan-discriminator-32") == count_critic([128] * 4, [True, True, False, False], classes)
    assert count("sngan-discriminator-64") == count_critic([64, 128, 256, 512, 1024], [True] * 5, classes)
    if not classes:
        assert count("wgan-gp-32") == count_generator(4, [128] * 4)


def test_blocks_of_equal_widths_equal_their_equations():
    """Of the 32-pixel critic: the first two blocks halve the side, the others add to their input unchanged."""
    torch.manual_seed(0)
    critic = create("sngan-discriminator-32", dim=4).double().eval()
    assert [block.halves for block in critic.blocks] == [True, True, False, False]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    block = critic.blocks[2]
    pad = {"stride": 1, "padding": 1}
    y = nn.functional.conv2d(x.relu(), block.c1.weight, block.c1.bias, **pad).relu()
    torch.testing.assert_close(block(x), x + nn.functional.conv2d(y, block.c2.weight, block.c2.bias, **pad))
    y = critic.blocks[1].c2(critic.blocks[1].c1(x.relu()).relu()) + critic.blocks[1].c_sc(x)
    torch.testing.assert_close(critic.blocks[1](x), nn.functional.avg_pool2d(y, 2))


def test_weights_of_the_critic_have_spectral_norm_one():
    """Also after training has changed them; the biases, and the weights of the generator, are free."""
    torch.manual_seed(0)
    critic = create("sngan-discriminator-32", image=16, dim=8, num_classes=3)
    optimizer = torch.optim.SGD(critic.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        critic(torch.randn(4, 6, 16, 16)).mean().backward()
        optimizer.step()
    for _ in range(100):
        critic(torch.randn(1, 6, 16, 16))
    layers = [m for m in critic.eval().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in layers]
    assert len(norms) == 3 + 3 + 2 + 2 and norms == pytest.approx([1.0] * len(norms), abs=1e-3)


def test_without_a_class_both_networks_ignore_classes():
    torch.manual_seed(0)
    generator = create("sngan-test").eval()
    critic = create("sngan-discriminator-test").eval()
    images, z = torch.randn(2, 2, 17, 17), torch.randn(2, 5)
    none = critic(torch.cat([images, torch.zeros(2, 3, 17, 17)], 1))
    torch.testing.assert_close(none, critic(images))
    label = torch.zeros(2, 3)
    label[:, 1] = 1
    one = critic(torch.cat([images, label[:, :, None, None].expand(-1, -1, 17, 17)], 1))
    assert (one - none).abs().min() > 1e-4
    plain, classed = (generator(torch.cat([z, label * on], 1)) for on in (0, 1))
    assert (plain - classed).abs().max() > 1e-4
    for norm in (module for module in generator.modules() if isinstance(module, nn.Linear) and module.bias is None):
        nn.init.zeros_(norm.weight)  # no scale, no shift
    torch.testing.assert_close(generator(torch.cat([z, label], 1)), plain)


def test_wasserstein_loss_accepts_spectral_normalization():
    nets = create("sngan", image=8, dim=4, channels=1), create("sngan-discriminator", image=8, dim=4, channels=1)
    objective = build_adversarial(*nets, Settings().with_({"loss": "wasserstein"}), noise=128, real="image")
    assert objective({"image": torch.randn(4, 1, 8, 8)}, "critic")["loss"].isfinite()


@pytest.mark.parametrize("config", [{"image": 36}, {"noise": 3, "num_classes": 3}])
def test_impossible_generators_are_refused(config):
    with pytest.raises(SettingsError, match="must be"):
        create("sngan", **config)


def test_the_critic_fits_the_generator():
    """Images of more than 32 pixels get the critic of the 64-pixel network."""
    made = card("sngan-discriminator")
    for side, name in ((32, "sngan-discriminator-32"), (64, "sngan-discriminator-64")):
        need = {"image": side, "channels": 3, "num_classes": 0}
        assert made.resolve_config(None, **need, **made.adapt(need)) == made.resolve_config(name)


def test_objective_tells_both_networks_the_class():
    torch.manual_seed(0)
    nets = (
        create("sngan", image=8, dim=4, channels=1, noise=131, num_classes=3),
        create("sngan-discriminator", image=8, dim=4, channels=1, num_classes=3),
    )
    objective = build_adversarial(*nets, Settings().with_(card("sngan").recipe), noise=128, real="image", num_classes=3)
    assert [(phase.name, phase.times) for phase in objective.phases] == [("critic", 5), ("generator", 1)]
    batch = {"image": torch.randn(6, 1, 8, 8), "label": torch.tensor([1, 2, 3, 1, 2, 3])}
    for phase, network in (("critic", objective.critic), ("generator", objective.model)):
        objective.zero_grad()
        objective(batch, phase)["loss"].backward()
        classes = [p for name, p in network.named_parameters() if "embed" in name or "l_y" in name]
        assert classes and all(p.grad.any() for p in classes)
    a, b = objective.sample([0, 0], torch.tensor([1, 2]))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.slow
def test_sngan_learns_figures(tmp_path):
    """A CNN that is trained on generated digits of each class alone recognizes real ones (chance: 0.1)."""
    run = fit(
        samples.path("figures"),
        task="image-generation",
        model="sngan-32",
        out=tmp_path / "run",
        settings={
            "steps": 900,
            "batch": 32,
            "evaluate": 100,
            "model.dim": 32,
            "lr": 3e-3,
            "ema": 0.98,
            "critic_steps": 1,
            "minutes": 0,
            "precision": "float32",
        },
    )
    assert run.record["settings"]["loss"] == "hinge" and run.record["settings"]["beta2"] == 0.9
    assert run.record["model"]["parts"]["critic"]["config"]["num_classes"] == 10
    assert [a["class"] for a in run.predict(["3", "7"], count=1)] == ["3", "7"]
    assert run.scores["classifier_accuracy"] > 0.7
