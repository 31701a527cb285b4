"""Click prediction: the probability that a user clicks an item, from a table of users, items and other columns."""

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

PRIOR_EXAMPLES = 10  # prior examples of the smoothed click rate per item


class ClickPrediction(TabularClassification):
    name = "click-prediction"
    reads = (
        "a table with a user column, an item column, any others, and a yes/no target (or a rating: with "
        "task.positive=4, ratings of at least 4 are yes)"
    )
    input_types = ("table",)
    column_spec = ColumnSpec(
        "last", names=("click", "clicked", "rating"), roles=("user", "item"), kinds={"user": "category", "item": "category"}
    )
    metrics = (
        Metric("auc", "max", "area under the ROC curve", label="AUC"),
        *(m for m in ClassificationTask.metrics if m.name != "auc"),
    )
    recipe: ClassVar = {"weight_decay": 1e-4, "patience": 6}

    @dataclass(frozen=True)
    class Options:
        positive: float | None = None  # numeric targets of at least this value are yes

    @classmethod
    def match(cls, data: Data) -> str | None:
        return None  # an ordinary table unless the task is requested

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        missing = [role for role in ("user", "item") if not data.columns_with_role(role)]
        if missing:
            return " and ".join(f"a {role} column (name it with --set role.{role}=COLUMN)" for role in missing)
        return None if data.target else "a yes/no target column (name it with --target)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        target = data.required_target
        if options.positive is None:
            if target.distinct != 2 and len(data):
                raise DataError(
                    f"{data.source}: the target {target.name!r} has {target.distinct} values, not two. "
                    "Set the rating from which it is yes: --set task.positive=4."
                )
            return data
        values = data.rows[target.name].cast(pl.Float64, strict=False)
        if values.null_count() > data.rows[target.name].null_count():
            raise DataError(
                f"{data.source}: task.positive={options.positive:g} needs a numeric target, but {target.name!r} "
                "has other values."
            )
        yes = (values >= options.positive).replace_strict({True: "yes", False: "no"}, default=None, return_dtype=pl.String)
        column = replace(target, kind="category", distinct=2, why=f"yes from {options.positive:g}")
        return replace(data, rows=data.rows.with_columns(yes.alias(target.name)), columns={**data.columns, target.name: column})

    def suggest_metric(self) -> tuple[str, str]:
        return "", ""  # clicks are rare as a rule, and AUC does not depend on how rare

    def inputs(self) -> list[Column]:
        return [*(c for c in self.columns if c.role in ("user", "item")), *super().inputs()]

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        item, yes = train.require_role("item").name, self.targets(train)["label"].astype(float)
        shares = (
            pl.DataFrame({"item": train.rows[item], "yes": yes})
            .group_by("item")
            .agg(((pl.col("yes").sum() + PRIOR_EXAMPLES * yes.mean()) / (pl.len() + PRIOR_EXAMPLES)).alias("share"))
        )
        known = dict(zip(shares["item"].to_list(), shares["share"].to_list()))
        p = np.array([known.get(i, yes.mean()) for i in test.rows[item].to_list()])
        own = Baseline(
            "item click rate",
            "the item's click rate in training, the same for all users",
            {"probabilities": np.stack([1 - p, p], 1)},
        )
        return [*super().baselines(train, test), own]


TASKS = (ClickPrediction,)
