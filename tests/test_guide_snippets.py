"""The guide's six snippets: same names and signatures, and weights trained with the guide's code load."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import guide
from fieldguide.checkpoints import weights
from fieldguide.models.adversarial.simple_gan import Discriminator, Generator
from fieldguide.models.convolutional.simplecnn import SimpleCNN
from fieldguide.models.feedforward.fnn import FNN
from fieldguide.models.recurrent.lstm_classifier import LSTMClassifier
from fieldguide.models.transformer.self_attention import SelfAttention

SNIPPETS = [  # ours, arguments, an input, parameters
    (FNN, (784, 256, 10), lambda: torch.randn(3, 784), 269_322),
    (SimpleCNN, (10,), lambda: torch.randn(3, 3, 32, 32), 1_070_986),
    (LSTMClassifier, (10_000, 128, 256, 2), lambda: torch.randint(10_000, (3, 7)), 2_202_114),
    (SelfAttention, (512, 8), lambda: torch.randn(3, 7, 512), 1_050_624),
    (Generator, (100, 784), lambda: torch.randn(3, 100), 559_632),
    (Discriminator, (784,), lambda: torch.randn(3, 784), 533_505),
]
SIX = pytest.mark.parametrize(
    "ours, arguments, inputs, parameters", SNIPPETS, ids=[snippet[0].__name__ for snippet in SNIPPETS]
)


def pair(ours: type, arguments: tuple) -> tuple[nn.Module, nn.Module]:
    """Return the guide's network and ours with its weights, loaded strictly."""
    torch.manual_seed(0)
    theirs = getattr(guide, ours.__name__)(*arguments)
    mine = ours(*arguments)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine, theirs


@SIX
def test_signature(ours, arguments, inputs, parameters):
    def positional(cls: type) -> list[tuple]:
        return [(p.name, p.default) for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(getattr(guide, ours.__name__))
    mine, theirs = pair(ours, arguments)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert sum(p.numel() for p in mine.parameters()) == parameters


@SIX
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equal_outputs(ours, arguments, inputs, parameters, training):
    """In training, the same random numbers drop the same units."""
    mine, theirs = pair(ours, arguments)
    x, outputs = inputs(), []
    for model in (mine, theirs):
        torch.manual_seed(1)
        outputs.append(model.train(training)(x))
    if ours is SelfAttention:  # the fused kernel adds in another order
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(*outputs)


@SIX
def test_same_initialization(ours, arguments, inputs, parameters):
    torch.manual_seed(2)
    mine = ours(*arguments).state_dict()
    torch.manual_seed(2)
    theirs = getattr(guide, ours.__name__)(*arguments).state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@SIX
def test_weights_saved_with_the_guides_code_load(ours, arguments, inputs, parameters, tmp_path):
    mine, theirs = pair(ours, arguments)
    torch.save(theirs.state_dict(), tmp_path / "guide.pth")
    fresh = ours(*arguments)
    assert weights.load(fresh, tmp_path / "guide.pth") == []
    x = inputs()
    assert torch.equal(fresh.eval()(x), mine.eval()(x))


def test_lstm_classifier_reads_the_last_real_token():
    mine, theirs = pair(LSTMClassifier, (50, 8, 6, 3))
    mine, theirs = mine.eval(), theirs.eval()
    x = torch.randint(50, (1, 9))
    mask = torch.arange(9)[None] < 4
    torch.testing.assert_close(mine(x, mask), theirs(x[:, :4]))
    assert not torch.allclose(mine(x), mine(x, mask))


def test_fnn_takes_any_leading_axes():
    assert FNN(6, 5, 4)(torch.randn(2, 3, 6)).shape == (2, 3, 4)


def test_simplecnn_for_other_image_sizes():
    model = SimpleCNN(7, channels=1, image=28)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 7)
    assert model.classifier[1].in_features == 64 * 7 * 7
