"""R3GAN: the start of training, the authors' files, classes, and training through `fit`."""

from __future__ import annotations

import math

import pytest
import torch

from fieldguide import create
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import samples
from fieldguide.models.adversarial.r3gan_discriminator import Block
from fieldguide.models.registry import card
from fieldguide.objectives import build_adversarial


def test_blocks_start_as_identities_with_the_published_deviations():
    """With L blocks, the first two convolutions have the deviation of He et al., divided by the fourth root of L."""
    torch.manual_seed(0)
    model = create("r3gan-32", dim=256, base=8192)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == 8  # two for each of 4, 8, 16, 32
    x = torch.randn(2, 256, 4, 4)
    assert torch.equal(blocks[0](x), x)
    gain = math.sqrt(2 / 1.04) * 8**-0.25
    for block in blocks[:3]:
        assert block.conv2.groups == 32 and block.conv2.weight.shape == (512, 16, 3, 3)
        assert block.conv1.weight.std().item() == pytest.approx(gain / math.sqrt(256), rel=0.02)
        assert block.conv2.weight.std().item() == pytest.approx(gain / math.sqrt(16 * 9), rel=0.02)


def test_widths_are_the_published_ones():
    """Widths of FFHQ-256 from 4 to 256, groups of 16 channels: cardinalities 96 to 12."""
    with torch.device("meta"):
        model, critic = create("r3gan-256"), create("r3gan-discriminator-256")
    widths = [768, *[stage.blocks[0].conv3.out_channels for stage in model.stages]]
    assert widths == [768, 768, 768, 768, 384, 192, 96]
    assert [stage.blocks[0].conv2.groups for stage in model.stages] == [96, 96, 96, 48, 24, 12]
    assert [stage.blocks[0].conv3.out_channels for stage in critic.stages] == widths[:0:-1]


def names_of_authors(widths: list[int], depth: int, critic: bool) -> set[str]:
    """Return the parameters' names, written down from the repository."""
    count = len(widths)
    names = {"Model.ExtractionLayer.Layer.weight"} if critic else {"Model.AggregationLayer.Layer.weight"}
    for stage in range(count):
        first = 0 if critic else 1
        for block in range(first, first + depth):
            names |= {f"Model.MainLayers.{stage}.Layers.{block}.LinearLayer{k}.Layer.weight" for k in (1, 2, 3)}
            names |= {f"Model.MainLayers.{stage}.Layers.{block}.NonLinearity{k}.Bias" for k in (1, 2)}
        other, place = (stage + 1, depth) if critic else (stage - 1, 0)
        if 0 <= other < count and widths[stage] != widths[other]:
            names.add(f"Model.MainLayers.{stage}.Layers.{place}.LinearLayer.Layer.weight")
    last = f"Model.MainLayers.{count - 1}.Layers.{depth}" if critic else "Model.MainLayers.0.Layers.0"
    return names | {f"{last}.Basis{'.weight' * critic}", f"{last}.LinearLayer.weight"}


@pytest.mark.parametrize("critic", [False, True])
def test_files_of_the_authors_load_and_are_written(critic, tmp_path):
    torch.manual_seed(0)
    name, widths = ("r3gan-discriminator-mini", [32, 64, 64, 64]) if critic else ("r3gan-mini", [64, 64, 64, 32])
    model, x = create(name).eval(), torch.randn(2, 3, 32, 32) if critic else torch.randn(2, 64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = weights.read(weights.save(model, tmp_path / "model.safetensors", "authors"))
    assert set(state) == names_of_authors(widths, 1, critic)
    kernels = {
        f"Model.MainLayers.{i}.Layers.{1 if critic else 0}.Resampler.Kernel" for i in (range(3) if critic else (1, 2, 3))
    }
    other = create(name).eval()
    assert weights.load(other, state | {key: torch.ones(4, 4) for key in kernels}) == []
    assert torch.equal(other(x), model(x))


def test_classes_reach_both_networks():
    torch.manual_seed(0)
    nets = create("r3gan-test", image=16, channels=1, noise=11), create("r3gan-discriminator-test", image=16, channels=1)
    recipe = Settings().with_(card("r3gan").recipe)
    objective = build_adversarial(*nets, recipe, noise=8, real="image", num_classes=3)
    batch = {"image": torch.randn(6, 1, 16, 16), "label": torch.tensor([1, 2, 3, 1, 2, 3])}
    for phase, network in (("critic", objective.critic), ("generator", objective.model)):
        objective.zero_grad()
        losses = objective(batch, phase)
        losses["loss"].backward()
        assert network.embed.weight.grad.any() and losses["loss"].isfinite()
        assert ("penalty" in losses) == (phase == "critic") == ("pairs" in losses)
    a, b = objective.sample([0, 0], torch.tensor([1, 2]))
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("config", [{"image": 36}, {"noise": 3, "num_classes": 3}])
def test_impossible_generators_are_refused(config):
    with pytest.raises(SettingsError, match="must be"):
        create("r3gan-mini", **config)


def test_widths_that_no_group_divides_work():
    assert create("r3gan-mini", image=28, dim=28, base=900).eval()(torch.randn(2, 64)).shape == (2, 3, 28, 28)


@pytest.mark.slow
def test_r3gan_learns_figures(tmp_path):
    """A CNN that is trained on generated digits of each class alone recognizes real ones (chance: 0.1)."""
    run = fit(
        samples.path("figures"),
        task="image-generation",
        model="r3gan-mini",
        out=tmp_path / "run",
        settings={"steps": 700, "batch": 32, "evaluate": 100, "ema": 0.98, "lr": 1e-3, "minutes": 0, "precision": "float32"},
    )
    assert run.record["settings"]["loss"] == "relativistic" and run.record["settings"]["penalty"] == "r1r2"
    assert run.record["model"]["parts"]["critic"]["size"] == "r3gan-discriminator-mini"
    assert run.scores["classifier_accuracy"] > 0.75
