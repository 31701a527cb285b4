"""Weights: renaming both ways, all file formats, and one error that lists all problems."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fieldguide.checkpoints import weights
from fieldguide.core.errors import WeightsError, WriteError
from fieldguide.models.mapping.key_rules import Dropped, Fused, Reshaped, Transposed
from fieldguide.models.registry import cards, create

TABLE = {
    "wte.weight": "embed.weight",
    "layer{i+1}.{j}.norm.gamma": "blocks.{i}.{j}.norm.weight",
    "layer{i+1}.{j}.norm.*": "blocks.{i}.{j}.norm.*",
    "h.{i}.c_attn.weight": Transposed("blocks.{i}.attn.weight"),
    "h.{i}.c_attn.bias": Transposed("blocks.{i}.attn.bias"),
    "h.{i}.query.*": Fused("blocks.{i}.qkv.*", 0, 3),
    "h.{i}.key.*": Fused("blocks.{i}.qkv.*", 1, 3),
    "h.{i}.value.*": Fused("blocks.{i}.qkv.*", 2, 3),
    "scale.{i}": Reshaped("blocks.{i}.gamma", here=(-1,), there=(-1, 1, 1)),
    "position_ids": Dropped("a count from zero"),
}
PUBLIC = {
    "wte.weight": (5, 2),
    "layer3.10.norm.weight": (4,),
    "h.0.c_attn.weight": (2, 6),
    "h.0.c_attn.bias": (6,),
    "scale.1": (4, 1, 1),
    **{
        f"h.12.{part}.{kind}": shape
        for part in ("query", "key", "value")
        for kind, shape in (("weight", (3, 2)), ("bias", (3,)))
    },
}


def state(shapes: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def resnet(**overrides) -> nn.Module:
    torch.manual_seed(len(overrides))
    return create("resnet-test", **overrides).eval()


def public(model: nn.Module, origin: str = "torchvision") -> dict[str, torch.Tensor]:
    return weights.translate(model.state_dict(), weights.get_tables(model)[origin], reverse=True)


# ------------------------------------------------------------------------------------------------ names


def test_translate_both_ways():
    theirs = state(PUBLIC)
    ours = weights.translate({**theirs, "position_ids": torch.arange(3)}, TABLE)
    assert ours.keys() == {
        "embed.weight",
        "blocks.2.10.norm.weight",
        "blocks.0.attn.weight",
        "blocks.0.attn.bias",
        "blocks.1.gamma",
        "blocks.12.qkv.weight",
        "blocks.12.qkv.bias",
    }
    assert torch.equal(ours["blocks.2.10.norm.weight"], theirs["layer3.10.norm.weight"])
    assert torch.equal(ours["blocks.0.attn.weight"], theirs["h.0.c_attn.weight"].T)
    assert torch.equal(ours["blocks.12.qkv.weight"][3:6], theirs["h.12.key.weight"])
    assert torch.equal(ours["blocks.1.gamma"], theirs["scale.1"].flatten())
    back = weights.translate(ours, TABLE, reverse=True)
    theirs["layer3.10.norm.gamma"] = theirs.pop("layer3.10.norm.weight")  # the first row counts
    assert equal(back, theirs)


def test_impossible_reshape_is_reported():
    table = {"a": Reshaped("b", here=(3, -1), there=(3, -1, 1))}
    assert weights.translate({"a": torch.zeros(3, 2, 1)}, table)["b"].shape == (3, 2)
    with pytest.raises(WeightsError, match=r"a \(4\) cannot be reshaped to \(3, -1\), the shape of b"):
        weights.translate({"a": torch.zeros(4)}, table)


def test_negative_numbers_do_not_match():
    with pytest.raises(WeightsError, match="layer0"):
        weights.translate({"layer0.0.norm.bias": torch.zeros(1)}, TABLE)


def test_repeated_numbers_must_agree():
    table = {"a.{i}.b.{i}": "c.{i}"}
    assert list(weights.translate({"a.4.b.4": torch.zeros(1)}, table)) == ["c.4"]
    with pytest.raises(WeightsError, match=r"unknown: a\.4\.b\.5"):
        weights.translate({"a.4.b.5": torch.zeros(1)}, table)


def test_translate_lists_all_unknown_names():
    theirs = state(PUBLIC)
    del theirs["h.12.key.bias"]
    with pytest.raises(WeightsError) as error:
        weights.translate({**theirs, "one": torch.zeros(1), "two.weight": torch.zeros(1)}, TABLE)
    text = str(error.value)
    assert "2 of 12 names" in text and "unknown: one" in text and "unknown: two.weight" in text
    assert "blocks.12.qkv.bias is built from 3 tensors, but the file has only h.12.query.bias, h.12.value" in text


def test_two_names_for_one_tensor_must_agree():
    theirs = {"layer1.0.norm.gamma": torch.ones(2), "layer1.0.norm.weight": torch.ones(2)}
    assert list(weights.translate(theirs, TABLE)) == ["blocks.0.0.norm.weight"]
    theirs["layer1.0.norm.gamma"] = torch.zeros(2)
    with pytest.raises(WeightsError, match="with different values"):
        weights.translate(theirs, TABLE)


@pytest.mark.parametrize(
    "name, origin", [(name, origin) for name, card in cards().items() for origin in card.weights if origin != "torch"]
)  # torch has no embedding
def test_every_table_covers_its_network_both_ways(name, origin):
    model = create(cards()[name].tiny)
    theirs = public(model, origin)
    assert equal(weights.translate(theirs, weights.get_tables(model)[origin]), model.state_dict())


# ------------------------------------------------------------------------------------------------ files


def written(model: nn.Module, kind: str, folder):
    tensors = public(model)
    if kind == "wrapped":
        torch.save(
            {"epoch": 1, "model": {"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, "note": "x"},
            folder / "m.ckpt",
        )
        return folder / "m.ckpt"
    if kind == "compiled":
        torch.save({f"_orig_mod.module.{k}": v for k, v in tensors.items()}, folder / "m.pt")
        return folder / "m.pt"
    if kind == "legacy":  # before torch 1.6
        torch.save(tensors, folder / "m.pth", _use_new_zipfile_serialization=False)
        return folder / "m.pth"
    if kind == "half":
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(tensors, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind == "old":  # before batch counters
        torch.save({k: v for k, v in tensors.items() if "num_batches" not in k}, folder / "m.bin")
        return folder / "m.bin"
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({k: v for k, v in tensors.items() if shards[k] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


@pytest.mark.parametrize("kind", ["wrapped", "compiled", "legacy", "half", "old", "sharded"])
def test_reads_all_usual_formats(kind, tmp_path):
    source, model = resnet(), resnet(channels=3)
    source.stem.norm.num_batches_tracked += 7
    x = torch.randn(2, 3, 32, 32)
    assert weights.load(model, written(source, kind, tmp_path)) == []
    if kind == "half":
        source.half().float()
    assert torch.equal(model(x), source(x))
    assert model.stem.norm.num_batches_tracked == (0 if kind == "old" else 7)
    assert model.head.weight.dtype == torch.float32


def test_sharded_index_and_missing_shard(tmp_path):
    source = resnet()
    folder = written(source, "sharded", tmp_path)
    index = folder / "model.safetensors.index.json"
    assert equal(weights.read(index), public(source))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="2 files, but 1 are missing: model-00002-of-00002"):
        weights.read(folder)
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(WeightsError, match="outside its folder"):
        weights.read(folder)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="is not an index of shards"):
        weights.read(folder)


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_rejected(zipped, tmp_path):
    torch.save({"model": Harmful()}, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"system, and reading it could run arbitrary code.*safetensors"):
        weights.read(tmp_path / "m.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear, and reading it"):
        weights.read(tmp_path / "m.pth")


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_damaged_files(name, tmp_path):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(public(resnet()), path)
    else:
        weights.save(resnet(), path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no weights at all", struct.pack("<Q", 1 << 40) + b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="is damaged"):
            weights.read(path)


def test_files_without_tensors(tmp_path):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "m.pt")
    with pytest.raises(WeightsError, match="holds no named tensors, but the keys epoch, loss"):
        weights.read(tmp_path / "m.pt")
    torch.save([torch.zeros(1)], tmp_path / "m.pt")
    with pytest.raises(WeightsError, match="but a list"):
        weights.read(tmp_path / "m.pt")
    with pytest.raises(WeightsError, match="does not exist"):
        weights.read(tmp_path / "none.pt")
    (tmp_path / "n.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match="and 2 other weight files"):
        weights.read(tmp_path)
    (tmp_path / "n.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError):
        weights.read(tmp_path / "n.pt")


# ------------------------------------------------------------------------------------------------ misfits


def test_all_mismatches_in_one_error():
    model = resnet()
    tensors = public(resnet(channels=3))
    tensors["layer1.0.convv2.weight"] = tensors.pop("layer1.0.conv2.weight")
    tensors["layer2.1.bn1.weight"] = torch.zeros(3)
    tensors["fc.bias"] = torch.zeros(5, dtype=torch.int64)
    del tensors["bn1.running_mean"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        weights.load(model, tensors)
    text = str(error.value)
    assert "(names read as those of torchvision): 2 missing, 1 unknown, 2 misshaped" in text
    assert "missing: stages.0.0.conv2.weight (8x8x3x3)" in text
    assert "missing: stem.norm.running_mean (8)" in text
    assert "unknown: layer1.0.convv2.weight" in text
    assert (
        "misshaped: stages.1.1.norm1.weight: 3 float32 in the checkpoint as layer2.1.bn1.weight, 16 float32 in the network"
    ) in text
    assert "fc.bias, 5 float32 in the network" in text and "head.bias: 5 int64" in text
    assert equal(model.state_dict(), before)


def test_closest_name_is_suggested():
    model = resnet()
    tensors = model.state_dict()
    tensors["stages.0.0.conv2.wieght"] = tensors.pop("stages.0.0.conv2.weight")
    with pytest.raises(WeightsError) as error:
        weights.load(model, tensors)
    assert "unknown: stages.0.0.conv2.wieght Did you mean 'stages.0.0.conv2.weight'?" in str(error.value)


def test_long_lists_are_truncated_with_their_count():
    model = resnet()
    with pytest.raises(WeightsError) as error:
        weights.load(model, {"head.bias": torch.zeros(5)})
    missing = sum("num_batches" not in key for key in model.state_dict()) - 1
    assert f"{missing} missing" in str(error.value) and f"and {missing - 20} more" in str(error.value)


def test_different_number_of_classes():
    source, model = resnet(num_classes=9), resnet()
    head, stem = model.head.weight.clone(), source.stem.conv.weight
    with pytest.raises(WeightsError, match=r"Only the layer 'head' differs: load\(..., head=\"skip\"\)"):
        weights.load(model, public(source))
    assert weights.load(model, public(source), head="skip") == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, head) and torch.equal(model.stem.conv.weight, stem)
    assert weights.load(resnet(), public(resnet()), head="skip") == []  # nothing to skip


def test_head_may_be_absent_but_no_other_layer():
    model = resnet()
    tensors = {key: tensor for key, tensor in public(resnet()).items() if not key.startswith("fc.")}
    assert weights.load(model, tensors, head="skip") == ["head.weight", "head.bias"]
    tensors = {key: tensor for key, tensor in public(resnet()).items() if not key.startswith("bn1.")}
    with pytest.raises(WeightsError, match=r"missing: stem\.norm\.weight"):
        weights.load(model, tensors, head="skip")
    tensors = public(resnet(num_classes=9)) | {"extra.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"unknown: extra\.weight"):
        weights.load(model, tensors, head="skip")


def test_origin_can_be_given():
    model = resnet()
    assert weights.load(model, public(resnet()), origin="torchvision") == []
    with pytest.raises(WeightsError, match=r"no weights of the origin 'torchvison'\. Did you mean 'torchvision'"):
        weights.load(model, public(resnet()), origin="torchvison")
    with pytest.raises(WeightsError, match=r"no name in the checkpoint belongs to ResNet \(tried field"):
        weights.load(model, {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="tried huggingface"):
        weights.load(model, public(resnet()), origin="huggingface")


def test_network_on_meta_is_rejected():
    with torch.device("meta"):
        model = create("resnet-test")
    with pytest.raises(WeightsError, match="meta device"):
        weights.load(model, public(resnet()))


# ------------------------------------------------------------------------------------------------ save


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("whole", torch.arange(8.0))
        self.register_buffer("part", self.whole[2:5])


def test_tied_tensors_are_written_once(tmp_path):
    source, model = Tied(), Tied()
    path = weights.save(source, tmp_path / "deep" / "m.safetensors")
    assert weights.read(path).keys() == {"embed.weight", "whole", "part"}
    assert weights.load(model, path) == [] and torch.equal(model.head.weight, source.embed.weight)
    tensors = weights.read(path)
    tensors["head.weight"] = tensors.pop("embed.weight")
    assert weights.load(Tied(), tensors) == []
    with pytest.raises(WeightsError, match=r"missing: embed.weight \(6x4\)"):
        weights.load(Tied(), {"whole": torch.zeros(8), "part": torch.zeros(3)})


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model = resnet().to(memory_format=torch.channels_last)
    path = weights.save(model, tmp_path / "m.safetensors")
    assert equal(weights.read(path), model.state_dict())
    before = path.read_bytes()

    def full(*arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match="no space"):
        weights.save(resnet(num_classes=9), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_saves_under_public_names(tmp_path):
    model = resnet()
    path = weights.save(model, tmp_path / "m.safetensors", format="huggingface")
    assert "resnet.embedder.embedder.convolution.weight" in weights.read(path)
    other = resnet(channels=3)
    assert weights.load(other, path) == [] and equal(other.state_dict(), model.state_dict())
    with pytest.raises(WeightsError, match="Did you mean 'huggingface'"):
        weights.save(model, path, format="hugingface")
