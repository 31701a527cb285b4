"""DINOv2 against transformers, and against the authors' equations with the names of their files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.registry import cards, create
from test_models import tiny
from test_parity_vit import CLOSE, logits, on_disk, random
from tv import transformers

CLASSES, SIDE, PATCH, DIM, DEPTH, HEADS = 5, 12, 4, 16, 4, 2
KINDS = {"plain": (0, False), "gated": (0, True), "registers": (3, False), "gated registers": (3, True)}
EACH = pytest.mark.parametrize("kind", list(KINDS))


def ours(kind: str = "plain", **more) -> nn.Module:
    registers, gated = KINDS[kind]
    spread = {"antialias": bool(registers), "offset": 0.0}  # as transformers has it
    return create(
        "dinov2-test",
        **{
            "channels": 3,
            "image": SIDE,
            "patch": PATCH,
            "dim": DIM,
            "depth": DEPTH,
            "heads": HEADS,
            "num_classes": CLASSES,
            "registers": registers,
            "gated": gated,
            **spread,
            **more,
        },
    ).eval()


def huggingface(kind: str, model: str = "ForImageClassification", **more) -> nn.Module:
    registers, gated = KINDS[kind]
    config = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_labels": CLASSES,
        "use_swiglu_ffn": gated,
        **more,
    }
    if registers:
        config.setdefault("num_register_tokens", registers)
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    return getattr(transformers, name + model)(getattr(transformers, name + "Config")(**config))


class Official(nn.Module):
    """The authors' backbone and classifier, written from their description with the names of their files."""

    def __init__(self, registers: int, gated: bool, layers: int, antialias: bool, offset: float):
        super().__init__()
        self.layers, self.antialias, self.offset = layers, antialias, offset
        b = self.backbone = nn.Module()
        b.cls_token, b.mask_token = nn.Parameter(torch.zeros(1, 1, DIM)), nn.Parameter(torch.zeros(1, DIM))
        b.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIDE // PATCH) ** 2, DIM))
        if registers:
            b.register_tokens = nn.Parameter(torch.zeros(1, registers, DIM))
        b.patch_embed = nn.Module()
        b.patch_embed.proj = nn.Conv2d(3, DIM, PATCH, PATCH)
        b.norm, b.blocks = nn.LayerNorm(DIM, eps=1e-6), nn.ModuleList()
        for _ in range(DEPTH):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
            block.attn, block.mlp, block.ls1, block.ls2 = (nn.Module() for _ in range(4))
            block.attn.qkv, block.attn.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
            block.ls1.gamma, block.ls2.gamma = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))
            if gated:
                block.mlp.w12, block.mlp.w3 = nn.Linear(DIM, 96), nn.Linear(48, DIM)  # 2/3 of 64, up to 48
            else:
                block.mlp.fc1, block.mlp.fc2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)
            b.blocks.append(block)
        self.linear_head = nn.Linear((1 + layers) * DIM, CLASSES)

    def places(self, rows: int, columns: int) -> Tensor:
        table, side = self.backbone.pos_embed, SIDE // PATCH
        if (rows, columns) == (side, side):
            return table
        grid = table[:, 1:].reshape(1, side, side, DIM).permute(0, 3, 1, 2)
        how = (
            {"scale_factor": ((rows + self.offset) / side, (columns + self.offset) / side)}
            if self.offset
            else {"size": (rows, columns)}
        )
        grid = F.interpolate(grid, mode="bicubic", antialias=self.antialias, **how)
        assert grid.shape[2:] == (rows, columns)
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, DIM)], 1)

    def forward(self, image: Tensor) -> Tensor:
        b, extra = self.backbone, getattr(self.backbone, "register_tokens", None)
        patches = b.patch_embed.proj(image)
        rows, columns = patches.shape[2:]
        x = torch.cat([b.cls_token.expand(len(image), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        x = x + self.places(rows, columns)
        if extra is not None:
            x = torch.cat([x[:, :1], extra.expand(len(image), -1, -1), x[:, 1:]], 1)
        outputs = []
        for block in b.blocks:
            parts = block.attn.qkv(block.norm1(x)).split(DIM, -1)
            heads = []
            for h in range(HEADS):
                q, k, v = (part[..., h * DIM // HEADS : (h + 1) * DIM // HEADS] for part in parts)
                heads.append((q @ k.transpose(1, 2) / (DIM // HEADS) ** 0.5).softmax(-1) @ v)
            x = x + block.ls1.gamma * block.attn.proj(torch.cat(heads, -1))
            y = block.norm2(x)
            if hasattr(block.mlp, "w12"):
                y = block.mlp.w12(y)
                y = block.mlp.w3(y[..., :48] * torch.sigmoid(y[..., :48]) * y[..., 48:])
            else:
                y = block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
            x = x + block.ls2.gamma * y
            outputs.append(b.norm(x))
        first = 1 if extra is None else 1 + extra.shape[1]
        return self.linear_head(torch.cat([*(y[:, 0] for y in outputs[-self.layers :]), outputs[-1][:, first:].mean(1)], 1))


@EACH
def test_transformers_files_round_trip(kind, tmp_path):
    theirs, mine = random(huggingface(kind)), random(ours(kind), 1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert weights.load(mine, tmp_path / "theirs") == []
    x = torch.randn(3, 3, SIDE, SIDE)
    want = logits(theirs, x)
    assert want.std() > 0.1
    torch.testing.assert_close(logits(mine, x), want, **CLOSE)
    weights.save(mine, tmp_path / "back" / "model.safetensors", format="huggingface")
    theirs.config.save_pretrained(tmp_path / "back")
    other = type(theirs).from_pretrained(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), theirs.state_dict().values(), strict=True))


@EACH
@pytest.mark.parametrize("size", [(20, 20), (8, 8), (8, 24)], ids=str)
def test_other_image_sizes_equal_transformers(kind, size):
    """It antialiases only with registers, as the authors do; networks of another image size agree."""
    theirs, mine = random(huggingface(kind)), ours(kind)
    x = torch.randn(2, 3, *size)
    want = logits(theirs, x)
    weights.load(mine, on_disk(theirs))
    torch.testing.assert_close(logits(mine, x), want, **CLOSE)
    if size[0] == size[1]:
        other = ours(kind, image=size[0])
        weights.load(other, on_disk(theirs))
        torch.testing.assert_close(logits(other, x), want, **CLOSE)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("size", [(12, 12), (20, 20), (8, 24)], ids=str)
@EACH
def test_author_files_are_read(kind, size, layers, tmp_path):
    """A classifier and a bare backbone, at other sizes with the authors' offset; outputs and gradients in float64."""
    registers, gated = KINDS[kind]
    how = {"antialias": True, "offset": 0.0} if registers else {"antialias": False, "offset": 0.1}
    theirs = random(Official(registers, gated, layers, **how)).double()
    mine = ours(kind, read=layers, **how).double()
    torch.save(theirs.state_dict(), tmp_path / "classifier.pth")
    assert weights.load(mine, tmp_path / "classifier.pth") == []
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    found, want = mine(x), theirs(x)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)
    direction = torch.randn(2, CLASSES, dtype=torch.float64)
    (found * direction).sum().backward()
    (want * direction).sum().backward()
    theirs.backbone.mask_token.grad = torch.zeros(1, DIM, dtype=torch.float64)
    renamed = weights.translate(
        {name: p.grad for name, p in mine.named_parameters()} | {"mask": torch.zeros(1, DIM).double()},
        weights.get_tables(mine)["facebook-classifier"],
        reverse=True,
    )
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(renamed[name], p.grad, rtol=1e-8, atol=1e-10)


@EACH
def test_backbone_leaves_the_head_initialized(kind, tmp_path):
    """dinov2_vits14_pretrain.pth and facebook/dinov2-small hold no head."""
    registers, gated = KINDS[kind]
    official = random(Official(registers, gated, 1, False, 0.0))
    torch.save(official.backbone.state_dict(), tmp_path / "pretrain.pth")
    base = random(huggingface(kind, "Model"))
    base.save_pretrained(tmp_path / "base")
    for path in (tmp_path / "pretrain.pth", tmp_path / "base"):
        mine = ours(kind)
        head = mine.head.weight.clone()
        with pytest.raises(WeightsError, match='head="skip"'):
            weights.load(mine, path)
        assert weights.load(mine, path, head="skip") == ["head.weight", "head.bias"] and torch.equal(mine.head.weight, head)
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        want = base(x).last_hidden_state[:, 1 + registers :]
    torch.testing.assert_close(mine.features(x)["b4"].flatten(2).mT, want, **CLOSE)
    back = weights.read(weights.save(mine, tmp_path / "x.safetensors", format="facebook"))
    for name, tensor in weights.translate(mine.state_dict(), weights.get_tables(mine)["facebook"], reverse=True).items():
        assert torch.equal(back[name], tensor)
    assert back.keys() - official.backbone.state_dict().keys() == {"linear_head.weight", "linear_head.bias"}
    assert not official.backbone.state_dict().keys() - back.keys()


@pytest.mark.parametrize("kind", ["plain", "gated registers"])
def test_features_equal_the_backbone_of_transformers(kind):
    theirs = random(huggingface(kind, "Backbone", out_features=["stage1", "stage2", "stage3", "stage4"]))
    mine = ours(kind)
    weights.load(
        mine,
        {f"{'dinov2_with_registers.' if 'registers' in kind else 'dinov2.'}{name}": x for name, x in on_disk(theirs).items()},
        head="skip",
    )
    x = torch.randn(2, 3, SIDE, 20)
    with torch.no_grad():
        want, found = theirs(x).feature_maps, mine.features(x)
    assert list(found) == list(mine.levels) == ["b1", "b2", "b3", "b4"]
    for one, level in zip(want, found.values(), strict=True):
        assert level.shape == (2, DIM, 3, 5)
        torch.testing.assert_close(level, one, **CLOSE)


@pytest.mark.parametrize("size", [name for name in cards()["dinov2"].sizes if cards()["dinov2"].sizes[name].params])
def test_published_sizes_have_the_names_and_shapes_of_transformers(size):
    with torch.device("meta"):
        mine = create(size)
        c = mine.config
        kind = next(name for name, (r, g) in KINDS.items() if (bool(r), g) == (bool(c.registers), c.gated))
        theirs = huggingface(
            kind,
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            image_size=518,
            patch_size=14,
            num_labels=1000,
            **({"num_register_tokens": 4} if c.registers else {}),
        )
        origin = weights.translate(mine.state_dict(), weights.get_tables(mine)["huggingface"], reverse=True)
        disk = {name: x.shape for name, x in on_disk(theirs).items()}
    assert {name: x.shape for name, x in origin.items()} == disk
    counted = sum(p.numel() for p in theirs.parameters())
    assert counted == sum(p.numel() for p in mine.parameters()) + c.dim  # the mask token
    assert c.antialias == bool(c.registers) and c.offset == (0 if c.registers else 0.1)


def test_hidden_width_of_the_gated_layer():
    with torch.device("meta"):
        block = create("dinov2-giant", depth=1).blocks[0]
    assert block.mlp.down.weight.shape == (1536, 4096)
    assert ours("gated", dim=20).blocks[0].mlp.down.in_features == 56  # 2/3 of 80 is 53.3


def test_offset_and_antialiasing_both_matter():
    """Without them, outputs differ by far more than rounding."""
    mine, x = random(ours()), torch.randn(1, 3, 8, 20)
    found = []
    for antialias, offset in ((False, 0.1), (False, 0.0), (True, 0.0)):
        other = ours(antialias=antialias, offset=offset)
        other.load_state_dict(mine.state_dict())
        found.append(logits(other, x))
    assert all((found[a] - found[b]).abs().max() > 1e-3 for a, b in ((0, 1), (1, 2), (0, 2)))


def test_layer_scale_and_stochastic_depth():
    model = create("dinov2-test")
    assert all(torch.equal(scale.gamma, torch.full((16,), 1e-5)) for b in model.blocks for scale in (b.scale1, b.scale2))
    model, x = random(create("dinov2-test", drop_path=0.5)), torch.randn(8, 2, 12, 12)
    assert torch.equal(logits(model, x), logits(model, x))
    model.train()
    assert not torch.equal(logits(model, x), logits(model, x))
    assert {block.drop_path.p for block in model.blocks} == {0.5}


def test_invalid_settings_are_rejected():
    with pytest.raises(SettingsError, match="read=5"):
        ours(read=5)
    mine = ours()
    with pytest.raises(WeightsError, match=r"pos\.weight"):
        weights.load(mine, {**mine.state_dict(), "pos.weight": torch.zeros(12, DIM)})
    assert tiny("dinov2", torch.bfloat16)(torch.randn(2, 2, 20, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
