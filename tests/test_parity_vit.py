"""ViT and DeiT against timm, torchvision and transformers: files in and out, other image sizes, other eps."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.registry import cards, create
from test_models import tiny
from tv import timm, torchvision, transformers

CLASSES, SIDE, PATCH, DIM, DEPTH, HEADS = 5, 12, 4, 16, 5, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def timm_vit(side: int = SIDE, **more) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=side, patch_size=PATCH, num_classes=CLASSES, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **more
    )


def timm_deit(side: int = SIDE, **more) -> nn.Module:
    return timm.models.deit.VisionTransformerDistilled(
        img_size=side, patch_size=PATCH, num_classes=CLASSES, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **more
    )


def torchvision_vit(side: int = SIDE) -> nn.Module:
    return torchvision.models.VisionTransformer(side, PATCH, DEPTH, HEADS, DIM, 4 * DIM, num_classes=CLASSES)


def settings(side: int = SIDE, **more) -> dict:
    return {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * DIM,
        "image_size": side,
        "patch_size": PATCH,
        "num_labels": CLASSES,
        **more,
    }


def huggingface_vit(side: int = SIDE) -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**settings(side)))


def huggingface_deit(side: int = SIDE) -> nn.Module:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**settings(side)))


THEIRS = {
    "vit timm": timm_vit,
    "vit torchvision": torchvision_vit,
    "vit huggingface": huggingface_vit,
    "deit timm": timm_deit,
    "deit huggingface": huggingface_deit,
}
EACH = pytest.mark.parametrize("kind", list(THEIRS))


def ours(kind: str, side: int = SIDE, **more) -> nn.Module:
    """Build our network for a peer; transformers uses another eps."""
    name, origin = kind.split()
    eps = 1e-12 if origin == "huggingface" else 1e-6
    return create(
        f"{name}-test",
        channels=3,
        image=side,
        patch=PATCH,
        dim=DIM,
        depth=DEPTH,
        heads=HEADS,
        num_classes=CLASSES,
        **{"eps": eps, **more},
    ).eval()


def random(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def logits(model: nn.Module, x: Tensor, **more) -> Tensor:
    with torch.no_grad():
        found = model(x, **more)
    return getattr(found, "logits", found)


def write(model: nn.Module, folder) -> object:
    """Write a checkpoint in the format of its library."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return folder / "model.pth"


@EACH
def test_reference_files_are_read(kind, tmp_path):
    theirs, mine = random(THEIRS[kind]()), random(ours(kind), 1)
    x = torch.randn(3, 3, SIDE, SIDE)
    assert weights.load(mine, write(theirs, tmp_path)) == []
    found, want = logits(mine, x), logits(theirs, x)
    assert found.shape == (3, CLASSES) and want.std() > 0.1
    torch.testing.assert_close(found, want, **CLOSE)


@EACH
def test_written_files_are_read_by_the_reference(kind, tmp_path):
    """By the library's own loader, every tensor bit-exact."""
    origin = kind.split()[1]
    theirs, mine = random(THEIRS[kind]()), ours(kind)
    weights.load(mine, write(theirs, tmp_path))
    folder = tmp_path / "back"
    weights.save(mine, folder / "model.safetensors", format=origin)
    if origin == "huggingface":
        theirs.config.save_pretrained(folder)
        other = type(theirs).from_pretrained(folder)
    else:
        other = THEIRS[kind]()
        other.load_state_dict(weights.read(folder / "model.safetensors"), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "size, origin, build",
    [
        ("vit-b16", "timm", lambda: timm.create_model("vit_base_patch16_224")),
        ("deit-base", "timm", lambda: timm.create_model("deit_base_distilled_patch16_224")),
        ("vit-b16", "torchvision", lambda: torchvision.models.vit_b_16()),
        (
            "vit-b16",
            "huggingface",
            lambda: on_disk(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))),
        ),
        (
            "deit-base",
            "huggingface",
            lambda: on_disk(transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(num_labels=1000))),
        ),
    ],
)
def test_published_sizes_have_their_names_and_shapes(size, origin, build):
    with torch.device("meta"):
        theirs, mine = build(), create(size)
        renamed = weights.translate(mine.state_dict(), weights.get_tables(mine)[origin], reverse=True)
    theirs = theirs if isinstance(theirs, dict) else theirs.state_dict()
    assert {k: x.shape for k, x in renamed.items()} == {k: x.shape for k, x in theirs.items()}


def test_transformers_backbone_without_a_head(tmp_path):
    """As google/vit-base-patch16-224-in21k: other names, a pooling layer, no head."""
    theirs, mine = random(transformers.ViTModel(transformers.ViTConfig(**settings()))), random(ours("vit huggingface"), 1)
    head = mine.head.weight.clone()
    with pytest.raises(WeightsError, match='head="skip"'):
        weights.load(mine, write(theirs, tmp_path))
    assert weights.load(mine, write(theirs, tmp_path), head="skip") == ["head.weight", "head.bias"]
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(mine.prefix_features(x)[:, 0], theirs(x).last_hidden_state[:, 0], **CLOSE)
    assert torch.equal(mine.head.weight, head)


@pytest.mark.parametrize("kind", ["vit huggingface", "deit huggingface"])
def test_eps_is_read_from_each_origin(kind, tmp_path):
    """On nearly constant patches eps matters. A folder of transformers states it or uses its default; a single file has
    that of timm and the authors.
    """
    theirs, x = random(THEIRS[kind]()), 1e-6 * torch.randn(2, 3, SIDE, SIDE)
    embeddings = next(theirs.children()).embeddings
    with torch.no_grad():
        for name, parameter in embeddings.named_parameters():
            parameter.mul_(1 if name.endswith("projection.weight") else 1e-4)
    theirs.save_pretrained(tmp_path)
    mine = fieldguide.load(tmp_path)
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "layer_norm_eps"}))
    assert mine.config.eps == fieldguide.load(tmp_path).config.eps == 1e-12
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    other = fieldguide.load(tmp_path)
    assert other.config.eps == 1e-6 and (logits(other, x) - logits(theirs, x)).abs().max() > 1e-2
    assert create("vit-test").config.eps == create("deit-test").config.eps == 1e-6
    fieldguide.save(mine, tmp_path / "back", "hf")
    back = type(theirs).from_pretrained(tmp_path / "back").eval()
    assert torch.equal(logits(back, x), logits(theirs, x))


def on_disk(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors under the names on disk."""
    return transformers.core_model_loading.revert_weight_conversion(model, model.state_dict())


@pytest.mark.parametrize("kind", ["vit timm", "deit timm"])
@pytest.mark.parametrize("size", [(20, 20), (8, 8), (8, 24), (18, 13)], ids=str)
def test_other_image_sizes_equal_timm(kind, size):
    """Position embeddings are interpolated as in timm, and incomplete patches are padded."""
    theirs = random(THEIRS[kind](dynamic_img_size=True, dynamic_img_pad=True))
    mine = ours(kind)
    weights.load(mine, theirs.state_dict(), origin="timm")
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)


@pytest.mark.parametrize("kind", ["vit timm", "deit timm"])
@pytest.mark.parametrize("side", [20, 8])
def test_position_embeddings_are_interpolated_when_loaded(kind, side):
    theirs = random(THEIRS[kind](dynamic_img_size=True))
    mine, first = ours(kind, side), kind == "deit timm"
    assert weights.load(mine, theirs.state_dict()) == []
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)
    assert torch.equal(mine.pos.weight[: 1 + first], theirs.pos_embed[0, : 1 + first])  # tokens before patches keep theirs
    resampled = timm.layers.resample_abs_pos_embed(theirs.pos_embed, [side // PATCH] * 2, num_prefix_tokens=1 + first)
    torch.testing.assert_close(mine.pos.weight, resampled[0], **CLOSE)


def test_incompatible_position_embeddings_are_rejected():
    mine = ours("vit timm")
    for rows, dim in ((1, 16), (12, 16), (10, 8)):  # no patch, no square, another width
        state = {**mine.state_dict(), "pos.weight": torch.zeros(rows, dim)}
        with pytest.raises(WeightsError, match=r"pos\.weight"):
            weights.load(mine, state)
    assert mine.pos.weight.any()


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_features_equal_timm(name):
    theirs = random(THEIRS[f"{name} timm"](side=12))
    mine = ours(f"{name} timm")
    weights.load(mine, theirs.state_dict())
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        levels = mine.features(x)
        want = theirs.forward_intermediates(x, indices=[0, 1, 2, 4], intermediates_only=True)
    assert list(levels) == list(mine.levels) == ["b1", "b2", "b3", "b5"]
    for (key, found), one in zip(levels.items(), want, strict=True):
        assert mine.levels[key] == (DIM, PATCH) and found.shape == (2, DIM, 3, 3)
        torch.testing.assert_close(found, one, **CLOSE)
    with torch.device("meta"):
        assert list(create("vit-b16").levels) == ["b3", "b6", "b9", "b12"]
        assert create("vit-l16").levels == dict.fromkeys(["b6", "b12", "b18", "b24"], (1024, 16))


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_stochastic_layers_only_in_training(name):
    """Dropout and stochastic depth vary in training and are off in evaluation."""
    x = torch.randn(8, 2, 12, 12)
    for change in ({"dropout": 0.5}, {"drop_path": 0.5}):
        model = random(create(f"{name}-test", **change))
        plain = create(f"{name}-test").eval()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(logits(model, x), logits(model, x)) and torch.equal(logits(model, x), logits(plain, x))
        model.train()
        assert not torch.equal(logits(model, x), logits(model, x))
    rates = [block.drop_path.p for block in create(f"{name}-test", drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


@torch.no_grad()
def test_deit_heads():
    """Two outputs in training, their mean in evaluation; each head reads its own token."""
    theirs, mine = random(timm_deit()), ours("deit timm")
    theirs.set_distilled_training()
    weights.load(mine, theirs.state_dict())
    x = torch.randn(4, 3, SIDE, SIDE)
    both = mine.train()(x)
    for i, want in enumerate(theirs.train()(x)):
        torch.testing.assert_close(both[:, i], want, **CLOSE)
    torch.testing.assert_close(mine.eval()(x), both.mean(1), **CLOSE)
    other = mine.dist.clone()
    mine.dist.copy_(torch.randn(DIM))
    assert not torch.allclose(mine.train()(x)[:, 1], both[:, 1], atol=1e-3)
    mine.dist.copy_(other)
    head = weights.load(
        mine,
        {
            **theirs.state_dict(),
            "head.weight": torch.zeros(7, DIM),
            "head.bias": torch.zeros(7),
            "head_dist.weight": torch.zeros(7, DIM),
            "head_dist.bias": torch.zeros(7),
        },
        head="skip",
    )
    assert head == ["head.weight", "head.bias"]  # both heads stay fresh


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_small_images_get_small_patches(name):
    adapt = cards()[name].adapt
    assert [adapt({"image": side}).get("patch") for side in (8, 16, 28, 32, 64, 96, 127, 128, 224)] == [
        2,
        2,
        4,
        4,
        8,
        8,
        16,
        None,
        None,
    ]


@pytest.mark.parametrize("size, std", [("vit-b16", 0.02), ("deit-base", 0.02), ("deit-tiny", 0.04)])
def test_initialization_follows_the_paper(size, std):
    """The standard deviation grows with the square root for narrower networks."""
    torch.manual_seed(0)
    model = create(size, depth=1)
    for weight in (model.head.weight, model.blocks[0].attn.qkv.weight, model.pos.weight, model.patch.weight):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert not model.blocks[0].mlp.up.bias.any() and model.cls.std().item() == pytest.approx(std, rel=0.2)


def test_indivisible_heads_are_rejected():
    with pytest.raises(SettingsError, match="heads=5"):
        create("vit-test", heads=5)


def test_half_precision_keeps_its_dtype():
    model = tiny("vit", torch.bfloat16)
    assert model(torch.randn(2, 2, 20, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
