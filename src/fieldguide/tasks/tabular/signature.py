"""The signature of tables: columns, and the numbers and codes they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fieldguide.core.card import Card
from fieldguide.core.signature import InputField, Step
from fieldguide.data.dataset import Column
from fieldguide.data.preprocessing import TablePreparer
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import describe_column

STATE = "preparer"  # the key of the fitted values in preprocess/task.json


class TabularSignature(SignatureBuilder):
    """The signature of a task that reads the rows of a table."""

    preparer: TablePreparer

    def describe_inputs(self) -> Sequence[InputField]:
        known = {c.column: c.values for c in self.preparer.categories if c.part == "value"}
        return [self.describe_feature(column, known.get(column.name, ())) for column in self.input_columns()]

    def describe_feature(self, column: Column, values: Sequence[str]) -> InputField:
        """Return a column. Ranges that old runs do not have are those of the quantiles."""
        field = describe_column(column, values)
        if column.role == "feature":  # texts may be missing too
            field = replace(field, nullable=True)
        if column.range is None and column.kind == "number":
            quantiles = next((n.quantiles for n in self.preparer.numbers if n.column == column.name and n.quantiles), ())
            if quantiles:
                return replace(field, low=quantiles[0], high=quantiles[-1])
        return field

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        kinds = {column.kind for column in self.input_columns()}
        scaled = any(number.quantiles for number in self.preparer.numbers)
        steps = [Step("parse_cells", "read numbers, dates and truth values in the format of each column", False)]
        if "date" in kinds:
            steps.append(
                Step("split_dates", "days since 1970, sine and cosine of the year and hour, weekday", False, state=STATE)
            )
        if self.preparer.texts:
            steps.append(Step("embed_texts", "TF-IDF vectors of texts, projected to a few numbers", False, state=STATE))
        if scaled and card.number_scale == "standard":
            steps.append(
                Step("standardize_numbers", "mean 0 and standard deviation 1 of the quantiles; missing is 0", True, state=STATE)
            )
        elif scaled:
            steps.append(
                Step("scale_numbers", "map numbers to a standard normal by quantiles; missing is 0", True, state=STATE)
            )
        if self.preparer.categories:
            steps.append(Step("look_up_categories", "codes of categories: 0 unknown, then values, missing", True, state=STATE))
        if card.input_type == "vector":
            steps.append(Step("encode_one_hot", "one-hot codes after the numbers", True, {"width": self.preparer.width}))
        return steps
