"""Reranking: the passages of a query are ordered by a network that reads each together with the query (a cross-encoder)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Bars, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.signature import RecordField, RecordUnit, Step
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.text_pairs import (
    COLUMN_SPEC,
    PASSAGES_COLUMN,
    RELEVANCE_COLUMN,
    find_columns,
    group_candidates,
    simplify,
)
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.metrics.bm25 import BM25
from fieldguide.metrics.ranking import rank_groups, resample_means, score_queries
from fieldguide.objectives import Objective
from fieldguide.objectives.reranking import Reranking
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.signature_parts import probability
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import TextTask, path_like
from fieldguide.tasks.text.embedding_report import SHOWN, shorten
from fieldguide.tasks.text.signature import PairSignature
from fieldguide.tasks.text.windows import PairTemplate, join_pairs, pair_template

MAX_TOKENS_BY_DEVICE = {"cpu": 128, "mps": 256, "cuda": 512}  # maximum tokens of a pair by device, if the user sets no length
TOKENS_PER_STEP = 8192  # approximate tokens per step, if the user sets no batch size
LOSSES = ("pointwise", "listwise")


class PassageReranking(PairSignature, TextTask):
    """Reranking with a cross-encoder. An example is a query with its passages."""

    name = "reranking"
    reads = (
        "a table (CSV, JSON Lines) with columns query, passage and label (or a graded score), one passage per row; or with columns "
        "query, positive and negatives"
    )
    record_for: ClassVar[RecordUnit] = "pair"
    input_types = ("tokens",)
    output_types = ("label",)
    feature = ("text",)
    further = ("list", "number", "category", "boolean")
    column_spec = COLUMN_SPEC
    metrics = (
        Metric("ndcg_10", "max", "NDCG at 10 among the passages of a query", label="NDCG@10"),
        Metric("mrr_10", "max", "mean reciprocal rank of the first relevant passage in the top 10", label="MRR@10"),
        Metric("map", "max", "mean average precision", label="MAP"),
        Metric("recall_1", "max", "of the relevant passages in the first place", percent=True, label="recall@1"),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 10}
    scores_untrained = True
    max_validation_examples = 1000  # each has several passages
    min_batch_size = 4

    @dataclass(frozen=True)
    class Options:
        query: str | None = None  # name of the column of queries, if it is not a usual one
        passage: str | None = None  # name of the column of passages (or positives)
        length: int | None = None  # maximum tokens of a query with a passage; the longer text is truncated
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str | None = None  # path of a tokenizer.json to use instead
        loss: str = "pointwise"  # pointwise: each pair by itself; listwise: the passages of a query compete
        candidates: int = 8  # most passages of a query per training step
        least: float | None = None  # smallest label of relevant passages; None: 1, or the middle of labels with fractions

    text: TextTokenizer
    frame: PairTemplate
    median: int  # tokens of a pair
    highest: float  # the largest label of the training rows
    usual: int  # passages of a query

    # Reading

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        enough = find_columns(data) or len(data.features("text", "list")) >= 2
        return None if enough else "a column of queries and one of passages"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        if (columns := find_columns(data, options.query, options.passage)) is None:
            raise DataError(
                f"{data.source}: the columns of queries and passages are unclear. Name them with --set task.query=COLUMN and --set "
                f"task.passage=COLUMN. The columns are: {', '.join(data.columns)}."
            )
        return group_candidates(data, columns)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        found = data.context
        task = cls(list(found.columns.values()), replace(options, query=found.query, passage=found.passage))
        if options.loss not in LOSSES:
            raise SettingsError(f"task.loss={options.loss!r} is unknown. Choose {' or '.join(LOSSES)}.")
        if options.candidates < 2:
            raise SettingsError("task.candidates must be at least 2.")
        queries, passages = task.texts(data), data.rows[PASSAGES_COLUMN].to_list()
        labels = data.rows[RELEVANCE_COLUMN].explode().to_numpy()
        known = [*queries, *dict.fromkeys(text for row in passages for text in row)]
        task.text = (
            TextTokenizer.load(options.tokenizer) if options.tokenizer else TextTokenizer.fit(known, size=options.vocab_size)
        )
        task.frame = pair_template(task.text)
        lengths = dict(zip(known, map(len, task.text.encode_exact(known))))
        sizes = [task.frame.size + lengths[q] + lengths[p] for q, row in zip(queries, passages) for p in row]
        task.median, task.highest = int(np.median(sizes)), float(labels.max())
        task.usual = int(np.median([len(row) for row in passages]))
        whole = bool((labels % 1 == 0).all())
        task.options = fill_options(
            task.options,
            length=suggest_length(sizes, MAX_TOKENS_BY_DEVICE[device().type]),
            vocab_size=task.text.size,
            least=1.0 if whole else float(labels.min() + labels.max()) / 2,
        )
        relevant = [(np.array(row) >= task.options.least) for row in data.rows[RELEVANCE_COLUMN].to_list()]
        if not any(row.any() and not row.all() for row in relevant):
            raise DataError(
                f"{data.source}: no training query has both a relevant passage (label of at least {task.options.least:g}) and another. "
                "Add passages that do not answer the query, or set task.least."
            )
        if labels.min() < 0:
            raise DataError(f"{data.source}: labels must not be negative, but {labels.min():g} occurs. Add a constant to them.")
        task.note_truncated(sum(size > task.options.length for size in sizes), len(sizes), task.options.length, "pairs")
        if alone := sum(not row.any() for row in relevant):
            task.notes.append(f"{alone:,} of {len(relevant):,} training queries have no relevant passage")
        return task

    @property
    def column(self) -> str:
        return self.options.query

    @property
    def second(self) -> str:
        """The name of the column of passages."""
        return self.options.passage

    def read_one(self, source: Any, answered: bool) -> Data:
        if not answered and isinstance(source, str) and not path_like(source):
            raise DataError(
                f"{source[:40]!r} is one text, but this run reads queries with passages. Give a table with the columns "
                f"{self.column!r} and {self.second!r}."
            )
        return super().read_one(source, answered)

    def list_requests(self, data: Data) -> pl.DataFrame:
        pairs = data.rows.select(self.column, pl.col(PASSAGES_COLUMN).alias(self.second))
        return pairs.explode(self.second)

    def input_columns(self) -> list[Column]:
        return [replace(c, kind="text") for name in (self.column, self.second) for c in self.columns if c.name == name]

    def example_input(self, test: Data) -> ExampleInput | None:
        if not len(test):
            return None
        return ExampleInput({self.column: test.rows[self.column][0], self.second: test.rows[PASSAGES_COLUMN][0][0]})

    # Batches

    def pad(self, tokens: list[np.ndarray], segments: list[np.ndarray]) -> dict[str, torch.Tensor]:
        padded, mask = self.text.batch(tokens)
        second = np.zeros_like(padded)
        second[mask] = np.concatenate(segments)
        return {"tokens": torch.from_numpy(padded), "mask": torch.from_numpy(mask), "segments": torch.from_numpy(second)}

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return the queries with all passages; training steps draw `task.candidates`, among them a relevant one."""
        passages, labels = data.rows[PASSAGES_COLUMN].to_list(), [np.array(v) for v in data.rows[RELEVANCE_COLUMN].to_list()]
        counts = np.array([len(row) for row in passages])
        starts, most = counts.cumsum() - counts, self.options.candidates
        queries = self.text.encode_exact(self.texts(data))
        first = [ids for ids, count in zip(queries, counts) for _ in range(count)]
        second = self.text.encode_exact([text for row in passages for text in row])
        tokens, segments, cut = join_pairs(first, second, self.frame, self.options.length)
        if not settings:  # for training texts `fit` has added the note
            self.note_truncated(cut, len(tokens), self.options.length, "pairs")

        def choose(row: int, generator: torch.Generator | None) -> np.ndarray:
            if generator is None or counts[row] <= most:
                return np.arange(counts[row])
            order = torch.randperm(int(counts[row]), generator=generator).numpy()
            relevant = labels[row][order] >= self.options.least
            front = order[relevant][:1]
            return np.concatenate([front, order[order != (front[0] if len(front) else -1)]])[:most]

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
            chosen = [choose(row, generator) for row in index]
            rows = np.concatenate([starts[row] + slots for row, slots in zip(index, chosen)])
            relevance = np.concatenate([labels[row][slots] for row, slots in zip(index, chosen)]) / self.highest
            return {
                **self.pad([tokens[i] for i in rows], [segments[i] for i in rows]),
                "query": torch.from_numpy(np.repeat(np.arange(len(index)), [len(slots) for slots in chosen])),
                "slot": torch.from_numpy(np.concatenate(chosen)),
                "relevance": torch.from_numpy(relevance.astype(np.float32)),
            }

        sizes = np.array([len(t) for t in tokens])
        return Batches(len(passages), make, np.add.reduceat(sizes, starts) if len(sizes) else None)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        self.request = self.texts(data)
        first = self.text.encode_exact(self.request)
        second = self.text.encode_exact(data.rows[self.second].fill_null("").to_list())
        tokens, segments, cut = join_pairs(first, second, self.frame, self.options.length)
        self.note_truncated(cut, len(tokens), self.options.length, "pairs")

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
            return self.pad([tokens[i] for i in index], [segments[i] for i in index])

        return Batches(len(tokens), make, np.array([len(t) for t in tokens]))

    @property
    def max_batch_size(self) -> int:
        """Return the maximum queries per step: fewer if they have many or long passages."""
        tokens = min(self.median, self.options.length) * min(self.usual, self.options.candidates)
        return int(np.clip(2 ** int(np.log2(max(TOKENS_PER_STEP / max(tokens, 1), 1))), 4, 128))

    def model_dims(self) -> dict[str, Any]:
        return {"num_classes": 1, "vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        length = self.options.length
        return {"vocab_size": self.text.size, "length": length, "tokens": min(self.median, length)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        also = ("segments",) if "segments" in card.optional_inputs else ()
        return Reranking(model, (*card.inputs, *also), self.options.loss)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the labels of the passages of each query, NaN where there are fewer."""
        labels = data.rows[RELEVANCE_COLUMN].to_list()
        found = np.full((len(labels), max(map(len, labels), default=1)), np.nan)
        for row, values in zip(found, labels):
            row[: len(values)] = values
        return {"relevance": found}

    def rank(self, outputs: Arrays, targets: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return query, rank and label of each relevant passage of queries that have passages of both kinds."""
        relevance = targets["relevance"]
        there = ~np.isnan(relevance)
        relevant = there & (relevance >= self.options.least)
        both = relevant.any(1) & (there & ~relevant).any(1)
        query, slot = np.nonzero(there & both[:, None])
        logits = outputs["logits"][query, slot]
        rank = rank_groups(query, logits, relevant[query, slot])
        kept = relevant[query, slot]
        return query[kept], rank[kept], relevance[query, slot][kept]

    def score_each(self, outputs: Arrays, targets: Arrays) -> dict[str, np.ndarray]:
        """Return the metrics of each query."""
        query, rank, label = self.rank(outputs, targets)
        each = score_queries(query, rank, label, recalls=(1,))
        return {m.name: each[m.name] for m in self.metrics}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        return {
            name: float(each.mean()) if len(each) else float("nan") for name, each in self.score_each(outputs, targets).items()
        }

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        each = self.score_each(outputs, targets)
        return resample_means(each) if len(each["map"]) else {}

    def find_doubts(self, targets: Arrays) -> list[str]:
        relevance = targets["relevance"]
        relevant = relevance >= self.options.least
        alone = int((~relevant.any(1) | ((relevance < self.options.least) & ~np.isnan(relevance)).any(1).__invert__()).sum())
        return (
            [f"{alone:,} of {len(relevance):,} queries are not scored: their passages are all relevant, or none is"]
            if alone
            else []
        )

    @classmethod
    def check_split(cls, data: Data, name: str, options: Any) -> None:
        labels = [set(row) for row in data.rows[RELEVANCE_COLUMN].to_list()]
        if not any(len(row) > 1 for row in labels):
            raise DataError(
                f"{data.source}: no query of the {name} rows has passages with different labels, so nothing can be ranked. Add queries "
                "with relevant and other passages."
            )

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        bm25 = BM25(list(dict.fromkeys(text for row in train.rows[PASSAGES_COLUMN].to_list() for text in row)))
        rng = np.random.default_rng(0)
        logits = np.full(self.targets(test)["relevance"].shape, np.nan)
        for row, query, passages in zip(logits, self.texts(test), test.rows[PASSAGES_COLUMN].to_list()):
            row[: len(passages)] = bm25.score_all([query], passages)[0] + 1e-9 * rng.random(len(passages))  # ties at random
        return [Baseline("BM25", "words that the query and a passage share", {"logits": logits})]

    # Predictions and report

    def postprocess(self, outputs: Arrays) -> Arrays:
        if "logit" not in outputs or self.options.loss != "pointwise":
            return outputs
        return {"logit": outputs["logit"], "score": 1 / (1 + np.exp(-outputs["logit"].astype(np.float64).clip(-500, 500)))}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        """Return the score of each pair, and its rank among the passages of its query in this request."""
        scores = outputs.get("score", outputs["logit"])
        codes = np.unique([simplify(text) for text in self.request], return_inverse=True)[1]
        ranks = rank_groups(codes, outputs["logit"], np.zeros(len(codes)))
        return [{"score": float(score), "rank": int(rank)} for score, rank in zip(scores, ranks)]

    def describe_postprocessing(self, members: int) -> list[Step]:
        steps = (
            [Step("sigmoid", "the probability that the passage is relevant", True)] if self.options.loss == "pointwise" else []
        )
        return [*steps, Step("rank", "order of the passages of each query", False)]

    def describe_record(self) -> list[RecordField]:
        score = RecordField("score", "number", "higher is better")
        if self.options.loss == "pointwise":
            score = probability("score", "that the passage is relevant")
        rank = "among the passages of this query in the request; 1 is the best"
        return [score, RecordField("rank", "integer", rank, low=1)]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        query, rank, _ = self.rank(outputs, targets)
        best: dict[int, int] = {}
        for one, place in zip(query.tolist(), rank.tolist()):
            best[one] = min(place, best.get(one, place))
        places = np.array(list(best.values()))
        texts, passages = self.texts(test), test.rows[PASSAGES_COLUMN].to_list()

        def describe(row: int) -> tuple[str, str, str, str, int]:
            logits, labels = outputs["logits"][row], targets["relevance"][row]
            first = int(np.nanargmax(logits))
            right = int(np.nanargmax(np.where(labels >= self.options.least, logits, np.nan)))
            found = "the same" if first == right else shorten(passages[row][first])
            return test.locate_row(row), shorten(texts[row]), shorten(passages[row][right]), found, best[row]

        order = sorted(best, key=lambda row: -best[row])
        header = ("row", self.column, "best relevant passage", "first passage", "rank of the relevant one")
        sample = np.random.default_rng(0).permutation(list(best))[:SHOWN]
        shown: list[ReportElement] = [
            Bars(
                "Rank of the first relevant passage",
                f"Fraction of the {len(places):,} test queries that have relevant and other passages.",
                {
                    **{str(place): float((places == place).mean()) for place in range(1, 6)},
                    "above 5": float((places > 5).mean()),
                },
            ),
            Table(
                "Lowest ranks",
                "Test queries whose first relevant passage is ranked lowest: mistakes of the network, or wrong labels.",
                header,
                [describe(row) for row in order if best[row] > 1][:SHOWN],
            ),
            Table("Random queries", "", header, [describe(int(row)) for row in sample]),
        ]
        return {"Rankings": [element for element in shown if not isinstance(element, Table) or element.rows]}

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        """Return the task of a cross-encoder. It reads the columns `query` and `passage`, or those that the user names."""
        if not assets.score:
            return None
        if len(assets.columns) not in (0, 2):
            raise SettingsError(
                f"columns={','.join(assets.columns)}: a reranker reads two columns, of queries and of passages. Name both, or none."
            )
        query, passage = assets.columns or ("query", "passage")
        loss = "pointwise" if assets.score == "sigmoid" else "listwise"
        return cls.from_state(
            [Column(query, "text"), Column(passage, "text"), Column("label", "number", "target")],
            cls.Options(query=query, passage=passage, length=assets.length, least=1.0, loss=loss),
            {"median": assets.length, "highest": 1.0, "usual": cls.Options.candidates},
            assets.tokenizer_folder,
        )

    # Saved with the run

    STATE: ClassVar = {"median": float, "highest": float, "usual": int}

    def state(self) -> dict[str, Any]:
        return {"median": self.median, "highest": self.highest, "usual": self.usual}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text = TextTokenizer.load(folder)
        task.frame = pair_template(task.text)
        task.median, task.highest, task.usual = state["median"], state["highest"], state["usual"]
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


TASKS = (PassageReranking,)
