"""Folders of transformers, diffusers and timm with image networks: loaded by configuration, equal, and saved bit-exact."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import fieldguide
from fieldguide.checkpoints import config_mapping, load, weights
from fieldguide.core.errors import WeightsError
from fieldguide.models.convolutional.mobilenet_v3 import SMALL
from fieldguide.models.registry import cards, create, find
from tv import timm, transformers

PLAIN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURE = {"num_labels": 5, "num_channels": 2}
SWIGLU = {"use_swiglu_ffn": True, "image_size": 12, "patch_size": 4}
TOWERS = {
    "text_config": {
        "hidden_size": 12,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 30,
        "max_position_embeddings": 12,
        "eos_token_id": 29,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "num_channels": 2,
        "hidden_act": "gelu",
    },
    "projection_dim": 8,
}
FOLDERS = {  # their class, its configuration, what ours must have understood
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [32, 48, 64], "depths": [1, 2, 1], **PICTURE},
        {"widths": (8, 12, 16)},
    ),
    "resnet-basic": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic", **PICTURE},
        {"block": "basic", "widths": (8, 12)},
    ),
    "two labels": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
        {"num_classes": 2},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], "num_stages": 3, "patch_size": 2, "drop_path_rate": 0.3, **PICTURE},
        {"eps": 1e-12, "drop_path": 0.3, "patch": 2},
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], "num_stages": 3, "patch_size": 2, **PICTURE},
        {"widths": (8, 12, 16)},
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.1, "depth_coefficient": 0.3, "hidden_dim": 128, "dropout_rate": 0.3, **PICTURE},
        {"padding": "same", "eps": 1e-3, "dropout": 0.3},
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        {**PLAIN, **PICTURE, "image_size": 12, "patch_size": 4},
        {"registers": 0, "antialias": False, "offset": 0.0},
    ),
    "dinov2-gated": ("Dinov2ForImageClassification", {**PLAIN, **PICTURE, **SWIGLU}, {"gated": True}),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        {**PLAIN, **PICTURE, **SWIGLU, "num_register_tokens": 3},
        {"registers": 3, "antialias": True, "offset": 0.0},
    ),
    "clip": ("CLIPModel", TOWERS, {"quick": False, "end": 29, "embed": 8}),
    "vilt": (
        "ViltForQuestionAnswering",
        {
            **PLAIN,
            **PICTURE,
            "intermediate_size": 64,
            "vocab_size": 30,
            "max_position_embeddings": 12,
            "image_size": 12,
            "patch_size": 4,
        },
        {"length": 12, "num_classes": 5},
    ),
}


def settled(theirs: nn.Module) -> nn.Module:
    """Return weights and statistics that affect every output."""
    torch.manual_seed(1)
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return theirs.eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answers(theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the outputs of both networks for the same inputs."""
    torch.manual_seed(2)
    kind, side = type(theirs).__name__, 64 if type(theirs).__name__.startswith("Efficient") else 24
    pictures = torch.randn(3, ours.config.channels, side, side)
    if kind.startswith(("CLIP", "Vilt")):
        pictures, tokens = pictures[:, :, :12, :12], torch.randint(1, 28, (3, 9))
        tokens[:, -1] = 29
        if kind == "CLIPModel":
            vectors = ours(pictures, tokens)
            return theirs(pixel_values=pictures, input_ids=tokens).logits_per_image, vectors[:, 0] @ vectors[:, 1].T
        return theirs(pixel_values=pictures, input_ids=tokens).logits, ours(pictures, tokens)
    return theirs(pictures).logits, ours(pictures)


@torch.no_grad()
@pytest.mark.parametrize("kind", FOLDERS)
def test_transformers_folders_round_trip(kind, tmp_path):
    name, shape, understood = FOLDERS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    theirs = settled(cls(cls.config_class(**shape)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs")
    assert {key: getattr(ours.config, key) for key in understood} == understood and not ours.training
    want, got = answers(theirs, ours)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    back = cls.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(answers(back, ours)[0], want)
    assert all(torch.equal(x, back.state_dict()[key]) for key, x in theirs.state_dict().items())
    assert fieldguide.load(tmp_path / "ours").config == ours.config


def test_missing_keys_have_the_defaults_of_transformers():
    """Keys that transformers omits have its default values."""
    card = cards()["convnext"]
    written = config_mapping.to_public_config(card, card.configs["huggingface"], create("convnext-test").config)
    assert written.pop("layer_norm_eps") == 1e-6 and written.pop("drop_path_rate") == 0
    card, _, table = config_mapping.identify_config(written)
    assert (
        config_mapping.to_config_fields(card, table, written, "here")["eps"]
        == transformers.ConvNextConfig().layer_norm_eps
        == 1e-12
    )


REFUSED = {  # by which they are other networks
    "resnet": {"downsample_in_bottleneck": True},
    "convnext": {"hidden_act": "relu"},
    "efficientnet": {"squeeze_expansion_ratio": 0.5},
    "dinov2": {"mlp_ratio": 3},
    "vilt": {"max_image_length": 4},
    "clip": {"vision_config": {**TOWERS["vision_config"], "hidden_act": "quick_gelu"}},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_configurations_of_other_networks_are_rejected(kind, tmp_path):
    name, shape, _ = FOLDERS[kind]
    cls = getattr(transformers, name)
    cls(cls.config_class(**{**shape, **REFUSED[kind]})).save_pretrained(tmp_path)
    key = "hidden_act" if kind == "clip" else next(iter(REFUSED[kind]))
    with pytest.raises(WeightsError, match=f"that differs from.*\n.*{key}"):
        fieldguide.load(tmp_path)


@torch.no_grad()
def test_old_clip_configurations_use_the_largest_token_as_end(tmp_path):
    theirs = settled(transformers.CLIPModel(transformers.CLIPConfig(**TOWERS)))
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, theirs = fieldguide.load(tmp_path), transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert ours.config.end == 29
    want, got = answers(theirs, ours)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- diffusers


def unet(**changes) -> nn.Module:
    from tv import diffusers

    torch.manual_seed(0)
    return settled(
        diffusers.UNet2DModel(
            **{
                "sample_size": 8,
                "in_channels": 2,
                "out_channels": 2,
                "layers_per_block": 1,
                "block_out_channels": (8, 16),
                "attention_head_dim": None,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "norm_num_groups": 4,
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "norm_eps": 1e-6,
                "num_class_embeds": 4,
                **changes,
            }
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("labels", [None, 4])
def test_diffusers_folders_round_trip(labels, tmp_path):
    from tv import diffusers

    theirs = unet(num_class_embeds=labels)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs")
    assert (ours.config.attend, ours.config.num_classes, ours.config.growth) == ((4,), labels - 1 if labels else 0, (1, 2))
    x, time, label = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 2]) if labels else None
    want = theirs(x, time, label).sample
    torch.testing.assert_close(ours(x, time, label), want, rtol=1e-4, atol=1e-4)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(x, time, label).sample, want)


@torch.no_grad()
def test_diffusers_folders_of_2022(tmp_path):
    """As google/ddpm-cifar10-32: old names in one .bin file, and an incomplete configuration."""
    theirs = unet(num_class_embeds=None)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, was in old.items():
            name = name.replace(new, was)
        state[name] = tensor
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    said = json.loads((tmp_path / "config.json").read_text())
    for key in ("dropout", "add_attention", "num_class_embeds", "class_embed_type", "attn_norm_num_groups"):
        said.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, x, time = fieldguide.load(tmp_path), torch.randn(2, 2, 8, 8), torch.tensor([3.0, 700.0])
    torch.testing.assert_close(ours(x, time), theirs(x, time).sample, rtol=1e-4, atol=1e-4)
    for key in ("norm_eps", "freq_shift", "flip_sin_to_cos", "downsample_padding", "attention_head_dim"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != key}))
        with pytest.raises(WeightsError, match=f"that differs from.*\n  {key}="):  # there, the default is another
            fieldguide.load(tmp_path)


# ---------------------------------------------------------------------------------------------- timm


def folder(model: nn.Module, name: str, path, **args) -> None:
    """Write the files of timm's `save_for_hf`, without importing the hub."""
    cfg = {"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "num_classes": 5}
    path.mkdir()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    (path / "config.json").write_text(
        json.dumps(
            {
                "architecture": name,
                "num_classes": 5,
                "num_features": 9,
                "global_pool": "avg",
                "pretrained_cfg": cfg,
                **({"model_args": args} if args else {}),
            }
        )
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "name, size, fields",
    [
        ("resnet18", "resnet18", {"num_classes": 5}),
        ("mobilenetv3_small_100", "mobilenetv3-small", {"eps": 1e-5, "padding": "symmetric", "blocks": SMALL}),
        ("tf_mobilenetv3_small_100", "mobilenetv3-small", {"eps": 1e-3, "padding": "same"}),
        ("mobilenetv4_conv_small_050", "mobilenetv4-conv-small-050", {"width": 0.5, "stem": 32}),
        ("mobilenetv2_050", "mobilenetv2-050", {"width": 0.5}),
        ("efficientnet_b0", "efficientnet-b0", {"eps": 1e-5, "padding": "symmetric"}),
        ("tf_efficientnet_b0", "tf-efficientnet-b0", {"eps": 1e-3, "padding": "same"}),
        ("convnextv2_atto", "convnextv2-atto", {"eps": 1e-6}),
        ("vit_tiny_patch16_224", "vit-ti16", {"eps": 1e-6}),
    ],
)
def test_timm_repositories(name, size, fields, tmp_path):
    """Models with equal shapes compute differently, and are distinguished by name."""
    torch.manual_seed(0)
    theirs = settled(timm.create_model(name, num_classes=5))
    folder(theirs, name, tmp_path / "there")
    found = load.inspect_checkpoint(tmp_path / "there")
    assert found.card is find(size)[0] and found.preprocessing_defaults()["pixels"] == "0.5,0.5,0.5/0.25,0.25,0.25"
    ours, x = fieldguide.load(tmp_path / "there"), torch.randn(2, 3, *(2 * ([224] if "vit" in name else [64])))
    assert {key: getattr(ours.config, key) for key in fields} == fields and ours.config.num_classes == 5
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_unsupported_timm_names_are_rejected(tmp_path):
    """Equal tensors, another network: anti-aliased convolutions have no weights of their own."""
    theirs = timm.create_model("resnetblur18", num_classes=5)
    assert theirs.state_dict().keys() == timm.create_model("resnet18", num_classes=5).state_dict().keys()
    folder(theirs, "resnetblur18", tmp_path / "blur")
    with pytest.raises(WeightsError, match=r"timm model resnetblur18, which is not supported.*resnet18"):
        fieldguide.load(tmp_path / "blur")
    folder(theirs, "resnet18", tmp_path / "odd", num_classes=5, output_stride=8)
    with pytest.raises(WeightsError, match=r"model_args\.output_stride=8 is not supported for resnet18"):
        fieldguide.load(tmp_path / "odd")


@pytest.mark.slow
def test_tensorflow_weights_need_a_name(tmp_path):
    theirs = timm.create_model("tf_efficientnet_b0", num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "alone.pth")
    with pytest.raises(WeightsError, match=r"could be .*efficientnet-b0.*Specify one"):
        fieldguide.load(tmp_path / "alone.pth")


ALIASES = [(card.name, theirs) for card in cards().values() for theirs in card.aliases.get("timm", {})]
QUICK = {
    "resnet34",
    "convnext_tiny",
    "efficientnet_b5",
    "tf_efficientnet_b2",
    "vgg11_bn",
    "mobilenetv3_large_100",
    "tf_mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "vit_small_patch16_384",
    "swin_tiny_patch4_window7_224",
    "tf_efficientnetv2_s",
}


@pytest.mark.parametrize(
    "name, theirs", [pytest.param(*row, marks=() if row[1] in QUICK else pytest.mark.slow) for row in ALIASES]
)
def test_timm_names_match_their_sizes(name, theirs):
    """Every shape, stride, padding and epsilon of timm's network of that name."""
    card, meant = cards()[name], cards()[name].aliases["timm"][theirs]
    size, changes = (meant, {}) if isinstance(meant, str) else meant
    with torch.device("meta"):
        peer = timm.create_model(theirs)
        ours = create(size, **changes, **({} if peer.num_classes else {"output_type": "vector"}))  # some have no head
    table = card.weights.get("timm", card.weights.get("torchvision"))
    table = table(ours.config) if callable(table) else table
    own, renamed = ours.state_dict(), weights.map_to_ours(peer.state_dict(), table).state
    if hasattr(ours, "resize_weight"):  # places of a class token that has none there
        renamed |= {
            key: fitted
            for key, x in renamed.items()
            if x.shape != own[key].shape and (fitted := ours.resize_weight(key, x)) is not None
        }
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in own.items()}

    def norms(model: nn.Module) -> list:
        return sorted(m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))

    def shrinks(model: nn.Module) -> list:
        """Return kernel and padding type of the layers that downsample."""
        return sorted(
            (m.kernel_size, m.stride, "Same" in type(m).__name__, m.groups > 1)
            for m in model.modules()
            if isinstance(m, nn.Conv2d) and m.stride != (1, 1)
        )

    assert norms(ours) == norms(peer) and shrinks(ours) == shrinks(peer)
