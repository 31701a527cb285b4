"""Two-tower retrieval: the in-batch loss by hand, features of users and items, and training to a floor."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

import references
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.inference.run import Run
from fieldguide.models.registry import card
from fieldguide.objectives.in_batch import InBatch
from fieldguide.tasks.recommendation.features import read_features
from fieldguide.tasks.recommendation.recommendation import Recommendation
from test_models import tiny


def with_features():
    torch.manual_seed(0)
    model = tiny("two-tower").double()
    model.set_item_features(torch.randint(4, (30, 1)), torch.randn(30, 1))
    return model


def test_features_enter_both_towers():
    model = with_features()
    items, mask = torch.randint(1, 30, (3, 5)), torch.arange(5) < torch.tensor([[5], [3], [1]])
    profile, numbers = torch.tensor([[1, 2], [4, 1], [0, 0]]), torch.randn(3, 2)
    wanted = references.two_tower(dict(model.state_dict()), items, mask, profile, numbers)
    got = model(items, mask, profile, numbers)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    before = model.table()
    model.set_item_features((model.item_codes + 1) % 4, model.item_values)
    assert not torch.allclose(before, model.table())


def test_loss_corrects_frequencies_and_repeated_items():
    """By hand: each target among the targets of the batch less log Q; another occurrence of the own target is left out."""
    model = with_features()
    items, target = torch.randint(1, 30, (4, 3)), torch.tensor([[5, 7, 5], [9, 7, 2], [0, 0, 5], [1, 2, 3]])
    counts = [0, *range(1, 30)]
    loss = InBatch(model, ("items", "mask"), counts)({"items": items, "mask": items > 0, "target": target})["loss"]
    users, wanted = model.features(items, items > 0)[target > 0], target[target > 0].tolist()
    table, share, total = model.table(), torch.tensor(counts) / sum(counts), 0.0
    for n, own in enumerate(wanted):
        score = lambda i: (users[n] * table[i]).sum() - share[i].log()  # noqa: B023
        others = [score(i) for m, i in enumerate(wanted) if m == n or i != own]
        total += torch.stack(others).logsumexp(0) - score(own)
    torch.testing.assert_close(loss.double(), total / len(wanted), rtol=1e-5, atol=1e-6)


def events(folder, extra: bool = True, users: int = 120, seed: int = 0):
    """Write events of users who like one kind of items; the kind and a price belong to items, the taste to users."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, 60)
    rows = []
    for u in range(users):
        liked = np.flatnonzero(kind == u % 4)
        chosen = rng.choice(liked, min(8, len(liked)), replace=False)
        chosen[0] = rng.integers(60)  # now and then something else
        for t, i in enumerate(chosen):
            rows.append((f"u{u}", f"i{i}", t, "abcd"[u % 4], "wxyz"[kind[i]], float(kind[i] * 10 + i % 7), float(rng.random())))
    frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "taste", "kind", "price", "noise"], orient="row")
    frame.select("user_id", "taste").unique(maintain_order=True).write_csv(folder / "users.csv")
    frame.select("item_id", "kind", "price").unique(maintain_order=True).write_csv(folder / "items.csv")
    frame = frame if extra else frame.drop("taste", "kind", "price", "noise")
    frame.write_csv(folder / "events.csv")
    return folder / "events.csv"


def fitted(path, **options):
    chosen = Recommendation.options_from(options)
    made = Recommendation.build_examples(read(path, column_spec=Recommendation.column_spec), chosen)
    return made, Recommendation.fit(made.take(np.flatnonzero(made.splits == "train")), chosen)


def test_columns_of_events_belong_to_users_or_items(tmp_path):
    made, task = fitted(events(tmp_path))
    users, goods = task.users.preparer, task.goods.preparer
    assert [c.column for c in users.categories] == ["taste"] and not users.numbers
    assert [c.column for c in goods.categories] == ["kind"] and [n.column for n in goods.numbers] == ["price"]
    dims = task.model_dims()
    assert dims["user_categories"] == (121, 5) and dims["item_categories"] == (5,) and dims["item_numbers"] == 1
    test = made.take(np.flatnonzero(made.splits == "test"))
    batch = task.batches(test, card("two-tower")).make(np.arange(3), None)
    taste = test.rows["#feature:taste"].list.first().to_list()
    values = users.categories[0].values
    assert [values[code - 1] for code in batch["profile"][:, 1]] == taste[:3] and len(set(batch["profile"][:, 0].tolist())) == 3
    config = card("two-tower").resolve_config(None, **{k: v for k, v in dims.items() if k != "length"})
    network = card("two-tower").make(config)
    task.objective(network, card("two-tower"), Settings())
    kinds = {r["item_id"]: r["kind"] for r in read(tmp_path / "items.csv").rows.to_dicts()}
    codes = network.item_codes[1:, 0].tolist()
    assert [goods.categories[0].values[c - 1] for c in codes] == [kinds[i] for i in task.items] and network.item_codes[
        0, 0
    ] == 0


def test_requests_need_no_features(tmp_path):
    _, task = fitted(events(tmp_path))
    for request in (pl.DataFrame({"user_id": ["u1", "u1"], "item_id": task.items[:2], "timestamp": [1, 2]}), task.items[0]):
        data = task.read([request])
        batch = task.predict_batches(data, card("two-tower")).make(np.arange(1), None)
        assert batch["profile"].shape == (1, 2) and (batch["profile"][0, 1] > 0) == isinstance(request, pl.DataFrame)


def test_tables_of_users_and_items_give_the_same(tmp_path):
    path = events(tmp_path, extra=False)
    _, task = fitted(path, user_table=str(tmp_path / "users.csv"), item_table=str(tmp_path / "items.csv"))
    (tmp_path / "wide").mkdir()
    _, wide = fitted(events(tmp_path / "wide"))
    for one, other in ((task.users, wide.users), (task.goods, wide.goods)):
        ids = one.table["#id"].to_list()
        for a, b in zip(one.apply(ids), other.apply(ids)):
            np.testing.assert_allclose(a, b)
    codes, numbers = task.goods.apply(["i1", "nothing"])
    assert codes[0].any() and not codes[1].any() and not numbers[1].any()


def test_damaged_tables(tmp_path):
    path = events(tmp_path, extra=False)
    twice = tmp_path / "twice.csv"
    twice.write_text("user_id,age\nu1,3\nu1,4\nu2,5\n" + "\n".join(f"v{i},{i}" for i in range(20)) + "\n")
    with pytest.raises(DataError, match=r"1 users have several rows \(u1\)"):
        fitted(path, user_table=str(twice))
    empty = tmp_path / "empty.csv"
    empty.write_text("user_id\n" + "\n".join(f"u{i}" for i in range(20)) + "\n")
    with pytest.raises(DataError, match="no usable feature columns"):
        read_features(str(empty), "user")
    with pytest.raises(DataError, match="missing"):
        fitted(path, item_table=str(tmp_path / "missing.csv"))


def test_retrieval_uses_features(tmp_path):
    """Users like one kind: far above popularity, and worse when the features of items are shuffled."""
    path = events(tmp_path, extra=False)
    settings = {
        "steps": 150,
        "batch": 64,
        "precision": "float32",
        "evaluate": 50,
        "task.item_table": str(tmp_path / "items.csv"),
    }
    run = fit(path, model="two-tower", task="recommendation", out=tmp_path / "run", settings=settings, minutes=2)
    others = {b["name"]: b["scores"]["ndcg_10"] for b in run.record["scores"]["baselines"]}
    assert run.scores["hr_10"] > 0.7 and run.scores["ndcg_10"] > 1.5 * others["popularity"]
    (tmp_path / "items.csv").unlink()  # the features are part of the run
    again = Run(tmp_path / "run")
    assert again.evaluate(path)["scores"] == pytest.approx(run.scores)
    known = again.predict(["u1"], count=3)[0]
    assert len(known["items"]) == 3
    new = again.predict(pl.DataFrame({"user_id": ["x", "x"], "item_id": known["items"][:2], "timestamp": [1, 2]}), count=5)[0]
    kinds = dict(zip(again.task.goods.table["#id"], again.task.goods.table["kind"]))
    liked = kinds[known["items"][0]]
    assert sum(kinds[i] == liked for i in new["items"]) >= 4  # a user without a profile, by the history alone
