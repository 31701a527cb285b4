"""Gradient boosting: a sum of decision trees, each fitted to the gradient of the loss (Friedman 2001).

New here: no gradient descent on weights. `fieldguide.training.solvers` grows the trees with LightGBM (Ke et al. 2017), and this
module stores them as arrays and adds up their leaves, so that a run with trees predicts like one with a network.

Initialization: complete trees with random features and thresholds, and leaves of 0, so an unfitted model predicts equal logits.
Shapes: B batch, N number columns, K category columns, T trees, V nodes of a tree, S splits by category.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError

MAX_LOOKUPS = 2_000_000  # rows times trees that are in work at a time, to bound memory


@dataclass(frozen=True, kw_only=True)
class Config:
    numbers: int = 8  # N
    categories: tuple[int, ...] = ()  # values of each category column, including 0 (unseen)
    num_classes: int = 2  # 1 for regression
    trees: int = 1  # T, over all classes
    nodes: int = 1  # V of the largest tree
    depth: int = 0  # of the deepest tree
    category_splits: int = 0  # S


def check_loaded_nodes(module: Any, keys: Any) -> None:
    """Check the nodes after loading. It is no lambda, so that processes can send the network to each other."""
    module.check_nodes()


class GradientBoosting(nn.Module):
    """Boosted trees for tables: numbers and categories -> class logits, or the value.

    Each node has a feature (its place among numbers, then categories), two children, and a threshold: rows with a value of at
    most the threshold go left. A node with a category split sends the rows whose category is in its set left. A leaf is its own
    child and has a value. `value` is T V. Raises `SettingsError` for a table without columns, for trees deeper than their nodes
    allow, and on loading nodes that lead out of their tree.
    """

    feature: Tensor  # T V int64
    threshold: Tensor  # T V
    child_nodes: Tensor  # T V 2 int64: left, right; places in the flattened trees
    split: Tensor  # T V int64: row of `sets`, -1 for numbers
    sets: Tensor  # S C bool: categories that go left
    tree_class: Tensor  # T int64
    base: Tensor  # classes

    def __init__(self, config: Config):
        super().__init__()
        if not config.numbers and not config.categories:
            raise SettingsError("the table has no columns: numbers=0 and categories=()")
        if not 0 <= config.depth <= max(config.nodes - 1, 0):
            raise SettingsError(f"depth={config.depth} is not possible with nodes={config.nodes}.")
        self.config = config
        shape, widest = (config.trees, config.nodes), max(config.categories, default=1)
        self.register_buffer("feature", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(shape))
        self.register_buffer("child_nodes", torch.zeros(*shape, 2, dtype=torch.int64))
        self.register_buffer("split", torch.full(shape, -1, dtype=torch.int64))
        self.register_buffer("sets", torch.zeros(config.category_splits, widest, dtype=torch.bool))
        self.value = nn.Parameter(torch.zeros(shape))
        self.register_buffer("tree_class", torch.zeros(config.trees, dtype=torch.int64))
        self.register_buffer("base", torch.zeros(config.num_classes))
        self.reset_parameters()
        self.register_load_state_dict_post_hook(check_loaded_nodes)

    def check_nodes(self) -> None:
        """Raise `SettingsError` if a node has a feature, child, class or set of categories that does not exist."""
        c = self.config
        limits = {
            "feature": c.numbers + len(c.categories),
            "child_nodes": c.trees * c.nodes,
            "tree_class": c.num_classes,
            "split": c.category_splits,
        }
        for name, limit in limits.items():
            values = getattr(self, name)
            least = -1 if name == "split" else 0
            if values.numel() and not values.is_meta and not (least <= int(values.min()) and int(values.max()) < limit):
                raise SettingsError(
                    f"{name} of the trees holds a number outside of {least} to {limit - 1}: the weights are damaged."
                )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        trees, nodes = self.config.trees, self.config.nodes
        place = torch.arange(nodes)[:, None]
        child = 2 * place + torch.tensor([1, 2])  # as in a heap
        child = torch.where(child[:, 1:] < nodes, child, place)
        self.child_nodes.copy_(child + nodes * torch.arange(trees)[:, None, None])
        self.feature.random_(self.config.numbers + len(self.config.categories))
        self.threshold.normal_()
        self.tree_class.copy_(torch.arange(trees) % self.config.num_classes)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B classes
        features = torch.cat([numbers, categories.to(numbers.dtype)], 1)
        rows = max(1, MAX_LOOKUPS // self.config.trees)
        if torch.compiler.is_exporting():  # the number of rows is not known
            return self._sum_leaves(features)
        return torch.cat([self._sum_leaves(part) for part in features.split(rows)])

    def _sum_leaves(self, features: Tensor) -> Tensor:  # B N+K -> B classes
        node = torch.arange(self.config.trees, device=features.device) * self.config.nodes  # the roots
        node = node.expand(features.shape[0], -1)  # B T
        feature, threshold, split = self.feature.flatten(), self.threshold.flatten(), self.split.flatten()
        children = self.child_nodes.flatten()
        for _ in range(self.config.depth):
            value = features.gather(1, feature[node])
            left = value <= threshold[node]
            if self.config.category_splits:
                row = split[node]
                in_set = self.sets[row.clamp(min=0), value.long().clamp(0, self.sets.shape[1] - 1)]
                left = torch.where(row >= 0, in_set.long(), left.long()) > 0  # onnxruntime has no `Where` of truth values
            node = children[2 * node + (~left).long()]
        leaves = self.value.flatten()[node]  # B T
        return self.base.expand(features.shape[0], -1).index_add(1, self.tree_class, leaves)

    @torch.no_grad()
    def set_trees(self, trees: list[list[dict[str, Any]]], classes: list[int], base: list[float]) -> None:
        """Store fitted trees, one list of nodes per tree with the root first, and the class that each adds to.

        A node is a leaf with `value`, or has `feature`, `left` and `right` (places in its tree) and either a `threshold` or the
        `categories` that go left.
        """
        sets: list[list[int]] = []
        self.value.zero_()
        self.child_nodes.copy_(torch.arange(self.child_nodes.shape[0] * self.child_nodes.shape[1]).view(*self.value.shape, 1))
        feature, threshold, split, value = (t.tolist() for t in (self.feature, self.threshold, self.split, self.value))
        child_nodes = self.child_nodes.tolist()
        for t, nodes in enumerate(trees):
            for v, node in enumerate(nodes):
                if "value" in node:
                    value[t][v] = node["value"]
                    continue
                feature[t][v] = node["feature"]
                child_nodes[t][v] = [t * self.config.nodes + node[side] for side in ("left", "right")]
                if "categories" in node:
                    split[t][v] = len(sets)
                    sets.append(node["categories"])
                else:
                    threshold[t][v] = node["threshold"]
        for name, content in (("feature", feature), ("threshold", threshold), ("split", split), ("value", value)):
            getattr(self, name).copy_(torch.tensor(content))
        self.child_nodes.copy_(torch.tensor(child_nodes))
        for row, members in enumerate(sets):
            self.sets[row, members] = True
        self.tree_class.copy_(torch.tensor(classes))
        self.base.copy_(torch.tensor(base))


CARD = Card(
    name="gradient-boosting",
    model=GradientBoosting,
    config=Config,
    paper="doi:10.1214/aos/1013203451",
    year=2001,
    input_type="table",
    output_type="label",
    solver="trees",
    sizes={
        "gradient-boosting": Size(params=1, source="a value per node; one node before fitting"),
        "gradient-boosting-test": Size(numbers=3, categories=(3, 5), num_classes=3, trees=48, nodes=15, depth=3),
    },
)
