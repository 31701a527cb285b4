"""SigLIP against transformers and the pseudocode of its paper: padding that is read, pooling, files, tokenizers, learning."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import fieldguide
from cases import huggingface_siglip
from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.checkpoints.load import inspect_checkpoint, save
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.inference.run import open_run
from fieldguide.inference.zero_shot import ZeroShotClassifier
from fieldguide.models.registry import card, create
from fieldguide.objectives import SigmoidContrastive
from fieldguide.objectives.contrastive import build_contrastive
from test_folders import settled
from test_models import batch, tiny
from test_task_image_text import COLOURS, SETTINGS, SIDES, album
from tv import transformers

EXACT = {"rtol": 1e-9, "atol": 1e-11}
PIECES = Path(__file__).parent / "golden" / "pieces"


def peer_of(ours):
    peer, rename = huggingface_siglip(ours)
    peer.double().load_state_dict(rename(ours.state_dict()))
    return peer.peer.eval()


# Network


@torch.no_grad()
def test_logits_equal_those_of_transformers():
    ours = tiny("siglip")
    peer, (image, tokens, mask) = peer_of(ours), batch("siglip")
    text = torch.full((5, 12), ours.config.pad)
    text[:, : tokens.shape[1]] = torch.where(mask, tokens, ours.config.pad)
    found = peer(pixel_values=image, input_ids=text)
    pairs = ours(image, tokens, mask)
    torch.testing.assert_close(pairs[:, 0] @ pairs[:, 1].T, found.logits_per_image, **EXACT)
    torch.testing.assert_close(ours.encode_image(image), found.image_embeds, **EXACT)
    torch.testing.assert_close(ours.encode_text(tokens, mask), found.text_embeds, **EXACT)


@torch.no_grad()
def test_padding_is_read():
    """Texts are read at the last position of the full length: padding is part of them, whoever adds it."""
    ours = tiny("siglip")
    text, pad = torch.tensor([[4, 5, 29]]), ours.config.pad
    full = F.pad(text, (0, 9), value=pad)
    torch.testing.assert_close(ours.encode_text(text), ours.encode_text(full), **EXACT)
    torch.testing.assert_close(
        ours.encode_text(F.pad(text, (0, 2), value=7), torch.arange(5)[None] < 3), ours.encode_text(full)
    )
    assert not torch.allclose(tiny("siglip", pad=4).encode_text(text), ours.encode_text(text), atol=1e-3)
    assert not torch.allclose(tiny("siglip", length=3).encode_text(text), ours.encode_text(text), atol=1e-3)
    with pytest.raises(DataError, match=r"13 tokens.*length=12"):
        ours.encode_text(F.pad(text, (0, 10)))


@torch.no_grad()
def test_images():
    """A remainder of the side is not read, as at 384 pixels with patches of 14; another size is an error."""
    ours = tiny("siglip")
    image = batch("siglip")[0]
    changed = image.clone()
    changed[:, :, 12:], changed[:, :, :, 12:] = 9, 9
    assert torch.equal(ours.encode_image(changed), ours.encode_image(image)) and ours.vision.grid == 3
    with pytest.raises(DataError, match=r"12 x 12 pixels.*image=14"):
        ours.encode_image(image[..., :12, :12])
    with pytest.raises(SettingsError, match="at least patch=4"):
        create("siglip-test", image=3)
    seen = ours.attention(image)
    assert seen.shape == (5, 3, 3)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(5, dtype=torch.float64))


@torch.no_grad()
def test_pooling_attention_equals_torch():
    ours = tiny("siglip").vision
    x, pool = ours.features(batch("siglip")[0]), ours.pool
    _, want = F.multi_head_attention_forward(
        *(y.transpose(0, 1) for y in (pool.query.expand(5, -1, -1), x, x)), 16, 2, pool.qkv.weight, pool.qkv.bias,
        None, None, False, 0.0, pool.proj.weight, pool.proj.bias, average_attn_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(pool.attention(x), want[:, :, 0], **EXACT)


@torch.no_grad()
def test_positions_fit_another_image_size():
    ours, other = tiny("siglip", torch.float32), create("siglip-test", image=24)
    weights.load(other, dict(ours.state_dict()))
    assert other.vision.pos.weight.shape == (36, 16) and torch.equal(other.text.embed.weight, ours.text.embed.weight)
    grid = ours.vision.pos.weight.T.unflatten(1, (3, 3))[None]
    want = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(other.vision.pos.weight, want)


@pytest.mark.parametrize("size", ["siglip-b16-224", "siglip-so400m-14-384", "siglip2-giant-16-256"])
def test_names_and_shapes_of_published_sizes(size):
    with torch.device("meta"):
        model = create(size)
        peer, rename = huggingface_siglip(model)
    theirs = {key: x.shape for key, x in peer.state_dict().items() if not key.endswith("position_ids")}
    assert {key: x.shape for key, x in rename(model.state_dict()).items()} == theirs


# Objective


def pseudocode(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, same: Tensor) -> Tensor:
    """Compute algorithm 1 of the paper pair by pair; `same` is 1 for positive pairs."""
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(image)):
        for j in range(len(text)):
            label = 1.0 if same[i, j] else -1.0
            total = total - torch.log(1 / (1 + torch.exp(-label * (scale.exp() * (image[i] * text[j]).sum() + bias))))
    return total.squeeze() / len(image)


@pytest.mark.parametrize("twice", [False, True], ids=["all differ", "equal texts and images"])
def test_loss_equals_the_pseudocode(twice):
    model = tiny("siglip")
    inputs = dict(zip(("image", "tokens", "mask"), batch("siglip")))
    text, picture = (torch.tensor([0, 1, 0, 2, 3]), torch.tensor([0, 0, 1, 2, 2])) if twice else (torch.arange(5),) * 2
    objective = build_contrastive(model, card("siglip"))
    assert type(objective) is SigmoidContrastive
    parts = objective(inputs | ({"text": text, "picture": picture} if twice else {}))
    same = (text[:, None] == text) | (picture[:, None] == picture)
    want = pseudocode(
        model.encode_image(inputs["image"]), model.encode_text(inputs["tokens"], inputs["mask"]),
        model.logit_scale, model.logit_bias, same,
    )  # fmt: skip
    torch.testing.assert_close(parts["loss"], want, **EXACT)
    torch.testing.assert_close(parts["positive"] + parts["negative"], want, **EXACT)
    for name, ours, theirs in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(parts["loss"], list(model.parameters())),
        torch.autograd.grad(want, list(model.parameters())),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=name)
    if not twice:
        peer = peer_of(model)
        full = F.pad(
            inputs["tokens"].masked_fill(~inputs["mask"], model.config.pad), (0, 12 - inputs["tokens"].shape[1]), value=3
        )
        loss = peer(pixel_values=inputs["image"], input_ids=full, return_loss=True).loss
        torch.testing.assert_close(parts["loss"], loss, **EXACT)
    out = objective.outputs(inputs)
    torch.testing.assert_close(out["image"], model.encode_image(inputs["image"]), **EXACT)
    torch.testing.assert_close(out["text"], model.encode_text(inputs["tokens"], inputs["mask"]), **EXACT)


def test_start_of_scale_and_bias():
    """At the start nearly all pairs are rejected, so that the many negatives do not dominate (section 3.2)."""
    model = create("siglip-test")
    assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias.item() == -10
    with pytest.raises(SettingsError, match="batch_size=2"):
        SigmoidContrastive(model)(dict(zip(("image", "tokens", "mask"), batch("siglip", 1, torch.float32))))


# Files


def siglip_tokenizer() -> Tokenizer:
    """Return a tokenizer of words, with the ids of the special tokens of SigLIP."""
    words = ["<pad>", "</s>", "<unk>", *"this is a photo of cat big dog red bus .".split()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "</s>"])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a SigLIP as on the hub: weights, tokenizer and image preprocessing."""
    path = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 20}
    text = {**tower, "vocab_size": 14, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.SiglipConfig(text_config=text, vision_config={**tower, "image_size": 24, "patch_size": 8})
    settled(transformers.SiglipModel(config)).save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=siglip_tokenizer(), eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "SiglipImageProcessor",
                "size": {"height": 24, "width": 24},
                "resample": 3,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )
    return path


@torch.no_grad()
def test_transformers_folders_both_ways(folder, tmp_path):
    found = inspect_checkpoint(folder)
    assert found.card.name == "siglip" and found.origin == "huggingface"
    ours, peer = fieldguide.load(folder), transformers.SiglipModel.from_pretrained(folder).eval()
    save(ours, tmp_path, "hf")
    again = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    image, tokens = torch.randn(2, 3, 24, 24), torch.randint(3, 14, (2, 16))
    for one in (peer, again):
        want = one(pixel_values=image, input_ids=tokens)
        torch.testing.assert_close(ours.encode_image(image), want.image_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.encode_text(tokens), want.text_embeds, rtol=1e-5, atol=1e-6)
    assert fieldguide.load(tmp_path).config == ours.config and ours.config.pad == 1


@torch.no_grad()
def test_zero_shot_equals_transformers(folder, pictures):
    """Each class has a probability of its own, and the texts are padded with the end token, as the tokenizer says."""
    classes = ["cat", "big dog", "red bus"]
    zero = ZeroShotClassifier.load(folder)
    assert zero.model.config.pad == 1 and zero.templates == ("This is a photo of {}.",)
    found = zero.predict(sorted(map(str, pictures.glob("*.png"))), classes)
    model = transformers.SiglipModel.from_pretrained(folder).eval()
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [[*fast(f"this is a photo of {name} .").input_ids, 1] for name in classes]
    tokens = torch.tensor([row + [1] * (16 - len(row)) for row in ids])
    how = zero.task.pictures
    image = how.apply(how.load(sorted(map(str, pictures.glob("*.png")))))
    want = model(pixel_values=image, input_ids=tokens).logits_per_image.sigmoid()
    got = torch.tensor([[r["probabilities"][name] for name in classes] for r in found])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    assert (got.sum(1) - 1).abs().max() > 1e-3, "not a softmax"
    assert [step.name for step in zero.signature.postprocessing][-1] == "sigmoid"


def test_sentencepiece_tokenizer(tmp_path):
    """SigLIP lowers letters, removes ASCII punctuation, ends texts, and pads with the end token."""
    shutil.copy(PIECES / "T5.model", tmp_path / "spiece.model")
    plain = TextTokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    text = TextTokenizer.load(tmp_path)
    said = f"  The CAT,  {string.punctuation} the\tcat’s “hat”!"
    want = plain.encode_exact(["the cat the cat’s “hat”"])[0].tolist()
    assert text.tokenizer.encode(said).ids == [*want, 1] and plain.encode_exact([said])[0].tolist() != want
    assert text.pad == text.end == 1
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer", "do_lower_case": False}))
    kept = TextTokenizer.load(tmp_path).tokenizer.encode("The cat,").ids
    assert kept == [*plain.encode_exact(["The cat"])[0].tolist(), 1]


def test_second_version_reads_lowercase(tmp_path):
    """The tokenizer files of SigLIP 2 are those of Gemma; its texts were in lower case."""
    siglip_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer.load(tmp_path).tokenizer.encode("A Cat").tokens == ["<unk>", "<unk>"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    text = TextTokenizer.load(tmp_path)
    assert text.tokenizer.encode("A Cat").tokens == ["a", "cat"]
    text.save(tmp_path)
    assert str(TextTokenizer.load(tmp_path).tokenizer.normalizer).count("Lowercase") == 1


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("siglip-b16-224", {"text_config": {"model_type": "siglip_text_model"}, "vision_config": {}}),
        ("siglip-b16-384", {"text_config": {}, "vision_config": {"image_size": 384}}),
        ("siglip2-b16-224", {"text_config": {"vocab_size": 256_000, "pad_token_id": 1}, "vision_config": {}}),
        (
            "siglip2-giant-16-256",
            {
                "text_config": {
                    "vocab_size": 256_000,
                    "hidden_size": 1152,
                    "intermediate_size": 4304,
                    "num_hidden_layers": 27,
                    "num_attention_heads": 16,
                    "projection_size": 1536,
                },
                "vision_config": {
                    "hidden_size": 1536,
                    "intermediate_size": 6144,
                    "num_hidden_layers": 40,
                    "num_attention_heads": 16,
                    "image_size": 256,
                },
            },
        ),
    ],
)
def test_published_configurations(size, said):
    """Files leave out what equals the base size. The padding of SigLIP 2 is 0, which they do not say."""
    said = {"architectures": ["SiglipModel"], "model_type": "siglip", **said}
    found, _, table = identify_config(said)
    assert found.config(**to_config_fields(found, table, said, "config.json")) == found.resolve_config(size)


def test_other_variants_are_rejected():
    said = {
        "model_type": "siglip",
        "architectures": ["SiglipModel"],
        "text_config": {"projection_size": 100},
        "vision_config": {},
    }
    with pytest.raises(WeightsError, match="projection_size"):
        to_config_fields(card("siglip"), identify_config(said)[2], said, "config.json")


# Training


SMALL = {"model.hidden": 128, "model.text_dim": 64, "model.text_hidden": 128, "task.length": 16, "lr": 1e-2}


@pytest.mark.slow
def test_learns_captions(tmp_path):
    table = album(tmp_path / "data", 400)
    run = fit(
        table,
        task="image-text",
        model="siglip-mini",
        out=tmp_path / "run",
        settings={**SETTINGS, **SMALL, "steps": 140, "evaluate": 70, "batch": 64},
    )
    chance = {b["name"]: b["scores"] for b in run.record["scores"]["baselines"]}["chance"]
    assert run.scores["text_r1"] > 0.8 and run.scores["text_r1"] > 2 * chance["text_r1"]
    photo = next(p for p in sorted((tmp_path / "data/photos").iterdir()))
    said = open_run(run.path).predict(str(photo), classes=", ".join(f"a {c} square on the {s}" for c in COLOURS for s in SIDES))
    assert said[0]["label"] == table.read_text().splitlines()[1].split(",")[1]
    assert "Attention" in (run.path / "report.html").read_text()
