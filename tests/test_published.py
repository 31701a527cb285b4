"""Prediction with pretrained networks, compared with transformers and its tokenizers and image processors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from fieldguide.checkpoints.preprocessor_config import build_transform
from fieldguide.cli import commands
from fieldguide.core.card import IMAGENET
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.inference.pretrained_task import PretrainedTask
from fieldguide.models.registry import create
from test_folders import settled
from test_text_files import wordpieces
from tv import timm, transformers

KINDS = ["cat", "big dog", "bus"]
NAMES = {"id2label": dict(enumerate(KINDS)), "label2id": {name: i for i, name in enumerate(KINDS)}}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SENTENCES = ["the cat sat on the mat", "don't you'll we've", "a naïve café", ""]
SCALE = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OLD = {
    "vit": {"size": 24, **SCALE},
    "deit": {"size": 28, "crop_size": 24, "resample": 3, **SCALE},
    "convnext": {"size": 24, "crop_pct": 0.875, **SCALE},
}


def files(pictures) -> list[str]:
    return sorted(map(str, pictures.glob("*.png")))


def seen(processor, paths) -> torch.Tensor:
    return torch.cat(
        [torch.as_tensor(np.asarray(processor(Image.open(p).convert("RGB"))["pixel_values"][0]))[None] for p in paths]
    )


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "name, said",
    [
        ("ViTImageProcessorPil", {"size": {"height": 24, "width": 24}}),
        (
            "ViTImageProcessorPil",
            {"size": {"height": 24, "width": 24}, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "do_normalize": True},
        ),
        ("ViTImageProcessorPil", {"size": {"height": 24, "width": 24}, "do_normalize": False}),
        ("DeiTImageProcessorPil", {"size": {"height": 30, "width": 30}, "crop_size": {"height": 24, "width": 24}}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 24}}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 24}, "crop_pct": 0.75, "resample": 3}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}),
        ("EfficientNetImageProcessorPil", {"size": {"height": 24, "width": 24}}),
        ("EfficientNetImageProcessorPil", {"size": {"height": 24, "width": 24}, "include_top": False, "resample": 2}),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_image_preprocessing_equals_transformers(pictures, tmp_path, name, said):
    theirs = getattr(transformers, name)(**said)
    theirs.save_pretrained(tmp_path)
    side = 384 if said["size"].get("shortest_edge") == 384 else 24
    how = build_transform(tmp_path, side, 3)
    paths = files(pictures)
    torch.testing.assert_close(how.apply(how.load(paths)), seen(theirs, paths), rtol=0, atol=1e-5)
    assert (
        how
        == type(how).from_json(json.loads(json.dumps(how.to_json())))
        == build_transform(tmp_path, side, 3).with_resize(how.method)
    )


@pytest.mark.parametrize("kind", OLD)
def test_old_preprocessor_files_without_a_type(pictures, tmp_path, kind):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLD[kind]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    name = {"vit": "ViTImageProcessorPil", "deit": "DeiTImageProcessorPil", "convnext": "ConvNextImageProcessorPil"}[kind]
    how, paths = build_transform(tmp_path, 24, 3), files(pictures)
    torch.testing.assert_close(
        how.apply(how.load(paths)), seen(getattr(transformers, name)(**OLD[kind]), paths), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "said",
    [
        {"crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {},
        {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "squash"},
    ],
    ids=["crop", "whole", "unsaid", "squash"],
)
def test_image_preprocessing_equals_timm(pictures, tmp_path, said):
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 24, 24], **said}})
    )
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg={"input_size": (3, 24, 24), **said}))
    how, paths = build_transform(tmp_path, 24, 3, IMAGENET), files(pictures)
    want = torch.stack([theirs(Image.open(path).convert("RGB")) for path in paths])
    torch.testing.assert_close(how.apply(how.load(paths)), want, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A ViT with three classes, as published on the hub."""
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    theirs = settled(
        transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=24, patch_size=8, **NAMES))
    )
    theirs.save_pretrained(path)
    ready = transformers.ViTImageProcessorPil(size={"height": 24, "width": 24})
    ready.save_pretrained(path)
    return path, theirs, ready


@torch.no_grad()
def test_image_classification(photos, pictures):
    folder, theirs, ready = photos
    want = theirs(seen(ready, files(pictures))).logits.softmax(-1).numpy()
    found = PretrainedTask.load(folder).predict(str(pictures))
    assert [r["label"] for r in found] == [KINDS[i] for i in want.argmax(1)] and want.std(0).max() > 1e-3
    np.testing.assert_allclose([[r["probabilities"][name] for name in KINDS] for r in found], want, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_image_embeddings(photos, pictures):
    folder, theirs, ready = photos
    want = theirs.vit(seen(ready, files(pictures))).last_hidden_state[:, 0]
    found = PretrainedTask.load(folder, output_type="vector").predict(str(pictures))
    np.testing.assert_allclose([r["vector"] for r in found], nn.functional.normalize(want, dim=-1), rtol=1e-4, atol=1e-5)


def test_timm_resnet_without_class_names(tmp_path, pictures):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "resnet18",
                "num_classes": 3,
                "pretrained_cfg": {
                    "input_size": [3, 64, 64],
                    "crop_pct": 0.95,
                    "interpolation": "bicubic",
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                },
            }
        )
    )
    way = timm.data.create_transform((3, 64, 64), crop_pct=0.95, interpolation="bicubic", mean=[0.5] * 3, std=[0.5] * 3)
    with torch.no_grad():
        want = theirs(torch.stack([way(Image.open(p).convert("RGB")) for p in files(pictures)])).softmax(-1).numpy()
    found = PretrainedTask.load(tmp_path).predict(str(pictures))
    np.testing.assert_allclose([list(r["probabilities"].values()) for r in found], want, rtol=1e-4, atol=1e-6)
    assert list(found[0]["probabilities"]) == ["0", "1", "2"]


# ---------------------------------------------------------------------------------------------- texts


def texts(path, kind: str, **said):
    """A BERT with a head, and its tokenizer."""
    vocab = wordpieces(path)
    torch.manual_seed(0)
    theirs = settled(
        getattr(transformers, f"Bert{kind}")(
            transformers.BertConfig(**SMALL, vocab_size=vocab, max_position_embeddings=40, **said)
        )
    )
    theirs.save_pretrained(path)
    return theirs, transformers.BertTokenizerFast.from_pretrained(path)


@torch.no_grad()
def test_text_classification(tmp_path):
    theirs, words = texts(tmp_path, "ForSequenceClassification", **NAMES)
    want = theirs(**words(SENTENCES, return_tensors="pt", padding=True)).logits.softmax(-1).numpy()
    found = PretrainedTask.load(tmp_path).predict(SENTENCES)
    np.testing.assert_allclose([[r["probabilities"][name] for name in KINDS] for r in found], want, rtol=1e-4, atol=1e-6)
    assert [r["label"] for r in found] == [KINDS[i] for i in want.argmax(1)]


@torch.no_grad()
def test_text_pair_classification(tmp_path):
    theirs, words = texts(tmp_path, "ForSequenceClassification", **NAMES)
    pairs = [("the cat sat", "the mat ran"), ("don't", "the cat ran to the mat and sat")]
    want = theirs(**words(*map(list, zip(*pairs)), return_tensors="pt", padding=True)).logits.softmax(-1).numpy()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"premise": a, "hypothesis": b}) + "\n" for a, b in pairs))
    found = PretrainedTask.load(tmp_path, columns="premise,hypothesis").predict(tmp_path / "pairs.jsonl")
    np.testing.assert_allclose([[r["probabilities"][name] for name in KINDS] for r in found], want, rtol=1e-4, atol=1e-6)
    with pytest.raises(SettingsError, match="columns=a,b: this model reads at most 1 text column"):
        PretrainedTask.load(tmp_path, output_type="vector", columns="a,b")


@torch.no_grad()
def test_token_classification(tmp_path):
    tags = ["O", "B-PER", "I-PER"]
    theirs, words = texts(
        tmp_path, "ForTokenClassification", id2label=dict(enumerate(tags)), label2id={tag: i for i, tag in enumerate(tags)}
    )
    split = ["the", "cat", "xylophonist", "sat", "."]
    made = words(split, is_split_into_words=True, return_tensors="pt")
    likely = theirs(**made).logits[0].softmax(-1)
    begins = [made.word_ids().index(i) for i in range(len(split))]
    (found,) = PretrainedTask.load(tmp_path).predict(["the cat xylophonist sat."])
    assert found["tokens"] == split and found["tags"] == [tags[likely[i].argmax()] for i in begins]
    for entity in found["entities"]:
        inside = begins[entity["first"] : entity["last"] + 1]
        assert entity["probability"] == pytest.approx(float(likely[inside].max(-1).values.min()), rel=1e-4)


@torch.no_grad()
def test_question_answering(tmp_path):
    theirs, words = texts(tmp_path, "ForQuestionAnswering")
    question, context = "who sat?", "the cat ran to the mat and sat on the other one"
    made = words(question, context, return_tensors="pt", return_offsets_mapping=True)
    where = made.pop("offset_mapping")[0].tolist()
    out, inside = theirs(**made), [i for i, s in enumerate(made.sequence_ids()) if s == 1]
    score = {(a, b): float(out.start_logits[0, a] + out.end_logits[0, b]) for a in inside for b in inside if a <= b < a + 30}
    first, last = max(score, key=score.get)
    (found,) = PretrainedTask.load(tmp_path).predict([context], question=question)
    assert found["answer"] == context[where[first][0] : where[last][1]] and found["start"] == where[first][0]


@torch.no_grad()
def test_fill_mask(tmp_path):
    theirs, words = texts(tmp_path, "ForMaskedLM")
    made = words("the cat [MASK] on the mat", return_tensors="pt")
    place = made["input_ids"][0].tolist().index(words.mask_token_id)
    want = theirs(**made).logits[0, place].softmax(-1).topk(3)
    (found,) = PretrainedTask.load(tmp_path).predict(["the cat ___ on the mat"], top=3)
    assert [w["probability"] for w in found["words"][0]] == pytest.approx(want.values.tolist(), rel=1e-4)
    assert found["words"][0][0]["word"] == words.decode(want.indices[:1])


@torch.no_grad()
@pytest.mark.parametrize("pooled", ["mean", "cls", None])
def test_text_embeddings(tmp_path, pooled):
    theirs, words = texts(tmp_path, "Model")
    if pooled:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling/config.json").write_text(
            json.dumps(
                {
                    "word_embedding_dimension": 16,
                    "pooling_mode_cls_token": pooled == "cls",
                    "pooling_mode_mean_tokens": pooled == "mean",
                    "pooling_mode_max_tokens": False,
                }
            )
        )
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    made = words(SENTENCES, return_tensors="pt", padding=True, truncation=True, max_length=8 if pooled else 40)
    out, mask = theirs(**made).last_hidden_state, made["attention_mask"][..., None]
    want = nn.functional.normalize(out[:, 0] if pooled == "cls" else (out * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    ready = PretrainedTask.load(tmp_path)
    predictions = ready.predict(SENTENCES)
    np.testing.assert_allclose([r["vector"] for r in predictions], want, rtol=1e-4, atol=1e-5)
    assert bool(predictions.notes) is bool(pooled)  # that a text is cut
    if not pooled:
        np.testing.assert_allclose(ready.embed(SENTENCES), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_visual_question_answering(tmp_path, pictures):
    vocab = wordpieces(tmp_path)
    torch.manual_seed(0)
    theirs = settled(
        transformers.ViltForQuestionAnswering(
            transformers.ViltConfig(**SMALL, vocab_size=vocab, max_position_embeddings=12, image_size=24, patch_size=8, **NAMES)
        )
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": 24, "width": 24},
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )
    made = transformers.BertTokenizerFast.from_pretrained(tmp_path)(["what sat?"] * 4, return_tensors="pt")
    image = seen(transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}), files(pictures))
    want = theirs(pixel_values=image, **made).logits.softmax(-1).numpy()
    found = PretrainedTask.load(tmp_path).predict(files(pictures), question="what sat?")
    np.testing.assert_allclose([[r["probabilities"][name] for name in KINDS] for r in found], want, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- refusals, and the shell


def test_invalid_requests_are_rejected(tmp_path):
    texts(tmp_path / "one", "ForSequenceClassification", num_labels=1, problem_type="regression")
    with pytest.raises(WeightsError, match="predicts a number, not one of several classes"):
        PretrainedTask.load(tmp_path / "one")
    texts(tmp_path / "many", "ForSequenceClassification", problem_type="multi_label_classification", **NAMES)
    with pytest.raises(WeightsError, match="predicts several classes at once"):
        PretrainedTask.load(tmp_path / "many")
    texts(tmp_path / "text", "ForSequenceClassification", **NAMES)
    ready = PretrainedTask.load(tmp_path / "text")
    with pytest.raises(SettingsError, match="no option temperature"):
        ready.predict(["a text"], temperature=1)
    (tmp_path / "t.csv").write_text("text,label\nthe cat sat,horse\nthe mat sat,cat\n")
    assert ready.evaluate(tmp_path / "t.csv")["scores"]["accuracy"] <= 0.5  # an unknown class counts as wrong
    with pytest.raises(DataError, match=r"no class in column 'label'.*horse"):
        (tmp_path / "u.csv").write_text("text,label\nthe cat sat,horse\nthe mat sat,cow\n")
        ready.evaluate(tmp_path / "u.csv")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "text" / name).unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="no tokenizer found in"):
        PretrainedTask.load(tmp_path / "text")
    texts(tmp_path / "vectors", "Model")
    with pytest.raises(DataError, match="embeddings have no targets"):
        PretrainedTask.load(tmp_path / "vectors").evaluate(tmp_path / "t.csv")
    (tmp_path / "vectors/1_Pooling").mkdir()
    (tmp_path / "vectors/1_Pooling/config.json").write_text('{"pooling_mode_rank_tokens": true}')
    with pytest.raises(WeightsError, match=r"the pooling rank_tokens is not supported"):
        PretrainedTask.load(tmp_path / "vectors")
    for name in ("sasrec-test", "fnn-test"):
        torch.save(create(name).state_dict(), tmp_path / f"{name}.pt")
        with pytest.raises(WeightsError, match="no task can use that without training"):
            PretrainedTask.load(tmp_path / f"{name}.pt", name=name)


def test_on_the_command_line(photos, pictures, tmp_path):
    folder = photos[0]
    run = lambda *words: CliRunner().invoke(commands.app, [*map(str, words)])
    want = PretrainedTask.load(folder).predict(str(pictures))
    done = run("predict", folder, pictures, "--json")
    assert done.exit_code == 0 and [json.loads(line) for line in done.stdout.splitlines()] == want
    vectors = run("predict", folder, pictures / "a.png", "--json", "--set", "output_type=vector")
    assert len(json.loads(vectors.stdout)["vector"]) == 16
    assert "vector" in run("predict", folder, pictures / "a.png", "--set", "output_type=vector").stdout
    for number, record in enumerate(want):
        label = record["label"] if number else next(name for name in KINDS if name != record["label"])  # the first wrongly
        (tmp_path / "known" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / record["input"], tmp_path / "known" / label)
    scored = run("evaluate", folder, tmp_path / "known", "--json")
    assert scored.exit_code == 0, scored.output
    said = json.loads(scored.stdout)
    assert said["rows"] == 4 and said["scores"]["accuracy"] == 0.75 and said["note"].startswith("pretrained")
    assert isinstance(run("evaluate", folder, tmp_path / "known", "--set", "templates=x").exception, SettingsError)
