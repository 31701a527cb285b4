"""unCLIP (DALL-E 2) trained from scratch: losses of prior and decoder, sampling against diffusers, runs, and captioned digits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn

import fieldguide
import fieldguide.data
from fieldguide.automl.build_plan import build_plan
from fieldguide.checkpoints.key_mapping import translate
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.exporting.verify import verify
from fieldguide.metrics import generative
from fieldguide.models.registry import card, create
from fieldguide.objectives import DDIM, Diffusion
from fieldguide.objectives.diffusion.unclip import UnCLIP
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.vision import clip_encoder, image_generation_report
from fieldguide.tasks.vision.clip_encoder import ClipEncoder
from fieldguide.tasks.vision.image_generation import ImageGeneration

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = {"white on black": (0, 255), "black on white": (255, 0), "gray on black": (0, 130)}  # ground and stroke


class SmallCLIP(nn.Module):
    """An arbitrary encoder of images B 1 2 2 and tokens B 3 to vectors of 10 elements."""

    def __init__(self):
        super().__init__()
        self.image, self.words = nn.Linear(4, 10), nn.Embedding(7, 10)

    def encode_images(self, images):
        return nn.functional.normalize(self.image(images.flatten(1)), dim=1)

    def encode_texts(self, tokens):
        states = self.words(tokens)
        return states, states.sum(1), tokens > 0


class Decoder(nn.Module):
    """A network of noisy images, time and embedding."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(10, 4)

    def forward(self, x, time, label):
        return torch.tanh(x + self.mix(label).view_as(x) + time.view(-1, 1, 1, 1) / 1000)


@pytest.fixture
def objective():
    torch.manual_seed(0)
    prior = create("unclip-prior-test", length=3)
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.2 * torch.randn_like(p))
        prior.clip_mean.normal_(0, 0.2), prior.clip_std.uniform_(0.2, 0.5)
    return UnCLIP(Decoder(), prior, SmallCLIP(), drop=0.5)


def test_losses_equal_their_equations(objective):
    """Of section 2.2 and of the decoder, with the same draws; both phases have gradients of their own network only."""
    batch = {"image": torch.randn(5, 1, 2, 2), "label": torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0], [2, 2, 2], [1, 0, 0]])}
    clip, prior = objective.encoder, objective.prior
    embedding = (clip.encode_images(batch["image"]) - prior.clip_mean) / prior.clip_std
    torch.manual_seed(1)
    loss = objective(batch, "prior")["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in prior.named_parameters()}
    assert all(p.grad is None for p in (*objective.model.parameters(), *clip.parameters()))
    torch.manual_seed(1)
    kept, time = torch.rand(5) >= 0.5, torch.randint(1000, (5,))
    assert kept.any() and not kept.all()
    noise, errors = torch.randn(5, 10, 1, 1), []
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    states, pooled, mask = clip.encode_texts(batch["label"])
    for i in range(5):
        beta = [min(1 - f(t + 1) / f(t), 0.999) for t in range(int(time[i]) + 1)]
        left = float(np.prod(1 - np.array(beta)))
        noisy = left**0.5 * embedding[i][:, None, None] + (1 - left) ** 0.5 * noise[i]
        text = (states[i], pooled[i], mask[i]) if kept[i] else (states[i] * 0, pooled[i] * 0, torch.ones(3, dtype=torch.bool))
        output = prior(noisy[None], time[i : i + 1].float(), *(x[None].detach() for x in text))
        errors.append(((output[0, :, 0, 0] - embedding[i].detach()) ** 2).mean())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(loss, expected)
    prior.zero_grad()
    expected.backward()
    for name, p in prior.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
    plain = Diffusion(objective.model, objective.process, drop=0.5)
    torch.manual_seed(2)
    loss = objective(batch)["loss"]
    torch.manual_seed(2)
    torch.testing.assert_close(loss, plain({"image": batch["image"], "label": embedding.detach()})["loss"])
    assert not any("encoder" in name for name in objective.state_dict())


def test_embeddings_equal_diffusers(objective):
    """Ancestral sampling with guidance, and the one of two samples that fits the text better (section 2.2)."""
    from latents import build
    from tv import diffusers

    prior, label, steps, scale = objective.prior, torch.tensor([[1, 2, 0], [3, 4, 5], [6, 1, 0]]), 6, 3.0
    peer = build(prior).eval()
    peer.load_state_dict(translate(prior.state_dict(), card("unclip-prior").tables(prior.config)["diffusers"], reverse=True))
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0, variance_type="fixed_small_log")
    scheduler.set_timesteps(steps)
    states, pooled, mask = objective.encoder.encode_texts(label)
    wanted = []
    with torch.no_grad():
        for i, number in enumerate((4, 0, 9)):
            both = []
            for k in range(2):
                draw = Noise(fieldguide.data.loader.mix_seeds(7, 1), [2 * number + k], (10, 1, 1), torch.zeros(1))
                x = draw()[:, :, 0, 0]
                for at, time in enumerate(scheduler.timesteps):
                    texts = [torch.stack([torch.zeros_like(y[i]), y[i]]) for y in (pooled, states)]
                    masks = torch.stack([torch.ones(3, dtype=torch.bool), mask[i]])
                    without, with_text = peer(x.expand(2, -1), time.expand(2), *texts, masks).predicted_image_embedding
                    output = without + scale * (with_text - without)
                    last = at == steps - 1
                    noise = torch.zeros(1, 10) if last else draw()[:, :, 0, 0]
                    before = None if last else scheduler.timesteps[at + 1]
                    with pytest.MonkeyPatch.context() as patch:
                        module = diffusers.schedulers.scheduling_unclip
                        patch.setattr(module, "randn_tensor", lambda *args, noise=noise, **options: noise)
                        x = scheduler.step(output[None], time, x, prev_timestep=before).prev_sample
                both.append(x[0])
            fit = [(e * peer.clip_std[0] + peer.clip_mean[0]) @ pooled[i] for e in both]
            wanted.append(both[int(fit[1] > fit[0])])
    found = objective.sample_embedding(label, seed=7, numbers=(4, 0, 9), steps=steps, guidance=scale)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=2e-3, atol=2e-3)  # diffusers computes betas in float32
    alone = objective.sample_embedding(label[1:2], seed=7, numbers=(0,), steps=steps, guidance=scale)
    torch.testing.assert_close(alone, found[1:2])
    sampler, options = DDIM(steps=3), {"seed": 7, "numbers": (4, 0, 9), "guidance": 2.0}
    images = objective.sample(label, (1, 2, 2), sampler, prior_steps=steps, prior_guidance=scale, **options)
    plain = Diffusion(objective.model, objective.process).sample(found, (1, 2, 2), sampler, **options)
    torch.testing.assert_close(images, plain)


def test_embedding_conditions_the_network():
    """Added to the time (section 2.1); zeros are no condition."""
    torch.manual_seed(0)
    model = create("ddpm-unet-test", num_classes=0, embedding=5).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, time, vector = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 5)
    torch.testing.assert_close(model(x, time), model(x, time, torch.zeros(2, 5)))
    expected = model.embed_condition(time, None) + vector @ model.embedding.weight.T
    torch.testing.assert_close(model.embed_condition(time, vector), expected)
    assert (model(x, time, vector) - model(x, time)).abs().max() > 1e-3


def write_digits(root, count, styles=tuple(STYLES)):
    """Write scanned digits in several styles with captions such as "a seven in gray on black"; return the table."""
    from sklearn.datasets import load_digits

    data, rng, rows = load_digits(), np.random.default_rng(0), []
    (root / "images").mkdir(parents=True)
    for i in rng.permutation(len(data.images))[:count]:
        style = styles[rng.integers(len(styles))]
        low, high = STYLES[style]
        name = f"images/{len(rows):04d}.png"
        Image.fromarray((low + (high - low) * data.images[i] / 16).round().astype(np.uint8)).save(root / name)
        rows.append({"image": name, "caption": f"a {NAMES[data.target[i]]} in {style}"})
    pl.DataFrame(rows).write_csv(root / "captions.csv")
    return root / "captions.csv"


CLIP = {"precision": "float32", "augmentation": "none", "task.side": 8, "model.patch": 2, "model.embed": 32, "model.depth": 3}


def fit_clip(source, out, **settings):
    return fieldguide.fit(
        source,
        task="image-text",
        model="clip-mini",
        out=out,
        settings={**CLIP, "model.dim": 64, "model.text_dim": 64, **settings},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the table of images, a CLIP, and a run that generates from its embeddings, each trained for two steps."""
    root, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    for name in ("train_classifier", "train_caption_matcher"):
        train = getattr(generative, name)
        patch.setattr(generative, name, lambda *args, train=train, **options: train(*args, **{**options, "steps": 2}))
    patch.setattr(clip_encoder, "PRIOR", "unclip-prior-test")
    patch.setattr(image_generation_report, "SHEET_IMAGES", 2)
    source, quick = write_digits(root / "data", 80), {"steps": 2, "batch": 16, "precision": "float32", "evaluate": 2}
    clip = fit_clip(source, root / "clip", **quick)
    small = {"model.dim": 8, "model.groups": 4, "model.depth": 1}
    run = fieldguide.fit(
        source,
        task="image-generation",
        out=root / "run",
        model="ddpm-8",
        settings={**quick, **small, "task.unclip": str(clip.path)},
    )
    patch.undo()
    return source, clip, run


@pytest.mark.slow
def test_runs_predict_without_their_clip(runs, tmp_path):
    source, clip, run = runs
    assert run.card.name == "ddpm-unet" and run.config.embedding == 32 and run.config.vocab_size == 0
    assert {p.name for p in run.path.glob("*.safetensors")} == {"model.safetensors", "prior.safetensors"}
    first = run.predict(["a seven in gray on black"], count=2, steps=2, prior_steps=3)
    assert [r["caption"] for r in first] == ["a seven in gray on black"] * 2
    shutil.copytree(run.path, tmp_path / "moved")
    hidden = clip.path.rename(clip.path.with_name("hidden"))
    again = fieldguide.open_run(tmp_path / "moved")
    assert again.predict(["a seven in gray on black"], count=2, steps=2, prior_steps=3) == first
    assert again.objective.prior.clip_std.mean() < 0.5
    hidden.rename(clip.path)
    encoder, theirs = again.task.reader, clip.model
    tokens = torch.from_numpy(again.task.tokens(["a two in black on white", "a nine"]))
    states, pooled, mask = encoder.encode_texts(tokens)
    torch.testing.assert_close(pooled / 32**0.5, theirs.encode_text(tokens, mask))
    torch.testing.assert_close(states[1, mask.sum(1)[1] - 1] @ pooled[1], states[1, mask.sum(1)[1] - 1].norm() * 32**0.5)
    assert encoder.tokenize(["a two in black on white"], 4)[0, -1] == encoder.text.end  # truncated
    images = again.task.pictures.apply(again.task.pictures.load([str(source.parent / "images/0003.png")]))
    pixels = clip.task.pictures.apply(clip.task.pictures.load([str(source.parent / "images/0003.png")]))
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(images), clip.model.encode_image(pixels))
    (tmp_path / "moved" / "preprocess" / "clip.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"clip\.safetensors"):
        fieldguide.open_run(tmp_path / "moved").predict(count=1)


@pytest.mark.slow
def test_exports_generate_the_same(runs, tmp_path):
    """Text encoder, prior and decoder are graphs, from the same noise in three sizes of batches."""
    run = fieldguide.open_run(runs[2].path)
    torch.manual_seed(0)
    with torch.no_grad():  # as strong as after training, so that images depend on embeddings and these on captions
        for p in (*run.objective.model.parameters(), *run.objective.prior.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    done = run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows == 64, done.verification.problems
    assert {path.name for path in done.path.glob("*.onnx")} == {"model.onnx", "text.onnx", "prior.onnx"}
    settings = json.loads((done.path / "export.json").read_text())
    (done.path / "export.json").write_text(json.dumps(settings | {"prior": settings["prior"] | {"guidance": 1.0}}))
    assert not verify(run, done.path, str(runs[0]), options={"count": 1}).passed


def test_impossible_requests(runs, tmp_path):
    source, clip, run = runs
    data, kind = fieldguide.data.read(str(source), column_spec=ImageGeneration.column_spec), {"task": "image-generation"}
    for settings, message in (
        ({"task.method": "consistency"}, "task.unclip generates images of captions by diffusion"),
        ({"task.length": 60}, "reads 8 tokens"),
        ({"task.unclip": str(run.path)}, "a network that embeds images"),
    ):
        with pytest.raises((SettingsError, fieldguide.WeightsError), match=message):
            build_plan(data, settings={"task.unclip": str(clip.path), **settings}, **kind)
    with pytest.raises(SettingsError, match="reads no embeddings"):
        build_plan(data, model="dit-8", settings={"steps": 1, "task.unclip": str(clip.path)}, **kind)
    with pytest.raises(SettingsError, match="cannot be distilled"):
        build_plan(data, settings={"steps": 1, "teacher": str(run.path)}, **kind)
    for i in range(12):
        Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(SettingsError, match="it needs captions"):
        ImageGeneration.fit(fieldguide.data.read(tmp_path), ImageGeneration.Options(unclip=str(clip.path)))
    with pytest.raises(SettingsError, match="has no states of tokens"):
        ClipEncoder(create("siglip-test"), "siglip", clip.task)


@pytest.mark.slow
def test_captioned_digits(tmp_path):
    """A judge of digit and style, trained on real images only, agrees with the caption of generated images."""
    source = write_digits(tmp_path / "data", None)
    clip = fit_clip(source, tmp_path / "clip", steps=200, batch=128, evaluate=100)
    settings = {"steps": 400, "batch": 64, "precision": "float32", "evaluate": 400, "task.unclip": str(clip.path)}
    run = fieldguide.fit(source, task="image-generation", model="ddpm-8", out=tmp_path / "run", settings=settings)
    task, data, splits = run.task, fieldguide.data.read(str(source)), run.read_splits()

    def load(rows):
        some = data.take(rows)
        words = [caption.split(" in ") for caption in some.rows["caption"].to_list()]
        known = torch.tensor([[NAMES.index(digit[2:]), list(STYLES).index(style)] for digit, style in words])
        return task.pictures.apply(task.pictures.load(some.rows["image"].to_list())), known, some.rows["caption"].to_list()

    images, known, _ = load(splits.train)
    judge = generative.train_classifier(images, known, (10, 3))
    real, asked, captions = load(splits.test[:200])
    count = lambda x, wanted: (generative.classify_attributes(judge, x, (10, 3)) == wanted.numpy()).all(1).mean()
    with torch.no_grad():
        made = task.generate(run.objective, torch.from_numpy(task.tokens(captions)), range(200), task.PredictOptions()).cpu()
    print(
        f"judge: real {count(real, asked):.3f}, generated {count(made, asked):.3f}, shuffled {count(made, asked.roll(1, 0)):.3f}"
    )
    assert count(real, asked) > 0.9 and count(made, asked) > 0.9 and count(made, asked.roll(1, 0)) < 0.15
