"""The objective of a network for recommendation, by its output type."""

from __future__ import annotations

from fieldguide.objectives.in_batch import InBatch
from fieldguide.objectives.masked_items import MaskedItems
from fieldguide.objectives.next_item import NextItem

RECOMMENDERS: dict[str, type[NextItem]] = {"items": NextItem, "masked-items": MaskedItems, "towers": InBatch}
