"""Visual instruction tuning: the forms of conversations with images, their tokens, damage, runs, and what is learned."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fieldguide
from damage import finding
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import BadData
from fieldguide.data.conversation_images import IMAGE_MARK
from fieldguide.inference.image_to_text import ImageToText
from fieldguide.models.registry import card
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.multimodal.visual_chat import join_rows, list_images
from fieldguide.training import peft
from fieldguide.training.state import Interrupted
from test_parity_qwen2_5_vl import processor
from test_tasks_resume import StopAt, log
from tv import transformers
from visual_chats import NAMES, QUESTION, make_row, read_rows, write_checkpoint, write_digits, write_rows

KINDS = ["llava", "qwen2.5-vl"]
FORMS = ["path", "image", "url", "column", "structs", "text", "llava"]
QUICK = {"steps": 4, "batch_size": 4, "precision": "float32", "threads": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return data, and a folder with a tiny network of each kind."""
    base = tmp_path_factory.mktemp("chats")
    return write_digits(base), {kind: write_checkpoint(base / kind, kind) for kind in KINDS}


def fitted(data, folder):
    """Return the task, fitted with the preprocessing of a checkpoint."""
    from fieldguide.automl.finetune import get_default_options
    from fieldguide.checkpoints.load import inspect_checkpoint

    kind = task("image-text-to-text")
    options = get_default_options(kind, inspect_checkpoint(folder), {}, None)
    return kind.fit(kind.build_examples(data, None), kind.options_from(options))


# Reading


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_conversations_with_images(form, tmp_path):
    data = fieldguide.read(write_digits(tmp_path, 12, form))
    assert infer_task(data)[0].name == "image-text-to-text" and len(data) == 12
    assert data.rows["image"][3] == str(tmp_path / "images/3.png") and data.rows["#height"][:2].to_list() == [24, 32]
    said = data.rows["messages"][0].to_list()
    assert [m["role"] for m in said] == ["user", "assistant"] and said[1]["content"] == "zero"
    assert said[0]["content"].replace("\n", "") == IMAGE_MARK + QUESTION


def test_folders_and_rows_without_images(tmp_path):
    rows = read_rows(write_digits(tmp_path, 12))
    rows[4] = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    write_rows(tmp_path / "messages.jsonl", rows)
    data = fieldguide.read(tmp_path)
    assert len(data) == 12 and data.rows["image"].null_count() == 1 and not [f for f in data.findings if f.unusable]
    built = task("image-text-to-text").build_examples(data, None)
    assert built.rows["picture"].n_unique() == 12


DAMAGE = {  # check -> how a row is changed
    "missing-file": lambda row: make_row("path", "images/gone.png", "one"),
    "truncated-image": lambda row: make_row("path", "images/cut.png", "one"),
    "empty-file": lambda row: make_row("path", "images/empty.png", "one"),
    "messages-with-more-than-16-images": lambda row: {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": f"images/{i}.png"} for i in range(17)]},
            row["messages"][1],
        ]
    },
    "messages-with-images-at-web-addresses": lambda row: make_row("url", "https://example.org/a.png", "one"),
    "messages-with-images-that-are-no-files": lambda row: make_row("url", "data:image/png;base64,AAAA", "one"),
    "messages-with-another-number-of-images-than-places-for-them": lambda row: {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, row["messages"][1]]
    },
    "messages-with-image-parts": lambda row: {
        "messages": [row["messages"][0], {"role": "assistant", "content": [{"type": "image", "path": "images/1.png"}]}]
    },
    "unknown-speaker": lambda row: {"messages": [row["messages"][0], {"role": "tool", "content": "one"}]},
    "no-messages": lambda row: {"messages": []},
}


@pytest.mark.parametrize("check", DAMAGE)
def test_damaged_rows_are_findings(check, tmp_path):
    rows = read_rows(write_digits(tmp_path, 120))
    whole = (tmp_path / "images/0.png").read_bytes()
    (tmp_path / "images/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/empty.png").write_bytes(b"")
    broken = [*rows[:9], DAMAGE[check](rows[9]), *rows[10:]]
    data = fieldguide.read(write_rows(tmp_path / "messages.jsonl", broken))
    found = finding(data, check)
    assert len(data) == 119 and found.unusable == 1 and found.places[0].startswith("messages.jsonl:10")
    if check == "missing-file":
        assert "gone.png" in found.places[0] or "gone.png" in str(found)
    with pytest.raises(BadData, match=rf"(?s)messages\.jsonl:1.*{check}"):
        fieldguide.read(write_rows(tmp_path / "messages.jsonl", [DAMAGE[check](row) for row in rows[:40]] + rows[40:]))


# Tokens


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_answers_are_trained(kind, folders):
    """Tokens are those of the prompt that prediction reads, then the answer and an end token, which alone have targets."""
    data, checkpoints = fieldguide.read(folders[0]), folders[1]
    chat, viewer = fitted(data, checkpoints[kind]), ImageToText.load(checkpoints[kind])
    batches = chat.batches(data, card(kind), Settings())
    batch = batches.make(np.arange(6), None)
    for i in range(6):
        size = viewer.task.pictures.load_each([data.rows["image"][i]])[0].shape[1:]
        prompt = viewer.tokens(QUESTION, tuple(size))
        tokens = batch["tokens"][i][batch["mask"][i]].tolist()
        assert tokens[: len(prompt)] == prompt
        target = batch["target"][i]
        answer = target[target >= 0].tolist()
        assert (
            target[: len(prompt) - 1].max() == -1 and chat.text.decode(answer).strip() == data.rows["messages"][i][1]["content"]
        )
        assert answer[-1] in chat.conversations.ends and answer[-1] not in answer[:-1]
    sizes = batches.make(np.array([0, 2]), None), batch
    assert ("grid" in sizes[1]) == (kind == "qwen2.5-vl") and "grid" not in sizes[0]


def test_tokens_equal_transformers(folders):
    data, chat = fieldguide.read(folders[0]), fitted(fieldguide.read(folders[0]), folders[1]["qwen2.5-vl"])
    ready = processor()
    ready.image_processor.size = {"shortest_edge": 4 * 64, "longest_edge": 9 * 64}
    for i in range(4):
        said = data.rows["messages"][i].to_list()[1]["content"]
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        ]
        text = ready.apply_chat_template(messages)
        want = ready(text=text, images=Image.open(data.rows["image"][i]).convert("RGB"))["input_ids"][0]
        assert chat.encode(data)[i].tokens.tolist() == want


def test_conversations_of_several_turns(folders, tmp_path):
    rows = read_rows(folders[0])[:3]
    more = [{"role": "user", "content": "Is it even?"}, {"role": "assistant", "content": "yes"}]
    write_rows(
        tmp_path / "m.jsonl", [{"messages": [{"role": "system", "content": "Be brief."}, *r["messages"], *more]} for r in rows]
    )
    (tmp_path / "images").symlink_to(folders[0].parent / "images")
    data = fieldguide.read(tmp_path / "m.jsonl")
    for kind in KINDS:
        chat = fitted(data, folders[1][kind])
        row = chat.encode(data)[0]
        words = chat.text.decode(row.tokens[row.trained])
        assert "zero" in words and "yes" in words and "even" not in words and "brief" not in words
        asked = chat.text.decode(chat.encode_prompts(data)[0])
        assert (
            "zero" in asked
            and asked.rstrip().endswith(("ASSISTANT:", "assistant"))
            and chat.targets(data)["answer"][0] == "yes"
        )


def test_texts_with_image_tokens_and_long_rows_are_reported(folders, tmp_path):
    rows = read_rows(folders[0])[:3]
    rows[1]["messages"][0]["content"][1]["text"] = "What does <|image_pad|> mean?"
    (tmp_path / "images").symlink_to(folders[0].parent / "images")
    data = fieldguide.read(write_rows(tmp_path / "m.jsonl", rows))
    with pytest.raises(DataError, match=r"m\.jsonl:2: the rendered conversation has <\|image_pad\|> 2 times, but one image"):
        fitted(data, folders[1]["qwen2.5-vl"])
    data = fieldguide.read(folders[0])
    chat = fitted(data, folders[1]["llava"])
    chat.options = chat.options.__class__(**{**vars(chat.options), "length": 10})
    with pytest.raises(DataError, match=r"messages\.jsonl:1: the images and the text before them have more than the 10 tokens"):
        chat.batches(data, card("llava"), Settings())


# Several images


def make_pairs(folder, rows):
    """Write conversations about one, two or three images of a folder, of which three rows share the first; return their file."""
    made = []
    for i in range(rows):
        parts = []
        for k in range(1 + i % 3):
            parts += [{"type": "image", "path": f"images/{i // 3 * 3 + k}.png"}, {"type": "text", "text": f"Image {k + 1}. "}]
        made.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": NAMES[i % 10]}]})
    return write_rows(folder / "several.jsonl", made)


def test_several_images_are_columns(folders):
    data = fieldguide.read(make_pairs(folders[0].parent, 12))
    assert list(data.rows["image_3"].is_not_null()) == [i % 3 == 2 for i in range(12)] and infer_task(data)[0].name == (
        "image-text-to-text"
    )
    groups = task("image-text-to-text").build_examples(data, None).rows["picture"].to_list()
    assert all((groups[i] == groups[k]) == (i // 3 == k // 3) for i in range(12) for k in range(12))
    joined = join_rows([["a"], ["b"], [], ["c", "a"], ["b", "c"], ["d"]])
    assert len({joined[i] for i in (0, 1, 3, 4)}) == 1 and len(set(joined)) == 3


@torch.no_grad()
def test_several_images_equal_transformers(folders):
    """Tokens of the processor, and logits of the network for a batch of rows with one, two and three images of different sizes."""
    data = fieldguide.read(make_pairs(folders[0].parent, 6))
    chat, ready = fitted(data, folders[1]["qwen2.5-vl"]), processor()
    ready.image_processor.size = {"shortest_edge": 4 * 64, "longest_edge": 9 * 64}
    ours = fieldguide.load(folders[1]["qwen2.5-vl"])
    peer = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folders[1]["qwen2.5-vl"]).eval()
    batch = chat.batches(data, card("qwen2.5-vl"), Settings()).make(np.arange(6), None)
    got = ours(batch["image"], batch["tokens"], batch["mask"], batch["grid"])
    assert batch["image"].ndim == 5
    for i in range(6):
        parts, photos = [], []
        for k, path in enumerate(list_images(data)[i]):
            parts += [{"type": "image"}, {"type": "text", "text": f"Image {k + 1}. "}]
            photos.append(Image.open(path).convert("RGB"))
        said = data.rows["messages"][i].to_list()[1]["content"]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
        told = ready(text=ready.apply_chat_template(messages), images=photos, return_tensors="pt")
        assert chat.encode(data)[i].tokens.tolist() == told["input_ids"][0].tolist()
        want = peer(**told).logits[0, :-1]
        torch.testing.assert_close(got[i][batch["mask"][i]], want, rtol=1e-3, atol=1e-4)


def test_several_images_are_tuned_and_answered(folders, tmp_path):
    data = make_pairs(folders[0].parent, 30)
    for kind in KINDS:
        settings = {**QUICK, "steps": 2, "finetune": "lora"}
        run = fieldguide.fit(data, weights=folders[1][kind], settings=settings, out=tmp_path / kind)
        said = [r["text"] for r in run.predict(data, max_new_tokens=4)]
        alone = write_rows(data.parent / "alone.jsonl", read_rows(data)[:2])
        assert [r["text"] for r in run.predict(alone, max_new_tokens=4)] == said[:2]  # fewer images than in training
        four = [{"type": "image", "path": f"images/{i}.png"} for i in range(4)]
        more = write_rows(data.parent / "more.jsonl", [{"messages": [{"role": "user", "content": four}]}])
        with pytest.raises(DataError, match="4 times, but 3 images"):
            run.predict(more)


# Runs


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """Return a run of each network, tuned with LoRA."""
    data, checkpoints = folders
    out = tmp_path_factory.mktemp("runs")
    return {
        kind: fieldguide.fit(data, weights=checkpoints[kind], settings={**QUICK, "finetune": "lora"}, out=out / kind)
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_runs_answer_and_are_scored(kind, folders, runs, tmp_path):
    run, data = fieldguide.open_run(runs[kind].path), folders[0]
    assert run.record["task"] == "image-text-to-text" and run.record["settings"]["finetune"] == "lora"
    assert set(run.scores) == {"loss", "exact_match"} and (run.path / "report.html").exists()
    photos = [str(data.parent / f"images/{i}.png") for i in range(3)]
    said = run.predict(photos, prompt=QUESTION, max_new_tokens=6)
    assert [record["input"] for record in said] == photos and all(set(r) == {"input", "text"} for r in said)
    asked = write_rows(data.parent / "asked.jsonl", [{"messages": row["messages"][:1]} for row in read_rows(data)[:3]])
    listed = run.predict(asked, max_new_tokens=6)
    assert [r["text"] for r in listed] == [r["text"] for r in said]
    whole = run.predict(data, max_new_tokens=6)  # the last answers are not part of the prompts
    assert [r["text"] for r in whole[:3]] == [r["text"] for r in said]
    scored = run.evaluate(data)
    assert scored["scores"]["loss"] == pytest.approx(run.scores["loss"], rel=1e-5) and "test rows" in scored["note"]
    with pytest.raises(SettingsError, match="no question about the images"):
        run.predict(photos)
    rows = [{"image": photo} for photo in photos]
    assert [r["text"] for r in run.predict(rows, prompt=QUESTION, max_new_tokens=6)] == [r["text"] for r in said]
    hello = write_rows(tmp_path / "hello.jsonl", [{"messages": [{"role": "user", "content": "Hello"}]}])
    assert set(run.predict(hello, max_new_tokens=3)[0]) == {"input", "text"}  # without an image
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    mixed = run.predict([str(tmp_path / "a.png"), str(tmp_path / "b.png")], prompt=QUESTION, max_new_tokens=3)
    assert set(mixed[0]) == {"input", "text"} and set(mixed[1]) == {"input", "error"}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_decoder_is_tuned(kind, folders, runs):
    """LoRA leaves the image encoder as it was, as does the default for whole networks."""
    before, after = fieldguide.load(folders[1][kind]), fieldguide.open_run(runs[kind].path).model
    frozen = tuple(type(before).frozen_parts)
    changed = {name for name, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[name])}
    assert changed and not [name for name in changed if name.startswith(frozen)]
    assert any(name.startswith("language.blocks") for name in changed)
    network = fieldguide.load(folders[1][kind])
    peft.prepare(network, Settings().with_({"finetune": "whole"}), [])
    assert {name for name, p in network.named_parameters() if not p.requires_grad} >= {
        name for name, _ in network.named_parameters() if name.startswith(frozen)
    }


def test_runs_continue_and_start_others(folders, runs, tmp_path):
    other = fieldguide.fit(
        folders[0], weights=runs["qwen2.5-vl"].path, settings={**QUICK, "finetune": "whole"}, out=tmp_path / "run"
    )
    task_of = lambda run: json.loads((run.path / "preprocess/task.json").read_text())
    assert task_of(other)["state"]["pictures"] == task_of(runs["qwen2.5-vl"])["state"]["pictures"]
    assert "starting from" not in str(other.record["request"]["weights"])


def test_stopped_and_resumed(folders, tmp_path):
    settings = {**QUICK, "finetune": "lora", "steps": 4, "eval_steps": 2}
    start = lambda out, **more: fieldguide.fit(
        folders[0], weights=folders[1]["llava"], settings=settings, out=tmp_path / out, **more
    )
    whole = start("whole")
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        start("stopped", callback=StopAt(3))
    assert log(fieldguide.resume(tmp_path / "stopped").path) == log(whole.path)


def test_a_checkpoint_is_needed(folders, tmp_path):
    with pytest.raises(SettingsError, match="starts from a pretrained vision-language model"):
        fieldguide.fit(folders[0], out=tmp_path / "run")


def test_checkpoints_without_template_use_that_of_llava(folders, tmp_path):
    folder = write_checkpoint(tmp_path / "plain", template=False)
    data = fieldguide.read(folders[0])
    chat = fitted(data, folder)
    row = chat.encode(data)[0]
    text = chat.text.tokenizer.decode([i for i in row.tokens if i != chat.options.picture], skip_special_tokens=False)
    assert text.replace("<s> ", "<s>") == f"<s>USER: \n{QUESTION} ASSISTANT: zero</s>"
    chat.save(tmp_path / "saved")
    assert type(chat).load(tmp_path / "saved").encode(data)[0].tokens.tolist() == row.tokens.tolist()


# Learning


@pytest.mark.slow
def test_learns_to_name_digits(tmp_path):
    """From random weights, with the image encoder trained as well: at least 90 % of the answers about new images are right."""
    data = write_digits(tmp_path, 1797, size=32, square=True)
    folder = write_checkpoint(
        tmp_path / "llava", image=32, seen_dim=48, seen_depth=3, seen_heads=4, dim=64, heads=4, kv_heads=2, hidden=128
    )
    settings = {
        **{"finetune": "whole", "keep_frozen": False, "layer_decay": 1.0, "optimizer": "muon", "lr": 1e-2},
        **{"steps": 500, "batch_size": 32, "precision": "float32"},
    }
    run = fieldguide.fit(data, weights=folder, settings=settings, out=tmp_path / "run")
    assert run.scores["exact_match"] >= 0.9
    photos = [str(tmp_path / f"images/{i}.png") for i in range(20)]
    said = [record["text"] for record in run.predict(photos, prompt=QUESTION, max_new_tokens=8)]
    assert set(said) <= set(NAMES)
