"""BLIP against transformers: files, configurations, generated captions, and a published folder that captions images."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import fieldguide
from cases import huggingface_blip, written
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.load import inspect_checkpoint, save
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.inference.run import open_run
from fieldguide.models.generation import BeamSearch, EncoderDecoderState, generate_batch
from fieldguide.models.registry import card, create
from test_folders import settled
from test_models import tiny
from test_task_image_text import album
from tv import transformers

WORDS = ["[PAD]", "[UNK]", "[SEP]", *"a red blue cat dog on the of picture".split()]
BEGIN, END = len(WORDS), 2  # the first token is not in the tokenizer's files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a BLIP as on the hub: weights, tokenizer and image preprocessing."""
    path = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": BEGIN + 2, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 12}
    ids = {"bos_token_id": BEGIN, "sep_token_id": END, "eos_token_id": 1, "pad_token_id": 0}
    vision = {"hidden_size": 12, "intermediate_size": 20, "image_size": 24, "patch_size": 8}
    config = transformers.BlipConfig(text_config={**shape, **text, **ids}, vision_config={**shape, **vision})
    peer = settled(transformers.BlipForConditionalGeneration(config))
    with torch.no_grad():
        peer.text_decoder.cls.predictions.bias[BEGIN:] = -20  # no text begins twice
        for layer in peer.text_decoder.bert.encoder.layer:
            layer.crossattention.output.dense.weight.mul_(8)  # so that texts depend on the image
    peer.save_pretrained(path)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(WORDS[:3])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]"
    ).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BlipImageProcessor", "size": {"height": 24, "width": 24}, "resample": 3})
    )
    return path


@torch.no_grad()
def test_transformers_folders_both_ways(folder, tmp_path):
    found = inspect_checkpoint(folder)
    assert found.card.name == "blip" and found.origin == "huggingface"
    ours, peer = fieldguide.load(folder), transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    save(ours, tmp_path, "hf")
    again = transformers.BlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    image, tokens, mask = written(ours.config, 3)
    for one in (peer, again):
        want = one(pixel_values=image, input_ids=tokens, attention_mask=mask.long()).logits
        torch.testing.assert_close(ours(image, tokens, mask)[mask], want[mask], rtol=1e-4, atol=1e-5)
    assert fieldguide.load(tmp_path).config == ours.config and (ours.config.begin, ours.config.end) == (BEGIN, END)
    assert ours.config.heads == 2, "not the default of transformers, 8"


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_transformers(folder, beams):
    """Texts begin with [DEC] and end at [SEP]; `eos_token_id` of the configuration ends nothing."""
    ours, peer = fieldguide.load(folder), transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    torch.manual_seed(0)
    image = torch.randn(4, 3, 24, 24)
    want = peer.generate(pixel_values=image, num_beams=beams, max_length=10, do_sample=False, length_penalty=1.0)
    got = generate_batch(
        EncoderDecoderState(ours, image, None),
        [[BEGIN]] * 4,
        BeamSearch(num_beams=beams, max_new_tokens=9, length_penalty=1.0),
        eos_token_ids=(END,),
    )
    clean = [[t for t in row[1:] if t not in (0, END)] for row in want.tolist()]
    assert [[t for t in row if t] for row in got] == clean and len(set(map(tuple, clean))) > 1
    other = generate_batch(
        EncoderDecoderState(ours, image.flip(0), None),
        [[BEGIN]] * 4,
        BeamSearch(num_beams=beams, max_new_tokens=9),
        eos_token_ids=(END,),
    )
    assert other != got, "captions depend on the image"


@torch.no_grad()
def test_folder_captions_images(folder, pictures):
    predictor = fieldguide.pipeline(folder)
    found = predictor.predict(str(pictures), num_beams=1)
    model = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    p = predictor.task.pictures
    image = p.apply(p.load(sorted(map(str, pictures.glob("*.png")))))
    rows = model.generate(pixel_values=image, max_length=12, do_sample=False)
    special = (BEGIN, END, 0)
    assert [r["text"].split() for r in found] == [
        [WORDS[t] for t in row if t not in special and t > 1] for row in rows.tolist()
    ]
    asked = predictor.predict(str(pictures), prompt="a picture of", num_beams=1)
    assert all(r["text"].startswith("a picture of") for r in asked) and predictor.task.begin == BEGIN
    with pytest.raises(SettingsError, match="shorten the prompt"):
        predictor.predict(str(pictures), prompt="a cat on the " * 4)


@torch.no_grad()
def test_cache_equals_the_whole_row():
    ours = tiny("blip")
    image, tokens, _ = (x.double() if x.is_floating_point() else x for x in written(ours.config, 3))
    state = EncoderDecoderState(ours, image, None)
    cache = state.new_cache(3, 6)
    for last in range(2, 6):
        new = tokens[:, :2] if last == 2 else tokens[:, last - 1 : last]
        torch.testing.assert_close(state.last(new, None, cache), ours(image, tokens[:, :last])[:, -1], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_image_sizes():
    ours, other = tiny("blip", torch.float32), create("blip-test", image=16)
    weights.load(other, dict(ours.state_dict()))
    assert other.vision.pos.shape == (1, 17, 12) and torch.equal(other.vision.pos[:, 0], ours.vision.pos[:, 0])
    with pytest.raises(DataError, match=r"4 x 8 pixels.*image=8"):
        ours(torch.zeros(1, 3, 8, 4), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(DataError, match="length=12"):
        ours(torch.zeros(1, 3, 8, 8), torch.ones(1, 13, dtype=torch.long))
    with pytest.raises(SettingsError, match="patch=4"):
        create("blip-test", image=10)


@pytest.mark.parametrize("size", ["blip-base", "blip-large"])
def test_names_and_shapes_of_published_sizes(size):
    with torch.device("meta"):
        model = create(size)
        peer, rename = huggingface_blip(model)
    theirs = {key: x.shape for key, x in peer.state_dict().items() if "predictions.decoder" not in key}
    assert {key: x.shape for key, x in rename(model.state_dict()).items()} == theirs


def test_tied_tensors_in_files(folder, tmp_path):
    """Older files hold the output layer, which is the embedding, a second time."""
    state = load_file(folder / "model.safetensors")
    known = fieldguide.load(folder)
    embedding, bias = state["text_decoder.bert.embeddings.word_embeddings.weight"], state["text_decoder.cls.predictions.bias"]
    twice = {
        **state,
        "text_decoder.cls.predictions.decoder.weight": embedding,
        "text_decoder.cls.predictions.decoder.bias": bias,
    }
    other = create("blip-test", **vars(known.config))
    assert weights.load(other, twice) == []
    assert torch.equal(other.embed.weight, known.embed.weight) and torch.equal(other.bias, known.bias)


BASE = {
    "architectures": ["BlipForConditionalGeneration"],
    "model_type": "blip",
    "text_config": {"model_type": "blip_text_model", "num_attention_heads": 12, "encoder_hidden_size": 768},
    "vision_config": {"model_type": "blip_vision_model"},
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("blip-base", BASE),
        (
            "blip-large",
            {**BASE, "vision_config": LARGE, "text_config": {"num_attention_heads": 12, "encoder_hidden_size": 1024}},
        ),
    ],
)
def test_published_configurations(size, said):
    found, _, table = identify_config(said)
    assert found.config(**to_config_fields(found, table, said, "config.json")) == found.resolve_config(size)


def test_other_networks_of_blip_are_rejected():
    said = {**BASE, "text_config": {**BASE["text_config"], "hidden_act": "relu"}}
    with pytest.raises(WeightsError, match="relu"):
        to_config_fields(card("blip"), identify_config(said)[2], said, "config.json")
    said = {**BASE, "architectures": ["BlipForQuestionAnswering"]}
    with pytest.raises(WeightsError, match="BlipForQuestionAnswering"):
        to_config_fields(card("blip"), identify_config(said)[2], said, "config.json")


def test_training_starts_from_published_weights(folder, tmp_path):
    """With the tokenizer, the markers and the image preprocessing of the checkpoint."""
    table = album(tmp_path / "data", 60)
    settings = {"steps": 4, "evaluate": 2, "batch": 8, "precision": "float32", "minutes": 0}
    run = fit(table, task="image-to-text", weights=folder, out=tmp_path / "run", settings=settings)
    config, options = run.model.config, run.task.options
    assert (config.image, config.vocab_size, config.begin, config.end) == (24, BEGIN + 2, BEGIN, END)
    assert (options.side, options.length, options.begin, options.end) == (24, 12, BEGIN, END)
    assert run.record["model"]["fresh"] == [] and run.task.pictures.fit == "stretch"
    photo = str(next((tmp_path / "data/photos").iterdir()))
    assert open_run(run.path).predict(photo, prompt="a picture of")[0]["text"].startswith("a picture of")
