"""The recurrent classifiers against their equations, one token at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import references
from cases import tokens
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.padding import ensure_nonempty, lengths, masked_mean, reverse, select_position
from fieldguide.models.registry import cards, create
from references import Equations

STEPS = {"rnn": (references.rnn_step, 1), "lstm": (references.lstm_step, 2), "gru": (references.gru_step, 1)}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", list(STEPS))
def test_equals_its_equations(name, depth, directions):
    torch.manual_seed(0)
    model = create(f"{name}-test", depth=depth, directions=directions).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    slow = Equations(model, references.recurrent(*STEPS[name])).double()
    slow.load_state_dict(Equations.translate(model.state_dict()), strict=True)
    inputs = tokens(model.config, 5)
    ours, theirs = model(*inputs), slow(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weighting = torch.randn(ours.shape, dtype=ours.dtype)
    (ours * weighting).sum().backward()
    (theirs * weighting).sum().backward()
    grads = {key: parameter.grad for key, parameter in slow.named_parameters()}
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[Equations.rename(key)], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", list(STEPS))
def test_initialization(name):
    torch.manual_seed(0)
    model = create(f"{name}-test", hidden=16, dim=8)
    rnn = model.rnn.layers[0][0]
    for gate in rnn.weight_hh_l0.split(16):
        torch.testing.assert_close(gate @ gate.T, torch.eye(16), rtol=0, atol=1e-5)
    bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
    expected = torch.zeros_like(bias)
    if name == "lstm":
        expected[16:32] = 1  # the forget gate, second of torch's four
    assert torch.equal(bias, expected)
    assert cards()[name].resolve_config(f"{name}-s").depth == 1


def test_invalid_settings_are_rejected():
    with pytest.raises(SettingsError, match="directions=3"):
        create("lstm-test", directions=3)
    with pytest.raises(SettingsError, match="depth"):
        create("lstm-test", depth=0)


def test_padding_is_ignored():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    assert lengths(mask).tolist() == [2, 1, 3]
    assert ensure_nonempty(mask).tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    x = torch.arange(9.0).view(3, 3, 1)
    assert reverse(x, lengths(mask)).squeeze(-1).tolist() == [[1, 0, 2], [3, 4, 5], [8, 7, 6]]
    assert select_position(x, torch.tensor([0, 1, 2])).squeeze(-1).tolist() == [0, 4, 8]
    assert masked_mean(x, ensure_nonempty(mask)).squeeze(-1).tolist() == [0.5, 3, 7]
    torch.manual_seed(0)
    row = nn.functional.one_hot(torch.tensor([[2, 0, 1]]), 3).double()
    assert torch.equal(reverse(reverse(row, torch.tensor([2])), torch.tensor([2])), row)
