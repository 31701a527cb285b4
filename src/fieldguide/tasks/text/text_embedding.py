"""Text embedding: texts that belong together get similar vectors, learned from pairs, triplets or scored pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from scipy.stats import spearmanr
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.text_pairs import (
    COLUMN_SPEC,
    NEGATIVES_COLUMN,
    find_columns,
    prepare,
    simplify,
)
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.data.read import load
from fieldguide.metrics.bm25 import BM25
from fieldguide.metrics.ranking import rank_relevant, rank_scores, resample_means, score_queries
from fieldguide.objectives import Objective
from fieldguide.objectives.embedding import POOLING_MODES, Pooling
from fieldguide.objectives.text_pairs import KEY_BASE, TextPairs
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.report_builder import MAX_EXAMPLE_CHARACTERS, ExampleInput
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import TextTask, name_by_text, path_like
from fieldguide.tasks.text.signature import EmbeddingSignature

MAX_TOKENS_BY_DEVICE = {"cpu": 128, "mps": 256, "cuda": 512}  # maximum tokens of a text by device, if the user sets no length
TOKENS_PER_STEP = 8192  # approximate tokens per step, if the user sets no batch size
INPUT = "text"  # the column of texts to predict
MIN_CANDIDATES = 50  # of a test; among fewer, retrieval is easy
LAYERS = "layers"  # in the pooling of a checkpoint: layers after the pooling, which are left out


@dataclass(frozen=True)
class PairTexts:
    """The texts of some rows: their numbers are equal for texts that differ only in case and spaces."""

    anchors: list[str]
    positives: list[str]
    negatives: list[list[str]]
    anchor_ids: np.ndarray  # N
    positive_ids: np.ndarray  # N
    negative_ids: np.ndarray  # N K, -1 where there are fewer


class TextEmbedding(EmbeddingSignature, TextTask):
    """Text embedding with a bi-encoder: both texts of a pair are encoded alone, by the same network.

    Pairs are scored by retrieval: for each anchor of the test rows, all positives and negatives of these rows are ranked by cosine
    similarity. Pairs with a score are compared with the cosine similarity.
    """

    name = "text-embedding"
    reads = (
        "a table (CSV, JSON Lines) with columns anchor and positive (or query and passage, ...), and optionally negatives "
        "(negative, negative_1, ..., or a list) or a score"
    )
    input_types = ("tokens",)
    output_types = ("vector",)
    feature = ("text",)
    further = ("list", "number", "category", "boolean")
    column_spec = COLUMN_SPEC
    metrics = (
        Metric("ndcg_10", "max", "NDCG at 10 over all passages of the test", label="NDCG@10"),
        *(
            Metric(f"recall_{k}", "max", f"of the right passages in the top {k}", percent=True, label=f"recall@{k}")
            for k in (1, 5, 10)
        ),
        Metric("mrr_10", "max", "mean reciprocal rank of the first right passage in the top 10", label="MRR@10"),
        Metric("spearman", "max", "rank correlation of cosine similarities and scores", label="Spearman"),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 10}
    scores_untrained = True
    max_validation_examples = 5000
    min_batch_size = 32

    @dataclass(frozen=True)
    class Options:
        anchor: str | None = None  # name of the column of anchors (queries), if it is not a usual one
        positive: str | None = None  # name of the column of positives (passages)
        length: int | None = None  # maximum tokens of a text; longer texts are truncated and counted
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str | None = None  # path of a tokenizer.json to use instead
        temperature: float = 0.05  # cosine similarities are divided by it
        symmetric: bool = False  # whether positives select their anchors, too
        negatives: int = 4  # most negatives of a row that a step, or the test, compares
        matryoshka: str | None = None  # widths such as 64,128: the first numbers of a vector are trained as a vector, too
        pooling: str | None = None  # how the vectors of tokens become one: mean, cls, max, ...; several are joined with +
        query_prompt: str | None = None  # a text before each anchor, such as "query: "
        passage_prompt: str | None = None  # a text before each positive and negative

    @dataclass(frozen=True)
    class PredictOptions:
        query: bool = False  # whether the texts are anchors (queries) rather than passages
        dimensions: int | None = None  # only the first numbers of each vector, for runs with task.matryoshka

    text: TextTokenizer
    median: int  # tokens of a training text
    low: float  # the score that stands for the cosine similarity 0
    high: float  # the score that stands for 1

    # Reading

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        enough = find_columns(data) or len(data.features("text", "list")) >= 2
        return None if enough else "two columns of texts that belong together, such as anchor and positive"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        if (columns := find_columns(data, options.anchor, options.positive)) is None:
            raise DataError(
                f"{data.source}: the columns of texts that belong together are unclear. Name them with --set task.anchor=COLUMN and "
                f"--set task.positive=COLUMN. The columns are: {', '.join(data.columns)}."
            )
        return prepare(data, columns)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        columns = find_columns(data, options.anchor, options.positive)
        assert columns is not None  # checked by `build_examples`
        task = cls(list(data.columns.values()), replace(options, anchor=columns.anchor, positive=columns.positive))
        task.check_options()
        found = task.number_texts(data)
        texts = list(dict.fromkeys([*found.anchors, *found.positives, *(text for row in found.negatives for text in row)]))
        task.text = (
            TextTokenizer.load(options.tokenizer) if options.tokenizer else TextTokenizer.fit(texts, size=options.vocab_size)
        )
        sizes = [2 + len(ids) for ids in task.text.encode_exact(texts)]
        task.median = int(np.median(sizes))
        length = suggest_length(sizes, MAX_TOKENS_BY_DEVICE[device().type])
        task.options = fill_options(task.options, length=length, vocab_size=task.text.size)
        task.note_truncated(sum(size > task.options.length for size in sizes), len(sizes), task.options.length)
        task.low, task.high = 0.0, 1.0
        if task.is_scored:
            known = data.rows[task.target.name].to_numpy()
            if known.min() < -1 or known.max() > 1:
                task.low, task.high = float(known.min()), float(known.max())
                task.notes.append(f"scores from {task.low:g} to {task.high:g} stand for cosine similarities from 0 to 1")
        elif len(np.unique(found.positive_ids)) < 2:
            raise DataError(
                f"{data.source}: all training rows have the same {columns.positive!r}, so there are no negatives to learn "
                "from. Add rows with other texts."
            )
        return task

    def check_options(self) -> None:
        """Fill in the pooling. Raises `SettingsError` for options that cannot work."""
        o = self.options
        modes = (o.pooling or "mean").split("+")
        if LAYERS in modes:
            modes.remove(LAYERS)
            self.notes.append("the layers of the checkpoint after its pooling are left out: vectors are those of the pooling")
        if unknown := [mode for mode in modes if mode not in POOLING_MODES]:
            raise SettingsError(
                f"task.pooling: {unknown[0]!r} is unknown. Choose from {', '.join(POOLING_MODES)}, joined with +."
            )
        self.options = replace(o, pooling="+".join(modes))
        if o.temperature <= 0 or o.negatives < 0:
            raise SettingsError("task.temperature must be above 0, and task.negatives at least 0.")
        _ = self.widths

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the widths of the vectors that are trained, smallest first; () for the whole vectors alone."""
        try:
            return tuple(sorted({int(part) for part in (self.options.matryoshka or "").split(",") if part.strip()}))
        except ValueError:
            raise SettingsError(f"task.matryoshka={self.options.matryoshka!r} must be widths such as 64,128.") from None

    @property
    def column(self) -> str:
        return INPUT

    @property
    def is_scored(self) -> bool:
        """Whether the pairs have scores."""
        return any(c.role == "target" for c in self.columns)

    @cached_property
    def pooled(self) -> Pooling:  # type: ignore[override]
        """How a passage becomes a vector."""
        return Pooling(tuple(self.options.pooling.split("+")), self.options.passage_prompt or "")

    def suggest_metric(self) -> tuple[str, str]:
        return ("spearman", "the pairs have scores") if self.is_scored else ("", "")

    def read_one(self, source: Any, answered: bool) -> Data:
        """Read texts, or a table with a column `text`, or with the column of anchors or positives of the training data."""
        if answered:
            return super().read_one(source, answered)
        is_typed = isinstance(source, str) and not path_like(source)
        loaded = load(self.make_row(source) if is_typed else source, labels_optional=True)
        names = loaded.raw.rows.columns
        own = [self.options.positive, self.options.anchor]
        name = next((name for name in (INPUT, *(own[::-1] if self.predict_options.query else own)) if name in names), INPUT)
        loaded.raw.kinds = {name: "text"}
        data = loaded.interpret(known=[Column(name, "text")], lenient=True, last=True)
        data = replace(data, rows=data.rows.rename({name: INPUT}), columns={INPUT: Column(INPUT, "text")})
        return name_by_text(data, source) if is_typed else data

    def input_columns(self) -> list[Column]:
        return [Column(INPUT, "text")]

    @property
    def prompts(self) -> dict[str, str]:
        """Return the text before the texts of each column."""
        o = self.options
        return {INPUT: o.passage_prompt or "", o.positive: o.passage_prompt or "", o.anchor: o.query_prompt or ""}

    def list_requests(self, data: Data) -> pl.DataFrame:
        return pl.DataFrame({INPUT: data.rows[self.options.positive].unique(maintain_order=True)})

    def example_input(self, test: Data) -> ExampleInput | None:
        if not len(test):
            return None
        return ExampleInput(" ".join(test.rows[self.options.positive][0].split())[:MAX_EXAMPLE_CHARACTERS])

    # Batches

    def number_texts(self, data: Data) -> PairTexts:
        """Return the texts of the rows, of which negatives the first ones, and their numbers."""
        anchors, positives = (data.rows[name].to_list() for name in (self.options.anchor, self.options.positive))
        negatives: list[list[str]] = [[] for _ in anchors]
        if not self.is_scored and self.options.negatives:
            negatives = [row or [] for row in data.rows[NEGATIVES_COLUMN].to_list()]
        numbers: dict[str, int] = {}
        number = lambda text: numbers.setdefault(simplify(text), len(numbers))
        anchor_ids, positive_ids = (
            np.array([number(text) for text in texts], dtype=np.int64) for texts in (anchors, positives)
        )
        width = max(map(len, negatives), default=0)
        negative_ids = np.full((len(anchors), width), -1, dtype=np.int64)
        for row, texts in enumerate(negatives):
            negative_ids[row, : len(texts)] = [number(text) for text in texts]
        return PairTexts(anchors, positives, negatives, anchor_ids, positive_ids, negative_ids)

    def encode_rows(self, texts: Sequence[str], prompt: str | None) -> list[np.ndarray]:
        """Return the token ids of each text after a prompt, with the tokens around it."""
        ids = self.text.encode_exact([(prompt or "") + text for text in texts])
        return [np.concatenate([[self.text.cls], row[: self.options.length - 2], [self.text.sep]]) for row in ids]

    def encode_texts(self, texts: Sequence[str], longest: int) -> Batches:
        return super().encode_texts(texts, min(longest, self.options.length))

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return the pairs with their negatives. Training steps draw `task.negatives` of them, others take the first."""
        found, most, o = self.number_texts(data), self.options.negatives, self.options
        anchors, positives = (
            self.encode_rows(found.anchors, o.query_prompt),
            self.encode_rows(found.positives, o.passage_prompt),
        )
        flat = self.encode_rows([text for row in found.negatives for text in row], o.passage_prompt)
        counts = np.array([len(row) for row in found.negatives], dtype=np.int64)
        starts = counts.cumsum() - counts
        scores = None
        if self.is_scored and self.target.name in data.rows.columns:
            values = data.rows[self.target.name].to_numpy()
            scores = torch.from_numpy(((values - self.low) / (self.high - self.low)).astype(np.float32))
        keys: dict[int, set[int]] = {}
        for anchor, positive in zip(found.anchor_ids.tolist(), found.positive_ids.tolist()):
            keys.setdefault(anchor, {anchor}).add(positive)

        def pad(rows: list[np.ndarray], name: str) -> dict[str, Tensor]:
            tokens, mask = self.text.batch(rows)
            return {f"{name}_tokens": torch.from_numpy(tokens), f"{name}_mask": torch.from_numpy(mask)}

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            chosen = []  # (row of the batch, number of the negative) of each negative
            for place, row in enumerate(index):
                every = np.arange(counts[row])
                if generator is not None and counts[row] > most:
                    every = torch.randperm(int(counts[row]), generator=generator).numpy()
                chosen += [(place, int(slot)) for slot in every[:most]]
            rows = index[[place for place, _ in chosen]] if chosen else index[:0]
            slots = np.array([slot for _, slot in chosen], dtype=np.int64)
            passages = [*(positives[i] for i in index), *(flat[starts[row] + slot] for row, slot in zip(rows, slots))]
            known = {int(i): keys[int(i)] for i in found.anchor_ids[index]}
            batch = {
                **pad([anchors[i] for i in index], "anchor"),
                **pad(passages, "passage"),
                "anchor_id": torch.from_numpy(found.anchor_ids[index]),
                "passage_id": torch.from_numpy(np.concatenate([found.positive_ids[index], found.negative_ids[rows, slots]])),
                "known": torch.tensor([i * KEY_BASE + passage for i, texts in known.items() for passage in sorted(texts)]),
                "negative_row": torch.tensor([place for place, _ in chosen], dtype=torch.int64),
                "negative_slot": torch.from_numpy(slots),
            }
            return batch if scores is None else {**batch, "score": scores[torch.from_numpy(index)]}

        lengths = np.array([len(a) + len(p) for a, p in zip(anchors, positives)])
        return Batches(len(anchors), make, lengths)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        prompt = self.options.query_prompt if self.predict_options.query else self.options.passage_prompt
        texts = [(prompt or "") + text for text in self.texts(data)]
        cut = sum(2 + len(ids) > self.options.length for ids in self.text.encode_exact(texts))
        self.note_truncated(cut, len(texts), self.options.length)
        return super().encode_texts(texts, self.options.length)

    @property
    def max_batch_size(self) -> int:
        """Return the maximum examples per step: fewer if texts are long."""
        return int(np.clip(2 ** int(np.log2(TOKENS_PER_STEP / max(2 * min(self.median, self.options.length), 1))), 32, 256))

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        length = self.options.length
        return {"vocab_size": self.text.size, "length": length, "tokens": min(self.median, length)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        width = model.config.dim * len(self.pooled.modes)
        if self.widths and (self.widths[0] < 1 or self.widths[-1] > width):
            raise SettingsError(f"task.matryoshka={self.options.matryoshka}: the vectors have {width:,} numbers.")
        widths = () if not self.widths else tuple(dict.fromkeys((*self.widths, width)))
        return TextPairs(model, self.pooled, self.options.temperature, self.options.symmetric, widths)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the scores, or the numbers of the texts."""
        if self.is_scored:
            return {"score": data.rows[self.target.name].to_numpy().copy()}
        found = self.number_texts(data)
        ids = found.negative_ids[:, : self.options.negatives]
        return {"anchor": found.anchor_ids, "positive": found.positive_ids, "negatives": ids}

    def rank(self, outputs: Arrays, targets: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Return the anchor of each distinct pair, and the rank of its positive among all passages."""
        pairs, first = np.unique(np.stack([targets["anchor"], targets["positive"]], 1), axis=0, return_index=True)
        if "rank" in outputs:
            return pairs[:, 0], outputs["rank"][first]
        anchors, queries = take_distinct(targets["anchor"], outputs["anchor"])
        passages, candidates = take_distinct(*list_passages(outputs, targets))
        places = np.stack([np.searchsorted(anchors, pairs[:, 0]), np.searchsorted(passages, pairs[:, 1])], 1)
        return pairs[:, 0], rank_relevant(queries, candidates, places, find_equal(anchors, passages))

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        if self.is_scored:
            return {"spearman": correlate(compute_cosines(outputs), targets["score"])}
        return {name: float(each.mean()) for name, each in self.score_anchors(outputs, targets).items()}

    def score_anchors(self, outputs: Arrays, targets: Arrays) -> dict[str, np.ndarray]:
        """Return the metrics of each anchor."""
        each = score_queries(*self.rank(outputs, targets))
        return {m.name: each[m.name] for m in self.metrics if m.name in each}

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        if self.is_scored:
            return super().intervals({"cosine": compute_cosines(outputs)}, targets)
        return resample_means(self.score_anchors(outputs, targets))

    def find_doubts(self, targets: Arrays) -> list[str]:
        if self.is_scored:
            return []
        passages = len(np.unique(np.concatenate([targets["positive"], targets["negatives"][targets["negatives"] >= 0]])))
        return [f"each anchor is compared with only {passages} passages"] if passages < MIN_CANDIDATES else []

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        found = self.number_texts(test)
        if self.is_scored:
            from sklearn.feature_extraction.text import TfidfVectorizer

            words = TfidfVectorizer(sublinear_tf=True).fit(
                [*self.number_texts(train).anchors, *self.number_texts(train).positives]
            )
            cosine = words.transform(found.anchors).multiply(words.transform(found.positives)).sum(1)
            outputs = {"cosine": np.asarray(cosine).ravel()}
            return [Baseline("TF-IDF", "cosine similarity of weighted counts of words", outputs)]
        targets = self.targets(test)
        names: dict[int, str] = dict(zip(found.positive_ids.tolist(), found.positives))
        for row, texts in zip(targets["negatives"], found.negatives):
            names |= {int(i): text for i, text in zip(row, texts) if i >= 0}
        passages = np.array(sorted(names))
        anchors, queries = take_distinct(found.anchor_ids, np.array(found.anchors, dtype=object))
        texts = [names[i] for i in passages.tolist()]
        scores = BM25(texts).score_all(queries.tolist(), texts)
        scores += 1e-9 * np.random.default_rng(0).random(scores.shape)  # equal scores are common: order them at random
        for query, passage in find_equal(anchors, passages):
            scores[query, passage] = -np.inf
        pairs, inverse = np.unique(np.stack([found.anchor_ids, found.positive_ids], 1), axis=0, return_inverse=True)
        places = np.stack([np.searchsorted(anchors, pairs[:, 0]), np.searchsorted(passages, pairs[:, 1])], 1)
        return [
            Baseline(
                "BM25", "words that the anchor and a passage share", {"rank": rank_scores(scores, places)[inverse.ravel()]}
            )
        ]

    # Predictions

    def postprocess(self, outputs: Arrays) -> Arrays:
        width = self.predict_options.dimensions
        if "vector" not in outputs or width is None:
            return outputs
        vectors = outputs["vector"]
        if not 0 < width <= vectors.shape[1]:
            raise SettingsError(f"dimensions={width} is not possible: the vectors have {vectors.shape[1]:,} numbers.")
        kept = vectors[:, :width]
        return {"vector": kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{"vector": [round(number, 8) for number in row]} for row in outputs["vector"].astype(float).tolist()]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        from fieldguide.tasks.text.embedding_report import describe_retrieval, describe_scores

        return (describe_scores if self.is_scored else describe_retrieval)(self, test, outputs, targets)

    # Saved with the run

    STATE: ClassVar = {"median": float, "low": float, "high": float}

    def state(self) -> dict[str, Any]:
        return {"median": self.median, "low": self.low, "high": self.high}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.median = TextTokenizer.load(folder), state["median"]
        task.low, task.high = state["low"], state["high"]
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


def take_distinct(ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct numbers, sorted, and the first value of each."""
    distinct, first = np.unique(ids, return_index=True)
    return distinct, values[first]


def list_passages(outputs: Arrays, targets: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers and vectors of all positives and negatives."""
    there = targets["negatives"] >= 0
    ids = np.concatenate([targets["positive"], targets["negatives"][there]])
    negatives = outputs["negatives"][:, : there.shape[1]] if there.any() else outputs["positive"][:0]
    return ids, np.concatenate([outputs["positive"], negatives[there] if there.any() else negatives])


def find_equal(anchors: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """Return the places of texts that are an anchor and a passage, which are no candidates for themselves: pairs, N 2."""
    _, first, second = np.intersect1d(anchors, passages, return_indices=True)
    return np.stack([first, second], 1)


def compute_cosines(outputs: Arrays) -> np.ndarray:
    """Return the cosine similarity of each pair."""
    return outputs["cosine"] if "cosine" in outputs else (outputs["anchor"] * outputs["positive"]).sum(1)


def correlate(found: np.ndarray, known: np.ndarray) -> float:
    """Return Spearman's rank correlation; NaN if either is constant."""
    if len(found) < 2 or found.min() == found.max() or known.min() == known.max():
        return float("nan")
    return float(spearmanr(found, known).statistic)


TASKS = (TextEmbedding,)
