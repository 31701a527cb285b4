"""Row-wise Adagrad with sparse gradients: the same as dense ones, resumed exactly, and as fast for long tables; DLRM and DCN-v2."""

from __future__ import annotations

import math
import time

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from fieldguide.automl.fit import fit
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models.layers.table import CategoryEmbedding, LookupTable
from fieldguide.models.registry import create
from fieldguide.objectives import Classification, Supervised
from fieldguide.training import checkpoint
from fieldguide.training.optim import build_optimizers
from fieldguide.training.row_adagrad import RowwiseAdagrad, clip_gradients
from test_models import tiny
from test_task_recommendation import clicks

SPARSE = Settings().with_({"embedding_optimizer": "adagrad"})


def by_hand(table: torch.Tensor, codes: list[list[int]], lr: float) -> torch.Tensor:
    """Return a table after steps with the loss sum(row^2 / 2) over the codes, row by row."""
    table, total = table.clone(), torch.zeros(len(table))
    for step in codes:
        before = table.clone()
        for row in sorted(set(step)):
            grad = step.count(row) * before[row]
            total[row] += (grad**2).mean()
            table[row] -= lr * grad / (total[row].sqrt() + 1e-8)
    return table


@pytest.mark.parametrize("kind", [lambda: CategoryEmbedding((4, 5), 3), lambda: LookupTable(9, 3)])
@pytest.mark.parametrize("sparse", [False, True])
def test_steps_by_hand(kind, sparse):
    """A row that occurs twice in a batch gets one step with the sum of its gradients."""
    torch.manual_seed(0)
    table = kind()
    nn.init.normal_(table.weight)
    table.sparse = sparse
    start, codes = table.weight.detach().clone(), [[1, 1, 3], [1, 8, 0], [3, 3, 3]]
    optimizer = RowwiseAdagrad([table.weight], lr=0.1)
    for step in codes:
        optimizer.zero_grad()
        found = nn.functional.embedding(torch.tensor(step), table.weight, sparse=table.sparse)
        (found.square().sum() / 2).backward()
        assert table.weight.grad.is_sparse == sparse
        optimizer.step()
    torch.testing.assert_close(table.weight.detach(), by_hand(start, codes, 0.1))


def test_clipping_counts_a_row_once():
    torch.manual_seed(0)
    for most in (0.5, 1e6):
        found = []
        for sparse in (False, True):
            torch.manual_seed(1)
            table, linear = LookupTable(6, 2), nn.Linear(2, 1)
            table.sparse = sparse
            linear(table(torch.tensor([1, 1, 2, 5]))).square().sum().mul(10).backward()
            norm = clip_gradients([*table.parameters(), *linear.parameters()], most)
            grad = table.weight.grad.to_dense() if sparse else table.weight.grad
            found.append((norm, grad, linear.weight.grad))
        torch.testing.assert_close(found[0], found[1])


def test_tables_have_their_own_optimizer():
    model = tiny("dlrm", torch.float32)
    objective = Supervised(model, ("numbers", "categories"), Classification())
    rows, others = build_optimizers(objective, [(n, p) for n, p in objective.named_parameters()], SPARSE)
    assert isinstance(rows, RowwiseAdagrad) and len(rows.param_groups[0]["params"]) == 3 and rows.param_groups[0]["scale"] == 10
    assert len([p for g in others.param_groups for p in g["params"]]) == len(list(model.parameters())) - 3
    batch = {"numbers": torch.randn(5, 3), "categories": torch.randint(3, (5, 3)), "target": torch.randint(2, (5,))}
    objective(batch)["loss"].backward()
    assert all(table.weight.grad.is_sparse for table in model.tables)
    with pytest.raises(SettingsError, match="no table of embeddings"):
        build_optimizers(nn.Linear(2, 2), [], SPARSE)


def test_state_is_stored_and_restored():
    """Two steps, and one step, a checkpoint and another step, are the same to the bit."""

    def train(interrupted: bool) -> torch.Tensor:
        torch.manual_seed(0)
        table = LookupTable(9, 3, sparse=True)
        optimizer = RowwiseAdagrad([{"params": [table.weight], "scale": 10.0}], lr=0.1)
        for step in ([1, 2], [2, 2, 5]):
            optimizer.zero_grad()
            table(torch.tensor(step)).square().sum().backward()
            optimizer.step()
            if interrupted:
                tensors, numbers = checkpoint.pack_optimizer(optimizer, "optimizer.0.0")
                optimizer = RowwiseAdagrad([{"params": [table.weight], "scale": 10.0}], lr=0.1)
                checkpoint.unpack_optimizer(optimizer, "optimizer.0.0", tensors, numbers)
        return table.weight.detach()

    assert torch.equal(train(False), train(True))


@pytest.mark.parametrize("name", ["dlrm-s", "dcn-v2-s", pytest.param("deepfm-s", marks=pytest.mark.slow)])
def test_clicks_are_learned_with_sparse_gradients(tmp_path, name):
    settings = {"task.positive": 4, "steps": 250, "batch": 128, "precision": "float32", "evaluate": 50, "lr": 3e-3}
    run = fit(
        clicks(tmp_path / "clicks.csv"),
        task="click-prediction",
        target="rating",
        model=name,
        out=tmp_path / "run",
        settings=settings | {"embedding_optimizer": "adagrad"},
    )
    others = {b["name"]: b["scores"]["auc"] for b in run.record["scores"]["baselines"]}
    others.pop("gradient-boosting")
    assert run.scores["auc"] > 0.75 > max(others.values())
    rows = pl.DataFrame({"user_id": ["u1", "new"], "item_id": ["i1", "i2"], "hour": 3})
    assert all(0 < answer["probabilities"]["yes"] < 1 for answer in run.predict(rows))


@pytest.mark.slow
def test_step_time_does_not_depend_on_rows():
    """A hundred times the rows take less than three times as long; with dense gradients it is about a hundred times."""
    torch.set_num_threads(1)
    fastest = []
    for rows in (10**5, 10**7):
        model = create("dlrm", categories=(rows,) * 2, numbers=2, dim=8, bottom=(16,), top=(16,))
        objective = Supervised(model, ("numbers", "categories"), Classification())
        optimizers = build_optimizers(objective, objective.named_parameters(), SPARSE)
        seconds = []
        for _ in range(8):
            codes = torch.randint(rows, (1024, 2))
            batch = {"numbers": torch.randn(1024, 2), "categories": codes, "target": torch.randint(2, (1024,))}
            started = time.perf_counter()
            objective(batch)["loss"].backward()
            clip_gradients(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
        fastest.append(min(seconds[2:]))
    assert fastest[1] < 3 * fastest[0]


# DLRM and DCN-v2


def test_pairs_of_products_in_the_published_order():
    """Rows of the lower triangle without the diagonal, the vector of the numbers first."""
    model = tiny("dlrm")
    assert model.pairs.T.tolist() == [[1, 0], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2]]
    assert model.top[0].in_features == 4 + 6
    bare = create("dlrm-test", numbers=0)
    assert bare.bottom is None and bare(torch.zeros(2, 0), torch.tensor([[1, 1, 1], [2, 2, 2]])).shape == (2, 2)
    with pytest.raises(SettingsError, match="two categorical"):
        create("dlrm-test", numbers=0, categories=(4,))


def test_published_names_are_recognized(tmp_path):
    """The names of the authors' code, both ways."""
    model = create("dlrm-test")
    state = {}
    for name, tensor in model.state_dict().items():
        part, rest = name.split(".", 1)
        state[{"tables": "emb_l", "bottom": "bot_l", "top": "top_l"}[part] + "." + rest] = tensor
    assert set(state) == set(weights.translate(model.state_dict(), weights.get_tables(model)["official"], reverse=True))
    torch.manual_seed(5)
    other = create("dlrm-test")
    assert weights.load(other, state) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("structure", ["stacked", "parallel"])
def test_structures_equal_the_equations(rank, structure):
    import references

    torch.manual_seed(0)
    model = create("dcn-v2-test", rank=rank, structure=structure).double()
    for part in model.parameters():
        nn.init.normal_(part, std=0.5)
    numbers, codes = torch.randn(3, 3, dtype=torch.float64), torch.randint(3, (3, 3))
    wanted = references.dcn_v2(model.config.categories, structure)(dict(model.named_parameters()), numbers, codes)
    torch.testing.assert_close(model(numbers, codes), wanted, rtol=1e-9, atol=1e-11)
    with pytest.raises(SettingsError, match="stacked or parallel"):
        create("dcn-v2-test", structure="both")


def test_cross_layers_raise_the_degree():
    """L layers are a polynomial of degree L + 1 in the input: the next difference is zero."""
    torch.manual_seed(0)
    model = create("dcn-v2-test", rank=0, structure="parallel", depth=2, hidden=()).double()
    model.head.weight.data[:, : len(model.head.weight[0]) // 2] = 0  # of the input itself, which has degree 1
    direction = torch.randn(1, 3, dtype=torch.float64)
    codes = torch.zeros(1, 3, dtype=torch.int64)
    values = np.array([model(k * direction, codes)[0, 0].item() for k in range(5)])
    assert abs(np.diff(values, 4)).max() < 1e-9 * math.pow(10, 3) and abs(np.diff(values, 3)).max() > 0
