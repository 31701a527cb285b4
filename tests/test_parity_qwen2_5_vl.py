"""Qwen2.5-VL against transformers: names, configurations, images of any size, preprocessing, and generated text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import fieldguide
from cases import huggingface_qwen2_5_vl, pack_patches, shown
from fieldguide.checkpoints.load import inspect_checkpoint, save
from fieldguide.checkpoints.preprocessor_config import build_native_transform
from fieldguide.cli import commands
from fieldguide.core.card import OPENAI
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.inference.image_to_text import ImageToText
from fieldguide.models.generation import Sampling, generate
from fieldguide.models.registry import card, create
from test_folders import settled
from test_models import tiny
from tv import transformers

PICTURE, PATCH, MERGE = 258, 4, 2
UNIT = PATCH * MERGE
ASKED = "What is there?"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
)


def words() -> Tokenizer:
    """Return a byte-level tokenizer with the special tokens of Qwen2.5-VL."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return made


def theirs():
    """Return a tiny Qwen2.5-VL of transformers with random parameters."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 266,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=PICTURE, video_token_id=262, tie_word_embeddings=False
    )
    return settled(transformers.Qwen2_5_VLForConditionalGeneration(config)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with network, tokenizer and preprocessing as transformers writes them."""
    path = tmp_path_factory.mktemp("qwen")
    theirs().save_pretrained(path)
    processor().save_pretrained(path)
    return path


def processor():
    made = words()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 4 * UNIT**2, "longest_edge": 16 * UNIT**2}, patch_size=PATCH, merge_size=MERGE
    )
    videos = transformers.Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE)
    return transformers.Qwen2_5_VLProcessor(images, fast, videos, chat_template=TEMPLATE)


def arrange(ours, rows, images):
    """Return padded tokens and images of rows, and what transformers takes. `rows` have one image token for each image."""
    expanded = [ours.expand_image_tokens(row, [x.shape[1:] for x in own]) for row, own in zip(rows, images)]
    width = max(map(len, expanded))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in expanded])
    mask = torch.arange(width) >= torch.tensor([[width - len(row)] for row in expanded])
    most = max(map(len, images))
    sizes = [x.shape[1:] for own in images for x in own]
    image = torch.zeros(len(rows), most, 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    grid = torch.zeros(len(rows), most, 2, dtype=torch.int64)
    for i, own in enumerate(images):
        for k, x in enumerate(own):
            image[i, k, :, : x.shape[1], : x.shape[2]] = x
            grid[i, k] = torch.tensor(x.shape[1:]) // PATCH
    pixels, grids = pack_patches([x for own in images for x in own], PATCH, MERGE)
    told = {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": (tokens == PICTURE).int(),
    }
    return (image, tokens, mask, grid), told, expanded


def draw(*sizes):
    torch.manual_seed(len(sizes))
    return [torch.randn(3, *size) for size in sizes]


ROWS = [[1, PICTURE, 5, 6], [1, 9, PICTURE, 7, 8, PICTURE, 4, 4], [3, 2, 4]]


@torch.no_grad()
def test_images_of_any_size_and_number(folder):
    """Sides that are no multiple of a window, several images in a row, and a row without an image; padded images and tokens."""
    ours, peer = fieldguide.load(folder), theirs()
    images = [draw((24, 40)), draw((16, 16), (40, 8)), []]
    (image, tokens, mask, grid), told, _ = arrange(ours, ROWS, images)
    got, want = ours(image, tokens, mask, grid), peer(**told).logits
    torch.testing.assert_close(got * mask[..., None], want * mask[..., None], rtol=1e-4, atol=1e-5)
    alone = ours(draw((24, 40))[0][None], tokens[:1][mask[:1]][None])[0]
    torch.testing.assert_close(alone, want[0][mask[0]], rtol=1e-4, atol=1e-5)
    words_alone = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(ours(None, words_alone), peer(input_ids=words_alone).logits, rtol=1e-4, atol=1e-5)


def test_gradients_with_padded_images(folder):
    """Gradients are finite and equal, although some rows of a softmax hold padding alone."""
    ours, peer = fieldguide.load(folder).train(), theirs().train()
    (image, tokens, mask, grid), told, _ = arrange(ours, ROWS, [draw((24, 40)), draw((16, 16), (40, 8)), []])
    weight = torch.randn(*tokens.shape, 266) * mask[..., None]
    (ours(image, tokens, mask, grid) * weight).sum().backward()
    (peer(**told).logits * weight).sum().backward()
    for mine, name in (
        (ours.vision.patch.weight, "patch_embed.proj.weight"),
        (ours.vision.merger.up.weight, "merger.mlp.0.weight"),
    ):
        other = dict(peer.model.visual.named_parameters())[name].grad
        torch.testing.assert_close(mine.grad, other.view_as(mine.grad), rtol=1e-3, atol=1e-3)
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def live(state):
    """Return the names in memory, as torch.save writes a state dict."""
    return {
        key.replace("visual.", "model.visual.")
        if key.startswith("visual.")
        else key.replace("model.", "model.language_model."): x
        for key, x in state.items()
    }


def hub(state):
    """Return the names on the hub."""
    return {key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): x for key, x in state.items()}


def flatten(said):
    """Return a configuration as the hub has it: the keys of the decoder at the top."""
    text = {k: v for k, v in said["text_config"].items() if k not in ("model_type", "rope_parameters")}
    vision = {k: v for k, v in said["vision_config"].items() if k != "in_channels"} | {
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
    }
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    rest = {k: v for k, v in said.items() if k not in ("text_config", "vision_config")}
    del vision["model_type"]
    return {**text, **rest, **rope, "vision_config": vision}


@torch.no_grad()
@pytest.mark.parametrize("named", [dict, hub, lambda s: live(hub(s))], ids=["written here", "hub", "memory"])
@pytest.mark.parametrize("told", [dict, flatten], ids=["nested", "flat"])
def test_transformers_folders(folder, tmp_path, named, told):
    state, said = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    save_file(named(state), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(told(said)))
    ours = fieldguide.load(tmp_path)
    assert inspect_checkpoint(tmp_path).card.name == "qwen2.5-vl" and ours.config == fieldguide.load(folder).config
    assert ours.config.picture == PICTURE and ours.config.seen_depth == 3 and not ours.config.tie_embeddings
    (image, tokens, mask, grid), other, _ = arrange(ours, ROWS[:1], [draw((24, 40))])
    torch.testing.assert_close(ours(image, tokens, mask, grid), theirs()(**other).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_written_folders(tmp_path, tied):
    ours = tiny("qwen2.5-vl", torch.float32, channels=3, tie_embeddings=tied)
    save(ours, tmp_path, "hf")
    peer = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    image, tokens, mask = shown(ours.config, 4)
    pixels, grid = pack_patches(list(image), PATCH, MERGE)
    want = peer(
        pixel_values=pixels,
        image_grid_thw=grid,
        input_ids=tokens,
        attention_mask=mask.long(),
        mm_token_type_ids=((tokens == ours.config.picture) & mask).int(),
    ).logits
    torch.testing.assert_close(ours(image, tokens, mask) * mask[..., None], want * mask[..., None], rtol=1e-4, atol=1e-5)
    assert inspect_checkpoint(tmp_path).card.name == "qwen2.5-vl" and fieldguide.load(tmp_path).config == ours.config


VISION = {  # config.json of Qwen/Qwen2.5-VL-7B-Instruct
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
PUBLISHED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": VISION,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
SMALL = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "vision_config": {**VISION, "out_hidden_size": 2048},
}
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vision_config": {**VISION, "out_hidden_size": 8192, "intermediate_size": 3456},
}


@pytest.mark.parametrize(("size", "changes"), [("qwen2.5-vl-7b", {}), ("qwen2.5-vl-3b", SMALL), ("qwen2.5-vl-72b", LARGE)])
def test_published_configurations(size, changes):
    from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields

    said = {**PUBLISHED, **changes}
    found, _, table = identify_config(said)
    assert found is card("qwen2.5-vl")
    assert found.config(**to_config_fields(found, table, said, "config.json")) == found.resolve_config(size)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"vision_config": {**VISION, "out_hidden_size": 2048}}, "out_hidden_size=2048"),
    ],
)
def test_other_variants_are_rejected(changes, expected):
    from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields

    said = {**PUBLISHED, **changes}
    with pytest.raises(WeightsError, match=expected):
        to_config_fields(card("qwen2.5-vl"), identify_config(said)[2], said, "config.json")


@pytest.mark.parametrize("size", ["qwen2.5-vl-3b", "qwen2.5-vl-72b"])
def test_names_and_shapes_of_published_sizes(size):
    with torch.device("meta"):
        model = create(size)
        peer, rename = huggingface_qwen2_5_vl(model)
    ours = {key: x.shape for key, x in rename(model.state_dict()).items()}
    assert ours == {key: x.shape for key, x in peer.state_dict().items()}


@torch.no_grad()
def test_generated_tokens_equal_transformers(folder):
    """With a cache, two prompts and images of different sizes in one batch, greedy."""
    ours, peer = fieldguide.load(folder), theirs()
    (image, tokens, _, grid), told, prompts = arrange(ours, ROWS[:2], [draw((24, 40)), draw((16, 16), (40, 8))])
    got = torch.stack(list(generate(ours.with_images(image, grid), prompts, 12, sampling=Sampling(temperature=0))), 1)
    want = peer.generate(**told, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[:, tokens.shape[1] :]
    assert torch.equal(got, want) and len(set(map(tuple, got.tolist()))) == 2
    other = torch.stack(list(generate(ours.with_images(-image, grid), prompts, 12, sampling=Sampling(temperature=0))), 1)
    assert not torch.equal(got, other)


@torch.no_grad()
def test_cache_equals_the_whole_row():
    ours = tiny("qwen2.5-vl")
    image, tokens, _ = (x.double() if x.is_floating_point() else x for x in shown(ours.config, 3))
    decoder = ours.with_images(image)
    cache = decoder.new_cache(3)
    for last in range(6, 10):
        new = tokens[:, :6] if last == 6 else tokens[:, last - 1 : last]
        torch.testing.assert_close(decoder.last(new, None, cache), ours(image, tokens[:, :last])[:, -1], rtol=1e-9, atol=1e-11)


def test_invalid_rows_are_rejected():
    ours = tiny("qwen2.5-vl", torch.float32)
    image, tokens, mask = shown(ours.config, 2)
    with pytest.raises(DataError, match=r"Row 0 has the image token 31 3 times, but its images have 4 merged patches"):
        ours(image, tokens[:, 2:], mask[:, 2:])
    with pytest.raises(DataError, match="no image was passed"):
        ours(None, tokens, mask)
    with pytest.raises(DataError, match="16 x 12 pixels: both sides must be multiples of 8"):
        ours(image[..., :12], tokens, mask)
    with pytest.raises(DataError, match="length=24"):
        ours(image, torch.cat([tokens, tokens[:, -1:].repeat(1, 20)], 1))
    for wrong, said in (
        ({"sections": (1, 1, 1)}, "sum 4"),
        ({"window": 12}, "multiple of patch x merge"),
        ({"seen_heads": 3}, "seen_heads=3"),
    ):
        with pytest.raises(SettingsError, match=said):
            create("qwen2.5-vl-test", **wrong)


# Preprocessing


SIZES = [(28, 28), (100, 37), (37, 100), (640, 480), (9, 300), (1000, 1400), (3, 5)]


@pytest.mark.parametrize(
    "limits", [{}, {"size": {"shortest_edge": 3136, "longest_edge": 100_000}}, {"min_pixels": 40_000, "max_pixels": 60_000}]
)
def test_preprocessing_equals_transformers(tmp_path, limits):
    peer = transformers.Qwen2VLImageProcessorPil(**limits)
    peer.save_pretrained(tmp_path)
    ours = build_native_transform(tmp_path, 14, 2, 448, 3, OPENAI)
    rng, paths = np.random.default_rng(0), []
    for i, (width, height) in enumerate(SIZES):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    found = ours.load_each(paths)
    for path, image in zip(paths, found):
        want = peer(Image.open(path), return_tensors="pt")
        h, w = image.shape[1] // 14, image.shape[2] // 14
        assert want["image_grid_thw"].tolist() == [[1, h, w]]
        torch.testing.assert_close(pack_patches([ours.apply(image)], 14, 2)[0], want["pixel_values"], rtol=1e-5, atol=1e-5)
    batch = ours.collate([found[:1], found[1:3]])
    assert batch["image"].shape[:2] == (2, 2) and batch["grid"][0].tolist() == [[x // 14 for x in found[0].shape[1:]], [0, 0]]
    assert ours.from_json(json.loads(json.dumps(ours.to_json()))) == ours


def test_preprocessing_of_another_network_is_rejected(tmp_path):
    transformers.Qwen2VLImageProcessorPil(patch_size=16).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="patch_size=16, but the network has 14"):
        build_native_transform(tmp_path, 14, 2, 448, 3, OPENAI)
    Image.new("RGB", (900, 4)).save(tmp_path / "long.png")
    ours = build_native_transform(tmp_path / "none", 14, 2, 448, 3, OPENAI)
    with pytest.raises(DataError, match=r"long\.png: 900 x 4 pixels: one side is more than 200 times"):
        ours.load_each([tmp_path / "long.png"])


# Prediction


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of images of several sizes."""
    path, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in (("a", (40, 24)), ("b", (20, 33)), ("c", (24, 40)), ("d", (90, 30)), ("e", (24, 24))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path / f"{name}.png")
    return path


@torch.no_grad()
def answers(paths, **how):
    ready, peer, said = processor(), theirs(), []
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}]
    text = ready.apply_chat_template(asked, add_generation_prompt=True)
    for path in paths:
        made = ready(text=text, images=Image.open(path), return_tensors="pt")
        out = peer.generate(**made, max_new_tokens=12, do_sample=False, pad_token_id=256, eos_token_id=[256, 257], **how)
        said.append(ready.tokenizer.decode(out[0, made["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


def test_answers_equal_transformers(folder, photos):
    paths = sorted(map(str, photos.glob("*.png")))
    viewer = ImageToText.load(folder)
    ready = processor()
    text = viewer.format_prompt(ASKED)
    for path in paths[:2]:
        size = viewer.task.pictures.load_each([path])[0].shape[1:]
        assert viewer.tokens(ASKED, tuple(size)) == ready(text=text, images=Image.open(path))["input_ids"][0]
    said = [record["text"] for record in viewer.predict(str(photos), ASKED, tokens=12)]
    assert said == answers(paths) and len(set(said)) == len(paths)
    searched = [record["text"] for record in viewer.predict(str(photos), ASKED, tokens=12, beams=3)]
    assert searched == answers(paths, num_beams=3, length_penalty=1.0) != said
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    penalized = ImageToText.load(folder).predict(str(photos), ASKED, tokens=12)
    assert [record["text"] for record in penalized] == answers(paths, repetition_penalty=1.5) != said


def test_on_the_command_line(folder, photos):
    run = lambda *rest: CliRunner().invoke(commands.app, ["predict", str(folder), str(photos), "--json", *rest])
    done = run("--set", f"prompt={ASKED}", "--set", "tokens=5")
    assert done.exit_code == 0, done.output
    assert [json.loads(line) for line in done.stdout.splitlines()] == ImageToText.load(folder).predict(
        str(photos), ASKED, tokens=5
    )
    small = run("--set", f"prompt={ASKED}", "--set", "tokens=5", "--set", f"max_pixels={4 * UNIT**2}")
    assert small.exit_code == 0 and small.stdout != done.stdout
    assert ImageToText.load(folder, max_pixels=4 * UNIT**2).task.pictures.max_pixels == 4 * UNIT**2
