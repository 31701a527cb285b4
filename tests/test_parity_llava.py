"""LLaVA against transformers: published names and configurations, generated tokens, and learning to describe images."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fieldguide
from cases import huggingface_llava, shown
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint, save
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.data.loader import Batches
from fieldguide.models.generation import Sampling, generate
from fieldguide.models.registry import card, create
from fieldguide.objectives.language import NextToken
from test_folders import settled
from test_loop import trainer
from test_models import tiny
from tv import transformers

PICTURE, PATCHES = 38, 4


def theirs(**changes):
    """Return a tiny LLaVA of transformers with random parameters."""
    torch.manual_seed(0)
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 8,
    }
    words = {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
    }
    peer = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=tower, text_config=words, image_token_index=PICTURE, **changes)
    )
    return settled(peer).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    theirs().save_pretrained(path)
    return path


def asked():
    """Return two images and a question about each; the first question is shorter."""
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8), [[1, PICTURE, 5, 6], [1, 9, PICTURE, 7, 8, 4, 4]]


def hub(path, state):
    """Return the names in llava-hf/llava-1.5-7b-hf."""
    return {key.replace("vision_tower.", "vision_tower.vision_model.", 1): x for key, x in state.items()}


def live(path, state):
    """Return the names in memory, as torch.save writes a state dict."""
    key = lambda name: name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
    return {
        name if name.startswith(("lm_head", "model.")) else f"model.{name}": x
        for name, x in ((key(name), x) for name, x in state.items())
    }


@torch.no_grad()
@pytest.mark.parametrize("named", [lambda path, state: state, hub, live], ids=["written here", "hub", "memory"])
def test_transformers_folders(folder, tmp_path, named):
    state = load_file(folder / "model.safetensors")
    save_file(named(folder, state), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours, peer = fieldguide.load(tmp_path), transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    assert ours.config.above == 1 and ours.config.picture == PICTURE and ours.config.seen_depth == 3
    image, rows = asked()
    tokens = torch.tensor([ours.expand_image_tokens(row) for row in rows[:1]])
    torch.testing.assert_close(
        ours(image[:1], tokens), peer(pixel_values=image[:1], input_ids=tokens).logits, rtol=1e-5, atol=1e-5
    )
    words = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(ours(None, words), peer(input_ids=words).logits, rtol=1e-5, atol=1e-5)


def test_several_images_in_a_row():
    """Outputs and gradients equal those of transformers, which takes the images of all rows one after another."""
    ours = tiny("llava", torch.float64, channels=3)
    peer, rename = huggingface_llava(ours)
    peer.double().load_state_dict(rename(ours.state_dict()))
    image, picture = shown(ours.config, 3)[0], ours.config.picture
    asked = torch.tensor([ours.expand_image_tokens([1, picture, 5, picture, 6])] * 2)
    more = torch.randn(2, 2, *image.shape[1:], dtype=torch.float64)
    everything = torch.ones_like(asked, dtype=torch.bool)
    got, want = ours(more, asked, everything), peer(more.flatten(0, 1), asked, everything)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for outputs in (got, want):
        outputs.square().sum().backward()
    known = dict(peer.named_parameters())
    for name, grad in rename({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}).items():
        torch.testing.assert_close(grad, known[name].grad, rtol=1e-7, atol=1e-9)
    first = torch.tensor([ours.expand_image_tokens([1, picture, 5, 6])] * 2)  # the second image of a row is not asked about
    torch.testing.assert_close(ours(more, first), ours(more[:, 0], first))
    with pytest.raises(DataError, match="4 images has"):
        ours(more, asked[:, :-2])


@torch.no_grad()
def test_transformers_reads_written_folders(tmp_path):
    ours = tiny("llava", torch.float32, channels=3)
    save(ours, tmp_path, "hf")
    peer = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    image, tokens, mask = shown(ours.config, 4)
    real = mask[..., None]
    torch.testing.assert_close(
        ours(image, tokens, mask) * real,
        peer(pixel_values=image, input_ids=tokens, attention_mask=mask.long()).logits * real,
        rtol=1e-4,
        atol=1e-5,
    )
    assert inspect_checkpoint(tmp_path).card.name == "llava" and fieldguide.load(tmp_path).config == ours.config


@torch.no_grad()
@pytest.mark.parametrize(("layer", "above"), [(-1, 0), (-2, 1), (-3, 2), (2, 1), (1, 2)])
def test_any_hidden_state_of_the_image_encoder_can_be_used(tmp_path, layer, above):
    peer = theirs(vision_feature_layer=layer)
    peer.save_pretrained(tmp_path)
    ours = fieldguide.load(tmp_path)
    image, tokens, mask = shown(ours.config, 2)
    got = ours(image, tokens, mask) * mask[..., None]
    want = peer(pixel_values=image, input_ids=tokens, attention_mask=mask.long()).logits * mask[..., None]
    assert ours.config.above == above
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


PUBLISHED = {  # config.json of llava-hf/llava-1.5-7b-hf, what computes
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
LARGE = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
AUTHORS = {  # that of liuhaotian/llava-v1.5-7b
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("size", "said", "changes"),
    [
        ("llava-1.5-7b", PUBLISHED, {}),
        ("llava-1.5-13b", {**PUBLISHED, "text_config": {**PUBLISHED["text_config"], **LARGE}}, {}),
        ("llava-1.5-7b", AUTHORS, {"vocab_size": 32_000}),
        ("llava-1.5-7b", {**AUTHORS, "model_type": "llava"}, {"vocab_size": 32_000}),
        ("llava-1.5-13b", {**AUTHORS, **LARGE}, {"vocab_size": 32_000}),
    ],
)
def test_published_configurations(tmp_path, size, said, changes):
    from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields

    found, _, table = identify_config(said)
    assert found is card("llava")
    assert found.config(**to_config_fields(found, table, said, "config.json")) == found.resolve_config(size, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "relu"),
        ({"vision_feature_layer": [-2, -5]}, "single integer"),
        ({"text_config": {"model_type": "mistral"}}, "mistral"),
    ],
)
def test_other_llava_variants_are_rejected(tmp_path, changes, words):
    from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields

    said = {**PUBLISHED, **changes}
    with pytest.raises(WeightsError, match=words):
        to_config_fields(card("llava"), identify_config(said)[2], said, "config.json")


def test_names_and_shapes_of_the_published_size():
    with torch.device("meta"):
        model = create("llava-1.5-7b")
        peer, rename = huggingface_llava(model)
    assert {key: x.shape for key, x in rename(model.state_dict()).items()} == {
        key: x.shape for key, x in peer.state_dict().items() if not key.endswith(("position_ids", "inv_freq"))
    }


@torch.no_grad()
def test_author_files(folder):
    """The language model and the two projection layers are in one file, the image encoder in that of CLIP."""
    ours, both = fieldguide.load(folder), {}
    for key, x in load_file(folder / "model.safetensors").items():
        if key.startswith("vision_tower."):
            both[f"model.vision_tower.vision_tower.vision_model.{key.removeprefix('vision_tower.')}"] = x
        else:
            key = key.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
            both[
                key.replace("multi_modal_projector.linear_1", "model.mm_projector.0").replace(
                    "multi_modal_projector.linear_2", "model.mm_projector.2"
                )
            ] = x
    assert "model.mm_projector.0.weight" in both
    other = create("llava-1.5-7b", **{k: getattr(ours.config, k) for k in vars(ours.config)}).eval()
    weights.load(other, both)
    image, tokens, mask = shown(ours.config, 2)
    assert torch.equal(other(image, tokens, mask), ours(image, tokens, mask))
    with pytest.raises(WeightsError, match=r"vision\.patch"):
        weights.load(other, {k: x for k, x in both.items() if "vision_tower" not in k})


def test_generated_text_equals_transformers(folder):
    """With a cache, two prompts of different length in one batch, greedy."""
    ours, peer = fieldguide.load(folder), transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    image, rows = asked()
    prompts = [ours.expand_image_tokens(row) for row in rows]
    got = torch.stack(list(generate(ours.with_images(image), prompts, 12, sampling=Sampling(temperature=0))), 1)
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.arange(width) >= torch.tensor([[width - len(row)] for row in prompts])
    want = peer.generate(
        input_ids=tokens,
        attention_mask=mask.long(),
        pixel_values=image,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(got, want[:, width:]) and len(set(map(tuple, got.tolist()))) == 2
    other = torch.stack(list(generate(ours.with_images(image.flip(0)), prompts, 12, sampling=Sampling(temperature=0))), 1)
    assert not torch.equal(got, other), "what is said hangs on the picture"


@torch.no_grad()
def test_cache_equals_the_whole_row():
    ours = tiny("llava")
    image, tokens, _ = (x.double() if x.is_floating_point() else x for x in shown(ours.config, 3))
    tokens, seeing = tokens[:, :7], ours.with_images(image)
    cache = seeing.new_cache(3)
    for last in range(5, 8):
        new = tokens[:, :5] if last == 5 else tokens[:, last - 1 : last]
        torch.testing.assert_close(seeing.last(new, None, cache), ours(image, tokens[:, :last])[:, -1], rtol=1e-9, atol=1e-11)


def test_invalid_rows_are_rejected():
    ours = tiny("llava")
    image, tokens, mask = (x.double() if x.is_floating_point() else x for x in shown(ours.config, 2))
    with pytest.raises(DataError, match=r"token 31 3 times.*2 images has 4 patches"):
        ours(image, tokens[:, 2:], mask[:, 2:])
    with pytest.raises(DataError, match="no image was passed"):
        ours(None, tokens, mask)
    with pytest.raises(DataError, match="was created with image=8"):
        ours(image[..., :4], tokens, mask)
    with pytest.raises(DataError, match="length=24"):
        ours(image, torch.cat([tokens, tokens[:, -1:].repeat(1, 20)], 1))
    with pytest.raises(SettingsError, match="above=2"):
        create("llava-test", above=2)
    with pytest.raises(DataError, match="has no image token"):
        list(
            generate(
                ours.with_images(image), [ours.expand_image_tokens([31]) + [5] * 15] * 2, 10, sampling=Sampling(temperature=0)
            )
        )
    assert ours.expand_image_tokens([1, 31, 2]) == [1, 31, 31, 31, 31, 2]


def test_learns_to_describe_images():
    """The image encoder stays frozen, as in the paper; the text names the bright quarter of an image."""
    torch.manual_seed(0)
    model = create("llava-test", channels=1, seen_dim=32, dim=32, hidden=64)
    place = torch.randint(4, (704,))
    quarter = torch.nn.functional.one_hot(place, 4).view(-1, 1, 2, 2).float()
    image = torch.randn(704, 1, 8, 8) * 0.3 + 2 * quarter.repeat_interleave(4, 2).repeat_interleave(4, 3)
    tokens = torch.cat([torch.tensor([[1, *[31] * 4, 2]] * 704), 10 + place[:, None], torch.full((704, 1), 3)], 1)
    target = torch.cat([torch.full((704, 5), -1), tokens[:, 6:], torch.full((704, 1), -1)], 1)  # the answer alone
    batches = Batches(640, lambda index, _: {"image": image[index], "tokens": tokens[index], "target": target[index]})
    model.vision.requires_grad_(False)
    before = [p.clone() for p in model.vision.parameters()]
    trainer(NextToken(model, card("llava").inputs), batches, steps=200, lr=1e-2, batch=32).train()
    assert all(torch.equal(p, q) for p, q in zip(before, model.vision.parameters()))
    said = torch.stack(
        list(generate(model.eval().with_images(image[640:]), tokens[640:, :6].tolist(), 2, sampling=Sampling(temperature=0))), 1
    )
    assert (said == tokens[640:, 6:]).all(1).float().mean() > 0.95


def test_configuration_has_image_token_and_size(tmp_path):
    save(create("llava-test", channels=3), tmp_path, "hf")
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["image_seq_length"] == PATCHES and said["vision_feature_layer"] == -2 and said["image_token_index"] == 31
