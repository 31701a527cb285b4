"""Text embedding: reading pairs, the objective, metrics of rankings, and training from files to vectors."""

from __future__ import annotations

import json
import math

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from damage import checks, finding, refused
from fieldguide import load, open_run, pipeline
from fieldguide.automl.fit import fit
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import BadData, read, samples, split
from fieldguide.data.preprocessing.text_pairs import ANCHOR_GROUP, NEGATIVES_COLUMN, to_texts
from fieldguide.metrics.bm25 import BM25
from fieldguide.metrics.ranking import rank_groups, rank_relevant, score_queries
from fieldguide.models.registry import card, create
from fieldguide.objectives.embedding import Pooling
from fieldguide.objectives.text_pairs import KEY_BASE, TextPairs
from fieldguide.tasks import task

KIND = task("text-embedding")
WORDS = "red green blue black white pink gray brown gold amber".split()
PAIRS = [{"anchor": f"what is {w}", "positive": f"{w} is a color"} for w in WORDS]


def build(rows, folder=None, **options):
    """Return the fitted task and its examples."""
    source = pl.DataFrame(rows) if folder is None else folder
    chosen = KIND.options_from(options)
    data = KIND.build_examples(KIND.select_columns(read(source, column_spec=KIND.column_spec)), chosen)
    return KIND.fit(data, chosen), data


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (("anchor", "positive"), {"negative": "nothing"}),
        (("query", "passage"), {"negative_1": "nothing", "negative_2": "never"}),
        (("query", "pos"), {"neg": ["nothing", "never"]}),
        (("Question", "Answer"), {}),
        (("sentence1", "sentence2"), {"score": 0.5}),
        (("left", "right"), {"label": 1}),
    ],
)
@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_columns_and_formats(names, more, format, tmp_path):
    rows = [{names[0]: row["anchor"], names[1]: row["positive"], **more} for row in PAIRS]
    for number, row in enumerate(rows):
        for key in {"score", "label"} & row.keys():
            row[key] = number % 2
    path = tmp_path / f"data.{format}"
    if format == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        flat = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        pl.DataFrame(flat).write_csv(path)
    fitted, data = build(None, path)
    assert (fitted.options.anchor, fitted.options.positive) == names
    assert fitted.number_texts(data).anchors == [row["anchor"] for row in PAIRS]
    wrong = [text for key in more if key.startswith("neg") for text in to_texts(more[key])]
    assert data.rows[NEGATIVES_COLUMN].to_list() == [wrong] * len(rows)
    assert fitted.is_scored == bool({"score", "label"} & more.keys())


def test_several_positives_become_rows_and_stay_in_one_split():
    rows = [{"query": f"q {w}", "pos": [f"{w} {i}" for i in range(3)], "neg": ["x"]} for w in WORDS]
    _, data = build(rows)
    assert len(data) == 30 and data.columns[ANCHOR_GROUP].role == "group"
    made = split(data)
    parts = [set(data.rows["query"].to_numpy()[rows]) for rows in (made.train, made.validation, made.test)]
    assert all(parts) and sum(map(len, parts)) == len(WORDS)


def test_names_that_are_not_usual():
    rows = [{"a": r["anchor"], "b": r["positive"], "c": f"a note on {i}, again {i}"} for i, r in enumerate(PAIRS)]
    with pytest.raises(DataError, match=r"task.anchor=COLUMN"):
        build(rows)
    fitted, _ = build(rows, anchor="b", positive="a")
    assert fitted.options.anchor == "b"


DAMAGE = {
    "empty-anchor": {"anchor": " "},
    "empty-positive": {"positive": None},
    "malformed-list": {"negative": '["open'},
    "negative-is-positive": {"negative": "Red  is a color"},
    "equal-texts": {"positive": "what is red"},
    "no-score": {"score": "high"},
}


@pytest.mark.parametrize("check", DAMAGE)
def test_damage_is_found(check):
    more = {"score": "0.5"} if check == "no-score" else {"negative": "no color"}
    rows = [{**row, **more} for row in PAIRS]
    if check == "no-score":
        for i, row in enumerate(rows):
            row["score"] = str(i / 10)
    rows[0].update(DAMAGE[check])
    if check in ("negative-is-positive", "equal-texts"):
        data = read(pl.DataFrame(rows), column_spec=KIND.column_spec)
        assert finding(data, check).places == ("the table in memory:1",) or finding(data, check).count == 1
        return
    with refused(check, ":1"):
        read(pl.DataFrame(rows), column_spec=KIND.column_spec)
    kept = read(pl.DataFrame(rows), column_spec=KIND.column_spec, allow_bad=True)
    assert len(KIND.build_examples(kept, KIND.Options())) == len(PAIRS) - 1


def test_repeated_pairs_and_equal_scores():
    data = read(pl.DataFrame([*PAIRS, PAIRS[0]]), column_spec=KIND.column_spec)
    assert "duplicate-pair" in checks(data)
    with pytest.raises(BadData, match="all scores are 1"):
        read(pl.DataFrame([{**row, "score": 1} for row in PAIRS]), column_spec=KIND.column_spec)


def test_settings_that_cannot_work():
    for options, words in (
        ({"pooling": "mena"}, "'mena' is unknown"),
        ({"temperature": 0}, "must be above 0"),
        ({"matryoshka": "a"}, "widths such as"),
    ):
        with pytest.raises(SettingsError, match=words):
            build(PAIRS, **options)
    fitted, _ = build(PAIRS, matryoshka="16")
    with pytest.raises(SettingsError, match="the vectors have 8 numbers"):
        fitted.objective(create("bert-test", dim=8, output_type="vector"), card("bert"), Settings())


# ------------------------------------------------------------------------------------------------ objective


class Given(torch.nn.Module):
    """An encoder whose vectors are given: the first token of a text is its number."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = torch.nn.Parameter(vectors)

    def features(self, tokens, mask):
        return self.vectors[tokens]


def make_batch(anchors, passages, pairs):
    """Return a batch of texts by number; `pairs` are the known pairs of numbers."""
    column = lambda numbers: torch.tensor(numbers)[:, None]
    there = lambda numbers: torch.ones(len(numbers), 1, dtype=torch.bool)
    negatives = len(passages) - len(anchors)
    return {
        "anchor_tokens": column(anchors),
        "anchor_mask": there(anchors),
        "passage_tokens": column(passages),
        "passage_mask": there(passages),
        "anchor_id": torch.tensor(anchors),
        "passage_id": torch.tensor(passages),
        "known": torch.tensor([a * KEY_BASE + b for a, b in [*pairs, *((a, a) for a in anchors)]]),
        "negative_row": torch.arange(negatives),
        "negative_slot": torch.zeros(negatives, dtype=torch.int64),
    }


def info_nce(vectors, anchors, passages, known, temperature, symmetric, width):
    """The loss pair by pair, in plain Python: -log of the share of the right one among the allowed ones."""
    unit = lambda v: v[:width] / v[:width].norm()
    cos = lambda a, b: (unit(vectors[a]) * unit(vectors[b])).sum()
    terms = []
    for i, a in enumerate(anchors):
        allowed = [j for j, p in enumerate(passages) if j == i or ((a, p) not in known and p != a)]
        total = sum(torch.exp(cos(a, passages[j]) / temperature) for j in allowed)
        forward = -torch.log(torch.exp(cos(a, passages[i]) / temperature) / total)
        p = passages[i]
        others = [j for j, b in enumerate(anchors) if j == i or ((b, p) not in known and b != p)]
        total = sum(torch.exp(cos(anchors[j], p) / temperature) for j in others)
        back = -torch.log(torch.exp(cos(a, p) / temperature) / total)
        terms.append((forward + back) / 2 if symmetric else forward)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("symmetric", "widths"), [(False, ()), (True, ()), (False, (2, 4, 6))])
def test_loss_and_gradients_equal_the_equations(dtype, symmetric, widths):
    torch.manual_seed(0)
    anchors, passages = [0, 1, 2, 3], [4, 5, 4, 6, 7, 5, 0]  # 4 is the positive of two; 5 and 0 are negatives, too
    known = {(0, 4), (1, 5), (2, 4), (3, 6), (0, 6)}
    objective = TextPairs(Given(torch.randn(8, 6, dtype=dtype)), None, 0.3, symmetric, widths)
    loss = objective(make_batch(anchors, passages, sorted(known)))["loss"]
    loss.backward()
    vectors = objective.model.vectors.detach().clone().requires_grad_()
    each = [info_nce(vectors, anchors, passages, known, 0.3, symmetric, width) for width in widths or (6,)]
    expected = sum(each) / len(each)
    expected.backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss, expected, **tolerance)
    torch.testing.assert_close(objective.model.vectors.grad, vectors.grad, **tolerance)


def test_duplicates_of_a_positive_are_no_negatives():
    """Two anchors share their only passage: nothing is wrong, so there is nothing to learn, with ids that differ there is."""
    objective = TextPairs(Given(torch.randn(4, 6)), None, 0.1)
    batch = make_batch([0, 1], [2, 2], [(0, 2), (1, 2)])
    assert objective(batch)["loss"].item() == pytest.approx(0)
    batch["known"] = batch["known"][:0]
    assert objective(batch)["loss"].item() > 0.5
    rows = [{"anchor": f"q {i}", "positive": f"Answer  {i // 2}" if i % 2 else f"answer {i // 2}"} for i in range(10)]
    fitted, data = build(rows)
    made = fitted.batches(data, card("bert"), Settings()).make(np.arange(10), None)
    assert len(made["passage_id"].unique()) == 5  # texts are compared without case and spaces


def test_cosine_regression():
    torch.manual_seed(0)
    objective = TextPairs(Given(torch.randn(4, 6, dtype=torch.float64)))
    batch = make_batch([0, 1], [2, 3], []) | {"score": torch.tensor([0.2, 0.9])}
    v = objective.model.vectors
    cosine = F.cosine_similarity(v[:2], v[2:])
    assert objective(batch)["loss"].item() == pytest.approx(((cosine - torch.tensor([0.2, 0.9])) ** 2).mean().item(), abs=1e-7)
    assert set(objective.outputs(batch)) == {"anchor", "positive"}


def test_batches_draw_hard_negatives_and_evaluation_does_not():
    rows = [{**row, "negatives": [f"{row['positive']} {i}" for i in range(9)]} for row in PAIRS]
    fitted, data = build(rows, negatives=2)
    batches = fitted.batches(data, card("bert"), Settings())
    index = np.array([3, 7])
    drawn = [batches.make(index, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0]["passage_id"], drawn[1]["passage_id"]) and drawn[0]["passage_tokens"].shape[0] == 6
    assert not torch.equal(drawn[0]["passage_id"], drawn[2]["passage_id"])
    plain = batches.make(index, None)
    targets = fitted.targets(data)
    assert plain["passage_id"][2:].tolist() == targets["negatives"][index].ravel().tolist()
    assert plain["negative_row"].tolist() == [0, 0, 1, 1] and plain["negative_slot"].tolist() == [0, 1, 0, 1]


def test_prompts_and_lengths():
    rows = [{"query": row["anchor"], "passage": row["positive"]} for row in PAIRS]
    fitted, data = build(rows, query_prompt="query: ", passage_prompt="passage: ", length=12)
    made = fitted.batches(data, card("bert"), Settings()).make(np.arange(2), None)
    decode = lambda ids: fitted.text.decode(ids.tolist())
    assert decode(made["anchor_tokens"][0]).split()[0].startswith("query:") and "passage:" in decode(made["passage_tokens"][0])
    for query, words in ((True, "query:"), (False, "passage:")):
        request = fitted.for_request(KIND.PredictOptions(query=query))
        batch = request.predict_batches(request.read(["red"]), card("bert")).make(np.arange(1), None)
        assert words in decode(batch["tokens"][0])
    request = fitted.for_request(KIND.PredictOptions())
    assert request.predict_batches(request.read(["word " * 50]), card("bert")).make(np.arange(1), None)["tokens"].shape[1] == 12
    assert "longer than 12 tokens" in request.notes[0]


# ------------------------------------------------------------------------------------------------ metrics


def slow_metrics(scores, relevant):
    """Recall, MRR, NDCG and MAP of one query, by their definitions."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j in relevant))
    hits = [j in relevant for j in order]
    ideal = sum(1 / math.log2(2 + i) for i in range(min(10, len(relevant))))
    return {
        **{f"recall_{k}": sum(hits[:k]) / len(relevant) for k in (1, 5, 10)},
        "mrr_10": next((1 / (i + 1) for i, hit in enumerate(hits[:10]) if hit), 0),
        "ndcg_10": sum(hit / math.log2(2 + i) for i, hit in enumerate(hits[:10])) / ideal,
        "map": sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / len(relevant),
    }


def test_metrics_of_rankings():
    rng = np.random.default_rng(0)
    queries, candidates = (np.round(rng.normal(size=(n, 3))) for n in (40, 30))  # rounded: with ties
    relevant = [set(rng.choice(30, rng.integers(1, 5), replace=False).tolist()) for _ in range(40)]
    pairs = np.array([(q, c) for q, mine in enumerate(relevant) for c in sorted(mine)])
    found = score_queries(pairs[:, 0], rank_relevant(queries, candidates, pairs))
    expected = [slow_metrics(row, mine) for row, mine in zip((queries @ candidates.T).tolist(), relevant)]
    for name, values in found.items():
        np.testing.assert_allclose(values, [row[name] for row in expected], err_msg=name)
    ranks = rank_groups(np.array([1, 0, 1, 1]), np.array([2.0, 5, 3, 2]), np.array([1, 1, 0, 0]))
    assert ranks.tolist() == [3, 1, 1, 2]


def test_bm25_equals_its_equation():
    texts = ["the cat sat on the mat", "a dog", "the dog and the cat and the fog", ""]
    words = [text.split() for text in texts]
    mean = sum(map(len, words)) / 4

    def score(query, row):
        total = 0.0
        for word in query.split():
            n, tf = sum(word in w for w in words), words[row].count(word)
            idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
            total += idf * tf * 2.5 / (tf + 1.5 * (1 - 0.75 + 0.75 * len(words[row]) / mean))
        return total

    queries = ["the cat", "Dog dog", "unknown", "fog on"]
    expected = [[score(query.lower(), row) for row in range(4)] for query in queries]
    np.testing.assert_allclose(BM25(texts).score_all(queries, texts), expected)
    np.testing.assert_allclose(BM25(texts).score_pairs(queries, texts), np.diag(expected))


def test_a_text_is_no_candidate_for_itself():
    rows = [{"anchor": a, "positive": b} for a, b in (("x y", "y z"), ("y z", "x y"), ("u v", "v w"))]
    fitted, data = build(rows)
    vectors = np.eye(3)[[0, 0, 1]].astype(np.float32)
    outputs = {"anchor": vectors, "positive": vectors, "negatives": np.zeros((3, 0, 3), np.float32)}
    assert fitted.score(outputs, fitted.targets(data))["recall_1"] == 1
    assert "only 3 passages" in fitted.find_doubts(fitted.targets(data))[0]


# ------------------------------------------------------------------------------------------------ fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = {"steps": 250, "evaluate": 125, "batch": 64, "precision": "float32", "lr": 5e-3, "task.matryoshka": "4"}
    return fit("helpdesk", model="bert-test", out=tmp_path_factory.mktemp("runs") / "helpdesk", settings=settings)


@pytest.mark.slow
def test_network_learns_the_sample(run):
    assert run.scores["ndcg_10"] > 0.6 and run.scores["recall_10"] > 0.8
    baseline = run.record["scores"]["baselines"][0]
    assert baseline["name"] == "BM25" and 0.1 < baseline["scores"]["ndcg_10"] < 0.4
    page = (run.path / "report.html").read_text()
    assert all(words in page for words in ("Rank of the right passage", "Shorter vectors", "Random anchors"))
    again = open_run(run.path)
    assert again.evaluate("helpdesk")["scores"] == pytest.approx(run.scores)


def test_predictions(run, tmp_path):
    rows = read("helpdesk").rows
    passages = run.predict(samples.path("helpdesk"))
    assert len(passages) == len(rows)
    vectors = np.array([record["vector"] for record in passages[:100]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    asked = run.predict([rows["query"][i] for i in range(100)], query=True)
    assert asked[0]["input"] == rows["query"][0]
    found = (np.array([record["vector"] for record in asked]) @ vectors.T).argsort(1)[:, ::-1]
    assert np.mean([i in found[i, :5] for i in range(100)]) > 0.8
    text = rows["passage"][0]
    np.testing.assert_allclose(run.predict(text)[0]["vector"], vectors[0], atol=1e-5)
    np.testing.assert_allclose(run.embed([text])[0], vectors[0], atol=1e-5)
    np.testing.assert_allclose(run.predict(pl.DataFrame({"text": [text]}))[0]["vector"], vectors[0], atol=1e-5)
    short = run.predict(text, dimensions=4)[0]["vector"]
    np.testing.assert_allclose(short, vectors[0, :4] / np.linalg.norm(vectors[0, :4]), atol=1e-5)
    with pytest.raises(SettingsError, match="the vectors have 8 numbers"):
        run.predict(text, dimensions=9)
    with pytest.raises(DataError, match="'text'"):
        run.predict(pl.DataFrame({"number": [1, 2]}))


def test_exported_folder_has_the_files_of_sentence_transformers(run, tmp_path):
    run.export("huggingface", out=tmp_path / "hf")
    modules = json.loads((tmp_path / "hf" / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["Transformer", "Pooling", "Normalize"]
    text = "The lamp drips, what now?"
    vector = pipeline(tmp_path / "hf").predict(text)[0]["vector"]
    np.testing.assert_allclose(vector, run.embed([text])[0], atol=1e-5)


def test_pooling_and_prompts_of_a_checkpoint(run, tmp_path):
    run.export("huggingface", out=tmp_path / "hf")
    config = tmp_path / "hf" / "1_Pooling" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    prompts = {"prompts": {"q": "say "}, "default_prompt_name": "q"}
    (tmp_path / "hf" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    offered = inspect_checkpoint(tmp_path / "hf").preprocessing_defaults()
    assert (offered["pooling"], offered["query_prompt"], offered["passage_prompt"]) == ("cls", "say ", "say ")
    known = {name: offered[name] for name in ("pooling", "query_prompt", "passage_prompt", "tokenizer")}
    fitted, data = build(PAIRS, **known)
    assert fitted.pooled == Pooling(("cls",), "say ")
    network = load(tmp_path / "hf").eval()
    objective = fitted.objective(network, card("bert"), Settings())
    batch = fitted.batches(data, card("bert"), Settings()).make(np.arange(2), None)
    first = network.features(batch["anchor_tokens"], batch["anchor_mask"])[:, 0]
    torch.testing.assert_close(objective.outputs(batch)["anchor"], F.normalize(first, dim=-1))
    assert build(PAIRS, pooling="mean+layers")[0].notes[0].startswith("the layers of the checkpoint")
    assert inspect_checkpoint(run.path).preprocessing_defaults()["pooling"] == "mean"


def test_scored_pairs(tmp_path):
    """The score is how many of the two words that texts name are equal."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, 8, (600, 4))
    picked[:300, 2] = picked[:300, 0]
    rows = [
        {"sentence1": f"{WORDS[a]} and {WORDS[b]}", "sentence2": f"{WORDS[c]} or {WORDS[d]}", "score": float(5 * len({a, b} & {c, d}) / 2)}
        for a, b, c, d in picked
    ]  # fmt: skip
    settings = {
        "steps": 150,
        "evaluate": 75,
        "batch": 64,
        "precision": "float32",
        "lr": 1e-2,
        "model.dim": 16,
        "model.hidden": 32,
    }
    run = fit(pl.DataFrame(rows), task="text-embedding", model="bert-test", out=tmp_path / "run", settings=settings)
    assert run.task.metric == "spearman" and run.scores["spearman"] > 0.7
    assert run.record["scores"]["baselines"][0]["scores"]["spearman"] > 0.7  # words are all that counts here
    assert (run.task.low, run.task.high) == (0.0, 5.0)
    assert "Similarities and scores" in (run.path / "report.html").read_text()
