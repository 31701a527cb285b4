"""Zero-shot classification: published image-text networks compared with transformers, and runs of image-text."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import load
from fieldguide.checkpoints.preprocessor_config import build_transform
from fieldguide.cli import commands, run_commands
from fieldguide.core.card import OPENAI
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.inference.zero_shot import ZeroShotClassifier
from fieldguide.models.registry import create
from test_folders import settled
from tv import transformers

CLASSES = ["cat", "big dog", "red bus"]
ENDS = ("<|startoftext|>", "<|endoftext|>")


def clip_tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        ["a photo of a cat.", "a drawing of a big dog", "red bus"],
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False),
    )
    made.add_special_tokens(list(ENDS))
    ids = [(token, made.token_to_id(token)) for token in ENDS]
    made.post_processor = processors.RobertaProcessing(ids[1], ids[0], False, False)
    return made


def clip_folder(path):
    """Write a CLIP as on the hub: weights and tokenizer."""
    tokenizer = clip_tokenizer()
    end = tokenizer.token_to_id(ENDS[1])
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    settled(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={
                    **tower,
                    "hidden_size": 12,
                    "intermediate_size": 48,
                    "vocab_size": tokenizer.get_vocab_size(),
                    "max_position_embeddings": 16,
                    "eos_token_id": end,
                    "bos_token_id": end - 1,
                    "pad_token_id": end,
                },
                vision_config={**tower, "hidden_size": 16, "intermediate_size": 64, "image_size": 24, "patch_size": 8},
                projection_dim=8,
            )
        )
    ).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=ENDS[0], eos_token=ENDS[1], pad_token=ENDS[1]
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a folder that also describes the image preprocessing."""
    path = clip_folder(tmp_path_factory.mktemp("clip"))
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 24},
                "crop_size": {"height": 24, "width": 24},
                "resample": 3,
                "image_mean": OPENAI[0],
                "image_std": OPENAI[1],
            }
        )
    )
    return path


@torch.no_grad()
def theirs(folder, paths, texts):
    """Return `logits_per_image` of transformers with its tokenizer and our images."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    made = transformers.PreTrainedTokenizerFast.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    how = build_transform(folder, 24, 3)
    return model(
        pixel_values=how.apply(how.load(paths)), input_ids=made.input_ids, attention_mask=made.attention_mask
    ).logits_per_image


def files(pictures):
    return sorted(map(str, pictures.glob("*.png")))


def test_image_preprocessing_equals_transformers(folder, pictures):
    """Up to rounding, since transformers may use another library than Pillow."""
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, resample=3)
    how = build_transform(folder, 24, 3)
    found = how.apply(how.load(files(pictures)))
    for path, x in zip(files(pictures), found):
        want = torch.as_tensor(processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0])
        apart = (x - want).abs() * min(how.std) * 255  # in levels of 255
        assert apart.max() < 4 and apart.mean() < 0.3


def test_probabilities_equal_transformers(folder, pictures):
    zero = ZeroShotClassifier.load(folder)
    found = zero.predict(str(pictures), CLASSES)
    want = theirs(folder, files(pictures), [f"a photo of a {name}." for name in CLASSES]).softmax(1)
    assert [r["input"] for r in found] == ["a.png", "b.png", "c.png", "d.png"]
    got = torch.tensor([[r["probabilities"][name] for name in CLASSES] for r in found])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    assert want.std(0).max() > 0.01, "pictures must differ for this to say anything"
    for record, row in zip(found, want):
        assert record["label"] == CLASSES[int(row.argmax())] and next(iter(record["probabilities"])) == record["label"]
    plain = zero.predict(files(pictures)[0], CLASSES, ["{}"])[0]["probabilities"]
    torch.testing.assert_close(
        torch.tensor([plain[name] for name in CLASSES]),
        theirs(folder, files(pictures)[:1], CLASSES)[0].softmax(0),
        rtol=2e-5,
        atol=1e-6,
    )


def test_several_templates_are_averaged(folder, pictures):
    ways = ["a photo of a {}.", "a drawing of a {}", "{}"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    means = []
    with torch.no_grad():
        for name in CLASSES:
            made = fast(
                [way.replace("{}", name) for way in ways], padding=True, truncation=True, max_length=16, return_tensors="pt"
            )
            vectors = model(
                pixel_values=torch.zeros(1, 3, 24, 24), **{k: made[k] for k in ("input_ids", "attention_mask")}
            ).text_embeds
            mean = vectors.mean(0)
            means.append(mean / mean.norm())
        how = build_transform(folder, 24, 3)
        image = model(pixel_values=how.apply(how.load(files(pictures))), input_ids=made.input_ids).image_embeds
        want = (model.logit_scale.exp() * image @ torch.stack(means).T).softmax(1)
    found = ZeroShotClassifier.load(folder).predict(files(pictures), CLASSES, ways)
    got = torch.tensor([[r["probabilities"][name] for name in CLASSES] for r in found])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


def test_texts_are_encoded_once(folder, pictures, monkeypatch):
    monkeypatch.setattr("fieldguide.inference.zero_shot.BATCH_SIZE", 1)
    zero, asked = ZeroShotClassifier.load(folder), []
    plain = zero.objective.model.encode_text
    monkeypatch.setattr(zero.objective.model, "encode_text", lambda *x: asked.append(len(x[0])) or plain(*x))
    assert len(zero.predict(str(pictures), CLASSES)) == 4 and asked == [3]


def test_long_class_names_are_truncated(folder):
    zero = ZeroShotClassifier.load(folder)
    ids, _ = zero.task.tokens(["a " * 40, "cat"])
    end = zero.task.end
    assert [len(ids[0]), ids[0][0], ids[0][-1], ids[1][-1]] == [16, end - 1, end, end] and (ids[0] == end).sum() == 1


def test_openai_file_with_a_given_tokenizer(folder, pictures, tmp_path):
    model = load(folder)
    path = weights.save(model, tmp_path / "x.safetensors", "openai")
    with pytest.raises(WeightsError, match=r"tokenizer.json does not exist.*tokenizer=PATH"):
        ZeroShotClassifier.load(path, name="clip-test", **changes(model))
    zero = ZeroShotClassifier.load(path, name="clip-test", tokenizer=folder / "tokenizer.json", **changes(model))
    assert zero.predict(files(pictures), CLASSES) == ZeroShotClassifier.load(folder).predict(files(pictures), CLASSES)
    with pytest.raises(WeightsError, match=r"has 28\d tokens, but the network 30"):
        small = weights.save(create("clip-test", channels=3), tmp_path / "small.safetensors", "openai")
        ZeroShotClassifier.load(small, name="clip-test", tokenizer=folder / "tokenizer.json")


def changes(model):
    from dataclasses import asdict

    return asdict(model.config)


def test_folder_of_classes_is_scored(folder, pictures, tmp_path):
    zero = ZeroShotClassifier.load(folder)
    told = {r["input"]: r["label"] for r in zero.predict(files(pictures), CLASSES)}
    right = {name: told[path] for name, path in zip("abcd", files(pictures))}
    wrong = next(name for name in CLASSES if name != right["c"])
    for name, label in {**right, "c": wrong}.items():
        (tmp_path / label.replace(" ", "_")).mkdir(exist_ok=True)
        shutil.copy(pictures / f"{name}.png", tmp_path / label.replace(" ", "_") / f"{name}.png")
    for label in CLASSES:  # classes that nothing was told to be have a picture, too
        place = tmp_path / label.replace(" ", "_")
        place.mkdir(exist_ok=True)
        if not any(place.iterdir()):
            shutil.copy(pictures / "a.png", place / "again.png")
    placed = [(path.stem, path.parent.name.replace("_", " ")) for path in tmp_path.glob("*/*.png")]
    hits = sum(right["a" if name == "again" else name] == label for name, label in placed)
    found = zero.evaluate(str(tmp_path))
    assert found["rows"] == len(placed) and found["scores"] == {"zero_shot_accuracy": pytest.approx(hits / len(placed))}
    assert 0 < hits < len(placed)
    low, high = found["intervals"]["zero_shot_accuracy"]
    assert low < hits / len(placed) < high
    said = zero.evaluate(str(tmp_path), {"cat": "red bus"}) if (tmp_path / "cat").is_dir() else None
    assert said is None or said["rows"] == len(placed)
    with pytest.raises(DataError, match="has no class horse"):
        zero.evaluate(str(tmp_path), {"horse": "a horse"})
    with pytest.raises(DataError, match="a folder of images for each class"):
        zero.evaluate(str(pictures))


def run_cli(*words):
    done = CliRunner().invoke(commands.app, list(map(str, words)))
    return done


def test_on_the_command_line(folder, pictures, tmp_path):
    done = run_cli(
        "predict", folder, pictures, "--json", "--set", "classes=cat, big dog,red bus", "--set", "templates=a photo of a {}.|{}"
    )
    assert done.exit_code == 0, done.output
    want = ZeroShotClassifier.load(folder).predict(str(pictures), CLASSES, ["a photo of a {}.", "{}"])
    assert [json.loads(line) for line in done.stdout.splitlines()] == want
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = run_cli("predict", folder, pictures / "a.png", tmp_path / "bad.png", "--json", "--set", "classes=cat,dog")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == run_commands.PARTIAL_FAILURE and "label" in records[0] and set(records[1]) == {"input", "error"}
    for label in ("cat", "dog"):
        (tmp_path / "all" / label).mkdir(parents=True)
        shutil.copy(pictures / "a.png", tmp_path / "all" / label)
    shutil.copy(pictures / "b.png", tmp_path / "all" / "dog")
    done = run_cli("evaluate", folder, tmp_path / "all", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"] == 3


def test_invalid_requests_are_rejected(folder, pictures):
    zero = ZeroShotClassifier.load(folder)
    with pytest.raises(SettingsError, match="no classes"):
        zero.predict(str(pictures), [])
    with pytest.raises(SettingsError, match=r"'a photo' has no \{\}"):
        zero.predict(str(pictures), CLASSES, ["a photo"])
    for key, said in (("temperature=2", "'temperature' is not an option"), ("templates={}", "no classes")):
        done = run_cli("predict", folder, pictures, "--set", key)
        assert done.exit_code == 1 and said in str(done.exception)
    for key in ("classes=cat", "beams=2"):
        assert isinstance(run_cli("evaluate", folder, pictures, "--set", key).exception, SettingsError)


def test_other_networks_are_rejected(tmp_path):
    from fieldguide.checkpoints.load import save

    save(create("vit-test", channels=3), tmp_path / "vit", "hf")
    with pytest.raises(WeightsError, match=r"is vit, whose output is label.*embeds images and texts"):
        ZeroShotClassifier.load(tmp_path / "vit")


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"size": 30, "crop_size": 20}, "images of 20 pixels per side, cropped from 30"),
        ({"size": 20, "crop_size": 24}, "cropped from 20"),
        ({"size": 24, "do_center_crop": False}, "the network reads 24"),
    ],
)
def test_incompatible_preprocessing_is_rejected(tmp_path, said, wrong):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(WeightsError, match=wrong):
        build_transform(tmp_path, 24, 3)


def test_open_clip_preprocessing(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(
            {
                "preprocess_cfg": {
                    "mean": [0.5, 0.4, 0.3],
                    "std": [0.1, 0.2, 0.3],
                    "interpolation": "bilinear",
                    "resize_mode": "squash",
                }
            }
        )
    )
    how = build_transform(tmp_path, 24, 3)
    assert (how.mean, how.std, how.fit, how.filter) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "stretch", Image.Resampling.BILINEAR)
    plain = build_transform(tmp_path / "none", 24, 3)
    assert plain.mean == OPENAI[0] and plain.filter == Image.Resampling.BICUBIC


@pytest.mark.slow
def test_fieldguide_runs(tmp_path, pictures):
    from test_task_image_text import album

    table = album(tmp_path / "album", 60)
    run = fit(table, task="image-text", model="clip-mini", out=tmp_path / "run", settings={"steps": 3, "batch": 8})
    zero, names = ZeroShotClassifier.load(tmp_path / "run"), ["red", "green", "blue"]
    found = zero.predict(str(pictures), names)
    asked = run.predict(str(pictures), classes="red,green,blue")
    assert [r["probabilities"] for r in found] == [r["probabilities"] for r in asked]
    ways = zero.predict(str(pictures), names, ["a {} square on the left", "a {} square on the right"])
    asked = run.predict(str(pictures), classes="red,green,blue", templates="a {} square on the left|a {} square on the right")
    assert [r["probabilities"] for r in ways] == [r["probabilities"] for r in asked] != [r["probabilities"] for r in found]
    vectors = [
        np.mean(
            [
                run.objective.model.encode_text(
                    *(torch.as_tensor(x) for x in run.task.text.batch(run.task.tokens([f"a {name} square on the {side}"])[0]))
                )
                .detach()
                .numpy()[0]
                for side in ("left", "right")
            ],
            0,
        )
        for name in names
    ]
    near = [[r["similarity"][name] for name in names] for r in ways]
    image = run.run_batches(run.task, run.task.predict_batches(run.task.read([str(pictures)]), run.card))["image"]
    want = [[float(x @ v / np.linalg.norm(v)) for v in vectors] for x in image]
    np.testing.assert_allclose(near, want, rtol=1e-4, atol=1e-5)
