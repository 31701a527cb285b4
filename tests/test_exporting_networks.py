"""Graphs of networks alone, for other sizes of their dynamic axes than the traced ones."""

from __future__ import annotations

import pytest
import torch

from fieldguide.core.signature import Axis, TensorSpec, TokenRule
from fieldguide.exporting.audio import build_resizing
from fieldguide.exporting.export import load_format
from fieldguide.exporting.graph import BATCH, Graph, build_example
from fieldguide.exporting.network import build_network_graph, flatten
from fieldguide.models import registry
from fieldguide.models.layers.conv import SameConv2d
from fieldguide.models.layers.padding import pad_map, shift_cyclic


def write_graph(name, form, folder):
    """Write the graph of a card's test size; this compares it with the network for other sizes."""
    torch.manual_seed(0)
    card = registry.cards()[name]
    network = registry.create(card.tiny).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # a network that returns zeros could not differ
    graph = build_network_graph(card, card.resolve_config(card.tiny), network)
    with torch.no_grad():
        outputs = flatten(graph.module(*graph.build_example().values()))
    graph.outputs = tuple(f"output_{i}" for i in range(len(outputs)))
    load_format(form).write(graph, folder / f"model{load_format(form).suffix}", "float32")
    return graph


@pytest.mark.parametrize("name", ["item-neighbors", "inceptiontime"])
def test_programs_take_other_lengths(name, tmp_path):
    write_graph(name, "torch", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize(
    "name",
    (
        *(
            "swin",
            "mask2former",
            "mamba2",
            "item-neighbors",
            "latte",
            "rnn",
            "inceptiontime",
            "deberta-v2",
            "wav2vec2",
            "hubert",
        ),
        *("wav2vec2-conformer", "efficientnet-lite", "mobilenetv4", "stylegan2-discriminator", "rt-detr", "conformer"),
    ),
)
def test_graphs_take_other_sizes(name, form, tmp_path):
    write_graph(name, form, tmp_path)


def test_examples_are_of_different_sizes():
    """Two axes of one size could become one symbol of a graph. Numbers of real entries are in the range of their axis."""
    height, width, samples = Axis("height", least=64), Axis("width", least=64), Axis("samples", least=10, most=20)
    specs = (
        TensorSpec("image", "float32", (BATCH, height, width)),
        TensorSpec("waveform", "float32", (BATCH, samples)),
        TensorSpec("lengths", "int64", (BATCH,), counts="samples"),
        TensorSpec("tokens", "int64", (BATCH, Axis("tokens", least=5)), low=0, high=9, tokens=(TokenRule(7, 4, "inside"),)),
    )
    for rows, size in ((1, 7), (5, 14)):
        batch = build_example(specs, 0, rows, size)
        assert batch["image"].shape == (rows, 63 + size, 64 + size) and batch["waveform"].shape == (rows, min(11 + size, 20))
        lengths = batch["lengths"].tolist()
        assert lengths[-1] == batch["waveform"].shape[1] and min(lengths) >= 10
        assert ((batch["tokens"] == 7).sum(1) == 4).all()
    assert len(set(build_example(specs, 0, 5, 14)["lengths"].tolist())) > 1


def test_the_shortest_recording_is_the_field_of_the_network():
    for name in ("wav2vec2", "hubert", "wav2vec2-conformer"):
        card = registry.cards()[name]
        network = registry.create(card.tiny)
        waveform = build_network_graph(card, network.config, network).inputs[0]
        assert waveform.axes[1].least == network.field == 8
        assert network.count_frames(8) == 1 and network.count_frames(7) == 0


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_cyclic_shift_is_a_roll(steps):
    x = torch.arange(30).view(2, 5, 3)
    assert torch.equal(shift_cyclic(x, steps, 1), x.roll(-steps, 1))


def test_maps_are_padded_at_the_end():
    x = torch.ones(1, 2, 3, 1)
    assert pad_map(x, 2, 3) is x
    assert pad_map(x, 4, 5)[0, ..., 0].tolist() == [[1.0] * 3 + [0.0] * 2] * 2 + [[0.0] * 5] * 2


@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 2), (7, 4)])
def test_same_padding_is_traced_for_all_remainders(kernel, stride, tmp_path):
    """One graph has the padding of every side."""
    torch.manual_seed(0)
    module = Single(SameConv2d(1, 2, kernel, stride)).eval()
    axes = BATCH, Axis("channels", 1), Axis("height", least=8), Axis("width", least=8)
    graph = Graph(module, (TensorSpec("x", "float32", axes),), ("y",), ())
    program = torch.export.export(
        module, tuple(graph.build_example().values()), dynamic_shapes=(({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},),)
    ).module()
    for side in range(9, 14):
        x = torch.randn(3, 1, side, side + 1)
        torch.testing.assert_close(program(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("side", [16, 40])
def test_images_of_spectrograms_are_resized_by_matrices(side):
    """To fewer and to more places, as `interpolate` does."""
    image = torch.randn(2, 1, 24, 30, generator=torch.Generator().manual_seed(0))
    down, across = build_resizing(24, side), build_resizing(30, side)
    want = torch.nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True)
    torch.testing.assert_close(down.mT @ image @ across, want, rtol=0, atol=1e-5)


class Single(torch.nn.Module):
    """A module of one tensor, with a tuple of outputs."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *tensors):
        return (self.module(tensors[0]),)
