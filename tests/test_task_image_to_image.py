"""Image to image: layouts of pairs and domains, degraded inputs, losses, scores, sizes of predictions, training and export."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn

from fieldguide import create, data
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, FieldguideError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import samples
from fieldguide.metrics import generative, image_quality
from fieldguide.models.registry import card, find
from fieldguide.objectives.gan_losses import LOSSES, LeastSquares
from fieldguide.objectives.image_translation import ImagePool, PairedTranslation, UnpairedTranslation
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.vision import image_to_image
from fieldguide.tasks.vision.image_restoration import convert_channels, degrade
from fieldguide.tasks.vision.image_to_image import ImageToImage
from fieldguide.tasks.vision.image_to_image_baselines import fit_colors, match_colors


@pytest.fixture(autouse=True, scope="module")
def train_evaluation_networks_briefly(request):
    """Train the CNNs that scores are computed with for a few steps only; `slow` tests restore them."""
    whole = generative.train_classifier
    generative.train_classifier = lambda *values, steps=10, **named: whole(*values, steps=10, **named)
    yield whole
    generative.train_classifier = whole


QUICK = {"steps": 6, "eval_steps": 3, "batch_size": 4, "precision": "float32"}


def write_image(path: Path, seed: int, size: tuple[int, int] = (20, 16), color: bool = True) -> np.ndarray:
    """Write a random image of width x height; return its pixels."""
    shape = (size[1], size[0], 3) if color else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_pairs(folder: Path, names: tuple[str, str] = ("A", "B"), count: int = 12, zoom: int = 1, color: bool = True) -> Path:
    for i in range(count):
        write_image(folder / names[0] / f"{i:02}.png", i, (16, 16), color)
        write_image(folder / names[1] / f"{i:02}.png", 100 + i, (16 * zoom, 16 * zoom))
    return folder


def fit_task(rows, **options) -> ImageToImage:
    return ImageToImage.fit(rows, ImageToImage.options_from(options))


def read(folder: Path):
    return data.read(folder, column_spec=ImageToImage.column_spec)


# Layouts


@pytest.mark.parametrize("names", [("A", "B"), ("input", "target"), ("source", "target"), ("before", "after"), ("LR", "HR")])
def test_folders_of_equal_names_are_pairs(tmp_path, names):
    rows = data.read(write_pairs(tmp_path, names))
    kind, why = infer_task(rows)
    assert kind.name == "image-to-image" and "pairs" in why and len(rows) == 12
    found = {
        (Path(a).parent.name, Path(b).parent.name, Path(a).name == Path(b).name)
        for a, b in rows.rows[["image", "target_image"]].rows()
    }
    assert found == {(*names, True)}


@pytest.mark.parametrize("layout", ["{part}/{domain}", "{domain}/{part}", "{part}{domain}"])
def test_splits_above_below_and_in_the_names(tmp_path, layout):
    for part, count in (("train", 8), ("test", 3)):
        for i in range(count):
            for k, domain in enumerate("AB"):
                write_image(tmp_path / layout.format(part=part, domain=domain) / f"{part}{i}.png", 10 * i + k)
    rows = data.read(tmp_path)
    assert rows.splits is not None and sorted(rows.splits.tolist()) == ["test"] * 3 + ["train"] * 8
    for split, image in zip(rows.splits, rows.rows["image"]):
        assert Path(image).name.startswith(split)


def test_domains_without_common_names_are_rows(tmp_path):
    for i in range(5):
        write_image(tmp_path / "trainA" / f"horse{i}.png", i)
    for i in range(7):
        write_image(tmp_path / "trainB" / f"zebra{i}.png", i)
    write_image(tmp_path / "testA" / "horse9.png", 8)
    write_image(tmp_path / "testB" / "zebra9.png", 9)
    rows = data.read(tmp_path)
    assert rows.rows["domain"].value_counts(sort=True).rows() == [("B", 8), ("A", 6)]
    made = fit_task(rows)
    assert made.domains == ["A", "B"] and not made.paired and fit_task(rows, reverse=True).domains == ["B", "A"]


def test_images_without_a_partner_are_reported(tmp_path):
    write_pairs(tmp_path)
    write_image(tmp_path / "A" / "lonely.png", 5)
    write_image(tmp_path / "B" / "also.png", 5)
    with pytest.raises(DataError, match="2 of 14 examples are unusable"):
        data.read(tmp_path)
    rows = data.read(tmp_path, allow_bad=True)
    (finding,) = [f for f in rows.findings if f.check == "no-partner"]
    assert finding.count == 2 and len(rows) == 12
    assert {Path(p).name for p in finding.places} == {"lonely.png", "also.png"}


def test_broken_targets_are_named(tmp_path):
    write_pairs(tmp_path, count=30)
    (tmp_path / "B" / "03.png").write_bytes(b"no image")
    rows = data.read(tmp_path, allow_bad=True)
    assert len(rows) == 29 and any("B/03.png" in str(f) for f in rows.findings)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_of_two_image_columns(tmp_path, kind):
    write_pairs(tmp_path / "files")
    table = pl.DataFrame(
        {"input_image": [f"files/A/{i:02}.png" for i in range(12)], "edited_image": [f"files/B/{i:02}.png" for i in range(12)]}
    )
    path = tmp_path / f"pairs.{kind}"
    (table.write_csv if kind == "csv" else table.write_ndjson)(path)
    rows = read(path)
    assert rows.required_target.name == "edited_image" and [c.name for c in rows.features("image")] == ["input_image"]
    assert fit_task(rows).paired


def test_files_with_both_halves(tmp_path):
    pixels = [write_image(tmp_path / f"{i}.png", i, (32, 16)) for i in range(4)]
    made = fit_task(read(tmp_path), side=16)
    first, second = made.load_pairs(read(tmp_path))
    order = [int(Path(p).stem) for p in read(tmp_path).rows["image"]]
    for row, i in enumerate(order):
        assert np.array_equal(first[row].numpy().transpose(1, 2, 0), pixels[i][:, :16])
        assert np.array_equal(second[row].numpy().transpose(1, 2, 0), pixels[i][:, 16:])
    turned = fit_task(read(tmp_path), side=16, reverse=True)
    assert torch.equal(turned.load_pairs(read(tmp_path))[0], second)
    assert "left half" in made.notes[0]


def test_other_data_is_refused(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i)
    with pytest.raises(DataError, match=r"neither targets nor domains.*task\.degrade=4x"):
        fit_task(read(tmp_path))
    with pytest.raises(SettingsError, match=r"task\.degrade='5x' is unknown"):
        fit_task(read(tmp_path), degrade="5x")
    for name in ("a1", "b1", "c1"):
        write_image(tmp_path / "three" / name / "0.png", 1)
    with pytest.raises(DataError, match="two domains, but 'label' holds 3: a1, b1, c1"):
        fit_task(data.read(tmp_path / "three"))


def test_classes_are_no_domains(tmp_path):
    """Class folders with numbered files, of which two are called A and B, and two called a and b."""
    for name in ("first/A", "first/B", "first/C", "second/a", "second/b"):
        for i in range(3):
            write_image(tmp_path / name / f"{i}.png", i)
    assert data.read(tmp_path / "first").rows["label"].n_unique() == 3
    assert sorted(data.read(tmp_path / "second").rows["label"].unique()) == ["a", "b"]


# Inputs


def test_degraded_inputs(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i, (32, 32))
    real = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(2, 3, 8, 8)
    assert torch.equal(degrade(real, "gray", 1), real[:, :1])
    small = degrade(real.contiguous(), "4x", 3)
    assert small.shape == real.shape
    means = real[0, 0].float().view(2, 4, 2, 4).mean((1, 3)).round().byte().numpy()  # of squares of 4 x 4
    enlarged = np.asarray(Image.fromarray(means).resize((8, 8), Image.Resampling.BILINEAR))
    assert np.abs(small[0, 0].numpy().astype(int) - enlarged).max() <= 1 and torch.equal(small[1, 2], small[0, 0])
    made = fit_task(read(tmp_path), degrade="4x")
    assert made.zoom == 4 and made.paired and made.model_dims()["channels"] == 3
    gray = fit_task(read(tmp_path), degrade="gray")
    assert gray.model_dims()["channels"] == 1 and gray.model_dims()["outputs"] == 3 and gray.zoom == 1


def test_sizes_follow_from_the_targets(tmp_path):
    made = fit_task(data.read(write_pairs(tmp_path, zoom=2)))
    assert made.zoom == 2 and made.pictures.side == 32


def test_gray_inputs_and_colored_targets(tmp_path):
    made = fit_task(data.read(write_pairs(tmp_path, color=False, zoom=2)))
    assert (made.pictures.channels, made.target_pictures.channels, made.zoom) == (1, 3, 2)
    turned = fit_task(data.read(tmp_path), reverse=True)
    assert (turned.pictures.channels, turned.target_pictures.channels, turned.zoom) == (3, 1, 0.5)


def test_degraded_images_are_read_as_in_training(tmp_path):
    """A small file gives the network what training made of the large image."""
    pixels = write_image(tmp_path / "large" / "0.png", 0, (32, 32))
    for i in range(1, 4):
        write_image(tmp_path / "large" / f"{i}.png", i, (32, 32))
    rows = read(tmp_path / "large")
    made = fit_task(rows, degrade="4x")
    row = [Path(p).name for p in rows.rows["image"]].index("0.png")
    small = pixels.reshape(8, 4, 8, 4, 3).mean((1, 3)).round().astype(np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    loaded = made.pictures.load([str(tmp_path / "small.png")])[0].int()
    assert (loaded - made.load_pairs(rows)[0][row].int()).abs().max() <= 1


def test_images_that_are_reduced_are_noted(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i, (96, 96))
    made = fit_task(read(tmp_path), degrade="4x", side=32)
    assert any("learns to enlarge images of 8 x 8" in note for note in made.notes)
    request = made.for_request(made.PredictOptions())
    request.predict_batches(read(tmp_path), card("pix2pix"))
    assert any("larger than 8 pixels" in note for note in request.notes)


def test_images_that_do_not_fit_into_memory_are_loaded_by_batch(tmp_path, monkeypatch):
    rows = data.read(write_pairs(tmp_path))
    made = fit_task(rows, shift=0.1)
    batches = [made.batches(rows, card("pix2pix"))]
    monkeypatch.setattr(image_to_image, "ram", lambda: 1)
    read_pairs, counts = made.load_pairs, []
    monkeypatch.setattr(made, "load_pairs", lambda some: counts.append(len(some)) or read_pairs(some))
    batches.append(made.batches(rows, card("pix2pix")))
    assert not counts
    first, second = (b.make(np.array([3, 1]), torch.Generator().manual_seed(0)) for b in batches)
    assert counts == [2] and all(torch.equal(first[name], second[name]) for name in first)


def test_networks_that_need_pairs_are_no_candidates_without_them(tmp_path):
    assert "noisy-target" in fit_task(data.read(write_pairs(tmp_path / "pairs"))).input_types
    for name in ("a", "b"):
        for i in range(4):
            write_image(tmp_path / "two" / name / f"{name}{i}.png", i, (16, 16))
    assert fit_task(data.read(tmp_path / "two")).input_types == ("image",)


def test_augmentation_changes_input_and_target_alike(tmp_path):
    rows = data.read(write_pairs(tmp_path))
    made = fit_task(rows, flip=True, shift=0.2)
    x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    batch = made.augment({"image": x, "target": 255 - x}, torch.Generator().manual_seed(0))
    assert torch.equal(batch["target"], 255 - batch["image"])
    assert sum(not torch.equal(a, b) for a, b in zip(x, batch["image"])) >= 5
    places = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(6, 3, 16, 16)  # each pixel its number
    moved = made.augment({"image": places}, torch.Generator().manual_seed(1))["image"][:, 0].long()
    for one in moved:
        down, right = one[8, 8] // 16 - 8, one[8, 8] % 16 - 8
        steps = {int(one[8, 9] - one[8, 8])}
        assert abs(down) <= 4 and steps <= {1, -1} and (abs(right) <= 4 or steps == {-1})
    assert torch.equal(made.augment({"image": x}, torch.Generator().manual_seed(0))["image"], batch["image"])
    unchanged = fit_task(rows, shift=0.0)
    assert torch.equal(unchanged.augment({"image": x}, torch.Generator().manual_seed(0))["image"], x)


def test_training_batches_of_two_domains(tmp_path):
    for i in range(9):
        write_image(tmp_path / "B" / f"zebra{i}.png", 50, (16, 16))
    for i in range(4):
        write_image(tmp_path / "A" / f"horse{i}.png", 51, (16, 16))
    rows = data.read(tmp_path)
    made = fit_task(rows, shift=0.0)
    batches = made.train_batches(rows, card("cyclegan"), Settings())
    assert len(batches) == 9  # those of the larger domain; the others are drawn at random
    batch = batches.make(np.arange(9), torch.Generator().manual_seed(0))
    first, second = (made.pictures.load([str(tmp_path / name)]) for name in ("A/horse0.png", "B/zebra0.png"))
    assert torch.equal(batch["image"], made.pictures.apply(first).expand(9, -1, -1, -1))
    assert torch.equal(batch["target"], made.pictures.apply(second).expand(9, -1, -1, -1))


# Objectives


def build_paired(**options) -> tuple[PairedTranslation, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, critic = create("pix2pix-test", channels=2, outputs=1), create("patchgan-test", channels=3)
    batch = {
        "image": torch.rand(3, 2, 16, 16) * 2 - 1,
        "target": torch.rand(3, 1, 16, 16) * 2 - 1,
        "row": torch.tensor([4, 5, 6]),
    }
    return PairedTranslation(model, critic, **options), batch


@pytest.mark.parametrize("loss", [None, "hinge", "least-squares", "relativistic"])
def test_losses_of_pairs_equal_their_equations(loss):
    objective, batch = build_paired(distance=7.0, adversarial=0.5, loss=LOSSES[loss]() if loss else None)
    objective.eval()
    made = objective.model(batch["image"])
    r, f = (objective.critic(torch.cat([batch["image"], x], 1)).double() for x in (batch["target"], made))
    log = lambda x: torch.nn.functional.logsigmoid(x)
    critic, generator = {
        None: lambda: (-(log(r).mean() + log(-f).mean()), -log(f).mean()),
        "hinge": lambda: ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(), -f.mean()),
        "least-squares": lambda: (((r - 1) ** 2).mean() + (f**2).mean(), ((f - 1) ** 2).mean()),
        "relativistic": lambda: (-log(r - f).mean(), -log(f - r).mean()),
    }[loss]()
    distance = (made - batch["target"]).abs().mean()
    assert objective(batch, "critic")["loss"].item() == pytest.approx(critic.item() / 2, rel=1e-5)
    assert objective(batch, "generator")["loss"].item() == pytest.approx((0.5 * generator + 7 * distance).item(), rel=1e-5)
    assert [p.name for p in objective.phases] == ["critic", "generator"]


def test_the_critic_does_not_train_the_generator():
    objective, batch = build_paired()
    objective(batch, "critic")["loss"].backward()
    assert all(p.grad is None for p in objective.model.parameters())
    assert all(p.grad is not None for p in objective.critic.parameters())


def test_without_an_adversarial_loss_there_is_no_critic():
    objective, batch = build_paired(adversarial=0.0)
    assert [p.name for p in objective.phases] == ["generator"] and objective.keep == ("model",)
    objective(batch, "generator")["loss"].backward()
    assert all(p.grad is None for p in objective.critic.parameters())


def test_dropout_of_predictions_depends_on_seed_and_number():
    torch.manual_seed(0)
    model = create("pix2pix-test", depth=6, channels=2, outputs=1).eval()
    objective = PairedTranslation(model, nn.Identity(), adversarial=0.0).eval()
    batch = {"image": torch.rand(3, 2, 64, 64), "row": torch.tensor([4, 5, 6])}
    plain = objective.outputs(batch)["made"]
    objective.draw = 1
    some = objective.outputs(batch)["made"]
    alone = objective.outputs({"image": batch["image"][1:2], "row": batch["row"][1:2]})["made"]
    assert torch.allclose(some[1:2], alone, atol=1e-6) and not torch.allclose(plain, some, atol=1e-3)
    objective.draw = 2
    assert not torch.allclose(objective.outputs(batch)["made"], some, atol=1e-3)


def build_unpaired(**options) -> tuple[UnpairedTranslation, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    networks = [create("cyclegan-test"), create("cyclegan-test"), create("patchgan-test"), create("patchgan-test")]
    batch = {name: torch.rand(3, 2, 16, 16) * 2 - 1 for name in ("image", "target")}
    return UnpairedTranslation(*networks, shape=(2, 16, 16), **options), batch


def test_losses_of_domains_equal_their_equations():
    """Equations 1 to 3 with squared errors, and the identity loss of section 5.2."""
    objective, batch = build_unpaired(cycle=6.0, identity=0.25)
    x, y = batch["image"], batch["target"]
    g, f, dy, dx = objective.model, objective.back, objective.critic, objective.back_critic
    l1 = lambda a, b: (a - b).abs().mean()
    adversarial = ((dy(g(x)) - 1) ** 2).mean() + ((dx(f(y)) - 1) ** 2).mean()
    cycle = l1(f(g(x)), x) + l1(g(f(y)), y)
    same = l1(g(y), y) + l1(f(x), x)
    found = objective(batch, "generator")
    assert found["loss"].item() == pytest.approx((adversarial + 6 * cycle + 1.5 * same).item(), rel=1e-5)
    critics = ((dy(y) - 1) ** 2).mean() + (dy(g(x)) ** 2).mean() + ((dx(x) - 1) ** 2).mean() + (dx(f(y)) ** 2).mean()
    assert objective(batch, "critic")["loss"].item() == pytest.approx(critics.item() / 2, rel=1e-5)
    assert objective.pool.count == 3 and not objective.made


def test_outputs_of_both_directions():
    objective, batch = build_unpaired()
    objective.eval()
    reverse = torch.tensor([False, True, False])
    found = objective.outputs({"image": batch["image"], "reverse": reverse})
    there, back = objective.model(batch["image"]), objective.back(batch["image"])
    expected = torch.where(reverse[:, None, None, None], back, there)
    assert torch.allclose(found["made"], expected, atol=1e-6)
    assert torch.allclose(found["again"][1:2], objective.model(expected[1:2]), atol=1e-6)
    assert torch.allclose(found["again"][0:1], objective.back(expected[0:1]), atol=1e-6)


def test_the_pool_returns_earlier_images_in_half_of_the_cases():
    torch.manual_seed(0)
    pool = ImagePool((1, 1, 1), size=4)
    first = torch.arange(4.0).view(4, 1, 1, 1)
    assert torch.equal(pool.exchange(first), first) and pool.count == 4
    returned_new, seen = 0, []
    for number in range(4, 404):
        new = torch.full((1, 1, 1, 1), float(number))
        found = float(pool.exchange(new))
        returned_new += found == number
        if found != number:
            seen.append(found)
            assert float(number) in pool.images.flatten().tolist() and found not in pool.images.flatten().tolist()
    assert 160 < returned_new < 240 and len(set(seen)) == len(seen)
    copy = ImagePool((1, 1, 1), size=4)
    copy.load_state_dict(pool.state_dict())
    assert torch.equal(copy.images, pool.images) and copy.count == 4


def test_least_squares_loss():
    r, f = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.5], [-1.0]])
    parts = LeastSquares().critic(r, f)
    assert (
        parts["real"] == 1.0 and parts["fake"] == pytest.approx(0.625) and LeastSquares().generator(f) == pytest.approx(2.125)
    )


# Scores


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean over windows of 11 x 11 pixels of one channel, each by its definition."""
    places = np.arange(11) - 5
    kernel = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (kernel * x).sum(), (kernel * y).sum()
            vx, vy = (kernel * (x - mx) ** 2).sum(), (kernel * (y - my) ** 2).sum()
            both = (kernel * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 0.01**2) * (2 * both + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
    return float(np.mean(values))


def test_ssim_equals_its_definition():
    rng = np.random.default_rng(0)
    a = rng.random((2, 2, 17, 14))
    b = np.clip(a + rng.normal(0, 0.2, a.shape), 0, 1)
    found = image_quality.ssim(torch.from_numpy(2 * a - 1), torch.from_numpy(2 * b - 1))
    for row in range(2):
        assert float(found[row]) == pytest.approx(np.mean([slow_ssim(a[row, c], b[row, c]) for c in range(2)]), abs=1e-9)
    same = torch.rand(2, 3, 6, 9)
    assert torch.allclose(image_quality.ssim(same, same), torch.ones(2))


def test_psnr_and_absolute_error():
    a, b = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.2)  # a tenth of the range
    assert float(image_quality.psnr(a, b)) == pytest.approx(20.0, abs=1e-4)
    assert float(image_quality.absolute_error(a, b)) == pytest.approx(0.1)
    assert float(image_quality.psnr(a, a)) == 100.0


def test_baselines_of_colors():
    torch.manual_seed(0)
    x = torch.rand(20, 3, 8, 8) * 2 - 1
    mix = torch.tensor([[0.5, 0.1, 0.0], [0.2, -0.4, 0.3]])
    y = torch.einsum("nchw,kc->nkhw", x, mix) + 0.1
    assert (fit_colors(x, y)(x) - y).abs().max() < 0.01
    matched = match_colors(x, x, 0.3 * torch.randn(30, 3, 8, 8) + 0.2)
    assert matched.mean((0, 2, 3)) == pytest.approx(torch.full((3,), 0.2), abs=0.05)
    assert matched.std((0, 2, 3)) == pytest.approx(torch.full((3,), 0.3), abs=0.05)
    assert convert_channels(torch.ones(1, 3, 2, 2), 1).flatten().tolist() == pytest.approx([1.0] * 4)


# Runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Gray images, and colored targets twice as large that are a function of them."""
    folder = tmp_path_factory.mktemp("pairs")
    for i in range(40):
        pixels = write_image(folder / "A" / f"{i:02}.png", i, (16, 16), False)
        large = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
        (folder / "B").mkdir(exist_ok=True)
        Image.fromarray(np.stack([large, 255 - large, large // 2], -1)).save(folder / "B" / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def paired_run(pairs, tmp_path_factory):
    return fit(pairs, model="pix2pix-test", out=tmp_path_factory.mktemp("run") / "run", settings={**QUICK, "model.dim": 4})


def test_a_run_of_pairs(paired_run, pairs, tmp_path):
    assert paired_run.task.zoom == 2 and (paired_run.path / "critic.safetensors").exists()
    assert set(paired_run.scores) >= {"l1", "ssim", "psnr", "perceptual_distance"}
    record = json.loads((paired_run.path / "run.json").read_text(encoding="utf-8"))
    assert {b["name"] for b in record["scores"]["baselines"]} == {"copy", "mean", "colors", "nearest"}
    wide = tmp_path / "wide.png"
    write_image(wide, 3, (30, 10), False)
    answers = paired_run.predict([str(wide), str(pairs / "A" / "00.png")])
    assert [(a["width"], a["height"]) for a in answers] == [(60, 20), (32, 32)]
    with pytest.raises(SettingsError, match="to: this model was trained on pairs"):
        paired_run.predict([str(wide)], to="B")
    alone = paired_run.predict([str(pairs / "A" / "00.png")])
    assert alone[0]["image"].content == answers[1]["image"].content
    found = paired_run.evaluate(pairs)
    assert found["rows"] == 8 and found["scores"]["l1"] == pytest.approx(paired_run.scores["l1"], rel=1e-4)
    assert "<html" in (paired_run.path / "report.html").read_text(encoding="utf-8")[:200].lower()


def test_a_run_without_pairs(tmp_path):
    for i in range(24):
        write_image(tmp_path / "data" / "noon" / f"n{i}.png", i, (16, 16))
        write_image(tmp_path / "data" / "night" / f"d{i}.png", 50 + i, (16, 16))
    settings = {**QUICK, "model.dim": 4}
    run = fit(tmp_path / "data", task="image-to-image", model="cyclegan-test", out=tmp_path / "run", settings=settings)
    assert run.task.domains == ["night", "noon"]
    assert {p.name for p in run.path.glob("*.safetensors")} >= {
        f"{n}.safetensors" for n in ("model", "back", "critic", "back_critic")
    }
    assert set(run.scores) >= {"feature_distance", "round_trip_error"}
    assert run.task.main_metric().name == "feature_distance" and run.task.monitored_metric().name == "thumbnail_distance"
    image = str(tmp_path / "data" / "noon" / "n0.png")
    there, back = run.predict([image])[0], run.predict([image], to="night")[0]
    assert there["image"].content != back["image"].content and there["width"] == 16
    with pytest.raises(SettingsError, match="to='dawn' is no domain"):
        run.predict([image], to="dawn")
    assert run.predict([image], to="noon")[0]["image"].content == there["image"].content


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pairs", "domains"])
def test_exports_equal_predictions(how, paired_run, pairs, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    if how == "domains":
        for i in range(16):
            write_image(tmp_path / "data" / "a" / f"n{i}.png", i, (16, 16))
            write_image(tmp_path / "data" / "b" / f"d{i}.png", 50 + i, (16, 16))
        settings = {**QUICK, "model.dim": 4}
        run = fit(tmp_path / "data", task="image-to-image", model="cyclegan-test", out=tmp_path / "run", settings=settings)
    else:
        run = paired_run
    out = run.export("onnx", out=tmp_path / "out")
    assert out.passed, out.result
    assert len((tmp_path / "out" / "run.py").read_text(encoding="utf-8").splitlines()) < 150


def decode(answers) -> np.ndarray:  # N H W K
    """Return the pixels of predicted images."""
    return np.stack([np.asarray(Image.open(io.BytesIO(answer["image"].content))).astype(int) for answer in answers])


def test_diffusion_of_targets(pairs, tmp_path):
    """A run of Palette: samples depend on seed, steps and number, not on the batch; graphs and domains are refused."""
    run = fit(pairs, model="palette-test", out=tmp_path / "run", settings={**QUICK, "task.side": 16})
    names = [str(pairs / "A" / f"0{i}.png") for i in range(3)]
    made = decode(run.predict(names, seed=3, steps=4))
    assert np.abs(decode(run.predict(names[:2], seed=3, steps=4)) - made[:2]).max() <= 1  # a level may be rounded either way
    for other in ({"seed": 4, "steps": 4}, {"seed": 3, "steps": 5}, {"seed": 3, "steps": 4, "guidance": 2.0}):
        assert np.abs(decode(run.predict(names, **other)) - made).max() > 1
    with pytest.raises(FieldguideError, match="samples in several steps"):
        run.export("onnx", out=tmp_path / "out")
    assert run.scores["l1"] < 1
    for name in ("a", "b"):
        for i in range(8):
            write_image(tmp_path / "data" / name / f"{name}{i}.png", i, (16, 16))
    with pytest.raises(SettingsError, match="Networks that can: cyclegan, pix2pix"):
        fit(tmp_path / "data", task="image-to-image", model="palette-test", out=tmp_path / "two", settings=QUICK)


def test_options_of_samplers_need_a_diffusion_model(paired_run, pairs):
    with pytest.raises(SettingsError, match="steps: not supported"):
        paired_run.predict([str(pairs / "A" / "00.png")], steps=5)


def test_settings_of_losses(pairs, tmp_path):
    run = fit(
        pairs,
        model="pix2pix-test",
        out=tmp_path / "run",
        settings={**QUICK, "model.dim": 4, "loss": "hinge", "task.adversarial": 2.0, "task.distance": 10.0},
    )
    objective = run.objective
    assert type(objective.loss) is LOSSES["hinge"] and objective.adversarial == 2.0 and objective.distance == 10.0


def test_critics_suit_small_images():
    found = card("patchgan").adapt({"channels": 1, "outputs": 3, "paired": True, "image": 32})
    assert found == {"channels": 4, "scaled": True, "dim": 16, "depth": 2}
    large = card("patchgan").adapt({"channels": 3, "outputs": 3, "paired": False, "image": 256})
    assert large == {"channels": 3, "scaled": False}
    made, size = find("patchgan-70")
    assert made.resolve_config(size, **large).dim == 64


@pytest.mark.slow
def test_pairs_are_learned(tmp_path, monkeypatch, train_evaluation_networks_briefly):
    monkeypatch.setattr(generative, "train_classifier", train_evaluation_networks_briefly)
    run = fit("outlines", minutes=1.5, out=tmp_path / "run")
    record = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    nearest = next(b["scores"]["l1"] for b in record["scores"]["baselines"] if b["name"] == "nearest")
    assert run.scores["l1"] < min(0.03, nearest)


@pytest.mark.slow
def test_domains_are_learned(tmp_path, monkeypatch, train_evaluation_networks_briefly):
    """A digit in chalk, translated to ink, is close to the same digit drawn in ink, which no training image is."""
    monkeypatch.setattr(generative, "train_classifier", train_evaluation_networks_briefly)
    run = fit("inks", task="image-to-image", minutes=2.5, out=tmp_path / "run")
    ground, stroke = np.array((244, 236, 214)), np.array((30, 44, 120))
    errors, paths = [], sorted((samples.path("inks") / "chalk").glob("*.png"))[:50]
    for answer, path in zip(run.predict([str(p) for p in paths]), paths):
        is_stroke = np.asarray(Image.open(path)).mean(-1) > 140
        true = np.where(is_stroke[..., None], stroke, ground)
        errors.append(np.abs(decode([answer])[0] - true).mean() / 255)
    assert np.mean(errors) < 0.08  # the mean of ink images has 0.25


def test_unknown_domains_are_named_in_evaluation(tmp_path):
    for name in ("a", "b"):
        for i in range(8):
            write_image(tmp_path / "data" / name / f"{name}{i}.png", i, (16, 16))
    run = fit(
        tmp_path / "data",
        task="image-to-image",
        model="cyclegan-test",
        out=tmp_path / "run",
        settings={**QUICK, "steps": 2, "eval_steps": 2},
    )
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    (tmp_path / "other" / "b").rename(tmp_path / "other" / "strange")
    with pytest.raises(FieldguideError, match="'strange' is no domain of this model: a, b"):
        run.evaluate(tmp_path / "other")


def test_the_task_is_listed():
    assert task("image-to-image") is ImageToImage
