"""Networks for tables against the authors' packages; unseen categories and categories with many values."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from rtdl_num_embeddings import PiecewiseLinearEmbeddings

import references
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.table import CategoryEmbedding, OneHot, PiecewiseLinear
from fieldguide.models.registry import create


@pytest.mark.filterwarnings("ignore:The .-th feature has just two bin edges:UserWarning")
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_piecewise_linear_equals_the_package_and_the_equation(bins):
    torch.manual_seed(0)
    ours = PiecewiseLinear(3, bins, 4).double()
    edges = torch.randn(3, bins + 1, dtype=torch.float64).cumsum(1).sort(1).values
    edges += torch.arange(bins + 1)
    ours.set_edges(edges)
    torch.nn.init.normal_(ours.curve)
    theirs = PiecewiseLinearEmbeddings([e.float() for e in edges], 4, activation=False, version="B")
    theirs = theirs.double()
    theirs.load_state_dict(
        {
            "linear0.weight": ours.weight,
            "linear0.bias": ours.bias,
            "linear.weight": ours.curve,
            **{key: tensor for key, tensor in theirs.state_dict().items() if key.startswith("impl.")},
        }
    )
    theirs.impl.weight.copy_(1 / edges.diff(dim=1))  # in double precision
    theirs.impl.bias.copy_(-edges[:, :-1] / edges.diff(dim=1))
    x = 4 * torch.randn(50, 3, dtype=torch.float64)
    x[0] = edges[:, 0]  # exactly on an edge
    x[1] = edges[:, -1]
    ours_out, theirs_out = ours(x), theirs(x)
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-10, atol=1e-12)
    if bins > 1:  # one interval goes on beyond both ends
        slow = torch.tensor(
            [
                [references.piecewise_linear(float(v), edges[column].tolist()) for column, v in enumerate(values)]
                for values in x
            ],
            dtype=torch.float64,
        )
        expected = torch.einsum("bnk,nkd->bnd", slow, ours.curve) + ours.bias + ours.weight * x[..., None]
        torch.testing.assert_close(ours_out, expected, rtol=1e-10, atol=1e-12)


def test_edges_start_at_the_quantiles_of_the_normal():
    block = PiecewiseLinear(2, 4, 3)
    expected = [-3.0, NormalDist().inv_cdf(0.25), 0.0, NormalDist().inv_cdf(0.75), 3.0]
    torch.testing.assert_close(block.edges, torch.tensor([expected, expected]))
    assert (PiecewiseLinear(1, 2000, 1).edges.diff(dim=1) > 0).all()  # also where the tail passes 3
    assert "edges" in block.state_dict()
    share = torch.histogram(torch.randn(20_000), torch.tensor(expected)).hist / 20_000
    torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.02)


def test_piecewise_linear_starts_linear():
    torch.manual_seed(0)
    block = PiecewiseLinear(1, 5, 3)
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    low, middle, high = block(x)
    torch.testing.assert_close(low + high, 2 * middle)


def test_invalid_edges_are_rejected():
    block = PiecewiseLinear(2, 2, 3)
    with pytest.raises(SettingsError, match="column 1 must increase"):
        block.set_edges(torch.tensor([[0.0, 1, 2], [0, 0, 1]]))
    with pytest.raises(SettingsError, match=r"got \(1, 3\)"):
        block.set_edges(torch.tensor([[0.0, 1, 2]]))
    with pytest.raises(SettingsError, match="bins=0"):
        PiecewiseLinear(2, 0, 3)


def test_category_encodings():
    one_hot = OneHot((3, 2))
    x = torch.tensor([[0, 0], [1, 0], [2, 1]])
    assert one_hot.width == 3
    assert one_hot(x).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 1]]
    embed = CategoryEmbedding((3, 2), 4)
    assert embed(x).shape == (3, 2, 4)
    assert not embed(x)[0].any() and embed(x)[2].any()  # unseen starts as nothing
    assert torch.equal(embed(x)[2, 1], embed.weight[4])


@pytest.mark.parametrize("name", ["mlp-test", "tabm-test"])
@pytest.mark.parametrize("numbers, categories", [(0, (3, 4)), (3, ()), (2, (1, 3)), (1, (100, 3, 70))])
def test_tables_with_any_column_types(name, numbers, categories):
    """No numbers, no categories, an always missing column, columns with many values."""
    torch.manual_seed(0)
    model = create(name, numbers=numbers, categories=categories)
    x = torch.stack([torch.zeros(6), *(torch.randint(size, (6,)) for size in categories)], 1)[:, 1:].long()
    output = model(torch.randn(6, numbers), x)
    assert output.shape[0] == 6 and output.shape[-1] == 3 and output.isfinite().all()
    output.sum().backward()


@pytest.mark.parametrize("name", ["mlp-test", "tabm-test"])
def test_empty_tables_are_rejected(name):
    with pytest.raises(SettingsError, match="no columns"):
        create(name, numbers=0, categories=())


def test_unseen_category_equals_no_category():
    """TabM: an unseen category equals a row without that one-hot part."""
    torch.manual_seed(0)
    model = create("tabm-test", numbers=2, categories=(4,)).eval()
    numbers, unseen = torch.randn(3, 2), torch.zeros(3, 1, dtype=torch.int64)
    before = model(numbers, unseen)
    with torch.no_grad():
        model.layers[0].weight[:, -3:] = 100.0
    assert torch.equal(model(numbers, unseen), before)
    assert not torch.allclose(model(numbers, unseen + 1), before)


def test_tabm_initialization_of_members():
    torch.manual_seed(0)
    model = create("tabm-test", numbers=2, categories=(4, 200), embedding=5)
    first = model.layers[0].r
    assert first.shape[1] == 2 * 5 + 3 + 5
    for start, stop in ((0, 5), (5, 10), (10, 13), (13, 18)):
        assert (first[:, start:stop] == first[:, start : start + 1]).all()
    assert first[:, [0, 5, 10, 13]].unique().numel() == 4 * first.shape[0]
    output = model(torch.randn(2, 2), torch.tensor([[1, 150], [2, 3]]))
    assert output.std(1).min() > 0
