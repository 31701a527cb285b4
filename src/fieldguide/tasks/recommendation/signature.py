"""The signature of recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fieldguide.core.card import Card
from fieldguide.core.signature import Axis, InputField, RecordField, RecordUnit, Step, TensorSpec, list_values
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import describe_column, fix_axes, request_tensor

OPTIONAL_ROLES = ("rating", "time")


class RecommendationSignature(SignatureBuilder):
    """The signature of recommendation. A request holds events, one per row, which are joined to one history per user."""

    record_for: ClassVar[RecordUnit] = "user"
    options: Any
    items: list[str]

    def describe_inputs(self) -> Sequence[InputField]:
        found = []
        for column in self.columns:
            if column.role in ("user", "item"):
                values = self.items if column.role == "item" else ()
                found.append(describe_column(column, values, nullable=False))
            elif column.role in OPTIONAL_ROLES:
                found.append(describe_column(column, nullable=True))
        return found

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        length, hides = self.options.length, "masked-items" in card.output_types
        return [
            Step("group", "events of each user in order of time", False),
            Step(
                "look_up_items",
                "numbers of the items, from 1; unknown ones are left out",
                True,
                {"count": len(self.items)},
                "items",
            ),
            Step("truncate", f"the latest {length} items, padded on the left", False, {"length": length}),
            *(
                [Step("hide_next", "a hidden place after the last item; of full histories without the first", True)]
                if hides
                else []
            ),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return [replace(spec, axes=fix_axes(spec.axes, {"time": self.options.length})) for spec in tensors]

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        about = "all items of the user, which are not recommended again; 0 is none"
        return [request_tensor("seen", "int64", Axis("history"), about=about, low=0, high=len(self.items))]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        steps = [Step("last", "logits at the last position", True)]
        if not self.options.repeats:
            steps.append(Step("exclude_seen", "items of the history are not recommended", True))
        return [*steps, Step("top_k", "the highest scores (option count)", True), Step("name_items", "names by number", True)]

    def describe_record(self) -> Sequence[RecordField]:
        known = list_values(self.items)
        return [
            RecordField("user", "string", "the user"),
            RecordField("recommended", "string", "the items, best first, as text"),
            RecordField("items", "array", "the items, best first", items=RecordField("", "string", **known)),
            RecordField("scores", "array", "the score of each", items=RecordField("", "number")),
        ]
