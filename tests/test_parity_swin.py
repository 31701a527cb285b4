"""Swin against timm and transformers: files of three origins, images of any size, levels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.registry import cards, create
from fieldguide.models.transformer.swin import Windows
from test_models import tiny
from test_parity_vit import CLOSE, logits, on_disk, random
from tv import timm, transformers

CLASSES, DIM, DEPTHS, HEADS, WINDOW, PATCH = 5, 8, (2, 3, 2), (1, 2, 4), 4, 2


def ours(**more) -> nn.Module:
    return create(
        "swin-test",
        **{
            "channels": 3,
            "dim": DIM,
            "depths": DEPTHS,
            "heads": HEADS,
            "window": WINDOW,
            "patch": PATCH,
            "num_classes": CLASSES,
            **more,
        },
    ).eval()


def timm_swin(size: tuple[int, int] = (32, 32), window: int = WINDOW, **more) -> nn.Module:
    return timm.models.swin_transformer.SwinTransformer(
        img_size=size,
        patch_size=PATCH,
        num_classes=CLASSES,
        embed_dim=DIM,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=window,
        **more,
    )


def huggingface_swin(side: int = 32) -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=side,
            patch_size=PATCH,
            embed_dim=DIM,
            depths=list(DEPTHS),
            num_heads=list(HEADS),
            window_size=WINDOW,
            num_labels=CLASSES,
        )
    )


def microsoft(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """Write an authors' file: merging named after the stage before it, and buffers computed from the window."""
    state = {}
    for name, x in theirs.state_dict().items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts).replace("head.fc", "head")] = x
    index = [name.replace("bias_table", "index") for name in state if "bias_table" in name]
    return (
        state
        | dict.fromkeys(index, torch.zeros(16, 16, dtype=torch.long))
        | {"layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16)}
    )


def test_timm_files_round_trip(tmp_path):
    theirs, mine, x = random(timm_swin()), random(ours(), 1), torch.randn(2, 3, 32, 32)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    assert weights.load(mine, tmp_path / "timm.pth") == []
    assert logits(theirs, x).std() > 0.1
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)
    back = timm_swin()
    back.load_state_dict(weights.read(weights.save(mine, tmp_path / "x.safetensors", format="timm")))
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_author_files_round_trip(tmp_path):
    """They differ from timm's in two names only, which would exchange the merging layers of stages."""
    theirs, mine, x = random(timm_swin()), random(ours(), 1), torch.randn(2, 3, 32, 32)
    torch.save({"model": microsoft(theirs)}, tmp_path / "swin.pth")
    assert weights.load(mine, tmp_path / "swin.pth") == []
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)
    back = weights.read(weights.save(mine, tmp_path / "x.safetensors", format="microsoft"))
    want = {name: x for name, x in microsoft(theirs).items() if "index" not in name and "attn_mask" not in name}
    assert back.keys() == want.keys() and all(torch.equal(back[name], x) for name, x in want.items())
    with pytest.raises(WeightsError, match="merge"):
        weights.load(mine, microsoft(theirs), origin="timm")


def test_transformers_files_round_trip(tmp_path):
    theirs, mine, x = random(huggingface_swin()), random(ours(), 1), torch.randn(2, 3, 32, 32)
    theirs.save_pretrained(tmp_path / "theirs")
    assert weights.load(mine, tmp_path / "theirs") == []
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)
    known = fieldguide.load(tmp_path / "theirs")  # by its configuration
    assert torch.equal(logits(known, x), logits(mine, x)) and known.config.window == WINDOW
    fieldguide.save(known, tmp_path / "back", "hf")
    other = type(theirs).from_pretrained(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize("size", [(33, 33), (48, 40), (35, 62), (64, 64)], ids=str)
def test_any_image_size_equals_transformers(size):
    """Patches, windows and merging are padded, and windows shift over the padding."""
    theirs, mine, x = random(huggingface_swin()), ours(), torch.randn(2, 3, *size)
    weights.load(mine, on_disk(theirs))
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (32, 32), (16, 64)], ids=str)
def test_windows_shift_only_along_larger_sides(size):
    """timm decides separately for each side. Its smaller windows have smaller tables, the center of ours."""
    theirs, mine, x = random(timm_swin(size, window=8)), random(ours(window=8), 1), torch.randn(2, 3, *size)
    state = theirs.state_dict()
    for s, stage in enumerate(theirs.layers):
        for b, block in enumerate(stage.blocks):
            h, w = block.window_size
            assert (block.shift_size[0] == 0) == (size[0] // 2 // 2**s <= 8 or b % 2 == 0)
            table = torch.randn(15, 15, HEADS[s])  # what lies outside is never read
            table[8 - h : 7 + h, 8 - w : 7 + w] = block.attn.relative_position_bias_table.view(2 * h - 1, 2 * w - 1, -1)
            state[f"layers.{s}.blocks.{b}.attn.relative_position_bias_table"] = table.flatten(0, 1)
    weights.load(mine, state, origin="timm")
    torch.testing.assert_close(logits(mine, x), logits(theirs, x), **CLOSE)


def test_levels_equal_timm():
    theirs, mine, x = random(timm_swin()), ours(), torch.randn(2, 3, 32, 32).double()
    weights.load(mine, theirs.state_dict())
    mine, theirs = mine.double(), theirs.double()
    with torch.no_grad():
        found, want = mine.features(x), theirs.forward_intermediates(x, indices=3, intermediates_only=True)
    assert {name: tuple(level.shape[1:]) for name, level in found.items()} == {
        "c2": (8, 16, 16),
        "c3": (16, 8, 8),
        "c4": (32, 4, 4),
    }
    for (name, level), one in zip(found.items(), want, strict=True):
        assert mine.levels[name] == (level.shape[1], 32 // level.shape[2])
        torch.testing.assert_close(level, one, **CLOSE)
    with torch.device("meta"):
        assert create("swin-t").levels == {"c2": (96, 4), "c3": (192, 8), "c4": (384, 16), "c5": (768, 32)}


@pytest.mark.parametrize(
    "size, theirs",
    [
        ("swin-t", "swin_tiny_patch4_window7_224"),
        ("swin-b", "swin_base_patch4_window7_224"),
        ("swin-l-384", "swin_large_patch4_window12_384"),
    ],
)
def test_published_sizes_have_timms_names_and_shapes(size, theirs):
    with torch.device("meta"):
        peer, mine = timm.create_model(theirs), create(size)
        renamed = weights.translate(mine.state_dict(), weights.get_tables(mine)["timm"], reverse=True)
    assert {k: x.shape for k, x in renamed.items()} == {k: x.shape for k, x in peer.state_dict().items()}


def test_images_of_224_need_no_padding():
    """56, 28, 14 and 7 positions per side, the last of which never shifts; so the published size equals any peer."""
    sizes = [Windows((side, side), 7, torch.device("cpu")) for side in (56, 28, 14, 7)]
    assert [w.full for w in sizes] == [w.size for w in sizes] and [w.shift for w in sizes] == [(3, 3)] * 3 + [(0, 0)]
    assert [w.mask is None for w in sizes] == [False, False, False, True]


def test_partition_and_unpartition_are_inverse():
    windows, x = Windows((7, 10), 4, torch.device("cpu")), torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    cut = windows.partition(x)
    assert cut.shape == (2, 6, 16, 3) and torch.equal(cut[0, 1].view(4, 4, 3), x[0, :4, 4:8])
    assert torch.equal(windows.unpartition(cut), x)


def test_bias_tables_are_interpolated_for_other_windows():
    theirs, mine = random(ours(window=4)), ours(window=7)
    assert weights.load(mine, theirs.state_dict()) == []
    table = theirs.stages[1].blocks[0].attn.bias.weight.view(7, 7, 2).permute(2, 0, 1)[None]
    want = F.interpolate(table, (13, 13), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(mine.stages[1].blocks[0].attn.bias.weight, want)
    for rows in (48, 36, 64):  # no square, or one of an even side, which no window has
        with pytest.raises(WeightsError, match="bias"):
            weights.load(mine, {**mine.state_dict(), "stages.0.blocks.0.attn.bias.weight": torch.zeros(rows, 1)})


def test_stochastic_layers_only_in_training():
    x = torch.randn(8, 2, 16, 16)
    for change in ({"dropout": 0.5}, {"drop_path": 0.5}):
        model = random(create("swin-test", **change))
        assert torch.equal(logits(model, x), logits(model, x))
        model.train()
        assert not torch.equal(logits(model, x), logits(model, x))
    rates = [block.drop_path.p for stage in create("swin-test", drop_path=0.5).stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_small_images_get_small_patches_and_windows():
    adapt = cards()["swin"].adapt
    assert {side: tuple(adapt({"image": side}).values()) for side in (8, 16, 28, 32, 64, 96, 128, 224)} == {
        8: (1, 4),
        16: (1, 4),
        28: (2, 4),
        32: (2, 4),
        64: (4, 4),
        96: (4, 6),
        128: (),
        224: (),
    }


def test_invalid_settings_are_rejected():
    with pytest.raises(SettingsError, match="must have the same length"):
        ours(heads=(1, 2))
    with pytest.raises(SettingsError, match="heads=3"):
        ours(heads=(3, 2, 4))
    assert tiny("swin", torch.bfloat16)(torch.randn(2, 2, 20, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
