"""In-context learning on tables: the stored context, its views, and the three stages of TabICL (Qu et al. 2025, arXiv:2502.05564).

A network of this kind is pretrained on synthetic tables and never trained on a user's. Its context are labeled rows that it reads
together with each request; they are stored in buffers, so that a run with a context is saved and loaded like any network.

More classes than the network tells apart are divided into groups, groups into groups, and so on (section 5.4 of the same paper): a node
of this tree is a prediction of the group among the context rows that belong to the node.

Rows of a request never see each other, and the context never sees them. The context is therefore encoded once, and what the rows of
a request need of it, keys and values, is kept until weights or context change.

Shapes: B rows of a request, C rows of the context, F columns, G tokens of a row (its columns, or groups of them), D width of a token,
E width of a row, I inducing points, h heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention

TEMPERATURE = 0.9  # of the softmax over classes, as in the authors' code
MAX_SCALED = 100.0  # standardized values are limited to it
EPSILON = 1e-6  # added to standard deviations
SMALLEST_PROBABILITY = 1e-6  # added to the probabilities of more classes than the network can tell apart
MAX_CELLS = 200_000  # tokens of rows that interact at a time, to bound memory
CACHED_BYTES = 2_000_000_000  # keys and values of the context that are kept between requests

KeysValues = tuple[Tensor, Tensor]
Node = tuple[int, ...]  # the first class of each group, and the class after the last one


def build_tree(first: int, last: int, most: int) -> list[Node]:
    """Return the nodes that tell apart the classes from `first` to `last` - 1 by at most `most` groups, the root first.

    Groups are ranges of classes of about the same size, as few as possible, as in the authors' code; those of a leaf are single classes.
    """
    count = last - first
    if count <= most:
        return [tuple(range(first, last + 1))]
    groups = min(math.ceil(count / most), most)
    edges = [first]
    for left in range(groups, 0, -1):
        edges.append(edges[-1] + math.ceil((last - edges[-1]) / left))
    return [tuple(edges), *(node for pair in pairwise(edges) for node in build_tree(*pair, most))]


def split_digits(y: Tensor, classes: int, most: int) -> list[Tensor]:
    """Return the digits of class numbers in the smallest base for which as few digits as possible with `most` values suffice.

    Each digit divides the classes into groups in another way, the first one into ranges (mixed radix in the authors' code).
    """
    digits, base = 1, 2
    while most**digits < classes:
        digits += 1
    while base**digits < classes:
        base += 1
    return [y // base**place % base for place in reversed(range(digits))]


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Fields that all networks with a context have."""

    numbers: int = 8
    categories: tuple[int, ...] = ()  # values of each category column, including 0 (unseen)
    num_classes: int = 10  # of the table; 1 for regression
    max_classes: int = 10  # that the network can tell apart; 0 if it predicts a number
    context: int = 0  # C: stored rows; 0 for a pretrained network that has not been given any
    views: int = 1  # views of the table whose predictions are averaged


# ------------------------------------------------------------------------------------------------- layers


class LengthScale(nn.Module):
    """Scale queries by a function of the number of keys and of the query: query-aware scalable softmax (arXiv:2602.11139).

    The softmax over many keys is flatter than over few; the scale grows with their logarithm as far as training found it useful.
    """

    def __init__(self, dim: int, heads: int, hidden: int = 64):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(1, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.query = nn.Sequential(nn.Linear(dim // heads, hidden), nn.GELU(), nn.Linear(hidden, dim // heads))
        nn.init.zeros_(self.query[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.query[2].bias)  # type: ignore[arg-type]

    def forward(self, q: Tensor, keys: int) -> Tensor:  # ... h T d -> ... h T d
        base = self.base(q.new_full((1,), math.log(max(keys, 1)))).unflatten(0, (q.shape[-3], 1, q.shape[-1]))  # h 1 d
        return q * base * (1 + torch.tanh(self.query(q)))


class Attention(nn.Module):
    """Multi-head attention in two steps, so that keys and values can be kept."""

    def __init__(self, dim: int, heads: int, is_scaled: bool):
        super().__init__()
        if dim % heads:
            raise SettingsError(f"a width of {dim} must be divisible by {heads} heads.")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.scale = LengthScale(dim, heads) if is_scaled else None

    def keys(self, x: Tensor) -> KeysValues:  # ... T D -> ... h T d, ... h T d
        dim = x.shape[-1]
        k, v = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, -1)
        return self.split(k), self.split(v)

    def split(self, x: Tensor) -> Tensor:  # ... T D -> ... h T d
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, angles: Rotation | None = None) -> Tensor:  # ... T D -> ... T D
        dim = x.shape[-1]
        q = self.split(F.linear(x, self.qkv.weight[:dim], self.qkv.bias[:dim]))
        if angles is not None:
            q, k = angles.rotate(q), angles.rotate(k)
        if self.scale is not None:
            q = self.scale(q, k.shape[-2])
        four = lambda t: t.flatten(0, -4) if t.ndim > 3 else t[None]  # the fused kernel wants one batch axis
        x = dot_product_attention(four(q), four(k), four(v)).view(q.shape)
        return self.proj(x.transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """A pre-norm block: attention to keys and values, and an MLP."""

    def __init__(self, dim: int, heads: int, hidden: int, is_scaled: bool = False, norm_bias: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, bias=norm_bias)
        self.attn = Attention(dim, heads, is_scaled)
        self.norm2 = nn.LayerNorm(dim, bias=norm_bias)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def keys(self, x: Tensor) -> KeysValues:  # ... T D -> ... h T d, ... h T d
        return self.attn.keys(self.norm1(x))

    def forward(self, x: Tensor, keys: KeysValues, angles: Rotation | None = None) -> Tensor:  # ... T D -> ... T D
        x = x + self.attn(self.norm1(x), *keys, angles)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class InducedBlock(nn.Module):
    """Attention through a few learned points, linear in the rows (Lee et al. 2019, arXiv:1810.00825).

    The points read the rows of the context; every row reads the points.
    """

    def __init__(self, dim: int, heads: int, hidden: int, points: int, is_scaled: bool, norm_bias: bool):
        super().__init__()
        self.points = nn.Parameter(torch.empty(points, dim))
        self.gather = Block(dim, heads, hidden, is_scaled, norm_bias)
        self.spread = Block(dim, heads, hidden, norm_bias=norm_bias)
        nn.init.trunc_normal_(self.points, std=0.02)

    def keys(self, x: Tensor) -> KeysValues:  # G C D -> G h I d, G h I d
        points = self.points.expand(*x.shape[:-2], -1, -1)
        return self.spread.keys(self.gather(points, self.gather.keys(x)))

    def forward(self, x: Tensor, keys: KeysValues) -> Tensor:  # G T D -> G T D
        return self.spread(x, keys)


class Rotation(nn.Module):
    """Rotary positions (arXiv:2104.09864). `is_interleaved` pairs adjacent dimensions, else those of the two halves."""

    freqs: Tensor

    def __init__(self, dim: int, base: float, is_interleaved: bool):
        super().__init__()
        self.is_interleaved = is_interleaved
        self.register_buffer("freqs", 1.0 / base ** (torch.arange(0, dim, 2).float() / dim))

    def rotate(self, x: Tensor) -> Tensor:  # ... T d -> ... T d
        places = torch.arange(x.shape[-2], device=x.device, dtype=self.freqs.dtype)
        angle = torch.outer(places, self.freqs)  # T d/2
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if self.is_interleaved else x.chunk(2, -1)
        pairs = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(pairs, -1).flatten(-2) if self.is_interleaved else torch.cat(pairs, -1)

    def forward(self, x: Tensor) -> Tensor:  # ... T d -> ... T d
        return self.rotate(x)


class RowInteraction(nn.Module):
    """Attention between the tokens of each row; the class tokens become the vector of the row."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, tokens: int, rotation: Rotation, norm_bias: bool):
        super().__init__()
        self.cls = nn.Parameter(torch.empty(tokens, dim))
        self.rotation = rotation
        self.blocks: Any = nn.ModuleList(Block(dim, heads, hidden, norm_bias=norm_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=norm_bias)
        nn.init.trunc_normal_(self.cls, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # B G D -> B E
        rows = max(1, MAX_CELLS // (x.shape[1] + len(self.cls)))
        if torch.compiler.is_exporting():  # the number of rows is not known
            return self.interact(x)
        return torch.cat([self.interact(part) for part in x.split(rows)])

    def interact(self, x: Tensor) -> Tensor:  # B G D -> B E
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        *first, last = list(self.blocks)
        for block in first:
            x = block(x, block.keys(x), self.rotation)
        return self.norm(last(x[:, : len(self.cls)], last.keys(x), self.rotation)).flatten(1)


class Learner(nn.Module):
    """In-context learning: rows of a request attend to those of the context, which have their targets added."""

    def __init__(
        self, dim: int, depth: int, heads: int, hidden: int, classes: int, outputs: int, scaled: bool, norm_bias: bool
    ):
        super().__init__()
        self.target = nn.Linear(classes or 1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, scaled, norm_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=norm_bias)
        self.decoder = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, outputs))

    def keys(self, x: Tensor) -> list[KeysValues]:  # C E -> for each block h C d, h C d
        found = []
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            found.append(block.keys(x))
            if i < len(blocks) - 1:
                x = block(x, found[-1])
        return found

    def forward(self, x: Tensor, keys: list[KeysValues]) -> Tensor:  # B E -> B outputs
        for block, each in zip(self.blocks, keys):
            x = block(x, each)
        return self.decoder(self.norm(x))


# ------------------------------------------------------------------------------------------------- context


class TableContext(nn.Module):
    """The stored rows, how their columns are normalized, and the views of the table.

    As in the authors' code, columns are standardized; every other view then makes them more normal by a power transform (Yeo and
    Johnson 2000); values beyond four standard deviations are compressed. Each view has its own order of columns and of classes.
    The numbers of all of this are fitted by `fieldguide.training.in_context`.
    """

    rows: Tensor  # C F: numbers, then categories - 1
    target: Tensor  # C: class, or value
    mean: Tensor  # F
    std: Tensor  # F
    power: Tensor  # F: exponents
    power_mean: Tensor  # F
    power_std: Tensor  # F
    low: Tensor  # 2 F: values below are compressed; without and with the power transform
    high: Tensor  # 2 F
    order: Tensor  # M F int64: columns of each view
    shift: Tensor  # M int64: which class is called 0

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        columns, stored = config.numbers + len(config.categories), config.context > 0
        zeros, ones = torch.zeros(columns), torch.ones(columns)
        buffers = {
            "rows": torch.zeros(config.context, columns),
            "target": torch.zeros(config.context),
            "mean": zeros,
            "std": ones,
            "power": ones.clone(),
            "power_mean": zeros.clone(),
            "power_std": ones.clone(),
            "low": torch.full((2, columns), -MAX_SCALED),
            "high": torch.full((2, columns), MAX_SCALED),
            "order": torch.stack([torch.arange(columns).roll(number) for number in range(config.views)]),
            "shift": torch.arange(config.views) % config.num_classes,
        }
        for name, value in buffers.items():  # a pretrained network without a context has none of them in its files
            self.register_buffer(name, value, persistent=stored)
        if stored:
            self.rows.normal_()
            self.target.copy_(
                torch.arange(config.context) % config.num_classes if config.max_classes else torch.randn(config.context)
            )

    def join(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B F
        return torch.cat([numbers, categories.to(numbers.dtype) - 1], 1)

    def view(self, x: Tensor, number: int) -> Tensor:  # B F -> B F
        """Return rows as one of the views has them."""
        is_power = number % 2
        x = ((x - self.mean) / (self.std + EPSILON)).clamp(-MAX_SCALED, MAX_SCALED)
        if is_power:
            x = (apply_yeo_johnson(x, self.power) - self.power_mean) / self.power_std
        x = torch.maximum(self.low[is_power] - torch.log1p(x.abs()), x)
        x = torch.minimum(self.high[is_power] + torch.log1p(x.abs()), x)
        return x[:, self.order[number]]

    def view_target(self, number: int) -> Tensor:  # -> C
        """Return the targets with the class numbers of a view."""
        if not self.config.max_classes:
            return self.target
        return (self.target - self.shift[number]) % self.config.num_classes

    def list_nodes(self) -> list[Node]:
        """Return the nodes of the tree of classes, the root first; one node for numbers."""
        c = self.config
        return build_tree(0, c.num_classes, c.max_classes) if c.max_classes else [(0, 1)]

    def select(self, y: Tensor, node: Node) -> tuple[Tensor | slice, Tensor]:
        """Return which context rows belong to a node, given their class numbers y (C), and their groups."""
        c, first, last = self.config, node[0], node[-1]
        if not c.max_classes or last - first == c.num_classes == len(node) - 1:
            return slice(None), y
        if y.is_meta:  # classes of the same size: when shapes or costs are computed
            return (some := slice(-(-len(y) * (last - first) // c.num_classes))), y[some]
        rows = ((y >= first) & (y < last)).nonzero()[:, 0]
        return rows, torch.bucketize(y[rows], y.new_tensor(node[1:]), right=True)

    def forward(self, outputs: Sequence[Tensor], number: int) -> Tensor:  # B outputs for each node -> B num_classes
        """Return the logits of a view in the usual order of classes, or its mean prediction."""
        c = self.config
        if not c.max_classes:
            return outputs[0].mean(1, keepdim=True)
        logits = outputs[0][:, : c.num_classes] / TEMPERATURE if len(outputs) == 1 else self.join_nodes(outputs)
        return logits[:, (torch.arange(c.num_classes, device=logits.device) - self.shift[number]) % c.num_classes]

    def join_nodes(self, outputs: Sequence[Tensor]) -> Tensor:  # B outputs for each node -> B num_classes
        """Return the logarithms of the probabilities of classes: the products of those of their groups."""
        total = outputs[0].new_zeros(len(outputs[0]), self.config.num_classes)
        for node, each in zip(self.list_nodes(), outputs):
            logp = (each[:, : len(node) - 1] / TEMPERATURE).log_softmax(-1)  # B groups
            sizes = torch.tensor(node, device=each.device).diff()
            total[:, node[0] : node[-1]] += logp.repeat_interleave(sizes, 1, output_size=node[-1] - node[0])
        return (total.exp() + SMALLEST_PROBABILITY).log()


def apply_yeo_johnson(x: Tensor, power: Tensor) -> Tensor:  # B F, F -> B F
    """Return the power transform of Yeo and Johnson (2000), which is defined for negative values too."""
    is_log, is_negative_log = power.abs() < EPSILON, (power - 2).abs() < EPSILON
    up = torch.log1p(x.clamp(min=0))
    down = torch.log1p((-x).clamp(min=0))
    exponent, other = torch.where(is_log, 1.0, power), torch.where(is_negative_log, 1.0, 2 - power)
    above = torch.where(is_log, up, torch.expm1(exponent * up) / exponent)
    below = torch.where(is_negative_log, down, torch.expm1(other * down) / other)
    return torch.where(x >= 0, above, -below)


class InContextNetwork(nn.Module):
    """A network that predicts from labeled rows: numbers and categories -> class logits, or a value.

    Subclasses define `embed_context` and `embed_rows`. Raises `SettingsError` for the wrong kind of target, and on prediction without
    a context.
    """

    MAX_KEPT_BYTES = CACHED_BYTES

    context: TableContext
    columns: Any
    rows: RowInteraction
    learner: Learner

    def __init__(self, config: Any):
        super().__init__()
        if not config.numbers and not config.categories:
            raise SettingsError("the table has no columns: numbers=0 and categories=()")
        if not config.max_classes and config.num_classes != 1:
            raise SettingsError(
                f"this checkpoint predicts numbers, but the target has {config.num_classes} classes. Start from its classifier, such "
                "as hf:jingang/TabICL/tabicl-classifier-v2-20260212.ckpt"
            )
        if config.max_classes and config.num_classes == 1:
            raise SettingsError(
                "this checkpoint predicts classes, but the target is a number. Start from its regressor, such as "
                "hf:jingang/TabICL/tabicl-regressor-v2-20260212.ckpt"
            )
        self.config = config
        self.context = TableContext(config)
        self.kept: tuple[Any, list[Any]] | None = None  # of the context: what it depends on, and the keys and values

    def embed_context(self, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:  # C F, C -> C G D
        """Return the tokens of the context, and the keys and values that other rows need to become tokens."""
        raise NotImplementedError

    def embed_rows(self, x: Tensor, keys: Any) -> Tensor:  # B F -> B G D
        raise NotImplementedError

    def encode_target(self, layer: nn.Linear, y: Tensor) -> Tensor:  # C -> C D
        if not self.config.max_classes:
            return layer(y[:, None])
        return layer(F.one_hot(y.long(), self.config.max_classes).to(layer.weight.dtype))

    def encode_context(self) -> list[tuple[Any, list[list[KeysValues]]]]:
        """Return, for each view, the keys and values of the columns and, for each node, of the rows of the context."""
        if not self.config.context and not self.context.rows.is_meta:  # shapes are known without rows
            raise SettingsError(
                "this network predicts from labeled rows, and it has none. Give it some: `fieldguide fit DATA --weights` stores your "
                "training rows in it."
            )
        found = []
        for number in range(self.config.views):
            y = self.context.view_target(number)
            tokens, columns = self.embed_context(self.context.view(self.context.rows, number), y)
            x, keys = self.rows(tokens), []
            for node in self.context.list_nodes():
                rows, groups = self.context.select(y, node)
                keys.append(self.learner.keys(x[rows] + self.encode_target(self.learner.target, groups)))
            found.append((columns, keys))
        return found

    def get_context(self) -> list[tuple[Any, list[list[KeysValues]]]]:
        """Return the encoded context, from an earlier call if weights and context are the same."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_exporting() or self.context.rows.is_meta:
            return self.encode_context()
        now = tuple(
            (id(t), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in (*self.parameters(), *self.buffers())
        )
        if self.kept is None or self.kept[0] != now:
            self.kept = None  # frees memory before the next one is computed
            found = self.encode_context()
            if self.estimate_kept_bytes(self.config.context, self.config.views) > CACHED_BYTES:
                return found
            self.kept = now, found
        return self.kept[1]

    def estimate_kept_bytes(self, context: int, views: int) -> int:
        """Return the bytes of keys and values of a context."""
        each: Any = self.learner.blocks[0]
        rows = round(context * self.count_levels())
        return 2 * len(self.learner.blocks) * each.up.in_features * rows * views * each.up.weight.element_size()

    def count_levels(self) -> float:
        """Return how many nodes a row of the context belongs to, on average over classes."""
        nodes = self.context.list_nodes()
        return sum(node[-1] - node[0] for node in nodes) / nodes[0][-1]

    def count_work(self, context: int, rows: int) -> float:
        """Return about how many multiply-adds one view needs for the context and the rows of requests."""
        columns, width = self.context.mean.numel(), self.learner.target.out_features
        count = lambda module: sum(p.numel() for p in module.parameters() if p.ndim == 2)
        token, nodes = columns * (count(self.columns) + count(self.rows)), self.context.list_nodes()
        work = (context + rows) * token
        for node in nodes:
            own = context * (node[-1] - node[0]) / nodes[0][-1]
            work += (own + rows) * (count(self.learner) + 2.0 * len(self.learner.blocks) * width * own)
        return work

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:  # B N, B K -> B num_classes
        x = self.context.join(numbers, categories)
        total: Any = 0.0
        for number, (columns, keys) in enumerate(self.get_context()):
            row = self.rows(self.embed_rows(self.context.view(x, number), columns))  # B E
            total = total + self.context([self.learner(row, each) for each in keys], number)
        return total / self.config.views
