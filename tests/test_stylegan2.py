"""StyleGAN 2: resampling, groups of the critic, styles, regularizers, files of others, and training through `fit`."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scipy.signal
import torch
from torch import nn

import fieldguide
import stylegans
from fieldguide import create
from fieldguide.automl.build_plan import configure_part
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.core.settings import Settings
from fieldguide.data import samples
from fieldguide.data.loader import Batches
from fieldguide.models.initialization import make_on_meta
from fieldguide.models.layers.minibatch_stddev import MinibatchStddev
from fieldguide.models.layers.modulated_conv import modulated_conv, modulated_conv_up
from fieldguide.models.layers.style_mapping import StyleMapping
from fieldguide.models.layers.upfirdn import upfirdn
from fieldguide.models.registry import card, find
from fieldguide.objectives import Adversarial, build_adversarial
from references import Equations
from test_gan import pictures
from test_loop import trainer
from test_models import tiny

EXACT = {"rtol": 1e-10, "atol": 1e-12}


# ---------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("taps", [4, 5, 12, (3, 5), (6, 6)])
@pytest.mark.parametrize(("up", "down", "padding"), [(1, 1, (2, 1)), (2, 1, (2, 1)), (2, 1, (-1, 7)), (1, 2, (1, 1)),
                                                     (4, 2, (9, 3)), (3, 1, (-2, -1)), (1, 1, (-3, 4)), (2, 1, (11, 12))])  # fmt: skip
def test_resampling_equals_zeros_and_a_full_convolution(taps, up, down, padding):
    """Each map by itself, with scipy. A filter that is not symmetric shows whether it is convolved or correlated."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 14, 13))
    kernel = rng.normal(size=taps)
    square = np.outer(kernel, kernel) if kernel.ndim == 1 else kernel
    large = np.zeros((2, 3, 14 * up, 13 * up))
    large[:, :, ::up, ::up] = x
    wide = np.pad(large, ((0, 0), (0, 0), *[(max(0, padding[0]), max(0, padding[1]))] * 2))
    cut = [slice(max(0, -padding[0]), size - max(0, -padding[1])) for size in wide.shape[2:]]
    wide = wide[:, :, cut[0], cut[1]]
    want = np.array([[scipy.signal.convolve2d(m, square, "valid")[::down, ::down] for m in image] for image in wide])
    ours = upfirdn(torch.from_numpy(x), torch.from_numpy(kernel), up, down, padding, gain=2.5)
    np.testing.assert_allclose(ours.numpy(), 2.5 * want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("kernel", [1, 3])
def test_modulated_convolutions_equal_one_kernel_per_image(kernel, length):
    torch.manual_seed(0)
    x, style = torch.randn(3, 5, 6, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    weight, taps = torch.randn(4, 5, kernel, kernel, dtype=torch.float64), torch.rand(length, dtype=torch.float64)
    plain, enlarged = [], []
    for image, s in zip(x, style):
        own = weight * s[None, :, None, None]
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        plain.append(stylegans.convolve(image[None], own, border=kernel // 2))
        large = stylegans.convolve(stylegans.insert_zeros(image[None], 2), own.flip(2, 3), border=kernel - 1)
        large = large[:, :, : 12 + kernel - 2, : 14 + kernel - 2]  # what is beyond is zero
        total = length + 1 - kernel
        enlarged.append(stylegans.resample(large, taps, low=(total + 1) // 2, high=total // 2, gain=4.0))
    torch.testing.assert_close(modulated_conv(x, weight, style), torch.cat(plain), **EXACT)
    torch.testing.assert_close(modulated_conv_up(x, weight, style, taps), torch.cat(enlarged), **EXACT)
    assert enlarged[0].shape == (1, 4, 12, 14)


def test_deviation_of_groups_is_the_published_one():
    """For whole groups, that of a tensor of groups first; for others, groups of equal numbers as far as possible."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    deviation = x.reshape(4, 2, 3, 4, 4).var(0, unbiased=False).add(1e-8).sqrt().mean((1, 2, 3)).repeat(4)
    ours = MinibatchStddev(4)(x)
    torch.testing.assert_close(ours, torch.cat([x, deviation[:, None, None, None].expand(8, 1, 4, 4)], 1), **EXACT)
    for rows in (1, 3, 7):
        torch.testing.assert_close(MinibatchStddev(4)(x[:rows]), stylegans.group_deviation(x[:rows], 4), **EXACT)


@pytest.mark.parametrize("rows", [8, 6])
def test_critic_compares_the_images_of_a_group(rows):
    model = tiny("stylegan2-discriminator", group=4)
    peer = Equations(model, stylegans.stylegan2_discriminator(model.config)).double()
    peer.load_state_dict(Equations.translate(model.state_dict()))
    torch.manual_seed(1)
    x = torch.randn(rows, 5, 17, 17, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-9, atol=1e-11)
    same = model(x[:1].expand(4, -1, -1, -1))
    assert (same - model(x)[:1]).abs().max() > 1e-3  # equal images look different from others


# ---------------------------------------------------------------------------------------------- styles


def test_mapping_has_the_published_size_and_learns_a_hundredth_as_fast():
    mapping = StyleMapping(512, 0, 512, 8)
    assert sum(p.numel() for p in mapping.parameters()) == 2_101_248
    assert mapping.layers[3].weight.std().item() == pytest.approx(100, rel=0.02)
    assert mapping(torch.randn(64, 512)).square().mean().item() == pytest.approx(1, abs=0.35)


def test_truncation_moves_styles_to_their_average():
    torch.manual_seed(0)
    model = create("stylegan2-test").double()
    z = torch.randn(4, 8, dtype=torch.float64)
    for _ in range(3):
        model.train()(torch.randn(64, 8, dtype=torch.float64))
    model.eval()
    w, average = model.map_styles(z), model.mapping.average.clone()
    torch.testing.assert_close(model.map_styles(z, 0.3)[:, 2], 0.3 * w[:, 2] + 0.7 * average.expand(4, -1), **EXACT)
    images = model.synthesis(model.map_styles(z, 0.0))
    torch.testing.assert_close(images, images[:1].expand_as(images), **EXACT)
    assert torch.equal(model.mapping.average, average) and average.any()
    mean = model.map_styles(torch.randn(20_000, 8, dtype=torch.float64) * torch.tensor([1.0] * 5 + [0.0] * 3))[:, 0].mean(0)
    model.mapping.average.zero_()  # of a file without an average
    known = model.mapping.get_center()
    assert known.any() and (known - mean).norm() < 0.5 * w[:, 0].std(0).norm()


def build(**changes) -> Adversarial:
    torch.manual_seed(0)
    nets = (
        create("stylegan2-test", image=16, channels=1, noise=11),
        create("stylegan2-discriminator-test", image=16, channels=1),
    )
    recipe = {**card("stylegan2").recipe, **changes}
    return build_adversarial(*nets, Settings().with_(recipe), noise=8, real="image", num_classes=3)


def data() -> Batches:
    x, _ = pictures()
    return Batches(64, lambda index, _: {"image": x[index], "label": torch.from_numpy(index) % 4})


def test_mixed_styles_change_at_one_layer():
    objective = build(style_mixing=0.5)
    torch.manual_seed(3)
    styles = objective.make_styles(torch.zeros(200, dtype=torch.int64), 200, torch.device("cpu")).detach()
    changes = (styles[:, 1:] != styles[:, :-1]).any(2)  # B L-1
    assert changes.sum(1).max() == 1 and 0.3 < changes.any(1).float().mean() < 0.7
    assert changes.any(0).all()  # at every layer
    torch.manual_seed(3)
    first = objective.model.map_styles(objective.add_condition(torch.randn(200, 8), None))
    torch.testing.assert_close(styles[:, 0], first[:, 0])


@pytest.mark.parametrize("name", ["stylegan1", "stylegan2", "stylegan3"])
def test_each_layer_has_its_own_style(name):
    model = tiny(name)
    torch.manual_seed(1)
    styles = torch.randn(2, model.layers, 6, dtype=torch.float64)
    peer = Equations(model, getattr(stylegans, name)(model.config, styles=styles)).double().eval()
    peer.load_state_dict(Equations.translate(model.state_dict()))
    torch.testing.assert_close(model.synthesis(styles), peer(torch.zeros(2, 8, dtype=torch.float64)), rtol=1e-9, atol=1e-10)


def test_noise_is_drawn_in_training_only():
    model = tiny("stylegan2")
    z = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(model(z), model(z)) and not torch.equal(model.train()(z), model(z))
    for module in model.modules():
        if hasattr(module, "strength"):
            nn.init.zeros_(module.strength)
    torch.testing.assert_close(model.train()(z), model.eval()(z), **EXACT)


# ---------------------------------------------------------------------------------------------- regularizers


def test_path_length_equals_an_explicit_jacobian():
    """Of all pixels by all numbers of the styles; the lengths of random projections, and their average."""
    objective = build(style_mixing=0.0).double()
    model = objective.model.train()
    for module in model.modules():
        if hasattr(module, "strength"):
            nn.init.zeros_(module.strength)
    objective.path_mean.fill_(0.4)
    torch.manual_seed(7)
    labels = torch.tensor([1, 2, 0])
    torch.set_default_dtype(torch.float64)
    try:
        ours = objective.regularize_path_length(labels, 3, torch.device("cpu"))
        torch.manual_seed(7)
        styles = objective.make_styles(labels, 3, torch.device("cpu")).detach()
    finally:
        torch.set_default_dtype(torch.float32)
    [torch.randn(3, 1, s, s, dtype=torch.float64) for s in (4, 8, 8, 16, 16)]  # noise of the synthesis, drawn before
    projections = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    lengths = []
    for w, y in zip(styles, projections):
        jacobian = torch.func.jacrev(lambda w: model.eval().synthesis(w[None])[0])(w)  # C S S L W
        product = (jacobian * y[..., None, None] / 16).sum((0, 1, 2))
        lengths.append(product.square().sum(1).mean().sqrt())
    mean = 0.99 * 0.4 + 0.01 * torch.stack(lengths).mean()
    torch.testing.assert_close(objective.path_mean, mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours, torch.stack([(x - mean) ** 2 for x in lengths]).mean(), rtol=1e-6, atol=1e-9)
    objective.zero_grad()
    ours.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("mapping" in name for name in gradients) and any("conv0.weight" in name for name in gradients)


def test_regularizers_are_lazy_and_count_more():
    """R1 at every 16th step of the critic, 16 times; path lengths at every fourth of the generator, four times."""
    objective, batch = build(), data().make(np.arange(8), None)
    objective.penalty, objective.regularize_path_length = (lambda *_: torch.tensor(2.0)), (lambda *_: torch.tensor(3.0))
    seen = {"critic": [], "generator": []}
    for step in range(18):
        for phase, name in (("critic", "penalty"), ("generator", "path_length")):
            losses = objective(batch, phase)
            rest = sum((losses[k] for k in ("real", "fake") if k in losses), torch.tensor(0.0))
            if name in losses:
                seen[phase].append(step)
                assert losses[name].item() == pytest.approx(16 * 2.0 if phase == "critic" else 3.0)
            if phase == "critic":
                assert losses["loss"].item() == pytest.approx(rest.item() + 32.0 * (name in losses), abs=1e-4)
            objective.after_step(phase)
    assert seen == {"critic": [0, 16], "generator": [0, 4, 8, 12, 16]}
    values = []
    for weight in (0.0, 2.0):  # with the same noise
        objective.path_length_weight, objective.steps["generator"] = weight, 4
        torch.manual_seed(1)
        values.append(objective(batch, "generator")["loss"].item())
    assert values[1] - values[0] == pytest.approx(4 * 2 * 3, abs=1e-4)


def test_training_resumes_exactly(tmp_path):
    """Also the steps of lazy regularizers, the mean of path lengths, and the augmentation."""
    changes = {"steps": 12, "batch": 8, "evaluate": None, "augment_critic": "ada", "ada_images": 60, "ada_target": -1.0}
    changes |= {"penalty_interval": 5, "ema": 0.9, "beta1": 0.0, "lr": 1e-3}
    settings = {k: v for k, v in changes.items() if k in ("augment_critic", "ada_images", "ada_target", "penalty_interval")}
    whole = trainer(build(**settings), data(), tmp_path / "a", **changes)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole.train()
    first = trainer(build(**settings), data(), tmp_path / "b", **changes)
    stream = first.make_batch_stream()
    for _ in range(7):
        first.train_step(stream)
        first.state.step += 1
    first.save()
    second = trainer(build(**settings), data(), tmp_path / "b", **changes)
    assert second.resume() and second.state.step == 7
    state = second.objective
    assert state.steps == {"critic": 7, "generator": 7} and state.augmentation.value > 0 and state.signs[1] == 3 * 8
    second.train()
    a, b = whole.objective.state_dict(), second.objective.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert whole.objective.augmentation.value == second.objective.augmentation.value > 0.5
    assert whole.objective.path_mean > 0 and all(torch.equal(x, y) for x, y in zip(whole.average.mean, second.average.mean))


def test_settings_for_styles_need_styles():
    nets = create("dcgan", image=16, channels=1, dim=8, noise=8), create("dcgan-discriminator", image=16, channels=1, dim=8)
    for changes in ({"style_mixing": 0.5}, {"path_length_weight": 2}):
        with pytest.raises(SettingsError, match="generator with styles"):
            build_adversarial(*nets, Settings().with_(changes), noise=8, real="image")
    with pytest.raises(SettingsError, match="no styles that could be truncated"):
        Adversarial(*nets, noise=8, real="image").sample([0], truncation=0.5)
    with pytest.raises(SettingsError, match="augments images"):
        build_adversarial(*nets, Settings().with_({"augment_critic": "ada"}), noise=8, real="vector")
    for key, value in {"style_mixing": 1.5, "penalty_interval": 0, "ada_target": 2, "augment_critic": "diffaugment"}.items():
        with pytest.raises(SettingsError, match=key):
            Settings().with_({key: value})
    sample = build().eval().sample
    a, b = (sample([1, 2], torch.tensor([1, 2]), truncation=t) for t in (1.0, 0.5))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("config", [{"image": 36}, {"image": 4}, {"noise": 3, "num_classes": 3}])
def test_impossible_generators_are_refused(config):
    with pytest.raises(SettingsError, match=r"must be|too small"):
        create("stylegan2-mini", **config)


def test_without_a_class_both_networks_work():
    torch.manual_seed(0)
    critic = create("stylegan2-discriminator-test").eval()
    x = torch.randn(2, 2, 17, 17)
    torch.testing.assert_close(critic(torch.cat([x, torch.zeros(2, 3, 17, 17)], 1)), critic(x))


def test_critic_has_the_size_of_the_generator():
    """And without such a size, the default one."""
    dims = {"image": 32, "channels": 1, "num_classes": 0}
    for size, found in (("stylegan2-mini", "stylegan2-discriminator-mini"), ("stylegan2-256", "stylegan2-discriminator-256")):
        assert configure_part("stylegan2-discriminator", dims, card("stylegan2"), size)[1] == found
    assert configure_part("dcgan-discriminator", dims, card("dcgan"), "dcgan-64-wide")[1] == "dcgan-discriminator-64"


# ---------------------------------------------------------------------------------------------- files


def names_of_rosinality(sides: int, depth: int) -> set[str]:
    """Return the names in `g_ema`, written down from the repository."""
    names = {f"style.{i + 1}.{part}" for i in range(depth) for part in ("weight", "bias")} | {"input.input"}
    convs = ["conv1", *(f"convs.{i}" for i in range(2 * sides - 2))]
    for i, conv in enumerate(convs):
        names |= {f"{conv}.conv.weight", f"{conv}.conv.modulation.weight", f"{conv}.conv.modulation.bias"}
        names |= {f"{conv}.noise.weight", f"{conv}.activate.bias", f"noises.noise_{i}"}
        names |= {f"{conv}.conv.blur.kernel"} if i % 2 else set()
    for i, rgb in enumerate(["to_rgb1", *(f"to_rgbs.{i}" for i in range(sides - 1))]):
        names |= {f"{rgb}.{part}" for part in ("bias", "conv.weight", "conv.modulation.weight", "conv.modulation.bias")}
        names |= {f"{rgb}.upsample.kernel"} if i else set()
    return names


def names_of_nvidia(sides: list[int], depth: int) -> set[str]:
    """Return the names in `G_ema.state_dict()`, written down from the repository."""
    names = {f"mapping.fc{i}.{part}" for i in range(depth) for part in ("weight", "bias")}
    names |= {"mapping.w_avg", f"synthesis.b{sides[0]}.const"}
    for side in sides:
        names.add(f"synthesis.b{side}.resample_filter")
        for conv in ("conv0", "conv1")[side == sides[0] :]:
            names |= {
                f"synthesis.b{side}.{conv}.{part}"
                for part in (
                    "weight",
                    "bias",
                    "noise_strength",
                    "noise_const",
                    "affine.weight",
                    "affine.bias",
                    "resample_filter",
                )
            }
        names |= {f"synthesis.b{side}.torgb.{part}" for part in ("weight", "bias", "affine.weight", "affine.bias")}
    return names


@pytest.mark.parametrize("origin", ["rosinality", "nvidia"])
def test_files_of_others_load_and_are_written(origin, tmp_path):
    kernels = {"rosinality": ("kernel",), "nvidia": ("resample_filter",)}[origin]
    torch.manual_seed(0)
    model = create("stylegan2-mini", num_classes=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if origin == "nvidia":
            model.mapping.average.normal_()
    path = weights.save(model, tmp_path / "model.safetensors", origin)
    state = weights.read(path)
    known = names_of_rosinality(4, 2) if origin == "rosinality" else names_of_nvidia([4, 8, 16, 32], 2)
    assert set(state) == {name for name in known if not name.endswith(kernels)}
    if origin == "rosinality":
        assert state["convs.0.conv.weight"].shape == (1, 64, 64, 3, 3) and state["input.input"].shape == (1, 64, 4, 4)
        assert state["noises.noise_6"].shape == (1, 1, 32, 32) and state["to_rgbs.2.bias"].shape == (1, 3, 1, 1)
        assert state["conv1.noise.weight"].shape == (1,)
    full = state | {name: torch.ones(4, 4) for name in known if name.endswith(kernels)}
    other = create("stylegan2-mini").eval()
    assert weights.load(other, full) == []
    z = torch.randn(3, 64)
    torch.testing.assert_close(other(z), model(z))
    torch.testing.assert_close(other.map_styles(z, 0.5), model.map_styles(z, 0.5))
    torch.save({"g": {"x": torch.ones(1)}, "g_ema": full, "latent_avg": torch.ones(64)}, tmp_path / "stylegan.pt")
    loaded = fieldguide.load(tmp_path / "stylegan.pt", name="stylegan2-mini")
    torch.testing.assert_close(loaded(z), model(z))


@pytest.mark.parametrize("origin", ["rosinality", "nvidia"])
def test_critics_of_others_load_and_are_written(origin, tmp_path):
    torch.manual_seed(0)
    model = create("stylegan2-discriminator-mini").eval()
    state = weights.read(weights.save(model, tmp_path / "model.safetensors", origin))
    known = {
        "rosinality": ("convs.0.0.weight", "convs.1.conv1.1.bias", "convs.3.conv2.1.weight", "convs.2.skip.1.weight",
                       "final_conv.0.weight", "final_linear.0.bias", "final_linear.1.weight"),
        "nvidia": ("b32.fromrgb.weight", "b32.conv0.bias", "b16.conv1.weight", "b8.skip.weight", "b4.conv.weight", "b4.fc.weight",
                   "b4.out.bias"),
    }[origin]  # fmt: skip
    assert set(known) <= set(state) and len(state) == 2 + 3 * 5 + 2 + 4
    other, x = create("stylegan2-discriminator-mini").eval(), torch.randn(4, 3, 32, 32)
    assert weights.load(other, state) == [] and torch.equal(other(x), model(x))


def test_published_files_are_recognized_by_their_names():
    """From names and shapes alone, on the meta device."""
    from fieldguide.checkpoints.identify import recognize
    from fieldguide.checkpoints.weights import translate

    for size in ("stylegan2-1024", "stylegan2-256"):
        made, _ = find(size)
        config = made.resolve_config(size)
        state = make_on_meta(made, config).state_dict()
        for origin in ("nvidia",):
            names = translate(state, made.tables(config)[origin], reverse=True)
            assert recognize(names, "a file")[:3] == (made, size, origin)


def test_pickles_with_code_are_refused_with_a_way_out(tmp_path):
    class Runs:
        def __reduce__(self):
            return eval, ("1 / 0",)

    path = tmp_path / "ffhq.pkl"
    path.write_bytes(pickle.dumps({"G_ema": Runs()}))
    with pytest.raises(WeightsError, match=r"would run the code in it.*G_ema.*save_file"):
        fieldguide.load(path)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_stylegan2_learns_figures(tmp_path):
    """A CNN that is trained on generated digits of each class alone recognizes real ones (chance: 0.1)."""
    run = fit(
        samples.path("figures"),
        task="image-generation",
        model="stylegan2-mini",
        out=tmp_path / "run",
        settings={
            "steps": 700,
            "batch": 64,
            "evaluate": 100,
            "lr": 0.02,
            "ema": 0.98,
            "penalty_weight": 0.1,
            "minutes": 0,
            "precision": "float32",
        },
    )
    assert run.record["settings"]["path_length_weight"] == 2 and run.record["settings"]["penalty_interval"] == 16
    assert run.record["model"]["parts"]["critic"]["size"] == "stylegan2-discriminator-mini"
    plain, typical = (run.predict(["3"], count=4, truncation=t) for t in (1.0, 0.5))
    assert [a["class"] for a in typical] == ["3"] * 4 and plain[0]["image"] != typical[0]["image"]
    assert run.scores["classifier_accuracy"] > 0.75
