"""BERT4Rec and HSTU: what their ports get wrong, and training to a floor."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from cases import hstu_equations
from fieldguide.automl.fit import fit
from fieldguide.automl.resume import resume
from fieldguide.core.errors import SettingsError
from fieldguide.data import read
from fieldguide.models.registry import card, create
from fieldguide.models.transformer.hstu import find_buckets
from fieldguide.objectives.masked_items import MaskedItems, choose_hidden, join_history
from fieldguide.objectives.next_item import NextItem
from fieldguide.tasks.recommendation.recommendation import ITEMS_COLUMN, TIMES_COLUMN, Recommendation
from fieldguide.training.state import Interrupted
from test_models import tiny
from test_task_recommendation import clicks
from test_tasks_resume import StopAt


def histories(*sizes: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return items padded on the left, and the item after each."""
    items, target = torch.zeros(2, len(sizes), width, dtype=torch.int64)
    for row, size in enumerate(sizes):
        whole = torch.randint(1, 30, (size + 1,))
        items[row, width - size :], target[row, width - size :] = whole[:-1], whole[1:]
    return items, target


# BERT4Rec


def test_history_is_read_with_its_last_item():
    torch.manual_seed(0)
    items, target = histories(1, 5, 8)
    whole, real = join_history(items, target)
    for row, size in enumerate((1, 5, 8)):
        wanted = [*items[row, 8 - size :].tolist(), int(target[row, -1])][-8:]
        assert whole[row][real[row]].tolist() == wanted


def test_hidden_items_follow_the_published_rule():
    """The rounded share of each history, at least one; in one row of eleven the last item alone."""
    torch.manual_seed(0)
    real = (torch.arange(20) >= torch.tensor([19, 10, 0])[:, None]).repeat(4000, 1)
    hidden = choose_hidden(real, 0.2)
    assert not (hidden & ~real).any()
    for first, count in ((0, 1), (1, 2), (2, 4)):
        rows = hidden[first::3]
        only = (rows.sum(1) == 1) & rows[:, -1]
        assert count == 1 or abs(float(only.float().mean()) - 1 / 11) < 0.02
        assert set(rows.sum(1).tolist()) == {1, count}
    assert torch.equal(choose_hidden(real, 0.0).nonzero()[:, 1], torch.full((12_000,), 19))


def test_loss_of_hidden_items_by_hand():
    torch.manual_seed(0)
    model = tiny("bert4rec").double()
    torch.nn.init.normal_(model.bias)
    items, target = histories(3, 8)
    objective = MaskedItems(model, ("items", "mask")).eval()
    loss = objective({"items": items, "mask": items > 0, "target": target})["loss"]
    whole, real = join_history(items, target)
    shown = whole.clone()
    shown[:, -1] = 0
    logits = model(shown, real)[:, -1, 1:]  # item 0 is no answer
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target[:, -1] - 1), rtol=1e-5, atol=1e-6)
    other = whole.clone()
    other[:, -1] = 7  # what is hidden is never read
    found = objective.model.features(other.masked_fill(choose_hidden(real, 0.0), 0), real)
    assert torch.equal(found, model.features(shown, real))


def test_next_item_is_a_hidden_place_after_the_last():
    """A history that fills the model loses its first item; positions count from the first item that is left."""
    torch.manual_seed(0)
    model = tiny("bert4rec")
    items = torch.randint(1, 30, (2, 12))
    mask = torch.arange(12) >= torch.tensor([[0], [9]])
    scores = model.score_next(items, mask)
    full = torch.cat([items[:1, 1:], torch.zeros(1, 1, dtype=torch.int64)], 1)
    torch.testing.assert_close(scores[:1], model(full)[:, -1])
    short = torch.cat([items[1:, 9:], torch.zeros(1, 1, dtype=torch.int64)], 1)
    torch.testing.assert_close(scores[1:], model(short)[:, -1])


def test_scores_after_the_latest_item_are_those_of_the_last_place():
    """Of item neighbors, whose scores of all places and of the last one are computed apart; gaps in a history count as no item."""
    torch.manual_seed(0)
    model = tiny("item-neighbors").double()
    items = torch.randint(1, 30, (4, 7))
    items[1, 3] = items[2, :4] = items[3, -1] = 0
    mask = torch.ones_like(items, dtype=torch.bool)
    torch.testing.assert_close(model.score_next(items, mask), model(items, mask)[:, -1])


# HSTU


def test_times_enter_the_attention():
    """Equal to the equations; rows are the moments of the next items, in buckets of natural logarithms over .301."""
    torch.manual_seed(0)
    model = tiny("hstu").double()
    for block in model.blocks:
        torch.nn.init.normal_(block.time_bias)
    items, mask = torch.randint(1, 30, (2, 6)), torch.arange(6) < torch.tensor([[6], [4]])
    moments = torch.randint(0, 10**6, (2, 7)).cumsum(1)
    times = torch.stack([moments[:, :-1], moments[:, 1:]], -1)
    wanted = hstu_equations(model.config)(dict(model.named_parameters()), items, mask, times)
    got = model(items, mask, times)
    torch.testing.assert_close(got[mask], wanted[mask], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(got[mask], model(items, mask)[mask])
    later = times.clone()
    later[:, -1, 1] += 10**6  # the request comes later: only the last place differs
    changed = model(items, mask, later)
    assert torch.equal(changed[0, :-1], got[0, :-1]) and not torch.allclose(changed[0, -1], got[0, -1])
    assert find_buckets(torch.tensor([[[0, 0]]])).item() == 0 and find_buckets(torch.tensor([[[0, 2**62]]])).item() == 128
    assert find_buckets(torch.tensor([[[5, 105]]])).item() == int(np.log(100) / 0.301)


def test_attention_keeps_how_often_something_occurs():
    """Weights do not sum to 1: twice the same items give another state before the norm, and each item adds its part."""
    model = tiny("hstu").double()
    block = model.blocks[0]
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    outputs = []
    block.out.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    for count in (1, 2):
        steps = torch.zeros(count, count, dtype=torch.int64)
        block(x.expand(1, count, 8), steps, None, torch.ones(1, count, count, dtype=torch.bool))
    gate = block.uvqk(F.layer_norm(x, (8,), eps=1e-6)).split(block.widths, -1)[0]
    first, second = (y[:, :1] / F.silu(gate) for y in outputs)
    torch.testing.assert_close(first, second, rtol=0.2, atol=0.2)  # the norm after it takes out the scale, but for its epsilon
    with pytest.raises(SettingsError, match="above 0"):
        create("hstu-test", temperature=0.0)


def test_batches_have_the_moments_of_items(tmp_path):
    rows = [(f"u{u}", f"i{(u + t) % 9}", 1000 * u + t * t) for u in range(6) for t in range(5)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    for dates in (False, True):
        if dates:
            frame = frame.with_columns(pl.from_epoch("timestamp", "s"))
        data = read(frame, column_spec=Recommendation.column_spec)
        made = Recommendation.build_examples(data, Recommendation.Options())
        part = lambda name: made.take(np.flatnonzero(made.splits == name))  # noqa: B023
        task = Recommendation.fit(part("train"), Recommendation.options_from({"length": "4"}))
        assert part("test").rows[TIMES_COLUMN].to_list()[1] == [1000 + t * t for t in range(5)]
        batch = task.batches(part("test"), card("hstu")).make(np.array([1]), None)
        assert batch["times"][0].tolist() == [[1000, 1001], [1001, 1004], [1004, 1009], [1009, 1016]]
        window = task.loss_batches(part("train"), card("hstu"), None).make(np.array([1]), None)
        assert window["times"][0].tolist() == [[0, 0], [0, 0], [1000, 1001], [1001, 1004]]
        assert window["items"][0].tolist()[:2] == [0, 0]
        task.prepare_test(part("train"), part("test"))
        asked = task.predict_batches(part("train"), card("hstu")).make(np.array([1]), None)
        assert asked["times"][0].tolist()[-1] == [1004, 5016]  # the latest moment that is known
        assert "times" not in task.batches(part("test"), card("sasrec")).make(np.array([1]), None)
        named = task.read_one("u1", False)
        assert task.histories(named, task.Options())[0][TIMES_COLUMN].to_list() == [[1000 + t * t for t in range(5)]]
        assert named.rows["item_id"].to_list() == part("test").rows[ITEMS_COLUMN].to_list()[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("bert4rec-ml1m", {"lr": 6e-3, "model.hidden_share": 0.4}), ("hstu-ml1m", {})])
def test_learns_the_order_of_items(tmp_path, name, settings):
    steps = {"steps": 200, "precision": "float32", "evaluate": 100, "batch": 64}
    run = fit("series", model=name, out=tmp_path / "run", settings=steps | settings, minutes=2)
    others = {b["name"]: b["scores"]["ndcg_10"] for b in run.record["scores"]["baselines"]}
    assert run.scores["ndcg_10"] > 0.6 and run.scores["ndcg_10"] > 1.3 * others["popularity"]
    assert run.predict(["tides-1,tides-2,tides-3"], count=3)[0]["items"][0] == "tides-4"
    assert run.evaluate("series")["scores"] == pytest.approx(run.scores)


@torch.no_grad()
def test_sampled_negatives_serve_hidden_items():
    """As for `NextItem`: with many samples the loss is that over all items."""
    torch.manual_seed(0)
    model = tiny("bert4rec")
    items, target = histories(3, 8)
    batch = {"items": items, "mask": items > 0, "target": target}
    whole = MaskedItems(model, ("items", "mask")).eval()(batch)["loss"]
    drawn = MaskedItems(model, ("items", "mask"), [0] + [1] * 29, negatives=60_000).eval()(batch)["loss"]
    assert abs(float(whole - drawn)) < 0.02 and issubclass(MaskedItems, NextItem)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert4rec-test", "hstu-test", "two-tower-test"])
def test_resumed_runs_are_the_same_to_the_bit(name, tmp_path):
    arguments = {"model": name, "settings": {"steps": 6, "evaluate": 2, "batch": 8, "precision": "float32"}}
    check_resumed("series", tmp_path, arguments)


@pytest.mark.slow
def test_resumed_with_sparse_gradients(tmp_path):
    settings = {
        "steps": 6,
        "evaluate": 2,
        "batch": 8,
        "precision": "float32",
        "task.positive": 4,
        "embedding_optimizer": "adagrad",
    }
    arguments = {"model": "dlrm-s", "task": "click-prediction", "target": "rating", "settings": settings}
    check_resumed(clicks(tmp_path / "clicks.csv", 400), tmp_path, arguments)


def check_resumed(source, folder, arguments) -> None:
    whole = fit(source, out=folder / "whole", **arguments)
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        fit(source, out=folder / "stopped", callback=StopAt(3), **arguments)
    again = resume(folder / "stopped")
    for file in whole.path.glob("*.safetensors"):
        assert file.read_bytes() == (again.path / file.name).read_bytes()
    assert again.scores == whole.scores
