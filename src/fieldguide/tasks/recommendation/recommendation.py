"""Recommendation: predict the next items of each user from the items of the past."""

from __future__ import annotations

from collections.abc import Mapping
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
from fieldguide.data.preprocessing.table import TablePreparer
from fieldguide.data.text_values import count_values
from fieldguide.data.timestamps import DATE_DTYPE
from fieldguide.objectives import Objective
from fieldguide.objectives.next_item import DEFAULT_TOP_K, rank_items
from fieldguide.objectives.recommenders import RECOMMENDERS
from fieldguide.tasks.base import Arrays, Baseline, Metric, Task
from fieldguide.tasks.recommendation.features import Features, find_features, is_feature, read_features
from fieldguide.tasks.recommendation.signature import RecommendationSignature
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import path_like

ITEMS_COLUMN = "#items"  # items of a user, ordered by time
FEATURE_PREFIX = "#feature:"  # of the other columns of the events of a user
TIMES_COLUMN = "#times"  # when each was met, in seconds; only if there is a time column
FEATURE_FILES = {"users": "user_features.parquet", "goods": "item_features.parquet"}  # attribute -> its file in a run folder
METRIC_CUTOFFS = (5, 10, 20)
MAX_HISTORY_ITEMS = 100  # maximum items of a history, if the user sets no length
MAX_FULLY_SCORED_ITEMS = 50_000  # above this many items, training samples negatives (`DRAWN`) instead of scoring all items
SAMPLED_NEGATIVES = 4096
UNKNOWN_USER_PROBABILITY = 0.5  # of a user of a training batch being read as an unknown one, with features
USER_CHUNK = 512  # users whose baselines are scored together


class Recommendation(RecommendationSignature, Task):
    name = "recommendation"
    has_own_rows = False
    reads = "a table of events: a user column, an item column and a time column"
    input_types = ("items",)
    output_types = tuple(RECOMMENDERS)
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
    baseline_models = ("item-neighbors",)
    max_validation_examples = 5000  # each is ranked among all items
    min_batch_size = 32

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # maximum items of a history; of longer ones the latest
        least: float | None = None  # ratings below this are left out
        repeats: bool | None = None  # whether items of the history may be recommended again
        negatives: int | None = None  # negative items sampled per step; 0 = all items are scored
        user_table: str | None = None  # file with features of users, one row each, for networks that read them
        item_table: str | None = None  # file with features of items, one row each, for networks that read them

    @dataclass(frozen=True)
    class PredictOptions:
        count: Annotated[int, Limits(1, 10_000)] = 10  # items recommended to each user

    items: list[str]  # names of items 1, 2, ...
    counts: np.ndarray  # frequency of each item in training, with 0 first
    known: pl.DataFrame  # users and their items in time order
    users: Features | None = None  # features of users and items; None in runs of earlier versions
    goods: Features | None = None

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
                pl.col(name).list.head(pl.col(ITEMS_COLUMN).list.len() - drop)
                for name in histories.columns
                if name in (ITEMS_COLUMN, TIMES_COLUMN) or name.startswith(FEATURE_PREFIX)
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
            rows = rows.with_columns(to_seconds(time).backward_fill().over(user).alias(TIMES_COLUMN))
        lists = [pl.col(item).alias(ITEMS_COLUMN), *(pl.col(name) for name in rows.columns if name == TIMES_COLUMN)]
        lists += [pl.col(c.name).alias(FEATURE_PREFIX + c.name) for c in data.columns.values() if is_feature(c)]
        grouped = rows.group_by(user, maintain_order=True).agg(*lists, pl.col(FILE).first(), pl.col(LINE).first()).sort(user)
        few = grouped.filter(pl.col(ITEMS_COLUMN).list.len() < 3)
        files = data.manifest.files
        place = tuple(f"{files[f].path}:{line}" for f, line in few.select(FILE, LINE).head(5).rows())
        return grouped, place

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        # Requests need no features: those of users and items are stored with the task.
        task = cls([c for c in data.columns.values() if c.role != "feature"], options)
        events = data.rows[ITEMS_COLUMN].explode().drop_nulls()
        task.items, counts = count_values(events)
        task.counts = np.array([0, *counts])
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
        task.known = data.rows.select(user, *(name for name in (ITEMS_COLUMN, TIMES_COLUMN) if name in data.rows.columns))
        task.fit_features(data)
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

    def fit_features(self, data: Data) -> None:
        """Find the features of users and items in the events and in the tables of the options."""
        user = data.require_role("user").name
        columns = [c for c in data.columns.values() if is_feature(c) and FEATURE_PREFIX + c.name in data.rows.columns]
        lists = [ITEMS_COLUMN, *(FEATURE_PREFIX + c.name for c in columns)]
        events = data.rows.select(user, *lists).explode(lists).rename({FEATURE_PREFIX + c.name: c.name for c in columns})
        events = events.drop_nulls(ITEMS_COLUMN)
        of_items = find_features(events, ITEMS_COLUMN, columns)
        of_users = find_features(events, user, [c for c in columns if c not in of_items[1]])
        known = data.rows[user].unique(maintain_order=True).to_list()
        named = self.options.user_table, self.options.item_table
        self.users = Features.fit(known, [*([read_features(named[0], "user")] if named[0] else []), of_users])
        self.goods = Features.fit(self.items, [*([read_features(named[1], "item")] if named[1] else []), of_items])

    def describe_profiles(self, users: list[str], card: Card | None) -> dict[str, np.ndarray]:
        """Return the codes and numbers of users for a network that reads them; the first code is the user."""
        if card is None or self.users is None or "profile" not in card.optional_inputs:
            return {}
        codes, numbers = self.users.apply(users)
        own = np.array([self.users.place.get(user, -1) + 1 for user in users], dtype=np.int64)
        return {"profile": np.concatenate([own[:, None], codes], 1), "profile_numbers": numbers}

    def codes(self, histories: pl.Series) -> list[np.ndarray]:
        """Return each history as item numbers; 0 for an item that is not in the training data."""
        flat = histories.explode()
        known = dict(zip(self.items, range(1, len(self.items) + 1)))
        numbers = flat.replace_strict(known, default=0, return_dtype=pl.Int64).fill_null(0).to_numpy()
        sizes = histories.list.len().to_numpy()
        return np.split(numbers[: sizes.sum()] if sizes.all() else numbers, sizes.cumsum()[:-1]) if len(sizes) else []

    def times(self, data: Data, card: Card | None) -> list[np.ndarray] | None:
        """Return when each item of each history was met, in seconds, for a network that reads it; None if it is not known.

        What is not known happens at the latest moment of the training data.
        """
        if card is None or "times" not in card.optional_inputs or TIMES_COLUMN not in data.rows.columns:
            return None
        lists = data.rows[TIMES_COLUMN]
        known = lists.explode().fill_null(self.find_latest_time(data)).to_numpy()
        return np.split(known, lists.list.len().to_numpy().cumsum()[:-1])

    def find_latest_time(self, data: Data) -> int:
        """Return the latest moment of the training data and of `data`, in seconds."""
        lists = [rows[TIMES_COLUMN].explode().drop_nulls() for rows in (self.known, data.rows) if TIMES_COLUMN in rows.columns]
        return max([0, *(int(seconds.to_numpy().max()) for seconds in lists if len(seconds))])

    def model_dims(self) -> dict[str, Any]:
        dims: dict[str, Any] = {"items": len(self.items) + 1, "length": self.options.length}
        if self.users is not None and self.goods is not None:
            users, goods = self.users.preparer, self.goods.preparer
            dims |= {"user_categories": (self.users.table.height + 1, *users.cardinalities), "user_numbers": len(users.numbers)}
            dims |= {"item_categories": tuple(goods.cardinalities), "item_numbers": len(goods.numbers)}
        return dims

    def data_facts(self) -> dict[str, Any]:
        return {
            "items": len(self.items),
            "length": self.options.length,
            "tokens": self.options.length,
            "rows": max(1, int(self.counts.sum()) // self.options.length),
        }

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        if self.goods is not None and hasattr(model, "set_item_features"):
            codes, numbers = self.goods.apply(["", *self.items])
            model.set_item_features(codes, numbers)
        return RECOMMENDERS[card.output_types[0]](
            model,
            (*card.inputs, *card.optional_inputs),
            self.counts.tolist(),
            self.options.negatives,
            settings.label_smoothing,
            self.options.repeats,
        )

    # Batches

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        histories, times = self.codes(data.rows[ITEMS_COLUMN]), self.times(data, card)
        profiles = self.describe_profiles(self.list_users(data), card)
        if settings and data.splits is not None and (data.splits == "train").all():
            if card.reads_whole_rows:
                return self.next_item_batches(histories, False)
            return self.windows(histories, times, profiles)
        return self.next_item_batches(histories, times=times, profiles=profiles)

    def list_users(self, data: Data) -> list[str]:
        """Return the user of each row."""
        return data.rows[next(c.name for c in self.columns if c.role == "user")].to_list()

    def loss_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        profiles = self.describe_profiles(self.list_users(data), card)
        return self.windows(self.codes(data.rows[ITEMS_COLUMN]), self.times(data, card), profiles)

    def windows(
        self,
        histories: list[np.ndarray],
        times: list[np.ndarray] | None = None,
        profiles: Mapping[str, np.ndarray] | None = None,
    ) -> Batches:
        """Return windows of `length` items, each predicted from the items before, with what is known of their users.

        During training the windows of a long history begin at random offsets.
        """
        length = self.options.length
        long = [i for i, h in enumerate(histories) if (h > 0).sum() >= 2]
        known = [histories[i][histories[i] > 0] for i in long]
        when = None if times is None else [times[i][histories[i] > 0] for i in long]
        owner = np.repeat(np.arange(len(known)), [-(-(len(h) - 1) // length) for h in known])
        number = np.concatenate([np.arange(-(-(len(h) - 1) // length)) for h in known])

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            shift = np.zeros(len(index), int)
            if generator is not None:
                shift = torch.randint(length, (len(index),), generator=generator).numpy()
            items, target = np.zeros((2, len(index), length), dtype=np.int64)
            moments = np.zeros((len(index), length, 2), dtype=np.int64)
            for row, (i, moved) in enumerate(zip(index, shift)):
                h = known[owner[i]]
                end = len(h) - number[i] * length - (moved if len(h) - 1 > length else 0)
                end = max(end, min(len(h), length + 1))
                part = slice(max(0, end - length - 1), end)
                first = length - len(h[part]) + 1
                items[row, first:], target[row, first:] = h[part][:-1], h[part][1:]
                if when is not None:
                    moments[row, first:] = pair_moments(when[owner[i]][part])
            batch = {"items": torch.from_numpy(items), "mask": torch.from_numpy(items > 0), "target": torch.from_numpy(target)}
            whose = np.array(long, dtype=np.int64)[owner[index]]
            batch |= {name: torch.from_numpy(values[whose]) for name, values in (profiles or {}).items()}
            if generator is not None and "profile" in batch:  # some are read as unknown, so that new users can be served
                batch["profile"][torch.rand(len(index), generator=generator) < UNKNOWN_USER_PROBABILITY, 0] = 0
            return batch if when is None else batch | {"times": torch.from_numpy(moments)}

        return Batches(len(owner), make)

    def next_item_batches(
        self,
        histories: list[np.ndarray],
        hold_out_last: bool = True,
        times: list[np.ndarray] | None = None,
        request: int = 0,
        profiles: Mapping[str, np.ndarray] | None = None,
    ) -> Batches:
        """Return each history without its last item, which is the target; with `hold_out_last=False`, the whole history.

        `times` are those of its items, in seconds. The next item is requested at the time of the held-out one, or at `request`.
        """
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
            batch |= {name: torch.from_numpy(values[index]) for name, values in (profiles or {}).items()}
            if times is not None:
                moments = np.zeros((len(index), length, 2), dtype=np.int64)
                for row, i in enumerate(index):
                    asked = times[i][-1] if hold_out_last else request
                    met = times[i][: len(before[row])][before[row] > 0][-length:]
                    moments[row, length - len(met) :] = pair_moments(np.append(met, asked))
                batch["times"] = torch.from_numpy(moments)
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
        """Extend the known histories with those of the test users, so that none of their items is recommended."""
        whole = held.rows.select(self.known.columns)
        self.known = pl.concat([whole, self.known.join(whole, on=self.known.columns[0], how="anti")])

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        histories = self.codes(test.rows[ITEMS_COLUMN])
        popular = torch.from_numpy(self.counts.astype(np.float32))
        return [
            Baseline(
                "popularity",
                "the most frequent items, the same for all users",
                self.score_histories(histories, lambda before: popular.expand(len(before), -1)),
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
        history = self.known.filter(pl.col(user) == source)
        met = history[ITEMS_COLUMN].to_list()
        items = met[0] if met else [part.strip() for part in source.split(",") if part.strip()]
        if unknown := [i for i in items if i not in set(self.items)]:
            raise DataError(
                f"{source!r} is neither a user nor a list of items of the training data (unknown: "
                f"{', '.join(map(repr, unknown[:5]))}). Items are, for example, {', '.join(self.items[:5])}."
            )
        columns = {user: [source] * len(items), item: items}
        others: dict[str, Any] = {c.name: [None] * len(items) for c in self.columns if c.role not in ("user", "item")}
        if met and TIMES_COLUMN in history.columns:
            time = next(c for c in self.columns if c.role == "time")
            seconds = history[TIMES_COLUMN].explode()
            others[time.name] = pl.from_epoch(seconds, "s").cast(DATE_DTYPE) if time.kind == "date" else seconds
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
        self.request = self.list_users(data)
        profiles = self.describe_profiles(self.request, card)
        return self.next_item_batches(histories, False, self.times(data, card), self.find_latest_time(data), profiles)

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

    STATE: ClassVar = {
        "items": list[str],
        "counts": list[float],
        "users?": TablePreparer.STATE,
        "goods?": TablePreparer.STATE,
    }

    def state(self) -> dict[str, Any]:
        kept = {name: each.preparer.to_json() for name in FEATURE_FILES if (each := getattr(self, name)) is not None}
        return {"items": self.items, "counts": self.counts.tolist(), **kept}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.items, task.counts = state["items"], np.array(state["counts"])
        task.known = pl.read_parquet(folder / "histories.parquet")
        for name, file in FEATURE_FILES.items():
            if name in state:
                setattr(task, name, Features(pl.read_parquet(folder / file), TablePreparer.from_json(state[name])))
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.known.write_parquet(folder / "histories.parquet")
        for name, file in FEATURE_FILES.items():
            if (each := getattr(self, name)) is not None:
                each.table.write_parquet(folder / file)


def to_seconds(time: Column) -> pl.Expr:
    """Return the seconds of a column of numbers or dates."""
    values = pl.col(time.name)
    return values.dt.epoch("s") if time.kind == "date" else values.cast(pl.Float64).round().cast(pl.Int64, strict=False)


def pair_moments(times: np.ndarray) -> np.ndarray:  # T + 1 -> T 2
    """Return the moment of each item but the last, and that of the item after it."""
    return np.stack([times[:-1], times[1:]], 1)


def pad_left(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Return the rows left-padded with 0."""
    out = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
    return out


TASKS = (Recommendation,)
