"""The signature of a task: how a fitted task calls its model.

`SignatureBuilder` composes it from what a task declares (columns, options, dimensions of its card) and from a few methods that say
what is special about it. Mixins next to the tasks override those (`tasks/*/signature.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from fieldguide.core.card import Card
from fieldguide.core.network_tensors import describe_network, make_getter
from fieldguide.core.option_docs import describe_options
from fieldguide.core.signature import (
    InputField,
    Limits,
    Loop,
    OptionSpec,
    RecordField,
    RecordUnit,
    SeriesFormat,
    Signature,
    Step,
    TensorSpec,
)
from fieldguide.data.dataset import Column
from fieldguide.tasks.signature_parts import describe_column
from fieldguide.tasks.spec import TaskSpec

INPUT_ROLES = ("feature", "user", "item", "series", "time")


class SignatureBuilder(TaskSpec):
    """Describes how a fitted task calls its model. Override the methods whose general answer does not fit."""

    row_form: ClassVar[Literal["table", "value"]] = "table"
    record_for: ClassVar[RecordUnit] = "row"
    max_request_rows: ClassVar[int] = 10_000
    method: ClassVar[str] = "forward"  # of the network
    columns: list[Column]

    def build_signature(self, card: Card, config: Any, network: Any) -> Signature:
        """Return how this task calls a network of a card."""
        known = describe_network(card, config, network)
        tensors = self.describe_tensors(known.tensors)
        return replace(
            known,
            task=self.name,
            method=self.method,
            row_form=self.row_form,
            record_for=self.record_for,
            inputs=tuple(self.describe_inputs()),
            series=self.describe_series(),
            preprocessing=tuple(self.describe_preprocessing(card)),
            tensors=(*tensors, *self.describe_request_tensors(card)),
            outputs=tuple(match_axes(self.describe_outputs(known.outputs, network), tensors)),
            postprocessing=tuple(self.describe_postprocessing(make_getter(card, config)("members", 0))),
            record=tuple(self.describe_record()),
            options=self.describe_options(),
            loop=self.describe_loop(known.loop),
            limits=self.describe_limits(),
        )

    def input_columns(self) -> list[Column]:
        """Return the columns that the model reads."""
        raise NotImplementedError

    def describe_inputs(self) -> Sequence[InputField]:
        """Return the raw inputs of a row: by default the columns that the model reads."""
        return [describe_column(column) for column in self.input_columns()]

    def describe_series(self) -> SeriesFormat | None:
        """Return the history and horizon of time series; None for rows that are independent of each other."""
        return None

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        """Return the steps from raw inputs to the tensors of the network, in order."""
        return []

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        """Return the arguments of the network as this task makes them: with fixed sizes, smaller limits, value ranges."""
        return tensors

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        """Return further tensors of a batch for prediction, which the steps around the network take."""
        return []

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        """Return the outputs of the network for these inputs."""
        return outputs

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        """Return the steps from the outputs of the network to records; `members` is the size of an ensemble, or 0."""
        return []

    def describe_record(self) -> Sequence[RecordField]:
        """Return the values of a prediction record, without `input`."""
        raise NotImplementedError

    def describe_options(self) -> tuple[OptionSpec, ...]:
        """Return the prediction options."""
        return describe_options(self.PredictOptions)

    def describe_loop(self, loop: Loop | None) -> Loop | None:
        """Return the loop of the network with the tokens and sizes of this task."""
        return loop

    def describe_limits(self) -> Limits:
        """Return the largest inputs."""
        return Limits(rows=self.max_request_rows)


def match_axes(outputs: Sequence[TensorSpec], tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the outputs with the sizes and limits that the axes of the same name have in the inputs."""
    known = {axis.name: axis for tensor in tensors for axis in tensor.axes}
    return [
        replace(out, axes=tuple(known.get(axis.name, axis) if axis.size is None else axis for axis in out.axes))
        for out in outputs
    ]
