"""Trees of LightGBM as lists of nodes, for `models.feedforward.gradient_boosting`."""

from __future__ import annotations

from typing import Any

import numpy as np


def read_lightgbm(structure: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Return the nodes of a tree as `dump_model` describes it, root first, and its depth.

    LightGBM compares in float64. For values in float32, `value <= threshold` is the same as with the largest float32 that is not
    above the threshold.
    """
    nodes: list[dict[str, Any]] = []
    stack: list[tuple[dict[str, Any], int | None, str, int]] = [(structure, None, "", 0)]
    deepest = 0
    while stack:
        node, parent, side, depth = stack.pop()
        place, deepest = len(nodes), max(deepest, depth)
        if parent is not None:
            nodes[parent][side] = place
        if "leaf_value" in node:
            nodes.append({"value": float(node["leaf_value"])})
            continue
        split: dict[str, Any] = {"feature": int(node["split_feature"])}
        if node["decision_type"] == "==":
            split["categories"] = [int(value) for value in str(node["threshold"]).split("||")]
        else:
            split["threshold"] = round_down(float(node["threshold"]))
        nodes.append(split)
        stack += [(node["right_child"], place, "right", depth + 1), (node["left_child"], place, "left", depth + 1)]
    return nodes, deepest


def round_down(value: float) -> float:
    """Return the largest float32 that is not above `value`."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf)))
