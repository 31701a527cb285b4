"""Recommendation: from events to ranked items; scores over all items against a slow count; damaged events."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.splits import split
from fieldguide.data.validation.checks import BadData
from fieldguide.models import registry
from fieldguide.objectives.next_item import NextItem, rank_items
from fieldguide.tasks.recommendation.recommendation import ITEMS_COLUMN, Recommendation
from fieldguide.training import solvers
from test_models import tiny


def asked(source, task=None, **more):
    return read_for(
        {
            "data": str(source),
            "target": None,
            "kinds": {},
            "roles": {},
            "group": None,
            "time": None,
            "allow_bad": False,
            "task": task,
            **more,
        }
    )


EVENTS = [
    ("ann", "tea", 3),
    ("bob", "jam", 1),
    ("ann", "jam", 1),
    ("ann", "bun", 9),
    ("bob", "tea", 2),
    ("ann", "egg", 12),
    ("cy", "bun", 5),
    ("cy", "tea", 6),
    ("cy", "jam", 7),
    ("bob", "nut", 4),
    ("dee", "tea", 1),
    ("dee", "egg", 2),
]


def table(path, events=EVENTS, header="user_id,item_id,timestamp"):
    path.write_text("\n".join([header, *(",".join(map(str, e)) for e in events)]) + "\n")
    return path


def test_leave_last_out(tmp_path):
    data, kind, _ = asked(table(tmp_path / "events.csv"))
    assert kind is Recommendation and {c.name: c.role for c in data.columns.values()} == {
        "user_id": "user",
        "item_id": "item",
        "timestamp": "time",
    }
    made = kind.build_examples(data, kind.Options())
    parts = split(made)
    got = {
        name: {r["user_id"]: r[ITEMS_COLUMN] for r in made.take(rows).rows.to_dicts()}
        for name, rows in (("train", parts.train), ("val", parts.validation), ("test", parts.test))
    }
    assert got["test"] == {"ann": ["jam", "tea", "bun", "egg"], "bob": ["jam", "tea", "nut"], "cy": ["bun", "tea", "jam"]}
    assert got["val"] == {"ann": ["jam", "tea", "bun"], "bob": ["jam", "tea"], "cy": ["bun", "tea"]}
    assert got["train"] == {"ann": ["jam", "tea"], "bob": ["jam"], "cy": ["bun"], "dee": ["tea", "egg"]}
    found = next(f for f in made.findings if f.check == "few-items")
    assert found.count == 1 and found.places == ("events.csv:12",)
    least = kind.build_examples(
        asked(table(tmp_path / "rated.csv", [(*e[:2], i % 5, e[2]) for i, e in enumerate(EVENTS)], "user,item,rating,time"))[0],
        kind.options_from({"least": "1"}),
    )
    assert sum(map(len, least.take(np.flatnonzero(least.splits == "test")).rows[ITEMS_COLUMN].to_list())) < 10


def learnt(tmp_path, **options):
    data, kind, _ = asked(table(tmp_path / "events.csv"))
    made = kind.build_examples(data, kind.options_from(options))
    return made, kind.fit(made.take(np.flatnonzero(made.splits == "train")), kind.options_from(options))


def test_training_never_includes_the_targets(tmp_path):
    made, task = learnt(tmp_path)
    assert sorted(task.items) == ["bun", "egg", "jam", "tea"]  # nut is met in the test part alone
    test = made.take(np.flatnonzero(made.splits == "test"))
    assert [task.items[i - 1] if i else None for i in task.targets(test)["item"]] == ["egg", None, "jam"]
    batch = task.batches(test, None).make(np.arange(3), None)
    for row, (user, before) in enumerate((("ann", ["jam", "tea", "bun"]), ("bob", ["jam", "tea"]), ("cy", ["bun", "tea"]))):
        assert [task.items[i - 1] for i in batch["items"][row] if i > 0] == before, user
    assert batch["next_item"].tolist() == task.targets(test)["item"].tolist()


@pytest.mark.parametrize("chance", [None, 0, 1, 2])
def test_windows_contain_consecutive_items(tmp_path, chance):
    _, task = learnt(tmp_path, length=4)
    histories = [np.arange(1, n + 1) for n in (2, 3, 5, 9, 14)]
    batches = task.windows(histories)
    generator = None if chance is None else torch.Generator().manual_seed(chance)
    batch = batches.make(np.arange(len(batches)), generator)
    met = set()
    for items, target, mask in zip(batch["items"], batch["target"], batch["mask"]):
        assert (mask == (items > 0)).all() and (items > 0).sum() == (target > 0).sum()
        real = items > 0
        assert (target[real] == items[real] + 1).all()  # here items are numbered as they follow
        met |= set(target[real].tolist())
    if chance is None:
        assert len(batches) == sum(-(-(len(h) - 1) // 4) for h in histories) and met == set(range(2, 15))


def test_ranks_are_over_all_items():
    torch.manual_seed(0)
    scores = torch.randn(40, 25).round(decimals=1)  # with ties
    seen = torch.randint(0, 25, (40, 6))
    target = torch.randint(0, 25, (40,))
    for repeats in (False, True):
        got = rank_items(scores, seen, target, repeats)
        for row in range(40):
            out = {0} | (set() if repeats else set(seen[row].tolist()))
            left = {i: float(scores[row, i]) for i in range(25) if i not in out}
            t = int(target[row])
            wanted = (
                float("inf")
                if t not in left
                else 1 + sum(v > left[t] for v in left.values()) + (sum(v == left[t] for v in left.values()) - 1) / 2
            )
            assert float(got["rank"][row]) == wanted
            best = [i for i in got["top"][row].tolist() if i]
            assert len(best) == len(left) and sorted(best) == sorted(left)
            assert [left[i] for i in best] == sorted(left.values(), reverse=True)


def test_scores_by_hand(tmp_path):
    _, task = learnt(tmp_path)
    got = task.score({"rank": np.array([1, 3, 11, np.inf])}, {})
    assert got["hr_10"] == 0.5 and got["hr_20"] == 0.75 and got["hr_5"] == 0.5
    assert got["ndcg_10"] == pytest.approx((1 + 1 / np.log2(4)) / 4) and got["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11) / 4)


def test_objective_equals_the_softmax_over_items():
    model = tiny("sasrec").double()
    items = torch.randint(1, 30, (4, 7))
    items[0, :3], items[2, :5] = 0, 0
    target = torch.where(items > 0, torch.randint(1, 30, (4, 7)), 0)
    batch = {"items": items, "mask": items > 0, "target": target}
    logits = model(items, items > 0)
    flat, wanted = logits[items > 0][:, 1:], target[items > 0] - 1
    whole = NextItem(model, ("items", "mask"))(batch)["loss"]
    torch.testing.assert_close(whole, F.cross_entropy(flat.float(), wanted), rtol=1e-5, atol=1e-6)
    smooth = NextItem(model, ("items", "mask"), smoothing=0.1)(batch)["loss"]
    torch.testing.assert_close(smooth, F.cross_entropy(flat.float(), wanted, label_smoothing=0.1), rtol=1e-5, atol=1e-6)


def test_sampled_softmax_is_corrected():
    """With the correction, the sampled softmax approaches that over all items for any sampling distribution."""
    model = tiny("sasrec")
    items = torch.randint(1, 30, (6, 8))
    batch = {"items": items, "mask": items > 0, "target": torch.randint(1, 30, (6, 8))}
    counts = [0, *(1 + i * i for i in range(29))]
    torch.manual_seed(0)
    with torch.no_grad():
        whole = NextItem(model, ("items", "mask"))(batch)["loss"]
        drawn = NextItem(model, ("items", "mask"), counts, negatives=60_000)
        even = NextItem(model, ("items", "mask"), [0] + [1] * 29, negatives=60_000)
        assert abs(float(drawn(batch)["loss"] - whole)) < 0.02 and abs(float(even(batch)["loss"] - whole)) < 0.02


def test_baselines_by_hand(tmp_path):
    made, task = learnt(tmp_path)
    train, test = (made.take(np.flatnonzero(made.splits == s)) for s in ("train", "test"))
    task.prepare_test(train, test)
    (popular,) = task.baselines(train, test)
    # ann met jam, tea, bun before; of the known items only egg is left, so it is first for whoever ranks.
    assert popular.outputs["rank"][0] == 1 and np.isinf(popular.outputs["rank"][1])
    # cy met bun and tea; jam and egg were each met together with tea once, by users of two items, but jam by bob, too.
    number = {name: i + 1 for i, name in enumerate(task.items)}
    card = registry.card("item-neighbors")
    batches = task.train_batches(train, card, Settings())
    config = card.resolve_config(None, items=len(task.items) + 1)
    network = solvers.solve(solvers.Problem(card, config, batches, batches, lambda network: network.config.decay)).network
    objective = task.objective(network, card, Settings())
    outputs = objective.outputs(task.batches(test, card).make(np.arange(len(test)), None))
    assert outputs["top"][2][:2].tolist() == [number["egg"], number["jam"]] and outputs["rank"][2] == 2


def test_damaged_events(tmp_path):
    file = tmp_path / "events.csv"
    many = [(f"u{i % 40}", f"i{i * 7 % 30}", i) for i in range(400)]
    table(file, many)
    assert not [f for f in read(file, column_spec=Recommendation.column_spec).findings if f.unusable]
    table(file, [*many, ("", "i3", 9), ("u3", "", 10)])
    lost = [f for f in read(file, column_spec=Recommendation.column_spec).findings if f.check == "missing-key"]
    assert [(f.unusable, f.places) for f in lost] == [(1, ("events.csv:402",)), (1, ("events.csv:403",))]
    table(file, [*many, *many[:3]])
    found = {f.check: f for f in read(file, column_spec=Recommendation.column_spec).findings}
    assert found["repeated-event"].count == 3 and "events.csv:402" in found["repeated-event"].places[0]
    table(file, [(u, i, "soon" if t in (5, 8) else t) for u, i, t in many])
    found = {f.check: f for f in read(file, column_spec=Recommendation.column_spec).findings}
    assert found["mixed-types"].count == 2 and "events.csv:7" in found["mixed-types"].places
    table(file, [(u, i, "soon") for u, i, t in many])
    data = read(file, column_spec=Recommendation.column_spec)
    with pytest.raises(DataError, match="the time column 'timestamp' holds"):
        Recommendation.build_examples(data, Recommendation.Options())
    table(file, [("", i, t) for u, i, t in many])
    with pytest.raises(BadData, match="400 of 400"):
        read(file, column_spec=Recommendation.column_spec)
    table(file, [(f"u{k}", i, t) for k, (u, i, t) in enumerate(many)])
    with pytest.raises(DataError, match="no user has three or more items"):
        Recommendation.build_examples(read(file, column_spec=Recommendation.column_spec), Recommendation.Options())
    table(file, many, "who,what,timestamp")
    with pytest.raises(DataError, match=r"role\.user=COLUMN"):
        asked(file, "recommendation")
    data, *_ = asked(file, "recommendation", roles={"user": "who", "item": "what"})
    assert data.require_role("user").name == "who"
    file.write_bytes(file.read_bytes().replace(b"u7,", "ü7,".encode("latin-1")))
    data, *_ = asked(file, "recommendation", roles={"user": "who", "item": "what"})
    assert "ü7" in data.rows["who"].to_list()
    (tmp_path / "events.jsonl").write_text("\n".join(json.dumps({"user": u, "item": i, "time": t}) for u, i, t in many))
    assert asked(tmp_path / "events.jsonl")[1] is Recommendation


@pytest.mark.slow
def test_network_learns_the_next_item(tmp_path):
    run = fit("series", minutes=2, out=tmp_path / "run", settings={"steps": 260, "precision": "float32", "evaluate": 65})
    scores, others = run.scores, {b["name"]: b["scores"]["ndcg_10"] for b in run.record["scores"]["baselines"]}
    assert run.card.name == "sasrec" and scores["ndcg_10"] > 0.6 and scores["ndcg_10"] > 1.3 * others["popularity"]
    answer = run.predict(["tides-1,tides-2,tides-3"], count=3)[0]
    assert answer["items"][0] == "tides-4" and len(answer["items"]) == 3 and not {"tides-1", "tides-2"} & set(answer["items"])
    with pytest.raises(DataError, match="neither a user"):
        run.predict(["nobody"])
    viewer, events = run.task.known.columns[0], read("series", column_spec=run.task.column_spec).rows
    for name in events[viewer].unique(maintain_order=True)[:5]:
        met = set(events.filter(pl.col(viewer) == name)[next(c.name for c in run.task.columns if c.role == "item")])
        said = run.predict([name], count=len(run.task.items))[0]["items"]
        assert met and not met & set(said) and met | set(said) == set(run.task.items)
    data = pl.DataFrame({"viewer": ["x", "x"], "episode": ["mines-1", "mines-2"], "day": [1, 2]})
    named = {c.role: c.name for c in run.task.columns}
    data = data.rename({"viewer": named["user"], "episode": named["item"], "day": named["time"]})
    assert run.predict(data, count=1)[0]["items"] == ["mines-3"]
    again = run.evaluate("series")
    assert again["scores"] == pytest.approx(run.scores)
    page = (run.path / "report.html").read_text()
    assert "Popularity bias" in page and "Recommended" in page


# Click prediction


def clicks(path, rows=3000, seed=0):
    """Return clicks of users who mostly like items of their own kind."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, rows), rng.integers(0, 40, rows)
    liked = rng.random(rows) < np.where(user % 4 == item % 4, 0.9, 0.1)
    hour = rng.integers(0, 24, rows)
    pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in item],
            "hour": hour,
            "rating": np.where(liked, 4 + hour % 2, 1 + hour % 3),
        }
    ).write_csv(path)
    return path


def test_clicks_depend_on_user_and_item(tmp_path):
    run = fit(
        clicks(tmp_path / "clicks.csv"),
        task="click-prediction",
        target="rating",
        model="deepfm-s",
        out=tmp_path / "run",
        settings={"task.positive": 4, "steps": 400, "batch": 128, "precision": "float32", "evaluate": 50, "lr": 3e-3},
    )
    others = {b["name"]: b["scores"]["auc"] for b in run.record["scores"]["baselines"]}
    trees = others.pop("gradient-boosting")  # they can learn which pairs match
    assert run.scores["auc"] > 0.8 > trees and max(others.values()) < 0.65  # neither users nor items alone tell
    pairs = [(u, i) for u in range(12) for i in range(12)]
    rows = pl.DataFrame({"user_id": [f"u{u}" for u, _ in pairs], "item_id": [f"i{i}" for _, i in pairs], "hour": 3})
    yes = np.array([a["probabilities"]["yes"] for a in run.predict(rows)])
    likes = np.array([u % 4 == i % 4 for u, i in pairs])
    assert yes[likes].mean() > 0.6 > 0.4 > yes[~likes].mean()
    assert run.evaluate(clicks(tmp_path / "later.csv", 400, 1))["scores"]["auc"] > 0.8


def test_clicks_need_yes_or_no(tmp_path):
    file = clicks(tmp_path / "clicks.csv", 300)
    with pytest.raises(DataError, match=r"task\.positive=4"):
        fit(file, task="click-prediction", target="rating", out=tmp_path / "run")
    pl.read_csv(file).rename({"user_id": "who"}).write_csv(file)
    with pytest.raises(DataError, match=r"role\.user=COLUMN"):
        fit(file, task="click-prediction", target="rating", out=tmp_path / "run")
