"""Click prediction: will this user take to this item? A table of users, items, what else is known, and yes or no."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.tasks.base import Baseline, Metric
from fieldguide.tasks.supervised import ClassificationTask
from fieldguide.tasks.tabular.tables import TabularClassification

SHRINK = 10  # an item's share of yes is mixed with that of all as if so many more had met it


class ClickPrediction(TabularClassification):
    name = "click-prediction"
    reads = (
        "a table with a column of users, one of items, any others, and one that says whether the user took to the item "
        "(or a rating: task.positive=4 makes yes of 4 and more)"
    )
    input_types = ("table",)
    column_spec = ColumnSpec(
        "last", names=("click", "clicked", "rating"), roles=("user", "item"), kinds={"user": "category", "item": "category"}
    )
    metrics = (Metric("auc", "max", "area under the ROC curve"), *(m for m in ClassificationTask.metrics if m.name != "auc"))
    recipe: ClassVar = {"weight_decay": 1e-4, "patience": 6}

    @dataclass(frozen=True)
    class Options:
        positive: float | None = None  # a target of numbers is yes from here on

    @classmethod
    def match(cls, data: Data) -> str | None:
        return None  # a table like any other, unless asked for

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        missing = [role for role in ("user", "item") if not data.columns_with_role(role)]
        if missing:
            return " and ".join(f"a column of {role}s (name it with --set role.{role}=COLUMN)" for role in missing)
        return None if data.target else "a column that says yes or no (name it with --target)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        target = data.target
        if options.positive is None:
            if target.distinct != 2 and len(data):
                raise DataError(
                    f"{data.source}: the target {target.name!r} has {target.distinct} values, not yes and no. Say "
                    "from which rating on it is yes: --set task.positive=4."
                )
            return data
        values = data.rows[target.name].cast(pl.Float64, strict=False)
        if values.null_count() > data.rows[target.name].null_count():
            raise DataError(
                f"{data.source}: task.positive={options.positive:g} needs a target of numbers, and {target.name!r} has others."
            )
        yes = (values >= options.positive).replace_strict({True: "yes", False: "no"}, default=None, return_dtype=pl.String)
        column = replace(target, kind="category", distinct=2, why=f"yes from {options.positive:g} on")
        return replace(data, rows=data.rows.with_columns(yes.alias(target.name)), columns={**data.columns, target.name: column})

    def inputs(self) -> list[Column]:
        return [*(c for c in self.columns if c.role in ("user", "item")), *super().inputs()]

    def linear_features(self, train: Data, test: Data) -> tuple[Any, Any]:
        """One-hot columns, sparse: there are as many as users and items."""
        from scipy.sparse import csr_matrix, hstack

        sizes = np.array(self.preparer.cardinalities)
        starts = np.concatenate([[0], sizes.cumsum()[:-1]])

        def sparse(data: Data) -> Any:
            numbers, codes = self.preparer.apply(data.rows)
            rows = np.repeat(np.arange(len(codes)), codes.shape[1])
            ones = csr_matrix(
                (np.ones(codes.size, np.float32), (rows, (codes + starts).ravel())), (len(codes), int(sizes.sum()))
            )
            return hstack([csr_matrix(numbers), ones]).tocsr()

        return sparse(train), sparse(test)

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        item, yes = train.require_role("item").name, self.targets(train)["label"].astype(float)
        shares = (
            pl.DataFrame({"item": train.rows[item], "yes": yes})
            .group_by("item")
            .agg(((pl.col("yes").sum() + SHRINK * yes.mean()) / (pl.len() + SHRINK)).alias("share"))
        )
        known = dict(zip(shares["item"].to_list(), shares["share"].to_list()))
        p = np.array([known.get(i, yes.mean()) for i in test.rows[item].to_list()])
        own = Baseline(
            "the item's own share",
            "how often the item was taken to in training, whoever asks",
            {"probabilities": np.stack([1 - p, p], 1)},
        )
        return [*super().baselines(train, test), own]


TASKS = (ClickPrediction,)
