"""Graphs of recommendation: the texts of a user's items, in order of time -> the items that may come next, best first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.number_formats import list_replacements
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.forecasting import check_dates, describe_target
from fieldguide.exporting.graph import BATCH, Graph, Lookup, Names, build_pipeline
from fieldguide.objectives.next_item import DEFAULT_TOP_K
from fieldguide.tasks.recommendation.recommendation import TIMES_COLUMN

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

PADDING = -1  # code of places without an item; 0 is an item that is not in the training data
MAX_SECONDS = 10**9  # of random times
MIN_CLOSE = 0.9  # fraction of values: items of nearly equal score may be in another order


class HistorySteps(nn.Module):
    """Return the batch of `Recommendation` for histories: their latest known items, padded on the left, and what was seen.

    `forward` takes the codes of items, B H int64 (0 is unknown, -1 is none); if the network reads them, the times of the items in
    seconds, B H int64, and of the request, B int64; if it reads profiles, the code of the user, B 1 int64 (0 is unknown).
    """

    profile: Tensor  # U K int64
    profile_numbers: Tensor  # U N

    def __init__(self, task: Any, card: Any, has_times: bool):
        super().__init__()
        self.length, self.has_times = task.options.length, has_times
        users = ["", *task.users.place] if task.users is not None else []
        for name, values in task.describe_profiles(users, card).items():
            values[:1] = 0  # an unknown user, whatever the name
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values)), persistent=False)

    def forward(self, codes: Tensor, *others: Tensor) -> dict[str, Tensor]:
        rest, is_known = list(others), codes > 0
        later = is_known.long().flip(1).cumsum(1).flip(1) - 1  # known items after each one
        place = torch.where(
            is_known & (later < self.length), self.length - 1 - later, self.length
        )  # the last place is left out
        align = lambda values: torch.zeros_like(values[:, :1]).expand(-1, self.length + 1).scatter(1, place, values)[:, :-1]
        items = align(codes)
        batch = {"items": items, "mask": torch.cat([items[:, :-1] > 0, torch.ones_like(items[:, :1]) > 0], 1)}
        batch["seen"] = codes.clamp(min=0)
        batch["unknown"] = (codes == 0).sum(1)
        if self.has_times:
            times = align(rest.pop(0))
            moments = torch.stack([times, torch.cat([times[:, 1:], rest.pop(0)[:, None]], 1)], -1)
            batch["times"] = torch.where((items > 0)[..., None], moments, 0)
        if rest:
            batch |= {name: values[rest[0][:, 0]] for name, values in self.named_buffers()}
        return batch


def build_recommendation(predictor: TaskPredictor) -> Graph:
    """Return the graph of recommendation. Raises `ExportError` for times that the program cannot read."""
    task: Any = predictor.task
    columns, reads, count = {column.role: column for column in task.columns}, predictor.card.optional_inputs, len(task.items)
    has_times = "times" in reads and TIMES_COLUMN in task.known.columns
    has_profile = "profile" in reads and task.users is not None
    inputs = [TensorSpec("history_codes", "int64", (BATCH, Axis("history")), low=PADDING, high=count)]
    lookups = [Lookup("history", tuple(task.items), first=1, unknown=0, missing=PADDING)]
    texts = {"history_codes": ["history"]}
    if has_times:
        inputs += [
            TensorSpec("times", "int64", (BATCH, Axis("history")), low=0, high=MAX_SECONDS),
            TensorSpec("request_time", "int64", (BATCH,), low=MAX_SECONDS, high=2 * MAX_SECONDS),
        ]
    if has_profile:
        inputs.append(TensorSpec("user_codes", "int64", (BATCH, Axis("users", 1)), low=0, high=len(task.users.place)))
        lookups.append(Lookup("user", tuple(task.users.place), first=1, unknown=0))
        texts["user_codes"] = ["user"]
    check_dates(time := columns.get("time"))
    values = {
        **{role: columns[role].name for role in ("user", "item")},
        "time": describe_target(time) if time is not None else {"name": ""},
        "zone": (time.date_format or {}).get("zone") == "UTC" if time is not None else False,
        "latest": max([0, *task.known[TIMES_COLUMN].explode().drop_nulls()]) if has_times else 0,
        "inputs": [name for spec in inputs for name in texts.get(spec.name, [spec.name])],
        "most": min(DEFAULT_TOP_K, count),
        "missing": MISSING_MARKERS,
        "characters": list_replacements(),
    }
    outputs = ("top", "scores", "unknown")
    front = HistorySteps(task, predictor.card, has_times)
    module = build_pipeline(predictor, front, nn.Identity(), outputs, keep_unknown)
    reading = ("dates", "event_dates") if time is not None and time.kind == "date" else ("numbers", "event_numbers")
    return Graph(
        module,
        tuple(inputs),
        outputs,
        (*reading, "histories"),
        values,
        texts,
        tuple(lookups),
        (Names("items", "top", ("", *task.items)),),
        min_close=MIN_CLOSE,
    )


def keep_unknown(objective: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the step that ranks items and passes the number of unknown ones on."""
    return lambda batch: {**objective.outputs(batch), "unknown": batch["unknown"]}
