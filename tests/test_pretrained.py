"""Pretrained networks: folders and files of other libraries in by name or shape alone, and back out, bit-equal."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fieldguide
from fieldguide import pretrained
from fieldguide.errors import WeightsError
from fieldguide.registry import cards, create
from tv import timm, torchvision, transformers


def settled(theirs: nn.Module) -> nn.Module:
    """Weights that make a difference everywhere: norms that are not 1, biases that are not 0."""
    torch.manual_seed(1)
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return theirs.eval()


def gpt2(**changes) -> nn.Module:
    shape = {"vocab_size": 40, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 2, **changes}
    torch.manual_seed(0)
    return settled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))


@torch.no_grad()
def test_a_folder_of_transformers_there_and_back(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs")
    tokens = torch.randint(40, (2, 9))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits)
    assert not ours.training and (ours.config.depth, ours.config.vocab, ours.config.length) == (3, 40, 16)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)


def test_a_configuration_of_another_network_is_refused_by_name(tmp_path):
    gpt2(activation_function="relu", scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"(?s)activation_function='relu'.*scale_attn_by_inverse_layer_idx=True"):
        fieldguide.load(tmp_path)


@torch.no_grad()
def test_a_file_is_recognised_by_names_and_shapes(tmp_path):
    x = torch.randn(2, 3, 64, 64)
    for theirs, size in ((torchvision.models.resnet18(num_classes=11), "resnet18"),
                         (timm.create_model("resnet34", num_classes=4), "resnet34")):
        torch.save(settled(theirs).state_dict(), tmp_path / "weights.pth")
        _, found, _ = pretrained.recognised(theirs.state_dict(), "a file")
        assert found == size
        torch.testing.assert_close(fieldguide.load(tmp_path / "weights.pth")(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_what_is_of_no_network_says_what_comes_nearest(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    state["layer1.0.gate.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"odd\.pth: these 123 tensors are of no network here; nearest come resnet"):
        fieldguide.load(tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"does not exist.*hf:organisation/name"):
        fieldguide.load(tmp_path / "none")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(WeightsError, match=r"config\.json is no JSON"):
        fieldguide.load(tmp_path / "odd.pth")


@pytest.mark.parametrize("name, origin", [(c.name, o) for c in cards().values() for o in c.configs])
def test_configurations_there_and_back(name, origin):
    """What is written is recognised and read as the same config; every number that a size may change is in the table."""
    card = cards()[name]
    for size in card.sizes:
        config = card.config(**card.sizes[size].overrides)
        written = json.loads(json.dumps(pretrained.outwards(card, card.configs[origin], config)))
        found, at, table = pretrained.identified(written)
        assert (found.name, at) == (name, origin)
        assert card.config(**pretrained.inwards(found, table, written, "here")) == config


def test_export_refuses_what_has_no_table(tmp_path):
    with pytest.raises(WeightsError, match="cannot be written as a folder of 'huggingface'"):
        fieldguide.save(create("fnn-test"), tmp_path, "hf")


def test_the_size_may_be_said(tmp_path):
    ours = create("resnet18", classes=6)
    fieldguide.save(ours, tmp_path / "here.safetensors")
    again = fieldguide.load(tmp_path / "here.safetensors", name="resnet18")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))
