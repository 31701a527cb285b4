"""Fits of image-text networks from checkpoints of transformers, which keep the preprocessing of the checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import damage
from fieldguide.automl.fit import fit
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import SettingsError
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.inference.run import open_run
from fieldguide.inference.zero_shot import ZeroShotClassifier
from test_folders import settled
from test_zero_shot import CLASSES, clip_folder
from tv import transformers

STILL = {"steps": 1, "lr": 0.0, "batch": 8, "precision": "float32", "augment": "none"}  # a step that changes nothing
SAID = ("a photo of a Cat.", "the big   dog", "red bus", "a drawing of a red cat " * 4)  # the last is cut, at 16 tokens


def album(folder, said=SAID, square=False):
    """Colored noise of odd sizes, and a table with texts."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(40):
        width, height = (30, 30) if square else rng.integers(24, 60, 2)
        tint = rng.integers(0, 200, 3)
        small = np.clip(rng.integers(0, 120, (height // 4, width // 4, 3)) + tint, 0, 255).astype(np.uint8)
        Image.fromarray(small).resize((int(width), int(height))).save(folder / f"{i:02}.png")
        rows.append(f"{i:02}.png,{said[i % len(said)]}")
    return rows


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with its processor, and an untrained run that started from it."""
    place = tmp_path_factory.mktemp("clip")
    folder = clip_folder(place / "theirs")
    shape = {"size": {"shortest_edge": 26}, "crop_size": {"height": 24, "width": 24}}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(**shape), tokenizer).save_pretrained(folder)
    table = damage.write(place / "photos.csv", ["image,caption", *(f"photos/{row}" for row in album(place / "photos"))])
    run = fit(table, task="image-text", weights=folder, out=place / "run", settings=STILL)
    return folder, place, run


@torch.no_grad()
def test_logits_equal_those_of_clip_with_its_processor(clip):
    folder, place, run = clip
    paths = sorted((place / "photos").iterdir())[:6]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    shape = {"size": {"shortest_edge": 26}, "crop_size": {"height": 24, "width": 24}}
    ready = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil(**shape), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    )
    made = ready(
        text=list(SAID),
        images=[Image.open(p).convert("RGB") for p in paths],
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=16,
    )
    want = model(**{k: v for k, v in made.items() if k != "token_type_ids"}).logits_per_image
    task, network = open_run(run.path).task, run.model
    ids, cut = task.tokens(list(SAID))
    padded = task.pad(ids)
    assert cut == 1 and [row.tolist() for row in ids] == [
        row[mask > 0].tolist() for row, mask in zip(made.input_ids, made.attention_mask)
    ]
    image = task.pictures.apply(task.pictures.load(paths))
    torch.testing.assert_close(image, made.pixel_values, rtol=0, atol=1e-5)
    both = network.encode_image(image), network.encode_text(padded["tokens"], padded["mask"])
    torch.testing.assert_close(network.logit_scale.exp() * both[0] @ both[1].T, want, rtol=0, atol=1e-4)
    assert want.std() > 0.1


def test_preprocessing_of_the_checkpoint_is_kept_and_noted(clip):
    folder, _, run = clip
    options = run.task.options
    assert (options.side, options.length, options.vocab_size, options.channels) == (
        24,
        16,
        inspect_checkpoint(folder).values["vocab_size"],
        3,
    )
    assert options.resize == f"crop {24 / 26} bicubic" and run.task.pictures.edge == 26
    assert run.record["model"]["fresh"] == [] and run.task.end == run.model.config.end
    assert any("are longer than 16 tokens" in note for note in run.record["data"]["notes"])


def test_zero_shot_after_fit_equals_the_original_checkpoint(clip):
    folder, place, run = clip
    want = ZeroShotClassifier.load(folder).predict(str(place / "photos"), CLASSES)
    for source in (run, ZeroShotClassifier.load(run.path)):
        got = (
            run.predict(str(place / "photos"), classes=",".join(CLASSES))
            if source is run
            else source.predict(str(place / "photos"), CLASSES)
        )
        assert [r["input"] for r in got] == [r["input"] for r in want]
        torch.testing.assert_close(
            *(torch.tensor([[r["probabilities"][name] for name in CLASSES] for r in each]) for each in (got, want)),
            rtol=1e-5,
            atol=1e-6,
        )


def test_special_tokens_are_added_once(clip):
    """Some tokenizer.json files of CLIP add special tokens, others do not."""
    folder, _, run = clip
    said = json.loads((folder / "tokenizer.json").read_text())
    assert said["post_processor"]
    bare = open_run(run.path).task
    bare.text = TextTokenizer(Tokenizer.from_str(json.dumps({**said, "post_processor": None})))
    for ours, want in zip(bare.tokens([*SAID, ""])[0], run.task.tokens([*SAID, ""])[0]):
        assert ours.tolist() == want.tolist() and ours[0] == run.task.end - 1


def test_resumed_run_keeps_its_preprocessing(clip, tmp_path):
    _, place, run = clip
    again = fit(place / "photos.csv", task="image-text", weights=run.path, out=tmp_path / "again", settings=STILL)
    assert again.task.pictures == run.task.pictures and again.task.options.template == "a photo of a {}."
    assert [r.tolist() for r in again.task.tokens(list(SAID))[0]] == [r.tolist() for r in run.task.tokens(list(SAID))[0]]
    photo = str(place / "photos/00.png")
    assert again.predict(photo)[0]["similarity"] == pytest.approx(run.predict(photo)[0]["similarity"], abs=1e-6)


def test_position_embeddings_are_interpolated_for_another_image_size(clip, tmp_path):
    folder, place, _ = clip
    run = fit(
        place / "photos.csv", task="image-text", weights=folder, out=tmp_path / "run", settings={**STILL, "task.side": 16}
    )
    assert run.record["model"]["fresh"] == [] and run.task.pictures.edge == round(16 * 26 / 24)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    places = model.vision_model.embeddings.position_embedding.weight.detach()
    grid = torch.nn.functional.interpolate(places[1:].T.reshape(1, 16, 3, 3), (2, 2), mode="bicubic", antialias=True)
    torch.testing.assert_close(run.model.vision.pos.weight.detach(), torch.cat([places[:1], grid.reshape(16, 4).T]))


def vilt_folder(path):
    words = "[PAD] [UNK] [CLS] [SEP] what is it where how many are there ? red bus".split()
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(0)
    settled(
        transformers.ViltForQuestionAnswering(
            transformers.ViltConfig(
                vocab_size=len(words),
                max_position_embeddings=8,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
                num_labels=4,
            )
        )
    ).save_pretrained(path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(path)
    pictures = transformers.ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)
    pictures.save_pretrained(path)
    return path, tokenizer, pictures


def test_vilt_inputs_equal_those_of_its_processor(tmp_path):
    """Square images only: others are padded here but resized differently there."""
    folder, tokenizer, pictures = vilt_folder(tmp_path / "theirs")
    asked = ["What is it?,bus", "Where is it?,red", "how many buses are there in it?,bus", "where are red,red"]
    rows = album(tmp_path / "photos", asked, square=True)
    table = damage.write(tmp_path / "photos.csv", ["image,question,answer", *(f"photos/{row}" for row in rows)])
    run = fit(table, task="visual-question-answering", weights=folder, out=tmp_path / "run", settings=STILL)
    assert set(run.record["model"]["fresh"]) == {"head.weight", "head.bias"}
    task, model = open_run(run.path).task, transformers.ViltForQuestionAnswering.from_pretrained(folder).eval()
    assert (task.options.side, task.options.length) == (32, 8)
    model.classifier[3] = torch.nn.Linear(32, 2)
    model.classifier[3].load_state_dict(run.model.head.state_dict())
    paths, texts = sorted((tmp_path / "photos").iterdir())[:4], [row.split(",")[0] for row in asked]
    made = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    seen = pictures([Image.open(p).convert("RGB") for p in paths], return_tensors="pt")
    drawn, torch.multinomial = torch.multinomial, lambda weights, count, **_: torch.arange(count)
    try:
        with torch.no_grad():
            want = model(input_ids=made.input_ids, attention_mask=made.attention_mask, **seen).logits
    finally:
        torch.multinomial = drawn
    ids, cut = task.tokens(texts)
    tokens, mask = (torch.from_numpy(each) for each in task.text.batch(ids))
    assert cut == 1 and torch.equal(tokens, made.input_ids)
    image = task.pictures.apply(task.pictures.load(paths))
    torch.testing.assert_close(image, seen["pixel_values"], rtol=0, atol=1e-5)
    torch.testing.assert_close(run.model(image, tokens, mask).detach(), want, rtol=0, atol=1e-4)


def test_resize_methods():
    plain, picture = ImageTransform(8, 3), Image.effect_noise((20, 13), 50).convert("RGB")
    for way, edge in (("crop bicubic", 8), ("crop 0.875 bilinear", 9), ("pad lanczos", 8), ("stretch box", 8)):
        how = plain.with_resize(way)
        assert how.edge == edge and how.cut(picture).size == (8, 8)
        assert plain.with_resize(how.method) == how == ImageTransform.from_json(json.loads(json.dumps(how.to_json())))
    assert ImageTransform.from_json(plain.to_json()) == plain
    white = np.asarray(plain.with_resize("pad bicubic").cut(picture))
    assert (white[0] == 255).all() and not (white[4] == 255).any()
    for wrong in (
        "",
        "crop",
        "crop nothing",
        "squash bicubic",
        "crop 0 bicubic",
        "crop 1.5 bicubic",
        "pad 0.5 bicubic",
        "crop 1 2 box",
    ):
        with pytest.raises(SettingsError, match="is not a valid resize method"):
            plain.with_resize(wrong)
