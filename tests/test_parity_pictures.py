"""Convolutional networks against torchvision, timm and transformers: their files load, outputs are equal, and back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pictures
from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.convolutional.alexnet_2012 import response_norm
from fieldguide.models.layers.conv import SameConv2d
from fieldguide.models.layers.stochastic_depth import DropPath, stochastic_depth_rates
from fieldguide.models.registry import cards, create, find, names
from tv import timm, torchvision, transformers

SHORT = {"num_classes": 5}
SHAPES = {  # our small networks: size, what differs from it
    "alexnet": ("alexnet", {"widths": (8, 12, 16, 12, 8), "hidden": 16}),
    "vgg": ("vgg11", {"widths": (4, 6, 8, 10, 12), "hidden": 16}),
    "vgg-bn": ("vgg16-bn", {"widths": (4, 6, 8, 10, 12), "hidden": 16}),
    "efficientnet": ("efficientnet-b0", {"width": 0.1, "depth": 0.5}),
    "tf-efficientnet": ("tf-efficientnet-b0", {"width": 0.1, "depth": 0.5}),
    "efficientnet-lite": ("efficientnet-lite0", {"width": 0.1, "depth": 0.5, "stem": 8, "top": 40}),
    "tf-efficientnet-lite": ("tf-efficientnet-lite0", {"width": 0.1, "depth": 0.5, "stem": 8, "top": 40}),
    "efficientnetv2": ("efficientnetv2-s", {"widths": (8, 16, 16, 16, 24, 32), "depths": (2, 1, 2, 2, 1, 2), "top": 40}),
    "tf-efficientnetv2": (
        "tf-efficientnetv2-m",
        {"widths": (8, 16, 16, 16, 24, 24, 32), "depths": (1, 2, 2, 2, 1, 2, 1), "top": 40},
    ),
    "mobilenetv3-large": ("mobilenetv3-large", {}),
    "mobilenetv3-small": ("mobilenetv3-small", {}),
    "mobilenetv4": ("mobilenetv4-conv-small", {"width": 0.25, "hidden": 40}),
    "mobilenetv4-fused": ("mobilenetv4-conv-large", {"width": 0.125, "stem": 8, "hidden": 40}),
    "mobilenetv4-hybrid": ("mobilenetv4-hybrid-medium", {"width": 0.25, "hidden": 40}),
    "mobilenetv4-gelu": ("mobilenetv4-hybrid-large", {"width": 0.125, "stem": 8, "hidden": 40}),
    "convnext": ("convnext-tiny", {"depths": (1, 2, 1, 2), "widths": (8, 12, 16, 20)}),
    "convnextv2": ("convnextv2-atto", {"depths": (1, 2, 1, 2), "widths": (8, 12, 16, 20)}),
    "inception-v3": ("inception-v3", {"shrink": 16, "early": (1, 2, 2)}),
    "convnextv2-wide": ("convnextv2-tiny", {"depths": (1, 1, 1, 1), "widths": (96, 8, 8, 8)}),
}
LIBRARIES = [  # network, origin, their network, how its file comes
    ("alexnet", "torchvision", pictures.torchvision_alexnet, "pth"),
    ("vgg", "torchvision", pictures.torchvision_vgg, "pth"),
    ("vgg-bn", "torchvision", pictures.torchvision_vgg, "ckpt"),
    ("vgg", "timm", pictures.timm_vgg, "pth"),
    ("vgg-bn", "timm", pictures.timm_vgg, "safetensors"),
    ("efficientnet", "torchvision", pictures.torchvision_efficientnet, "pth"),
    ("efficientnet", "timm", pictures.timm_efficientnet, "safetensors"),
    ("tf-efficientnet", "timm", pictures.timm_efficientnet, "pth"),
    ("tf-efficientnet", "huggingface", pictures.huggingface_efficientnet, "folder"),
    ("efficientnet-lite", "timm", pictures.timm_efficientnet_lite, "safetensors"),
    ("tf-efficientnet-lite", "timm", pictures.timm_efficientnet_lite, "pth"),
    ("efficientnetv2", "torchvision", pictures.torchvision_efficientnet_v2, "pth"),
    ("efficientnetv2", "timm", pictures.timm_efficientnet_v2, "safetensors"),
    ("tf-efficientnetv2", "timm", pictures.timm_efficientnet_v2, "pth"),
    ("inception-v3", "torchvision", pictures.torchvision_inception_v3, "pth"),
    ("mobilenetv3-large", "torchvision", pictures.torchvision_mobilenet_v3, "pth"),
    ("mobilenetv3-small", "torchvision", pictures.torchvision_mobilenet_v3, "safetensors"),
    ("mobilenetv3-large", "timm", pictures.timm_mobilenet_v3, "pth"),
    ("mobilenetv3-small", "timm", pictures.timm_mobilenet_v3, "ckpt"),
    ("mobilenetv4", "timm", pictures.timm_mobilenet_v4, "pth"),
    ("mobilenetv4-fused", "timm", pictures.timm_mobilenet_v4, "safetensors"),
    ("mobilenetv4-hybrid", "timm", pictures.timm_mobilenet_v4, "pth"),
    ("mobilenetv4-gelu", "timm", pictures.timm_mobilenet_v4, "safetensors"),
    ("convnext", "timm", pictures.timm_convnext, "safetensors"),
    ("convnext", "torchvision", pictures.torchvision_convnext, "pth"),
    ("convnext", "huggingface", pictures.huggingface_convnext, "folder"),
    ("convnextv2", "timm", pictures.timm_convnext, "pth"),
    ("convnextv2-wide", "timm", pictures.timm_convnext, "safetensors"),
    ("convnextv2", "huggingface", pictures.huggingface_convnext, "folder"),
]
EACH = pytest.mark.parametrize("name, origin, build, kind", LIBRARIES, ids=[f"{row[0]}-{row[1]}" for row in LIBRARIES])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ours(name: str, **changes) -> nn.Module:
    size, values = SHAPES[name]
    return create(size, **SHORT | values | changes).eval()


def shaken(model: nn.Module) -> nn.Module:
    """Return random weights and statistics, so that no error is hidden by zeros or ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.shape[0] > 1:
                parameter.normal_(0, 1.4 / math.prod(parameter.shape[1:]) ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return getattr(output, "logits", output)


def write(theirs: nn.Module, kind: str, folder):
    """Write a checkpoint in a usual format."""
    if kind == "folder":
        theirs.save_pretrained(folder)
        return folder
    path = folder / f"model.{kind}"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), path)
    elif kind == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, path)
    return path


@EACH
def test_files_round_trip(name, origin, build, kind, tmp_path):
    torch.manual_seed(0)
    mine, x = ours(name), torch.randn(2, 3, 64, 64)
    theirs = shaken(build(mine))
    want = logits(theirs, x)
    assert not torch.allclose(logits(mine, x), want, rtol=1e-2)
    assert weights.load(mine, write(theirs, kind, tmp_path)) == []
    assert weights._recognize(mine, weights.read(write(theirs, kind, tmp_path)), None)[0] == origin
    torch.testing.assert_close(logits(mine, x), want, rtol=1e-4, atol=1e-5)
    # The way back, into a network that holds other numbers.
    weights.save(mine, tmp_path / "back.safetensors", format=origin)
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    shaken(theirs)
    state = weights.read(tmp_path / "back.safetensors")
    if kind == "folder":
        theirs = type(theirs).from_pretrained(None, config=theirs.config, state_dict=state).eval()
    else:
        theirs.load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in theirs.state_dict().items())
    assert torch.equal(logits(theirs, x), want)


@pytest.mark.parametrize("name", ["convnext", "convnextv2"])
def test_author_names_equal_timms_conversion(name, tmp_path):
    """timm has a function that converts the authors' files."""
    torch.manual_seed(0)
    mine, x = shaken(ours(name)), torch.randn(2, 3, 64, 64)
    weights.save(mine, tmp_path / "theirs.safetensors", format="authors")
    state = weights.read(tmp_path / "theirs.safetensors")
    theirs = pictures.timm_convnext(mine).eval()
    theirs.load_state_dict(timm.models.convnext.checkpoint_filter_fn({"model": state}, theirs), strict=True)
    torch.testing.assert_close(logits(theirs, x), logits(mine, x), rtol=1e-4, atol=1e-5)
    again = ours(name)
    torch.save({"model": state}, tmp_path / "theirs.pth")
    assert weights.load(again, tmp_path / "theirs.pth") == []
    assert torch.equal(logits(again, x), logits(mine, x))


@pytest.mark.parametrize(
    "name, build",
    [
        (name, build)
        for name, origin, build, _ in LIBRARIES
        if name in ("efficientnet", "tf-efficientnetv2", "mobilenetv3-small", "mobilenetv4", "convnext")
    ],
)
def test_training_equals_the_reference(name, build):
    """Gradients and batch statistics, in addition to tests/test_models.py, for classes of the library itself."""
    torch.manual_seed(0)
    mine = ours(
        name,
        **{key: 0.0 for key in ("dropout", "drop_path") if key in find(SHAPES[name][0])[0].config.__dataclass_fields__},
    )
    theirs = shaken(build(mine)).double().train()
    table = next(
        table for table in weights.get_tables(mine).values() if not weights.map_to_ours(theirs.state_dict(), table).unknown
    )
    mine = mine.double().train()
    weights.load(mine, theirs.state_dict())
    x, weighting = torch.randn(3, 3, 40, 40, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for model in (mine, theirs):
        output = model(x)
        (getattr(output, "logits", output) * weighting).sum().backward()
    grads = weights.translate({name: p.grad for name, p in theirs.named_parameters()}, table)
    for key, parameter in mine.named_parameters():
        scale = grads[key].abs().max().clamp(min=1)
        torch.testing.assert_close(parameter.grad / scale, grads[key] / scale, rtol=1e-8, atol=1e-10)
    renamed = weights.translate(theirs.state_dict(), table)
    assert all(torch.allclose(tensor, renamed[key], rtol=1e-10) for key, tensor in mine.state_dict().items())


# ---------------------------------------------------------------------------------------------- published sizes

THEIR_NAMES = {
    **{f"tf-efficientnet-b{i}": (timm, f"tf_efficientnet_b{i}") for i in range(8)},
    **{f"efficientnet-b{i}": (torchvision, f"efficientnet_b{i}") for i in range(8)},
    **{f"tf-efficientnet-lite{i}": (timm, f"tf_efficientnet_lite{i}") for i in range(5)},
    **{f"efficientnet-lite{i}": (timm, f"efficientnet_lite{i}") for i in range(5)},
    **{f"efficientnetv2-{s}": (torchvision, f"efficientnet_v2_{s}") for s in "sml"},
    **{f"tf-efficientnetv2-{s}": (timm, f"tf_efficientnetv2_{s}") for s in ("s", "m", "l", "xl")},
    **{f"convnext-{s}": (timm, f"convnext_{s}") for s in ("tiny", "small", "base", "large", "xlarge")},
    **{
        f"convnextv2-{s}": (timm, f"convnextv2_{s}") for s in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
    },
    **{
        f"mobilenetv4-conv-{s}": (timm, f"mobilenetv4_conv_{s.replace('-', '_')}")
        for s in ("small", "small-050", "medium", "large")
    },
    **{
        f"mobilenetv4-hybrid-{s}": (timm, f"mobilenetv4_hybrid_{s.replace('-', '_')}")
        for s in ("medium", "medium-075", "large", "large-075")
    },
    **{f"mobilenetv3-{s}": (torchvision, f"mobilenet_v3_{s}") for s in ("large", "small")},
    **{f"vgg{n}{bn}": (torchvision, f"vgg{n}{bn.replace('-', '_')}") for n in (11, 13, 16, 19) for bn in ("", "-bn")},
    "alexnet": (torchvision, "alexnet"),
    "inception-v3": (timm, "inception_v3"),
}
QUICK = (
    "efficientnet-b0",
    "tf-efficientnet-b3",
    "tf-efficientnet-lite2",
    "efficientnetv2-s",
    "tf-efficientnetv2-m",
    "convnext-small",
    "convnextv2-pico",
    "convnextv2-tiny",
    "mobilenetv3-large",
    "mobilenetv3-small",
    "mobilenetv4-conv-small-050",
    "mobilenetv4-conv-medium",
    "mobilenetv4-hybrid-medium",
    "vgg13-bn",
    "alexnet",
    "inception-v3",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in THEIR_NAMES])
def test_published_sizes_equal_the_reference_networks(name):
    """Names, shapes, epsilons, strides and drop rates of the library's network of that name."""
    library, theirs = THEIR_NAMES[name]
    with torch.device("meta"):
        theirs = timm.create_model(theirs) if library is timm else getattr(torchvision.models, theirs)()
        mine = create(name)
    table = weights.get_tables(mine)[library.__name__]
    renamed = weights.translate(theirs.state_dict(), table)
    assert {key: tensor.shape for key, tensor in renamed.items()} == {k: t.shape for k, t in mine.state_dict().items()}

    def norms(model: nn.Module) -> list:
        return sorted(m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))

    def convs(model: nn.Module) -> list:
        """Return the convolutions, without timm's dense layers in that form and without padding."""
        return sorted(
            (m.kernel_size, m.stride, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)
        )

    assert norms(mine) == norms(theirs) and convs(mine) == convs(theirs)
    if library is torchvision:
        drops = [m.p for m in theirs.modules() if type(m).__name__ == "StochasticDepth"]
        assert [m.p for m in mine.modules() if isinstance(m, DropPath)] == pytest.approx(drops) or not drops
        outer = {m.p for m in theirs.modules() if isinstance(m, nn.Dropout)}
        assert {m.p for m in mine.modules() if isinstance(m, nn.Dropout)} == outer


def test_every_published_size_is_compared():
    mine = {
        "alexnet",
        "vgg",
        "efficientnet",
        "efficientnet-lite",
        "efficientnetv2",
        "mobilenetv3",
        "mobilenetv4",
        "mobilenetv4-hybrid",
        "convnext",
        "convnextv2",
        "inception-v3",
    }
    sizes = {name for card in mine for name in names() if name in cards()[card].sizes}
    assert set(THEIR_NAMES) == sizes - {"inception-v3-fid"}  # which no library has


# ---------------------------------------------------------------------------------------------- pictures and levels


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"inception-v3"}))  # whose stem does not pad
@pytest.mark.parametrize("side", [32, 64, 96], ids=["adapted to 32", "adapted to 64", "as published"])
def test_levels_match_features(name, side):
    size, values = SHAPES[name]
    card = next(card for card in cards().values() if size in card.sizes)
    adapted = card.adapt({"image": side})
    assert bool(adapted) == (side <= 64)
    model = create(size, **SHORT | values | adapted).eval()
    x = torch.randn(2, 3, side, side)
    seen = model.features(x)
    assert list(seen) == list(model.levels) and list(seen)[-4:] == ["c2", "c3", "c4", "c5"]
    for level, (dim, stride) in model.levels.items():
        assert seen[level].shape[:2] == (2, dim)
        assert abs(seen[level].shape[2] - side / stride) <= 1  # AlexNet's poolings lose a row
    strides = [stride for _, stride in model.levels.values()]
    assert strides == sorted(strides) and (strides[-4:] == [4, 8, 16, 32] or side < 96)
    assert logits(model, x).shape == (2, 5)
    assert 2 <= seen["c5"].shape[2] <= 7


@pytest.mark.parametrize("name, least", [("alexnet", 63), ("vgg", 32), ("convnext", 32)])
def test_images_that_are_too_small_are_rejected(name, least):
    model = ours(name)
    assert logits(model, torch.randn(1, 3, least, least + 9)).isfinite().all()
    with pytest.raises(DataError, match=rf"{least - 1} x {least}.*at least {least} pixels"):
        model(torch.randn(1, 3, least - 1, least))


def test_alexnet_2012_names_its_image_size():
    with pytest.raises(SettingsError, match=r"image=60.*at least 63"):
        create("alexnet-2012", image=60, hidden=4)
    with pytest.raises(SettingsError, match=r"image=14.*at least 15"):
        create("alexnet-2012", image=14, stem="3x3", hidden=4)
    assert create("alexnet-2012", image=15, stem="3x3", hidden=4).fc1.in_features == 256
    with pytest.raises(DataError, match=r"20 x 24.*for 20 x 20"):
        create("alexnet-2012-test")(torch.randn(1, 3, 20, 24))
    with torch.device("meta"):
        assert create("alexnet-2012").features(torch.empty(1, 3, 224, 224))["c5"].shape == (1, 256, 6, 6)


# ---------------------------------------------------------------------------------------------- what the catalogue warns of


def test_response_norm_uses_the_sum():
    """torch divides alpha by the number of channels, the paper does not. Also with fewer channels than neighbors."""
    for maps in (3, 8):
        x = torch.randn(2, maps, 3, 3, dtype=torch.float64) * 30
        want = nn.functional.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
        torch.testing.assert_close(response_norm(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 2), (2, 2), (3, 3), (7, 4)])
def test_same_padding_equals_timm(kernel, stride):
    """For every remainder of the side; torch's own padding differs for even sides."""
    torch.manual_seed(0)
    mine = SameConv2d(4, 4, kernel, stride, groups=2)
    theirs = timm.layers.Conv2dSame(4, 4, kernel, stride, groups=2)
    theirs.load_state_dict(mine.state_dict())
    for side in range(8, 14):
        x = torch.randn(1, 4, side, side + 3)
        assert torch.equal(mine(x), theirs(x)) and mine(x).shape[2] == math.ceil(side / stride)


def test_padding_and_epsilon_matter():
    """Weights trained with one setting give other outputs with the other."""
    torch.manual_seed(0)
    mine, x = shaken(ours("efficientnet")), torch.randn(2, 3, 64, 64)
    answers = [logits(mine, x)]
    for changes in ({"padding": "same"}, {"eps": 1e-3}):
        other = ours("efficientnet", **changes)
        other.load_state_dict(mine.state_dict())
        answers.append(logits(other, x))
        assert not torch.allclose(answers[0], answers[-1], rtol=1e-5)
    assert {create_on_meta(f"{kind}efficientnet-b{i}") for kind in ("", "tf-") for i in (0, 5)} == {
        ("symmetric", 1e-5),
        ("symmetric", 1e-3),
        ("same", 1e-3),
    }


def create_on_meta(name: str) -> tuple[str, float]:
    with torch.device("meta"):
        model = create(name)
    return model.config.padding, model.stem.norm.eps


def test_huggingface_padding_assumes_even_sides():
    """transformers always pads at the end; TensorFlow and this library pad both sides of odd images."""
    torch.manual_seed(0)
    mine = ours("tf-efficientnet")
    theirs = shaken(pictures.huggingface_efficientnet(mine))
    weights.load(mine, theirs.state_dict())
    original = pictures.timm_efficientnet(mine).eval()
    original.load_state_dict(weights.translate(mine.state_dict(), weights.get_tables(mine)["timm"], reverse=True))
    x = torch.randn(2, 3, 65, 65)
    torch.testing.assert_close(logits(mine, x), logits(original, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(mine, x), logits(theirs, x), rtol=1e-2)


def test_timm_vgg_dense_layers_are_reshaped_correctly():
    """Its first dense layer is a 7x7 convolution, so a wrong reshaping shows on maps above one pixel."""
    torch.manual_seed(0)
    mine = shaken(ours("vgg", side=2))
    theirs = pictures.timm_vgg(mine).eval()
    theirs.load_state_dict(weights.translate(mine.state_dict(), weights.get_tables(mine)["timm"], reverse=True))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), rtol=1e-4, atol=1e-5)


def test_efficientnet_layer_counts_of_the_guide():
    """82 layers are the convolutions and the head of B0, including those of squeeze-and-excitation."""

    def layers(name: str, kinds: tuple = (nn.Conv2d, nn.Linear)) -> int:
        with torch.device("meta"):
            return sum(isinstance(module, kinds) for module in create(name).modules())

    assert layers("efficientnet-b0") == 82 and layers("efficientnet-b7") == 274
    assert layers("vgg16") == 16 and layers("vgg19") == 19 and layers("alexnet") == layers("alexnet-2012") == 8


# ---------------------------------------------------------------------------------------------- chance


def test_drop_path_drops_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.ones(4000, 2, 3)
    assert drop.eval()(x) is x and DropPath(0.0).train()(x) is x
    y = drop.train()(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))  # a row as a whole
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs(y.mean().item() - 1) < 0.05 and abs((y[:, 0, 0] == 0).float().mean().item() - 0.3) < 0.03
    assert drop(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(SettingsError, match=r"must be in \[0, 1\)"):
        DropPath(1.0)
    assert stochastic_depth_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3]) and stochastic_depth_rates(0.3, 1) == [0]


CHANCE = [
    (name, build)
    for name, origin, build, _ in LIBRARIES
    if origin == ("timm" if name.startswith(("tf", "convnextv2")) else "torchvision")
]


@pytest.mark.parametrize("name, build", CHANCE, ids=[name for name, _ in CHANCE])
def test_dropout_equals_the_reference_in_training(name, build):
    """Equal seeds give equal dropout and stochastic depth, at the same positions and in the same order."""
    torch.manual_seed(0)
    mine, x = ours(name), torch.randn(6, 3, 64, 64)
    theirs = shaken(build(mine))
    weights.load(mine, theirs.state_dict())
    assert torch.equal(logits(mine, x), logits(mine, x))
    answers = []
    for model, seed in ((mine, 1), (theirs, 1), (mine, 2)):
        torch.manual_seed(seed)
        answers.append(logits(model.train(), x))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(answers[0], answers[2], rtol=1e-2)


def test_alexnet_2012_dropout_after_hidden_layers():
    torch.manual_seed(0)
    model, x = shaken(create("alexnet-2012-test", dropout=0.5)), torch.randn(64, 3, 20, 20)
    seen = {}
    model.head.register_forward_pre_hook(lambda _, inputs: seen.update(last=inputs[0]))
    model.fc2.register_forward_pre_hook(lambda _, inputs: seen.update(first=inputs[0]))
    logits(model, x)
    quiet = dict(seen)
    logits(model.train(), x)
    for place in ("first", "last"):
        alive = quiet[place] > 0
        assert 0.4 < (seen[place][alive] == 0).float().mean() < 0.6 if place == "first" else (seen[place] == 0).any()
    kept = seen["first"] > 0
    torch.testing.assert_close(seen["first"][kept], 2 * quiet["first"][kept])


def test_stochastic_depth_rates_equal_the_papers():
    """EfficientNet's rates end just below the given rate, ConvNeXt's at it, as in timm."""
    for name, build in (
        ("efficientnet", pictures.timm_efficientnet),
        ("efficientnetv2", pictures.timm_efficientnet_v2),
        ("convnext", pictures.timm_convnext),
        ("convnextv2", pictures.timm_convnext),
    ):
        mine = ours(name, drop_path=0.5)
        chances = [m.p for m in mine.modules() if isinstance(m, DropPath)]
        theirs = [getattr(m, "drop_prob", 0.0) for key, m in build(mine).named_modules() if key.endswith("drop_path")]
        assert chances == pytest.approx(theirs) and chances[-1] > 0.4 and chances[0] == 0


def test_residual_branches_start_small():
    """ConvNeXt starts near the identity; the response normalization of V2 starts as the identity."""
    block = ours("convnext").stages[1][0]
    x = torch.randn(1, 12, 8, 8)
    assert 0 < (block(x) - x).abs().max() < 1e-5
    y = torch.randn(2, 3, 3, 48)
    assert torch.equal(ours("convnextv2").stages[1][0].response(y), y)


def test_global_response_norm_equals_the_equation():
    """Section 3 in float64, by positions and channels."""
    torch.manual_seed(0)
    layer = ours("convnextv2").stages[0][0].response.double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, 32, dtype=torch.float64) * torch.rand(32, dtype=torch.float64)
    length = torch.stack([(x[..., k] ** 2).sum((1, 2)).sqrt() for k in range(32)], -1)  # B D
    share = length / (sum(length[:, k] for k in range(32))[:, None] / 32 + 1e-6)
    want = layer.weight * (x * share[:, None, None]) + layer.bias + x
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_final_epsilon_of_transformers_differs():
    assert transformers.ConvNextConfig().layer_norm_eps == 1e-12 and ours("convnext").norm.eps == 1e-6
