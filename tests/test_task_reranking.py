"""Reranking: reading queries with passages, the objectives, and training from files to rankings."""

from __future__ import annotations

import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from damage import refused
from fieldguide import open_run
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import BadData, read, split
from fieldguide.data.preprocessing.text_pairs import PASSAGES_COLUMN, RELEVANCE_COLUMN
from fieldguide.models.registry import card
from fieldguide.objectives.reranking import Reranking
from fieldguide.tasks import task
from test_models import tiny

KIND = task("reranking")
WORDS = "red green blue black white pink gray brown gold amber".split()
ROWS = [
    {"query": f"what is {w}", "passage": f"{other} is a color", "label": int(w == other)}
    for i, w in enumerate(WORDS)
    for other in (w, WORDS[i - 1], WORDS[i - 2])
]


def examples(source, **options):
    chosen = KIND.options_from(options)
    return KIND.build_examples(KIND.select_columns(read(source, column_spec=KIND.column_spec)), chosen), chosen


def build(source, **options):
    """Return the fitted task and its examples."""
    data, chosen = examples(source, **options)
    return KIND.fit(data, chosen), data


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("format", ["csv", "jsonl"])
@pytest.mark.parametrize("form", ["rows", "negatives", "list"])
def test_formats(form, format, tmp_path):
    rows = ROWS
    if form != "rows":
        key = {"negatives": ("negative_1", "negative_2"), "list": ("negatives",)}[form]
        rows = []
        for i in range(0, len(ROWS), 3):
            wrong = [row["passage"] for row in ROWS[i + 1 : i + 3]]
            values = wrong if form == "negatives" else [json.dumps(wrong) if format == "csv" else wrong]
            rows.append({"query": ROWS[i]["query"], "positive": ROWS[i]["passage"], **dict(zip(key, values))})
    path = tmp_path / f"data.{format}"
    if format == "csv":
        pl.DataFrame(rows).write_csv(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    fitted, data = build(path)
    assert len(data) == 10 and fitted.options.least == 1
    assert data.rows[PASSAGES_COLUMN].to_list() == [[row["passage"] for row in ROWS[i : i + 3]] for i in range(0, 30, 3)]
    assert data.rows[RELEVANCE_COLUMN].to_list() == [[1, 0, 0]] * 10
    assert data.locate_row(1) == f"data.{format}:{5 + (format == 'csv') - 1 if form == 'rows' else 2 + (format == 'csv')}"


def test_queries_are_never_parted():
    rng = np.random.default_rng(0)
    rows = [ROWS[i] for i in rng.permutation(len(ROWS))]
    rows[3] = {**rows[3], "query": rows[3]["query"].upper() + " "}
    data, _ = examples(pl.DataFrame(rows))
    assert len(data) == 10 and data.rows[PASSAGES_COLUMN].list.len().to_list() == [3] * 10
    made = split(data)
    assert len({*made.train, *made.validation, *made.test}) == 10
    given = pl.DataFrame([{**row, "split": "test" if i == 4 else "train"} for i, row in enumerate(ROWS)])
    data, _ = examples(given)
    assert data.splits.tolist() == ["train"] * 10
    assert [f.check for f in data.findings if f.check == "mixed-splits"]


@pytest.mark.parametrize(
    ("check", "change"),
    [("empty-anchor", {"query": " "}), ("empty-positive", {"passage": ""}), ("no-score", {"label": "perhaps"})],
)
def test_damaged_rows_are_found(check, change):
    rows = [{**row, "label": str(row["label"])} for row in ROWS]
    rows[0] |= change
    with refused(check, ":1"):
        read(pl.DataFrame(rows), column_spec=KIND.column_spec)


def test_data_that_cannot_be_ranked():
    data, _ = examples(pl.DataFrame([*ROWS, {**ROWS[0], "label": 0}]))
    assert data.rows[RELEVANCE_COLUMN][0].to_list() == [1, 0, 0]
    assert next(f for f in data.findings if f.check == "conflicting-labels").count == 1
    with pytest.raises(BadData, match="all scores are 1"):
        read(pl.DataFrame([{**row, "label": 1} for row in ROWS]), column_spec=KIND.column_spec)
    with pytest.raises(DataError, match="neither a column of labels nor one of negatives"):
        examples(pl.DataFrame([{k: v for k, v in row.items() if k != "label"} for row in ROWS]))
    alone = [{**row, "label": int(i < 15)} for i, row in enumerate(ROWS)]
    with pytest.raises(DataError, match="has both a relevant passage"):
        build(pl.DataFrame(alone))
    data, options = examples(pl.DataFrame(alone))
    with pytest.raises(DataError, match="no query of the test rows"):
        KIND.check_split(data, "test", options)
    with pytest.raises(DataError, match="not valid JSON"):
        read(pl.DataFrame([{"query": "a", "positive": "b", "negatives": '["c'}]), column_spec=KIND.column_spec)
    for options, words in (({"loss": "pairwise"}, "pointwise or listwise"), ({"candidates": 1}, "at least 2")):
        with pytest.raises(SettingsError, match=words):
            build(pl.DataFrame(ROWS), **options)


def test_graded_and_fractional_labels():
    graded = [{**row, "label": 2 * row["label"] + i % 2} for i, row in enumerate(ROWS)]
    fitted, data = build(pl.DataFrame(graded))
    assert (fitted.options.least, fitted.highest) == (1, 3)
    batch = fitted.batches(data, card("bert"), Settings()).make(np.arange(2), None)
    torch.testing.assert_close(batch["relevance"] * 3, torch.tensor([2.0, 1, 0, 3, 0, 1]))
    scored = [{**row, "label": 0.1 + 0.8 * row["label"]} for row in ROWS]
    assert build(pl.DataFrame(scored))[0].options.least == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ objective


def slow_loss(logits, query, relevance, loss):
    """The losses by their definitions, one pair or query at a time."""
    if loss == "pointwise":
        terms = [
            -(r * torch.log(torch.sigmoid(x)) + (1 - r) * torch.log(1 - torch.sigmoid(x))) for x, r in zip(logits, relevance)
        ]
        return sum(terms) / len(terms)
    terms = []
    for q in sorted(set(query)):
        mine = [i for i in range(len(query)) if query[i] == q]
        total = sum(torch.exp(logits[i]) for i in mine)
        mass = sum(relevance[i] for i in mine)
        if mass > 0:
            terms.append(-sum(relevance[i] / mass * torch.log(torch.exp(logits[i]) / total) for i in mine))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
def test_loss_and_gradients_equal_the_equations(loss, dtype):
    model = tiny("bert", dtype, output_type="label", num_classes=1)
    torch.manual_seed(0)
    query, relevance = [0, 0, 0, 1, 1, 2, 2], [1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0]
    batch = {
        "tokens": torch.randint(5, 20, (7, 6)),
        "mask": torch.ones(7, 6, dtype=torch.bool),
        "query": torch.tensor(query),
        "relevance": torch.tensor(relevance),
    }
    objective = Reranking(model, ("tokens", "mask"), loss)
    found = objective(batch)["loss"]
    wanted = slow_loss(model(batch["tokens"], batch["mask"])[:, 0], query, relevance, loss)
    names = [name for name, _ in model.named_parameters()]
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (found, wanted))
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found, wanted.to(found.dtype), **close)
    for name, a, b in zip(names, ours, theirs):
        torch.testing.assert_close(a, b, msg=name, **close)
    nothing = {**batch, "relevance": torch.zeros(7)}
    if loss == "listwise":
        assert objective(nothing)["loss"] == 0  # no relevant passage at all
        large = Reranking(lambda tokens, mask: 1e4 * model(tokens, mask), ("tokens", "mask"), loss)
        assert large(batch)["loss"].isfinite()


def test_steps_draw_candidates_with_a_relevant_one():
    rows = [{"query": w, "positive": f"{w} yes", "negatives": [f"{w} no {i}" for i in range(9)]} for w in WORDS]
    fitted, data = build(pl.DataFrame(rows), candidates=3)
    batches = fitted.batches(data, card("bert"), Settings())
    drawn = [batches.make(np.arange(10), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0]["slot"], drawn[1]["slot"]) and not torch.equal(drawn[0]["slot"], drawn[2]["slot"])
    assert drawn[0]["relevance"].view(10, 3).sum(1).tolist() == [1] * 10 and len(set(drawn[0]["slot"].tolist())) > 4
    whole = batches.make(np.array([4, 2]), None)
    assert whole["slot"].tolist() == [*range(10)] * 2 and whole["query"].tolist() == [0] * 10 + [1] * 10
    decoded = fitted.text.decode(whole["tokens"][0][whole["mask"][0]].tolist())
    assert "white" in decoded and "white yes" in decoded
    second = whole["segments"][0][whole["mask"][0]]
    assert second[0] == 0 and second[-1] == 1 and (second.diff() >= 0).all()


def test_metrics_leave_out_queries_with_nothing_to_order():
    fitted, _ = build(pl.DataFrame(ROWS))
    nan = math.nan
    relevance = np.array([[0, 1, 0, 1], [1, 0, nan, nan], [0, 0, nan, nan], [1, 1, nan, nan]])
    logits = np.array([[0.3, 0.2, 0.1, 0.0], [1.0, 2.0, nan, nan], [1.0, 2.0, nan, nan], [1.0, 2.0, nan, nan]])
    scores = fitted.score({"logits": logits}, {"relevance": relevance})
    dcg, ideal = 1 / math.log2(3) + 1 / math.log2(5), 1 + 1 / math.log2(3)
    assert scores == pytest.approx(
        {
            "ndcg_10": (dcg / ideal + 1 / math.log2(3)) / 2,
            "mrr_10": 0.5,
            "map": ((1 / 2 + 2 / 4) / 2 + 1 / 2) / 2,
            "recall_1": 0,
        }
    )
    assert "2 of 4 queries are not scored" in fitted.find_doubts({"relevance": relevance})[0]


# ------------------------------------------------------------------------------------------------ fit


def make_table(count=400):
    """Passages that begin with the color that the query asks for are relevant; words are shared by all."""
    rng = np.random.default_rng(0)
    codes = dict(zip(WORDS[:4], ("one", "two", "three", "four")))
    rows = []
    for i in range(count):
        w = WORDS[rng.integers(4)]
        order = rng.permutation(WORDS[:4])
        rows += [{"query": f"number {i} for {w}", "passage": f"{codes[one]} it is", "label": int(one == w)} for one in order]
    return pl.DataFrame(rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = {"steps": 100, "evaluate": 50, "batch": 32, "precision": "float32", "lr": 5e-3, "task.loss": "listwise"}
    settings |= {"model.dim": 32, "model.hidden": 64, "task.vocab_size": 400}
    out = tmp_path_factory.mktemp("runs") / "codes"
    return fit(make_table(), task="reranking", model="bert-test", out=out, settings=settings)


@pytest.mark.slow
def test_network_learns(run):
    assert run.scores["mrr_10"] > 0.9 and run.scores["ndcg_10"] > 0.9
    baseline = run.record["scores"]["baselines"][0]
    assert baseline["name"] == "BM25" and baseline["scores"]["mrr_10"] < 0.7
    page = (run.path / "report.html").read_text()
    assert "Rank of the first relevant passage" in page and "Random queries" in page


def test_predictions(run):
    rows = make_table(6)
    records = open_run(run.path).predict(rows.drop("label").sample(fraction=1, shuffle=True, seed=1))
    assert len(records) == 24 and sorted(r["rank"] for r in records) == sorted([1, 2, 3, 4] * 6)
    by_rank = {(r["rank"] == 1) for r in records}
    assert by_rank == {True, False}
    ordered = run.predict(rows.drop("label"))
    found = [rows["label"][i] for i, record in enumerate(ordered) if record["rank"] == 1]
    assert np.mean(found) > 0.8
    for first in range(0, 24, 4):
        each = ordered[first : first + 4]
        assert sorted(each, key=lambda r: -r["score"]) == sorted(each, key=lambda r: r["rank"])
    with pytest.raises(DataError, match="reads queries with passages"):
        run.predict("just a text")
    with pytest.raises(DataError, match="'passage'"):
        run.predict(rows.select("query"))


def test_evaluation(run):
    whole = run.evaluate(make_table())
    assert whole["rows"] == 80 and whole["scores"] == pytest.approx(run.scores)
    new = run.evaluate(make_table(60).with_columns(pl.col("query").str.replace("number ", "number 7000")))
    assert new["rows"] == 60 and new["scores"]["mrr_10"] > 0.55
    with pytest.raises(DataError, match="neither a column of labels"):
        run.evaluate(make_table(9).drop("label"))


def test_pointwise_scores_are_probabilities(tmp_path):
    settings = {"steps": 4, "batch": 8, "precision": "float32"}
    made = fit(make_table(60), task="reranking", model="bert-test", out=tmp_path / "run", settings=settings)
    scores = [record["score"] for record in made.predict(make_table(3).drop("label"))]
    assert all(0 < score < 1 for score in scores)
    assert made.signature.record[0].high == 1 and made.signature.record_for == "pair"
