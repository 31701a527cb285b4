"""Recommendation: predict the next items of each user from the items of the past."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Bars, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import FILE, LINE, Column, Data, Finding
from fieldguide.data.loader import Batches
from fieldguide.objectives import Objective
from fieldguide.objectives.next_item import DEFAULT_TOP_K, NextItem, rank_items
from fieldguide.tasks.base import Arrays, Baseline, Metric, Task
from fieldguide.tasks.recommendation.signature import RecommendationSignature
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import path_like

ITEMS_COLUMN = "#items"  # items of a user, ordered by time
METRIC_CUTOFFS = (5, 10, 20)
MAX_HISTORY_ITEMS = 100  # maximum items of a history, if the user sets no length
MAX_FULLY_SCORED_ITEMS = 50_000  # above this many items, training samples negatives (`DRAWN`) instead of scoring all items
SAMPLED_NEGATIVES = 4096
USER_CHUNK = 512  # users whose baselines are scored together


class Recommendation(RecommendationSignature, Task):
    name = "recommendation"
    has_own_rows = False
    reads = "a table of events: a user column, an item column and a time column"
    input_types = ("items",)
    output_types = ("items",)
    column_spec = ColumnSpec(
        "none", roles=("user", "item", "rating", "time"), kinds={"user": "identifier", "item": "identifier", "rating": "number"}
    )
    metrics = (
        Metric("ndcg_10", "max", "NDCG at 10 over all items", label="NDCG@10"),
        Metric("hr_10", "max", "of next items ranked in the top 10 of all items", percent=True, label="HR@10"),
        Metric("mrr", "max", "mean reciprocal rank over all items", label="MRR"),
        *(
            Metric(f"{name}_{k}", "max", f"{words} {k}", percent=name == "hr", label=f"{name.upper()}@{k}")
            for k in (5, 20)
            for name, words in (("ndcg", "NDCG at"), ("hr", "of next items ranked in the top"))
        ),
    )
    recipe: ClassVar = {"patience": 10}
    min_batch_size = 32

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # maximum items of a history; of longer ones the latest
        least: float | None = None  # ratings below this are left out
        repeats: bool | None = None  # whether items of the history may be recommended again
        negatives: int | None = None  # negative items sampled per step; 0 = all items are scored

    @dataclass(frozen=True)
    class PredictOptions:
        count: Annotated[int, Limits(1, 10_000)] = 10  # items recommended to each user

    items: list[str]  # names of items 1, 2, ...
    counts: np.ndarray  # frequency of each item in training, with 0 first
    known: pl.DataFrame  # users and their items in time order

    # From events to user histories

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        missing = [role for role in ("user", "item") if not data.columns_with_role(role)]
        return " and ".join(f"a {role} column (name it with --set role.{role}=COLUMN)" for role in missing) or None

    @classmethod
    def match(cls, data: Data) -> str | None:
        return None if cls.missing_requirements(data) else "a user column and an item column"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Build three examples per user (leave-one-out).

        Training uses all but the last two items, validation predicts the last but one, and the test predicts the
        last, each from the items before. Users with fewer than three items are only trained on.
        """
        histories, place = cls.histories(data, options)
        sizes = histories[ITEMS_COLUMN].list.len()
        parts, splits = [], []
        for name, drop, least in (("train", 2, 3), ("val", 1, 3), ("test", 0, 3)):
            some = histories.filter(sizes >= least).with_columns(
                pl.col(ITEMS_COLUMN).list.head(pl.col(ITEMS_COLUMN).list.len() - drop)
            )
            if name == "train":
                some = pl.concat([some, histories.filter(sizes < least)])
            parts.append(some)
            splits += [name] * some.height
        few = int((sizes < 3).sum())
        if few == histories.height:
            raise DataError(
                f"{data.source}: no user has three or more items, which validation and test need. Check the user "
                "column (--set role.user=COLUMN)."
            )
        made = Data(
            data.source, pl.concat(parts), data.columns, data.manifest, list(data.findings), np.array(splits, dtype=object)
        )
        if few:
            made.findings.append(
                Finding("few-items", "note", "users with fewer than three items are trained on but not tested", place, few)
            )
        return made

    @classmethod
    def histories(cls, data: Data, options: Any) -> tuple[pl.DataFrame, tuple[str, ...]]:
        """Return one row per user with the place of the first event and the items in time order, and the places of
        users with few items.
        """
        user, item = data.require_role("user").name, data.require_role("item").name
        rows = data.rows.with_columns(pl.Series("#place", range(len(data))))
        if options.least is not None:
            if not data.columns_with_role("rating"):
                raise DataError(
                    f"{data.source}: task.least={options.least:g} needs a rating column (--set role.rating=COLUMN)."
                )
            rows = rows.filter(pl.col(data.require_role("rating").name) >= options.least)
        if data.columns_with_role("time"):
            time = data.require_role("time")
            if time.kind not in ("number", "date"):
                raise DataError(
                    f"{data.source}: the time column {time.name!r} holds {time.kind} values ({time.why}). "
                    "Name another with --set role.time=COLUMN."
                )
            rows = rows.sort(time.name, maintain_order=True, nulls_last=False)
        grouped = (
            rows.group_by(user, maintain_order=True)
            .agg(pl.col(item).alias(ITEMS_COLUMN), pl.col(FILE).first(), pl.col(LINE).first())
            .sort(user)
        )
        few = grouped.filter(pl.col(ITEMS_COLUMN).list.len() < 3)
        files = data.manifest.files
        place = tuple(f"{files[f].path}:{line}" for f, line in few.select(FILE, LINE).head(5).rows())
        return grouped, place

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        events = data.rows[ITEMS_COLUMN].explode().drop_nulls()
        counted = events.value_counts(sort=True).sort(["count", events.name], descending=[True, False])
        task.items = counted[events.name].to_list()
        task.counts = np.array([0, *counted["count"].to_list()])
        sizes = data.rows[ITEMS_COLUMN].list.len().to_numpy()
        again = 1 - sum(len(set(h)) for h in data.rows[ITEMS_COLUMN].to_list()) / max(sizes.sum(), 1)
        longest = int(min(MAX_HISTORY_ITEMS, max(4, np.quantile(sizes, 0.9))))
        task.options = fill_options(
            options,
            length=longest,
            repeats=bool(again > 0.05),
            negatives=0 if len(task.items) <= MAX_FULLY_SCORED_ITEMS else SAMPLED_NEGATIVES,
        )
        user = data.require_role("user").name
        task.known = data.rows.select(user, ITEMS_COLUMN)
        if not data.columns_with_role("time"):
            task.notes.append("there is no time column: items are ordered by row (name one with --set role.time=COLUMN)")
        if again > 0.05:
            task.notes.append(
                f"{100 * again:.0f} % of the events repeat an item of the same user: such items may be "
                "recommended again (disable this with task.repeats=false)"
            )
        if cut := int((sizes > task.options.length).sum()):
            task.notes.append(
                f"{cut:,} users have histories longer than {task.options.length} items: prediction reads only the "
                "latest (change this with task.length=...)"
            )
        return task

    def codes(self, histories: pl.Series) -> list[np.ndarray]:
        """Return each history as item numbers; 0 for an item that is not in the training data."""
        flat = histories.explode()
        known = dict(zip(self.items, range(1, len(self.items) + 1)))
        numbers = flat.replace_strict(known, default=0, return_dtype=pl.Int64).fill_null(0).to_numpy()
        sizes = histories.list.len().to_numpy()
        return np.split(numbers[: sizes.sum()] if sizes.all() else numbers, sizes.cumsum()[:-1]) if len(sizes) else []

    def model_dims(self) -> dict[str, Any]:
        return {"items": len(self.items) + 1, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        return {
            "items": len(self.items),
            "length": self.options.length,
            "tokens": self.options.length,
            "rows": max(1, int(self.counts.sum()) // self.options.length),
        }

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return NextItem(
            model, card.inputs, self.counts.tolist(), self.options.negatives, settings.label_smoothing, self.options.repeats
        )

    # Batches

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        histories = self.codes(data.rows[ITEMS_COLUMN])
        if settings and data.splits is not None and (data.splits == "train").all():
            return self.windows(histories)
        return self.next_item_batches(histories)

    def loss_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        return self.windows(self.codes(data.rows[ITEMS_COLUMN]))

    def windows(self, histories: list[np.ndarray]) -> Batches:
        """Return windows of `length` items, each predicted from the items before.

        During training the windows of a long history begin at random offsets.
        """
        length = self.options.length
        known = [h[h > 0] for h in histories]
        known = [h for h in known if len(h) >= 2]
        owner = np.repeat(np.arange(len(known)), [-(-(len(h) - 1) // length) for h in known])
        number = np.concatenate([np.arange(-(-(len(h) - 1) // length)) for h in known])

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            shift = np.zeros(len(index), int)
            if generator is not None:
                shift = torch.randint(length, (len(index),), generator=generator).numpy()
            items, target = np.zeros((2, len(index), length), dtype=np.int64)
            for row, (i, moved) in enumerate(zip(index, shift)):
                h = known[owner[i]]
                end = len(h) - number[i] * length - (moved if len(h) - 1 > length else 0)
                end = max(end, min(len(h), length + 1))
                part = h[max(0, end - length - 1) : end]
                items[row, length - len(part) + 1 :], target[row, length - len(part) + 1 :] = part[:-1], part[1:]
            return {"items": torch.from_numpy(items), "mask": torch.from_numpy(items > 0), "target": torch.from_numpy(target)}

        return Batches(len(owner), make)

    def next_item_batches(self, histories: list[np.ndarray], hold_out_last: bool = True) -> Batches:
        """Return each history without its last item, which is the target; with `hold_out_last=False`, the whole history."""
        length = self.options.length

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            before = [histories[i][:-1] if hold_out_last else histories[i] for i in index]
            known = [h[h > 0] for h in before]
            items = pad_left([h[-length:] for h in known], length)
            # a history of unknown items is read as one padding position
            mask = items > 0
            mask[:, -1] = True
            batch = {
                "items": torch.from_numpy(items),
                "mask": torch.from_numpy(mask),
                "seen": torch.from_numpy(pad_left(known, max([1, *map(len, known)]))),
            }
            if hold_out_last:
                batch["next_item"] = torch.tensor([int(histories[i][-1]) for i in index])
            return batch

        return Batches(len(histories), make)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the last item of each history; 0 for an item that is not in the training data, which counts as missed.

        Raises `DataError` if no item is known.
        """
        items = np.array([h[-1] for h in self.codes(data.rows[ITEMS_COLUMN])])
        if len(items) and not items.any():
            given = data.rows[ITEMS_COLUMN].list.last().head(3).to_list()
            raise DataError(
                f"{data.source}: no item is in the training data, so every score would be 0. It has {', '.join(map(repr, given))}; "
                f"the model knows {', '.join(map(repr, self.items[:3]))}. Check leading zeros and the spelling of the ids."
            )
        if unknown := int((items == 0).sum()):
            self.add_note(f"{unknown:,} of {len(items):,} next items are not in the training data; they count as missed")
        return {"item": items}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        rank = outputs["rank"].astype(np.float64)
        scores = {}
        for k in METRIC_CUTOFFS:
            scores[f"hr_{k}"] = float((rank <= k).mean())
            scores[f"ndcg_{k}"] = float(np.where(rank <= k, 1 / np.log2(1 + rank), 0).mean())
        return {m.name: float((1 / rank).mean()) if m.name == "mrr" else scores[m.name] for m in self.metrics}

    def prepare_test(self, train: Data, held: Data) -> None:
        """Build the sparse user-item matrix of the training rows, for the baselines.

        Also extends the known histories with those of the test users, so that none of their items is recommended.
        """
        from scipy.sparse import csr_matrix

        histories = self.codes(train.rows[ITEMS_COLUMN])
        rows = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
        met = csr_matrix(
            (np.ones(len(rows), np.float32), (rows, np.concatenate(histories))), shape=(len(histories), len(self.items) + 1)
        )
        met.data[:] = 1
        self.met = met
        whole = held.rows.select(self.known.columns)
        self.known = pl.concat([whole, self.known.join(whole, on=self.known.columns[0], how="anti")])

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        from scipy.sparse import csr_matrix, diags

        histories = self.codes(test.rows[ITEMS_COLUMN])
        popular = torch.from_numpy(self.counts.astype(np.float32))
        seldom = 1 / np.sqrt(np.maximum(np.asarray(self.met.sum(0)).ravel(), 1))
        together = diags(seldom) @ (self.met.T @ self.met) @ diags(seldom)  # cosine similarity of the columns
        together = together.tolil()
        together.setdiag(0)
        together = together.tocsr().astype(np.float32)

        def neighbours(before: list[np.ndarray]) -> Tensor:
            rows = np.repeat(np.arange(len(before)), [len(h) for h in before])
            own = csr_matrix(
                (np.ones(len(rows), np.float32), (rows, np.concatenate(before))), shape=(len(before), len(self.items) + 1)
            )
            return torch.from_numpy((own @ together).toarray())

        return [
            Baseline(
                "popularity",
                "the most frequent items, the same for all users",
                self.score_histories(histories, lambda before: popular.expand(len(before), -1)),
            ),
            Baseline(
                "item co-occurrence",
                "items of the same users as the history's items (cosine similarity)",
                self.score_histories(histories, neighbours),
            ),
        ]

    def score_histories(self, histories: list[np.ndarray], scores: Any) -> Arrays:
        """Return the outputs of a function that scores all items for histories."""
        parts = []
        for first in range(0, len(histories), USER_CHUNK):
            some = histories[first : first + USER_CHUNK]
            before = [h[:-1][h[:-1] > 0] for h in some]
            seen = torch.from_numpy(pad_left(before, max([1, *map(len, before)])))
            parts.append(rank_items(scores(before), seen, torch.tensor([int(h[-1]) for h in some]), self.options.repeats))
        return {name: torch.cat([p[name] for p in parts]).numpy() for name in parts[0]}

    # Predictions

    def read_one(self, source: Any, answered: bool) -> Data:
        """Read a table of events, a user of the training data, or item names separated by commas."""
        if answered or not isinstance(source, str) or path_like(source):
            return super().read_one(source, answered)
        user, item = (next(c.name for c in self.columns if c.role == role) for role in ("user", "item"))
        met = self.known.filter(pl.col(user) == source)[ITEMS_COLUMN].to_list()
        items = met[0] if met else [part.strip() for part in source.split(",") if part.strip()]
        if unknown := [i for i in items if i not in set(self.items)]:
            raise DataError(
                f"{source!r} is neither a user nor a list of items of the training data (unknown: "
                f"{', '.join(map(repr, unknown[:5]))}). Items are, for example, {', '.join(self.items[:5])}."
            )
        columns = {user: [source] * len(items), item: items}
        others = {c.name: [None] * len(items) for c in self.columns if c.role not in ("user", "item")}
        return read(pl.DataFrame({**columns, **others}), schema=self.columns, labels_optional=True)

    def read(self, sources: Any, *, answered: bool = False) -> Data:
        data = super().read(sources, answered=answered)
        if answered:
            return data.take(np.flatnonzero(data.splits == "test"))
        rows, _ = self.histories(data, self.Options())
        return Data(data.source, rows, data.columns, data.manifest, data.findings)

    def predict_batches(self, data: Data, card: Card) -> Batches:
        histories = self.codes(data.rows[ITEMS_COLUMN])
        if new := sum(int((h == 0).sum()) for h in histories):
            self.notes.append(f"{new} events have items that are not in the training data; they are ignored")
        self.request = data.rows[next(c.name for c in self.columns if c.role == "user")].to_list()
        return self.next_item_batches(histories, hold_out_last=False)

    def predict_step(self, objective: Objective) -> Any:
        objective.top = max(DEFAULT_TOP_K, self.predict_options.count)
        return super().predict_step(objective)

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        answers = []
        for user, top, scores in zip(self.request, outputs["top"].astype(int), outputs["scores"]):
            best = [(self.items[i - 1], float(s)) for i, s in zip(top, scores) if i > 0][: self.predict_options.count]
            answers.append(
                {
                    "user": user,
                    "recommended": ", ".join(i for i, _ in best),
                    "items": [i for i, _ in best],
                    "scores": [s for _, s in best],
                }
            )
        return answers

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        rank, top = outputs["rank"], outputs["top"].astype(int)[:, :10]
        histories = self.codes(test.rows[ITEMS_COLUMN])
        users = test.rows[next(c.name for c in self.columns if c.role == "user")].to_list()
        name = lambda i: self.items[i - 1] if i else "(unknown)"
        rows = [
            (
                users[i],
                ", ".join(map(name, histories[i][-9:-1])),
                ", ".join(name(j) for j in top[i] if j),
                name(targets["item"][i]),
                "–" if np.isinf(rank[i]) else int(np.ceil(rank[i])),
            )
            for i in np.random.default_rng(0).permutation(len(users))[:30]
        ]
        tenth = self.popularity_deciles()
        shown = np.bincount(tenth[top[top > 0]], minlength=10) / max((top > 0).sum(), 1)
        met = np.bincount(tenth[targets["item"][targets["item"] > 0]], minlength=10) / max((targets["item"] > 0).sum(), 1)
        sizes = np.array([len(h) - 1 for h in histories])
        edges = np.unique(np.quantile(sizes, np.linspace(0, 1, 6)).astype(int))
        by_size = {
            f"{low} to {high} items": float((rank[(sizes >= low) & (sizes <= high)] <= 10).mean())
            for low, high in pairwise(edges)
        }
        by_fame = {
            f"tenth {t + 1}": float((rank[tenth[targets["item"]] == t] <= 10).mean())
            for t in range(10)
            if ((tenth[targets["item"]] == t) & (targets["item"] > 0)).any()
        }
        distinct = len(set(top[top > 0].tolist()))
        return {
            "Users": [
                Table(
                    "Recommended",
                    "Random test users: their last items (latest last), the recommendations (best "
                    "first), the actual next item, and its rank among all items.",
                    ("user", "history", "recommended", "next item", "rank"),
                    rows,
                )
            ],
            "Popularity": [
                Table(
                    "Popularity bias",
                    f"Items by training frequency: the first tenth is the most frequent. {distinct:,} of "
                    f"{len(self.items):,} items are recommended to at least one user.",
                    ("tenth of items", "fraction of recommendations", "fraction of next items"),
                    [(t + 1, float(shown[t]), float(met[t])) for t in range(10)],
                ),
                Bars("Hit rate at 10 by item popularity", "", by_fame),
                Bars("Hit rate at 10 by history length", "", by_size),
            ],
        }

    def popularity_deciles(self) -> np.ndarray:
        """Return the popularity decile of each item number, 0 = most frequent. `items` are sorted by frequency."""
        return np.concatenate([[0], np.arange(len(self.items)) * 10 // max(len(self.items), 1)])

    # Saved with the run

    STATE: ClassVar = {"items": list[str], "counts": list[float]}

    def state(self) -> dict[str, Any]:
        return {"items": self.items, "counts": self.counts.tolist()}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.items, task.counts = state["items"], np.array(state["counts"])
        task.known = pl.read_parquet(folder / "histories.parquet")
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.known.write_parquet(folder / "histories.parquet")


def pad_left(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Return the rows left-padded with 0."""
    out = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
    return out


TASKS = (Recommendation,)
