"""ResNet against torchvision, timm and transformers: their files load, outputs are equal, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fieldguide.checkpoints import weights
from fieldguide.models.registry import create
from tv import timm, torchvision, transformers

DEPTHS, CLASSES = (1, 2, 1, 1), 5


def torchvision_resnet(block: str) -> tuple[nn.Module, dict]:
    """Build a ResNet of torchvision, whose level widths are fixed."""
    resnet = torchvision.models.resnet
    kind = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[block]
    return resnet.ResNet(kind, list(DEPTHS), CLASSES), {"widths": (64, 128, 256, 512)}


def timm_resnet(block: str) -> tuple[nn.Module, dict]:
    """Build a ResNet of timm, whose stem width is fixed."""
    resnet, widths = timm.models.resnet, (64, 8, 12, 16)
    kind = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[block]
    return resnet.ResNet(kind, DEPTHS, CLASSES, channels=widths), {"widths": widths}


def huggingface_resnet(block: str) -> tuple[nn.Module, dict]:
    widths = (8, 12, 16, 20)
    growth = 4 if block == "bottleneck" else 1
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[growth * w for w in widths], depths=list(DEPTHS), layer_type=block, num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config), {"widths": widths}


LIBRARIES = {"torchvision": torchvision_resnet, "timm": timm_resnet, "huggingface": huggingface_resnet}
EACH = pytest.mark.parametrize("library", list(LIBRARIES))


def origin(library: str) -> str:
    return "torchvision" if library == "timm" else library  # timm kept torchvision's names


def pair(library: str, block: str) -> tuple[nn.Module, nn.Module]:
    """Return their network with random weights and statistics, and ours."""
    torch.manual_seed(0)
    theirs, settings = LIBRARIES[library](block)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    ours = create("resnet50", block=block, depths=DEPTHS, num_classes=CLASSES, **settings)
    return theirs.eval(), ours.eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(x)
    return getattr(output, "logits", output)


def write(theirs: nn.Module, library: str, kind: str, folder) -> object:
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
        state = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    "library, kind, block",
    [
        ("torchvision", "pth", "bottleneck"),
        ("torchvision", "safetensors", "basic"),
        ("timm", "pth", "bottleneck"),
        ("timm", "safetensors", "basic"),
        ("timm", "ckpt", "basic"),
        ("huggingface", "pth", "bottleneck"),
        ("huggingface", "folder", "basic"),
        ("huggingface", "folder", "bottleneck"),
    ],
)
def test_files_are_read_bit_exact(library, kind, block, tmp_path):
    """The same operations on the same layout give equal outputs."""
    theirs, ours = pair(library, block)
    x = torch.randn(2, 3, 48, 48)
    assert not torch.equal(logits(ours, x), logits(theirs, x))
    assert weights.load(ours, write(theirs, library, kind, tmp_path)) == []
    assert torch.equal(logits(ours, x), logits(theirs, x))


@EACH
def test_gradients_equal(library):
    theirs, ours = pair(library, "basic" if library == "torchvision" else "bottleneck")
    weights.load(ours, theirs.state_dict(), origin=origin(library))
    ours, theirs = ours.double().train(), theirs.double().train()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    weighting = torch.randn(2, CLASSES, dtype=torch.float64)
    for model in (ours, theirs):
        output = model(x)
        (getattr(output, "logits", output) * weighting).sum().backward()
    grads = weights.translate(
        {name: p.grad for name, p in theirs.named_parameters()}, weights.get_tables(ours)[origin(library)]
    )
    for name, parameter in ours.named_parameters():
        scale = grads[name].abs().max().clamp(min=1)
        torch.testing.assert_close(parameter.grad / scale, grads[name] / scale, rtol=1e-9, atol=1e-11)


@EACH
def test_written_files_are_read_by_the_reference(library, tmp_path):
    theirs, ours = pair(library, "basic")
    weights.save(ours, tmp_path / "model.safetensors", format=origin(library))
    theirs.load_state_dict(weights.read(tmp_path / "model.safetensors"), strict=True)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(logits(ours, x), logits(theirs, x))


def test_channels_last_is_close():
    """Another memory layout uses other kernels with another order of summation. The layout is kept."""
    theirs, ours = pair("timm", "bottleneck")
    weights.load(ours, theirs.state_dict())
    x = torch.randn(2, 3, 48, 48)
    plain = logits(ours, x)
    ours = ours.to(memory_format=torch.channels_last)
    levels = ours.features(x.to(memory_format=torch.channels_last))
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels.values())
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(logits(ours, x), plain, rtol=1e-4, atol=1e-5)


def test_small_stem_equals_torchvision_without_stem():
    torch.manual_seed(0)
    theirs, settings = torchvision_resnet("basic")
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours = create("resnet18", depths=DEPTHS, num_classes=CLASSES, stem="3x3", **settings).eval()
    weights.load(ours, theirs.state_dict())
    x = torch.randn(2, 3, 20, 20)
    assert torch.equal(logits(ours, x), logits(theirs.eval(), x))


@pytest.mark.parametrize("block, growth", [("basic", 1), ("bottleneck", 4)])
@pytest.mark.parametrize("stem, first", [("7x7-pool", 4), ("3x3", 1)])
def test_levels(block, growth, stem, first):
    model = create("resnet18", block=block, depths=(1, 1, 1, 1), widths=(8, 12, 16, 20), stem=stem)
    levels = model.features(torch.randn(1, 3, 64, 96))
    assert model.levels == {f"c{i + 2}": (growth * width, first * 2**i) for i, width in enumerate((8, 12, 16, 20))}
    assert {name: tuple(level.shape[1:]) for name, level in levels.items()} == {
        name: (dim, 64 // stride, 96 // stride) for name, (dim, stride) in model.levels.items()
    }


def test_blocks_start_as_the_identity():
    model = create("resnet-test").eval()
    block = model.stages[1][1]  # without a projection
    x = torch.rand(1, 64, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("name, parameters", [("resnet18", 11_689_512), ("resnet152", 60_192_808)])
def test_parameter_counts_equal_torchvision(name, parameters):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
        ours = create(name)
    assert [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)] == [parameters] * 2
    renamed = weights.translate(theirs.state_dict(), weights.get_tables(ours)["torchvision"])
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in ours.state_dict().items()}
