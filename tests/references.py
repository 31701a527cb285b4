"""Slow references, written equation by equation from the papers, for networks without an equivalent in other packages.

They use only loops, sums, products and elementary functions, no layers of torch, so that they share no errors with
the networks. `Equations` gives a function of named tensors the interface of a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Equations(nn.Module):
    """Holds tensors like those of a network, and applies a function `(tensors, *inputs)` to them."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        state, parameters = model.state_dict(), dict(model.named_parameters())
        self.flat = {name: self.rename(name) for name in state}
        for name, parameter in parameters.items():
            self.register_parameter(self.rename(name), nn.Parameter(torch.empty_like(parameter)))
        for name in state.keys() - parameters.keys():
            self.register_buffer(self.rename(name), torch.empty_like(state[name]))

    @staticmethod
    def rename(name: str) -> str:
        return name.replace(".", "__")  # torch allows no dots in the name of a parameter

    @classmethod
    def translate(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cls.rename(name): tensor for name, tensor in state.items()}

    def forward(self, *inputs: Tensor) -> Tensor:
        tensors = {name: getattr(self, flat) for name, flat in self.flat.items()}
        return self.function(tensors | {"training": self.training}, *inputs)


# ---------------------------------------------------------------------------------------------- recurrent


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def rnn_step(w: Tensor, u: Tensor, b: Tensor, c: Tensor, x: Tensor, state: tuple) -> tuple:
    (h,) = state
    return (torch.tanh(w @ x + b + u @ h + c),)


def lstm_step(w: Tensor, u: Tensor, b: Tensor, c: Tensor, x: Tensor, state: tuple) -> tuple:
    h, cell = state
    i, f, g, o = ((w @ x + b) + (u @ h + c)).chunk(4)
    cell = sigmoid(f) * cell + sigmoid(i) * torch.tanh(g)
    return sigmoid(o) * torch.tanh(cell), cell


def gru_step(w: Tensor, u: Tensor, b: Tensor, c: Tensor, x: Tensor, state: tuple) -> tuple:
    (h,) = state
    (ri, zi, ni), (rh, zh, nh) = (w @ x + b).chunk(3), (u @ h + c).chunk(3)
    reset, update = sigmoid(ri + rh), sigmoid(zi + zh)
    return ((1 - update) * torch.tanh(ni + reset * nh) + update * h,)


def recurrent(step: Callable, states: int) -> Callable[..., Tensor]:
    """Apply a recurrent stack to one row, token by token, in as many directions as there are weights."""

    def function(p: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        rows = []
        for row, real in zip(tokens, mask):
            xs = [p["embed.weight"][int(token)] for token in row[real]]
            layer = 0
            while f"rnn.layers.{layer}.0.weight_ih_l0" in p:
                lanes = []
                direction = 0
                while (name := f"rnn.layers.{layer}.{direction}.weight_ih_l0") in p:
                    w, u, b, c = (
                        p[name.replace("weight_ih", part)] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                    )
                    state = tuple(torch.zeros(u.shape[1], dtype=u.dtype) for _ in range(states))
                    lane = []
                    for x in xs if direction == 0 else xs[::-1]:
                        state = step(w, u, b, c, x, state)
                        lane.append(state[0])
                    lanes.append(lane if direction == 0 else lane[::-1])
                    direction += 1
                xs = [torch.cat(parts) for parts in zip(*lanes)]
                layer += 1
            # Forwards the last state, backwards the state that read the first token last.
            last = torch.cat([lanes[0][-1], *(lane[0] for lane in lanes[1:])])
            rows.append(p["head.weight"] @ last + p["head.bias"])
        return torch.stack(rows)

    return function


# ---------------------------------------------------------------------------------------------- LeNet-5

# The paper's table I: a row a map of S2, a column a map of C3.
TABLE_1 = (
    "X...XXX..XXXX.XX",
    "XX...XXX..XXXX.X",
    "XXX...XXX..X.XXX",
    ".XXX..XXXX..X.XX",
    "..XXX..XXXX.XX.X",
    "...XXX..XXXX.XXX",
)


def squash(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(2 / 3 * x)


def lenet5(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """LeNet-5 of 1998, computed by receptive fields, as described in section II.B."""

    def field(maps: Tensor, side: int, step: int, rows: int) -> Tensor:  # -> B D rows rows side side
        return torch.stack(
            [
                torch.stack([maps[:, :, i * step : i * step + side, j * step : j * step + side] for j in range(rows)], 2)
                for i in range(rows)
            ],
            2,
        )

    def subsample(maps: Tensor, name: str) -> Tensor:
        total = field(maps, 2, 2, maps.shape[-1] // 2).sum((-1, -2))
        return total * p[f"{name}.weight"].view(-1, 1, 1) + p[f"{name}.bias"].view(-1, 1, 1)

    fields = field(pictures, 5, 1, 28)
    c1 = torch.stack([(fields * p["c1.weight"][k][:, None, None]).sum((1, -1, -2)) + p["c1.bias"][k] for k in range(6)], 1)
    s2 = squash(subsample(squash(c1), "s2"))
    fields, c3, kernel = field(s2, 5, 1, 10), [], iter(p["c3.weight"])
    for k in range(16):
        seen = [m for m in range(6) if TABLE_1[m][k] == "X"]
        c3.append(sum((fields[:, m] * next(kernel)).sum((-1, -2)) for m in seen) + p["c3.bias"][k])
    s4 = squash(subsample(squash(torch.stack(c3, 1)), "s4"))  # B 16 5 5
    c5 = squash((s4[:, None] * p["c5.weight"]).sum((2, 3, 4)) + p["c5.bias"])
    f6 = squash((c5[:, None] * p["f6.weight"]).sum(2) + p["f6.bias"])
    return -torch.stack([((f6 - code) ** 2).sum(1) for code in p["codes"]], 1)


def lenet5_modern(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """The modern LeNet-5 by receptive fields: pad by 2, convolve, ReLU, maximum of four."""

    def layer(maps: Tensor, name: str) -> Tensor:
        side = maps.shape[-1] - 4
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        out = torch.stack(
            [
                torch.stack([(maps[:, None, :, i : i + 5, j : j + 5] * weight).sum((2, 3, 4)) + bias for j in range(side)], 2)
                for i in range(side)
            ],
            2,
        )
        out = out.clamp(min=0)
        return torch.maximum(
            torch.maximum(out[..., 0::2, 0::2], out[..., 1::2, 0::2]), torch.maximum(out[..., 0::2, 1::2], out[..., 1::2, 1::2])
        )

    padded = pictures.new_zeros(*pictures.shape[:2], pictures.shape[2] + 4, pictures.shape[3] + 4)
    padded[..., 2:-2, 2:-2] = pictures
    x = layer(layer(padded, "conv1"), "conv2").reshape(len(pictures), -1)
    for name in ("fc1", "fc2"):
        x = (x @ p[f"{name}.weight"].T + p[f"{name}.bias"]).clamp(min=0)
    return x @ p["head.weight"].T + p["head.bias"]


# ---------------------------------------------------------------------------------------------- tables


def mlp(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """An MLP whose category embeddings are one table with consecutive parts for the columns."""

    def function(p: dict[str, Tensor], numbers: Tensor, categories: Tensor) -> Tensor:
        rows = []
        for number, category in zip(numbers, categories):
            x, start = [number], 0
            for size, value in zip(sizes, category):
                x.append(p["embed.weight"][start + int(value)])
                start += size
            x, layer = torch.cat(x), 0
            while f"layers.{layer}.weight" in p:
                x = (p[f"layers.{layer}.weight"] @ x + p[f"layers.{layer}.bias"]).clamp(min=0)
                layer += 1
            rows.append(p["head.weight"] @ x + p["head.bias"])
        return torch.stack(rows)

    return function


def linear(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """A linear model of numbers and one-hot categories."""

    def function(p: dict[str, Tensor], numbers: Tensor, categories: Tensor) -> Tensor:
        one_hot = [nn.functional.one_hot(c, size).to(numbers.dtype) for c, size in zip(categories.T, sizes)]
        return torch.cat([numbers, *one_hot], 1) @ p["head.weight"].T + p["head.bias"]

    return function


def gradient_boosting(nodes: int, trees: int) -> Callable[..., Tensor]:
    """Walk down each tree, row by row."""

    def function(p: dict[str, Tensor], numbers: Tensor, categories: Tensor) -> Tensor:
        rows = []
        for number, category in zip(numbers, categories):
            x, logits = [*number.tolist(), *category.tolist()], p["base"].clone()
            for t in range(trees):
                v = 0
                while True:
                    is_left = x[int(p["feature"][t, v])] <= float(p["threshold"][t, v])
                    following = int(p["child_nodes"][t, v, 0 if is_left else 1]) - t * nodes
                    if following == v:
                        break
                    v = following
                one_hot = torch.arange(len(logits)) == int(p["tree_class"][t])
                logits = logits + p["value"][t, v] * one_hot
            rows.append(logits)
        return torch.stack(rows)

    return function


def bag_of_ngrams(p: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
    """Equation of tf-idf with logarithmic counts, for models whose n-grams are single tokens."""
    rows, known = [], {int(key) - 1: i for i, key in enumerate(p["keys"])}
    for text, real in zip(tokens, mask):
        words = [int(t) for t, r in zip(text, real) if r]
        x = torch.zeros_like(p["idf"])
        for word in set(words) & known.keys():
            x[known[word]] = (1 + math.log(words.count(word))) * p["idf"][known[word]]
        x = x / x.norm() if x.any() else x
        rows.append(p["head.weight"] @ x + p["head.bias"])
    return torch.stack(rows)


def exponential_smoothing(config: Any) -> Callable[..., Tensor]:
    """ETS(A, Ad, A), one window and one set of parameters at a time; chosen by earlier forecasts, or else by AIC."""

    def smooth(y: list[float], alpha: float, beta: float, phi: float, gamma: float, m: int) -> tuple:
        first = sum(y[:m]) / m
        level, trend = first, ((sum(y[m : 2 * m]) / m - first) / m if phi else 0.0)
        season, squared, count = [value - first if m > 1 else 0.0 for value in y[:m]], 0.0, 0
        for t, value in enumerate(y):
            error = value - level - phi * trend - season[t % m]
            level, trend = level + phi * trend + alpha * error, phi * trend + beta * error
            season[t % m] += gamma * error if m > 1 else 0.0
            if t >= min(max(2 * m, len(y) // 4), len(y) - 1):
                squared, count = squared + error**2, count + 1
        return level, trend, season, squared / count, count

    def extend(level: float, trend: float, season: list[float], phi: float, start: int) -> list[float]:
        return [
            level + sum(phi**i for i in range(1, h + 1)) * trend + season[(start + h - 1) % config.season]
            for h in range(1, config.horizon + 1)
        ]

    def forecast(y: list[float]) -> list[list[float]]:
        m, horizon, candidates = config.season, config.horizon, []
        origins = [len(y) - horizon - i * max(1, horizon // 2) for i in range(3)]
        origins = [o for o in origins if o >= max(2 * m, 4)]
        for alpha in (0.0, 0.02, 0.1, 0.3, 0.6, 1.0):
            for share, phi in ((0.0, 0.0), (0.1, 0.9), (0.03, 1.0)) if alpha else ((0.0, 0.0),):
                for g in (0.0, 0.05, 0.3, 1.0) if m > 1 else (0.0,):
                    values = (alpha, alpha * share, phi, g * (1 - alpha))
                    level, trend, season, variance, count = smooth(y, *values, m)
                    parameters = 1 + 2 * (phi > 0) + 2 * (g > 0)
                    cost = count * math.log(variance) + 2 * parameters
                    if origins:
                        cost = 0.0
                        for origin in origins:
                            early = smooth(y[:origin], *values, m)
                            ahead = extend(*early[:3], phi, origin)
                            cost += sum(abs(a - b) for a, b in zip(ahead, y[origin : origin + horizon]))
                    candidates.append((cost, values, level, trend, season, variance))
        _, (alpha, beta, phi, gamma), level, trend, season, variance = min(candidates, key=lambda c: c[0])
        steps, spread = [], 1.0
        for h in range(1, config.horizon + 1):
            damped = sum(phi**i for i in range(1, h + 1))
            mean = extend(level, trend, season, phi, len(y))[h - 1]
            normal = [
                math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * q - 1, dtype=torch.float64))) for q in config.quantiles
            ]
            steps.append([mean, *(mean + z * math.sqrt(variance * spread) for z in normal)])
            spread += (alpha + beta * damped + (gamma if m > 1 and h % m == 0 else 0.0)) ** 2
        return steps

    def function(p: dict[str, Tensor], series: Tensor) -> Tensor:
        rows = [[forecast(window[:, c].tolist()) for c in range(window.shape[1])] for window in series]
        return p["scale"] * torch.tensor(rows, dtype=series.dtype).transpose(1, 2)

    return function


def mfcc_linear(config: Any) -> Callable[..., Tensor]:
    """Davis and Mermelstein 1980, equation 1; statistics of each recording on its own."""

    def describe(values: Tensor) -> list[Tensor]:
        return [values.mean(0), (values.var(0, correction=0) + 1e-12).sqrt()]

    def encode(features: Tensor) -> Tensor:
        steps, bands = features.shape
        columns = []
        for k in range(config.coefficients):
            norm = math.sqrt((1 if k == 0 else 2) / bands)
            columns.append(norm * sum(features[:, j] * math.cos(math.pi / bands * k * (j + 0.5)) for j in range(bands)))
        cepstra = torch.stack(columns, 1)
        parts = []
        for part in range(config.parts):
            low, high = part * steps / config.parts, (part + 1) * steps / config.parts
            inside = [(max(0.0, min(t + 1, high) - max(t, low)), cepstra[t]) for t in range(steps)]
            parts.append(sum(share * row for share, row in inside) / (high - low))
        return torch.cat([*describe(cepstra), *describe(cepstra.diff(dim=0)), *parts])

    def function(p: dict[str, Tensor], features: Tensor, lengths: Tensor) -> Tensor:
        rows = torch.stack([encode(row[:length]) for row, length in zip(features, lengths.tolist())])
        return rows @ p["head.weight"].T + p["head.bias"]

    return function


def hog_linear(config: Any) -> Callable[..., Tensor]:
    """Dalal and Triggs 2005, sections 6.2 to 6.4, pixel by pixel."""

    def bounds(i: int, count: int, size: int) -> range:
        return range(i * size // count, -(-(i + 1) * size // count))

    def features(image: Tensor) -> Tensor:
        channels, height, width = image.shape
        cells = torch.zeros(config.cells, config.cells, config.directions, dtype=image.dtype)
        votes = torch.zeros(height, width, config.directions, dtype=image.dtype)
        for y in range(height):
            for x in range(width):
                best = (-1.0, 0.0, 0.0)
                for c in range(channels):
                    dx = float(image[c, y, min(x + 1, width - 1)] - image[c, y, max(x - 1, 0)])
                    dy = float(image[c, min(y + 1, height - 1), x] - image[c, max(y - 1, 0), x])
                    best = max(best, (dx * dx + dy * dy, dx, dy), key=lambda vote: vote[0])
                size, dx, dy = best
                place = (math.atan2(dy, dx) % math.pi) / math.pi * config.directions - 0.5
                low = math.floor(place)
                votes[y, x, low % config.directions] += math.sqrt(size) * (1 - (place - low))
                votes[y, x, (low + 1) % config.directions] += math.sqrt(size) * (place - low)
        for i in range(config.cells):
            for j in range(config.cells):
                inside = votes[bounds(i, config.cells, height)][:, bounds(j, config.cells, width)]
                cells[i, j] = inside.mean((0, 1))
        blocks = torch.zeros(4, config.directions, config.cells - 1, config.cells - 1, dtype=image.dtype)
        for i in range(config.cells - 1):
            for j in range(config.cells - 1):
                block = cells[i : i + 2, j : j + 2].reshape(4, -1)
                block = (block / (block.square().sum() + 1e-4).sqrt()).clamp(max=0.2)
                blocks[:, :, i, j] = block / (block.square().sum() + 1e-4).sqrt()
        side = config.pixels
        coarse = torch.stack(
            [
                image[c, bounds(i, side, height)][:, bounds(j, side, width)].mean()
                for c in range(channels)
                for i in range(side)
                for j in range(side)
            ]
        )
        return torch.cat([blocks.flatten(), coarse])

    def function(p: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.stack([features(image) for image in images]) @ p["head.weight"].T + p["head.bias"]

    return function


def piecewise_linear(x: float, edges: list[float]) -> list[float]:
    """Equation 1 of arXiv:2203.05556: 1 for intervals below, a fraction of its own, 0 above."""
    last, out = len(edges) - 2, []
    for t, (low, high) in enumerate(pairwise(edges)):
        if x < low and t > 0:
            out.append(0.0)
        elif x >= high and t < last:
            out.append(1.0)
        else:
            out.append((x - low) / (high - low))
    return out


# ---------------------------------------------------------------------------------------------- positions


def sinusoid(position: int, column: int, dim: int) -> float:
    """Section 3.5 of arXiv:1706.03762."""
    angle = position / 10_000 ** (2 * (column // 2) / dim)
    return math.sin(angle) if column % 2 == 0 else math.cos(angle)


# ---------------------------------------------------------------------------------------------- maps


def convolve(maps: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, border: int = 0) -> Tensor:
    """Sum over the positions of a kernel: the shifted map times the weight of the position."""
    batch, _, height, width = maps.shape
    wide = maps.new_zeros(batch, maps.shape[1], height + 2 * border, width + 2 * border)
    wide[:, :, border : border + height, border : border + width] = maps
    side = weight.shape[-1]
    rows, columns = ((n + 2 * border - side) // stride + 1 for n in (height, width))
    out = sum(
        torch.einsum(
            "bchw,dc->bdhw",
            wide[:, :, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride],
            weight[:, :, i, j],
        )
        for i in range(side)
        for j in range(side)
    )
    return out if bias is None else out + bias[:, None, None]


def spread(maps: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, border: int = 0) -> Tensor:
    """Transposed convolution: add the kernel, times each pixel, at the position of the pixel."""
    side = weight.shape[-1]
    rows, columns = ((n - 1) * stride + side for n in maps.shape[2:])
    out = maps.new_zeros(len(maps), weight.shape[1], rows, columns)
    for y in range(maps.shape[2]):
        for x in range(maps.shape[3]):
            laid = torch.einsum("bc,cdij->bdij", maps[:, :, y, x], weight)
            patch = torch.zeros_like(out)
            patch[:, :, y * stride : y * stride + side, x * stride : x * stride + side] = laid
            out = out + patch
    out = out[:, :, border : rows - border, border : columns - border]
    return out if bias is None else out + bias[:, None, None]


def halve(maps: Tensor) -> Tensor:
    """Return the maximum of each 2 x 2 square."""
    rows, columns = (n // 2 * 2 for n in maps.shape[2:])
    corners = [maps[:, :, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).amax(0)


def unet(padding: str) -> Callable[..., Tensor]:
    """Figure 1 of arXiv:1505.04597, from the top left to the right."""
    border = 1 if padding == "same" else 0

    def function(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
        def twice(maps: Tensor, name: str) -> Tensor:
            for conv in ("conv1", "conv2"):
                maps = convolve(maps, p[f"{name}.{conv}.weight"], p[f"{name}.{conv}.bias"], border=border).clamp(min=0)
            return maps

        levels = [twice(pictures, "down.0")]
        while f"down.{len(levels)}.conv1.weight" in p:
            levels.append(twice(halve(levels[-1]), f"down.{len(levels)}"))
        x = levels.pop()
        for i, skip in enumerate(reversed(levels)):
            x = spread(x, p[f"up.{i}.weight"], p[f"up.{i}.bias"], stride=2)
            if padding == "same":  # a last row and column of zeros where the size was odd
                full = x.new_zeros(*x.shape[:2], *skip.shape[2:])
                full[:, :, : x.shape[2], : x.shape[3]] = x
                x = full
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            x = twice(torch.cat([skip[:, :, top : top + x.shape[2], left : left + x.shape[3]], x], 1), f"merge.{i}")
        return convolve(x, p["head.weight"], p["head.bias"])

    return function


def batch_normalise(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Normalize over all axes but the second; in training by batch statistics, which update the running ones."""
    across = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    if p["training"]:
        kept, n = (mean, var), x.numel() // x.shape[1]
        mean = x.sum(across) / n
        var = ((x - mean.view(shape)) ** 2).sum(across) / n
        with torch.no_grad():
            kept[0].mul_(0.9).add_(0.1 * mean)
            kept[1].mul_(0.9).add_(0.1 * var * n / (n - 1))
            p[f"{name}.num_batches_tracked"] += 1
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5) ** 0.5
    return x * p[f"{name}.weight"].view(shape) + p[f"{name}.bias"].view(shape)


def layer_normalise(p: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    """Normalize one vector."""
    mean = x.sum() / len(x)
    return (x - mean) / (((x - mean) ** 2).sum() / len(x) + eps) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def softmax(x: list[Tensor]) -> list[Tensor]:
    top = max(float(value.detach()) for value in x)
    powers = [torch.exp(value - top) for value in x]
    return [power / sum(powers) for power in powers]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


# ---------------------------------------------------------------------------------------------- recommendation


def deepfm(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """Equations 1 to 4 of Guo et al. 2017, row by row and pair by pair, on one sparse vector x of all features."""

    def function(p: dict[str, Tensor], numbers: Tensor, categories: Tensor) -> Tensor:
        rows = []
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        w = torch.cat([p["first_numbers"], p["first.weight"][:, 0]])
        v = torch.cat([p["number_vectors"], p["vectors.weight"]])
        for row, codes in zip(numbers, categories):
            value = dict(enumerate(row))
            value |= {len(row) + starts[k] + int(code): torch.ones((), dtype=row.dtype) for k, code in enumerate(codes)}
            fields = sorted(value)
            y = p["bias"][0] + sum(w[i] * value[i] for i in fields)
            for a in range(len(fields)):
                for b in range(a + 1, len(fields)):
                    i, j = fields[a], fields[b]
                    y = y + (v[i] * v[j]).sum() * value[i] * value[j]
            h = torch.cat([v[i] * value[i] for i in fields])
            layers = sorted({int(name.split(".")[1]) for name in p if name.startswith("deep.")})
            for layer in layers:
                h = p[f"deep.{layer}.weight"] @ h + p[f"deep.{layer}.bias"]
                h = h if layer == layers[-1] else h.clamp(min=0)
            rows.append(torch.stack([torch.zeros_like(y), y + h[0]]))
        return torch.stack(rows)

    return function


def dlrm(p: dict[str, Tensor], numbers: Tensor, categories: Tensor) -> Tensor:
    """Section 2 of arXiv:1906.00091, row by row and pair by pair, in the order of the authors' loops."""

    def mlp(name: str, x: Tensor, last: bool) -> Tensor:
        layers = sorted({int(key.split(".")[1]) for key in p if key.startswith(name + ".")})
        for layer in layers:
            x = p[f"{name}.{layer}.weight"] @ x + p[f"{name}.{layer}.bias"]
            x = x.clamp(min=0) if last or layer != layers[-1] else x
        return x

    rows = []
    for row, codes in zip(numbers, categories):
        vectors = [mlp("bottom", row, True), *(p[f"tables.{k}.weight"][code] for k, code in enumerate(codes))]
        products = [(vectors[i] * vectors[j]).sum() for i in range(len(vectors)) for j in range(i)]
        y = mlp("top", torch.cat([vectors[0], torch.stack(products)]), False)[0]
        rows.append(torch.stack([torch.zeros_like(y), y]))
    return torch.stack(rows)


def dcn_v2(sizes: tuple[int, ...], structure: str) -> Callable[..., Tensor]:
    """Equations 1 to 4 of arXiv:2008.13535, row by row and expert by expert."""

    def function(p: dict[str, Tensor], numbers: Tensor, categories: Tensor) -> Tensor:
        starts, rows = [sum(sizes[:k]) for k in range(len(sizes))], []
        for row, codes in zip(numbers, categories):
            x0 = torch.cat([row, *(p["embed.weight"][start + code] for start, code in zip(starts, codes))])
            x, layer = x0, 0
            while f"cross.{layer}.linear.weight" in p or f"cross.{layer}.bias" in p:
                name = f"cross.{layer}"
                if f"{name}.linear.weight" in p:
                    x = x0 * (p[f"{name}.linear.weight"] @ x + p[f"{name}.linear.bias"]) + x
                else:
                    gates = softmax(list(p[f"{name}.gate.weight"] @ x))
                    mixed = torch.zeros_like(x)
                    for gate, u, c, v in zip(gates, p[f"{name}.up"], p[f"{name}.middle"], p[f"{name}.down"]):
                        mixed = mixed + gate * x0 * (u @ torch.tanh(c @ torch.tanh(v @ x)) + p[f"{name}.bias"])
                    x = mixed + x
                layer += 1
            h = x if structure == "stacked" else x0
            for place in sorted({int(key.split(".")[1]) for key in p if key.startswith("deep.")}):
                h = (p[f"deep.{place}.weight"] @ h + p[f"deep.{place}.bias"]).clamp(min=0)
            h = h if structure == "stacked" else torch.cat([x, h])
            rows.append(p["head.weight"] @ h + p["head.bias"])
        return torch.stack(rows)

    return function


def item_neighbors(decay: float) -> Callable[..., Tensor]:
    """The sum of similarities to the items so far, one history, one item and one neighbor at a time."""

    def function(p: dict[str, Tensor], items: Tensor, mask: Tensor) -> Tensor:
        rows = []
        for row, real in zip(items, mask):
            history, steps = [], []
            for item, is_real in zip(row.tolist(), real.tolist()):
                history += [item] if is_real else []
                scores = [p["weight"].new_zeros(()) for _ in range(len(p["weight"]))]
                for age, each in enumerate(reversed(history)):
                    for place, similarity in zip(p["index"][each].tolist(), p["weight"][each]):
                        scores[place] = scores[place] + decay**age * similarity
                steps.append(torch.stack(scores))
            rows.append(torch.stack(steps))
        return torch.stack(rows)

    return function


def patchcore(patch: int, stride: int) -> Callable[..., Tensor]:
    """The distance of one patch after another to every stored one; then linear interpolation and a Gaussian as matrices."""

    def interpolate(rows: int, size: int) -> Tensor:  # size x rows, with the centers of pixels aligned
        matrix = torch.zeros(size, rows, dtype=torch.float64)
        for i in range(size):
            place = min(max((i + 0.5) * rows / size - 0.5, 0.0), rows - 1.0)
            low = int(place)
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, rows - 1)] += place - low
        return matrix

    def blur(size: int, sigma: float) -> Tensor:  # size x size
        reach = range(-round(3 * sigma), round(3 * sigma) + 1)
        total = sum(math.exp(-(k**2) / (2 * sigma**2)) for k in reach)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            for k in reach:
                matrix[i, min(max(i + k, 0), size - 1)] += math.exp(-(k**2) / (2 * sigma**2)) / total
        return matrix

    def function(p: dict[str, Tensor], image: Tensor) -> Tensor:
        edge, (high, wide) = patch // 2, image.shape[2:]
        maps = []
        for one in image:
            grid = []
            for y in range(0, high, stride):
                row = []
                for x in range(0, wide, stride):
                    ys = [min(max(y + k, 0), high - 1) for k in range(-edge, edge + 1)]
                    xs = [min(max(x + k, 0), wide - 1) for k in range(-edge, edge + 1)]
                    numbers = one[:, ys][:, :, xs].flatten()
                    components = p["basis"].T @ (numbers - p["mean"])
                    row.append(torch.stack([(components - stored).norm() for stored in p["memory"]]).min())
                grid.append(torch.stack(row))
            found = torch.stack(grid)
            vertical, horizontal = (
                (blur(size, stride) @ interpolate(rows, size)).to(found.dtype) for rows, size in zip(found.shape, (high, wide))
            )
            maps.append(vertical @ found @ horizontal.T)
        return torch.stack(maps)

    return function


def sasrec(heads: int, length: int) -> Callable[..., Tensor]:
    """The authors' code, one history, one item, one head at a time."""

    def function(p: dict[str, Tensor], items: Tensor, mask: Tensor) -> Tensor:
        linear = lambda name, x: p[f"{name}.weight"] @ x + p[f"{name}.bias"]
        dim = p["embed.weight"].shape[1]
        rows = []
        for row, real in zip(items, mask):
            history = row[real].tolist()
            xs = [
                dim**0.5 * (p["embed.weight"][item] if item else torch.zeros(dim, dtype=p["pos.weight"].dtype))
                + p["pos.weight"][length - len(history) + t]
                for t, item in enumerate(history)
            ]
            block = 0
            while f"blocks.{block}.norm1.weight" in p:
                name, ys = f"blocks.{block}", []
                queries = [layer_normalise(p, f"{name}.norm1", x, 1e-8) for x in xs]
                for t, query in enumerate(queries):
                    q, past = linear(f"{name}.query", query), xs[: t + 1]
                    k, v = [linear(f"{name}.key", x) for x in past], [linear(f"{name}.value", x) for x in past]
                    z = []
                    for h in range(heads):
                        part = slice(h * dim // heads, (h + 1) * dim // heads)
                        weights = softmax([(q[part] * key[part]).sum() / (dim // heads) ** 0.5 for key in k])
                        z.append(sum(w * value[part] for w, value in zip(weights, v)))
                    y = layer_normalise(p, f"{name}.norm2", torch.cat(z) + query, 1e-8)
                    ys.append(linear(f"{name}.down", linear(f"{name}.up", y).clamp(min=0)) + y)
                xs, block = ys, block + 1
            xs = [layer_normalise(p, "norm", x, 1e-8) for x in xs]
            logits = torch.zeros(len(row), len(p["embed.weight"]), dtype=p["pos.weight"].dtype)
            logits[real, 1:] = torch.stack([torch.stack([(item * x).sum() for item in p["embed.weight"][1:]]) for x in xs])
            rows.append(logits)
        return torch.stack(rows)

    return function


def two_tower(
    p: dict[str, Tensor],
    items: Tensor,
    mask: Tensor,
    profile: Tensor | None = None,
    numbers: Tensor | None = None,
    sizes: tuple[int, ...] = (5, 3),
) -> Tensor:
    """Figure 2 of Yi et al. 2019 for the tiny size: one user and one item at a time; features of items are buffers."""

    def tower(name: str, x: Tensor) -> Tensor:
        layers = sorted({int(key.split(".")[2]) for key in p if key.startswith(f"{name}.layers.")})
        for layer in layers:
            x = p[f"{name}.layers.{layer}.weight"] @ x + p[f"{name}.layers.{layer}.bias"]
            x = x if layer == layers[-1] else x.clamp(min=0)
        return x / (x**2).sum() ** 0.5

    dtype = p["embed.weight"].dtype
    vectors = [
        tower(
            "item",
            torch.cat([p["embed.weight"][i], p["item_embed.weight"][p["item_codes"][i, 0]], p["item_values"][i].to(dtype)]),
        )
        for i in range(len(p["embed.weight"]))
    ]
    rows = []
    for number, (row, real) in enumerate(zip(items, mask)):
        codes = [0] * len(sizes) if profile is None else profile[number].tolist()
        values = torch.zeros(2, dtype=dtype) if numbers is None else numbers[number].to(dtype)
        own = [p["user_embed.weight"][sum(sizes[:k]) + code] for k, code in enumerate(codes)]
        met, logits = [], []
        for item, is_real in zip(row.tolist(), real.tolist()):
            met += [p["embed.weight"][item]] if is_real and item else []
            mean = sum(met) / len(met) if met else torch.zeros_like(p["embed.weight"][0])
            user = tower("user", torch.cat([mean, *own, values]))
            logits.append(torch.stack([(user * vector).sum() / 0.1 for vector in vectors]))
        rows.append(torch.stack(logits))
    return torch.stack(rows)


def hstu(heads: int, key_dim: int, value_dim: int, length: int, temperature: float) -> Callable[..., Tensor]:
    """Equations 1 to 3 of arXiv:2402.17152 and the authors' bias by place and time, one history, item and head at a time."""

    def plain_norm(x: Tensor) -> Tensor:
        mean = x.sum() / len(x)
        return (x - mean) / (((x - mean) ** 2).sum() / len(x) + 1e-6) ** 0.5

    def unit(x: Tensor) -> Tensor:
        return x / (x**2).sum() ** 0.5

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def function(p: dict[str, Tensor], items: Tensor, mask: Tensor, times: Tensor | None = None) -> Tensor:
        dim, rows = p["embed.weight"].shape[1], []
        for number, (row, real) in enumerate(zip(items, mask)):
            history = row[real].tolist()
            when = [(0, 0)] * len(history) if times is None else times[number][real].tolist()
            xs = [p["embed.weight"][i] * (i > 0) * dim**0.5 + p["pos.weight"][t] for t, i in enumerate(history)]
            block = 0
            while f"blocks.{block}.uvqk.weight" in p:
                name, parts, ys = f"blocks.{block}", [], []
                for x in xs:
                    uvqk = silu(p[f"{name}.uvqk.weight"] @ plain_norm(x))
                    parts.append(uvqk.split([heads * value_dim, heads * value_dim, heads * key_dim, heads * key_dim]))
                for t, x in enumerate(xs):
                    attended = []
                    for h in range(heads):
                        keys, values = slice(h * key_dim, (h + 1) * key_dim), slice(h * value_dim, (h + 1) * value_dim)
                        y = torch.zeros(value_dim, dtype=x.dtype)
                        for s in range(t + 1):
                            passed = max(abs(when[t][1] - when[s][0]), 1)
                            bias = (
                                p[f"{name}.place_bias"][t - s] + p[f"{name}.time_bias"][min(int(math.log(passed) / 0.301), 128)]
                            )
                            y = y + silu((parts[t][2][keys] * parts[s][3][keys]).sum() + bias) / length * parts[s][1][values]
                        attended.append(y)
                    gated = parts[t][0] * plain_norm(torch.cat(attended))
                    ys.append(x + p[f"{name}.out.weight"] @ gated + p[f"{name}.out.bias"])
                xs, block = ys, block + 1
            logits = torch.zeros(len(row), len(p["embed.weight"]), dtype=p["pos.weight"].dtype)
            cosines = [torch.stack([(unit(x) * unit(item)).sum() for item in p["embed.weight"][1:]]) for x in xs]
            logits[real, 1:] = torch.stack(cosines) / temperature
            rows.append(logits)
        return torch.stack(rows)

    return function


# ---------------------------------------------------------------------------------------------- forecasts


def dlinear(window: int, values: int) -> Callable[..., Tensor]:
    """The equations of section 4 of arXiv:2205.13504, one series and step at a time; ends are repeated."""

    def function(p: dict[str, Tensor], series: Tensor) -> Tensor:
        rows = []
        for row in series:
            columns = []
            for x in row.T:
                last = len(x) - 1
                trend = torch.stack(
                    [
                        sum(x[min(max(t + step, 0), last)] for step in range(-(window // 2), window // 2 + 1)) / window
                        for t in range(len(x))
                    ]
                )
                y = p["seasonal.weight"] @ (x - trend) + p["seasonal.bias"] + p["trend.weight"] @ trend + p["trend.bias"]
                columns.append(torch.stack([y[start : start + values] for start in range(0, len(y), values)]))
            rows.append(torch.stack(columns, 1))
        return torch.stack(rows)

    return function


def lstm_forecaster(horizon: int) -> Callable[..., Tensor]:
    """Sections 3.2 and 3.3 of arXiv:1711.11053, one window, series and step at a time."""

    def function(p: dict[str, Tensor], series: Tensor, past: Tensor, known: Tensor) -> Tensor:
        linear = lambda name, x: p[f"{name}.weight"] @ x + p[f"{name}.bias"]
        rows = []
        for row, beside, sure in zip(series, past, known):
            columns = []
            for x in row.T:
                steps = len(x)
                xs, layer = [torch.cat([x[t : t + 1], beside[t], sure[t]]) for t in range(steps)], 0
                while f"rnn.layers.{layer}.0.weight_ih_l0" in p:
                    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                    w, u, b, c = (p[f"rnn.layers.{layer}.0.{kind}_l0"] for kind in kinds)
                    state, ys = (torch.zeros(u.shape[1], dtype=u.dtype),) * 2, []
                    for value in xs:
                        state = lstm_step(w, u, b, c, value, state)
                        ys.append(state[0])
                    xs, layer = ys, layer + 1
                contexts = linear("down", linear("up", torch.cat([xs[-1], *sure[steps:]])).clamp(min=0))
                size = len(contexts) // (horizon + 1)
                parts = [contexts[k * size : (k + 1) * size] for k in range(horizon + 1)]
                columns.append(
                    torch.stack(
                        [
                            linear("head", linear("local", torch.cat([parts[k], parts[horizon], sure[steps + k]])).clamp(min=0))
                            for k in range(horizon)
                        ]
                    )
                )
            rows.append(torch.stack(columns, 1))
        return torch.stack(rows)

    return function


def patchtst(patch: int, stride: int, heads: int, values: int) -> Callable[..., Tensor]:
    """Section 3 of arXiv:2211.14730 with the choices of the authors' code; one patch at a time."""

    def function(p: dict[str, Tensor], series: Tensor) -> Tensor:
        batch, steps, columns = series.shape
        x = torch.stack([series[i, :, j] for i in range(batch) for j in range(columns)])
        mean = sum(x[:, t] for t in range(steps)) / steps
        deviation = (sum((x[:, t] - mean) ** 2 for t in range(steps)) / steps + 1e-5) ** 0.5
        x = torch.stack([(x[:, min(t, steps - 1)] - mean) / deviation for t in range(steps + stride)], 1)
        xs = [
            x[:, start : start + patch] @ p["embed.weight"].T + p["embed.bias"] + p["pos"][n]
            for n, start in enumerate(range(0, steps + stride - patch + 1, stride))
        ]
        dim, before, block = p["pos"].shape[1], {}, 0
        while f"blocks.{block}.proj.weight" in p:
            name = f"blocks.{block}"
            linear = lambda part, x, name=name: x @ p[f"{name}.{part}.weight"].T + p[f"{name}.{part}.bias"]
            qkv, ys = [linear("qkv", x) for x in xs], []
            for n in range(len(xs)):
                z = []
                for h in range(heads):
                    q, k, v = (slice(i * dim + h * dim // heads, i * dim + (h + 1) * dim // heads) for i in range(3))
                    scores = torch.stack([(qkv[n][:, q] * other[:, k]).sum(1) / (dim // heads) ** 0.5 for other in qkv], 1)
                    before[n, h] = scores = scores + before.get((n, h), 0)
                    powers = torch.exp(scores)
                    z.append(sum((powers[:, m] / powers.sum(1))[:, None] * qkv[m][:, v] for m in range(len(xs))))
                ys.append(xs[n] + linear("proj", torch.cat(z, 1)))
            ys = batch_normalise(p, f"{name}.norm1", torch.stack(ys, 2)).unbind(2)
            xs = [y + linear("down", gelu(linear("up", y))) for y in ys]
            xs, block = list(batch_normalise(p, f"{name}.norm2", torch.stack(xs, 2)).unbind(2)), block + 1
        flat = torch.stack([x[:, d] for d in range(dim) for x in xs], 1)  # first all patches of one number
        y = (flat @ p["head.weight"].T + p["head.bias"]) * deviation[:, None] + mean[:, None]
        return y.reshape(batch, columns, -1, values).transpose(1, 2)

    return function


# ---------------------------------------------------------------------------------------------- DCGAN


def dcgan(p: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Project, then double the side and normalize, except after the last layer."""
    x, place = spread(noise[:, :, None, None], p["main.0.weight"]), 0
    while f"main.{place + 3}.weight" in p:
        x = batch_normalise(p, f"main.{place + 1}", x).clamp(min=0)
        place += 3
        x = spread(x, p[f"main.{place}.weight"], stride=2, border=1)
    return torch.tanh(x)


def dcgan_discriminator(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Halve the side and normalize, except in the first and last layer."""
    leak = lambda x: torch.where(x > 0, x, x / 5)
    x, place = leak(convolve(pictures, p["main.0.weight"], stride=2, border=1)), 2
    while f"main.{place + 1}.weight" in p:
        x = convolve(x, p[f"main.{place}.weight"], stride=2, border=1)
        x, place = leak(batch_normalise(p, f"main.{place + 1}", x)), place + 3
    return sigmoid(convolve(x, p[f"main.{place}.weight"])).flatten(1)


# ---------------------------------------------------------------------------------------------- SNGAN


def class_normalise(p: dict[str, Tensor], name: str, x: Tensor, label: Tensor) -> Tensor:
    """Normalize without scale and shift, then apply those of each row's class, weighted by its one-hot vector."""
    if f"{name}.embed.weight" not in p:
        return batch_normalise(p, f"{name}.norm", x)
    ones, table = torch.ones(x.shape[1], dtype=x.dtype), p[f"{name}.embed.weight"]  # 2D K
    plain = {f"{name}.norm.weight": ones, f"{name}.norm.bias": 0 * ones}
    x = batch_normalise({**p, **plain}, f"{name}.norm", x)
    rows = []
    for y, weights in zip(x, label):
        pairs = sum(weight * table[:, k] for k, weight in enumerate(weights))
        scale, shift = pairs[: len(y)], pairs[len(y) :]
        rows.append(torch.stack([y[d] * (1 + scale[d]) + shift[d] for d in range(len(y))]))
    return torch.stack(rows)


def sngan(p: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Project to a small map; residual blocks that repeat each pixel 2 x 2 between norm and convolution."""
    convolved = lambda name, x, border: convolve(x, p[f"{name}.weight"], p[f"{name}.bias"], border=border)
    repeat = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    width = p["l1.weight"].shape[1]
    noise, label = noise[:, :width], noise[:, width:]
    dim = p["blocks.0.c1.weight"].shape[1]
    side = round((len(p["l1.weight"]) / dim) ** 0.5)
    x, i = (noise @ p["l1.weight"].T + p["l1.bias"]).reshape(-1, dim, side, side), 0
    while f"blocks.{i}.c1.weight" in p:
        y = convolved(f"blocks.{i}.c1", repeat(class_normalise(p, f"blocks.{i}.b1", x, label).clamp(min=0)), 1)
        y = convolved(f"blocks.{i}.c2", class_normalise(p, f"blocks.{i}.b2", y, label).clamp(min=0), 1)
        x, i = y + convolved(f"blocks.{i}.c_sc", repeat(x), 0), i + 1
    return torch.tanh(convolved("last", batch_normalise(p, "norm", x).clamp(min=0), 1))


def spectrally_normalised(p: dict[str, Tensor], name: str) -> Tensor:
    """Return a weight divided by its largest singular value; in training after one step of the power iteration."""
    weight = p[f"{name}.parametrizations.weight.original"]
    u, v = (p[f"{name}.parametrizations.weight.0._{letter}"] for letter in "uv")
    matrix = weight.reshape(len(weight), -1)
    if p["training"]:
        with torch.no_grad():
            u.copy_(matrix @ v / (matrix @ v).square().sum().sqrt())
            v.copy_(u @ matrix / (u @ matrix).square().sum().sqrt())
    return weight / (u[:, None] * matrix * v).sum()


def halve_side(x: Tensor) -> Tensor:
    """Return the means of 2 x 2 pixels, without a last odd row or column."""
    height, width = (n // 2 * 2 for n in x.shape[2:])
    return sum(x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)) / 4


def residual_critic(p: dict[str, Tensor], x: Tensor, weight: Callable[..., Tensor]) -> Tensor:
    """Residual blocks, of which those with a convolution beside them halve the side, and a last ReLU."""
    convolved = lambda name, x, border: convolve(x, weight(p, name), p[f"{name}.bias"], border=border)
    y = convolved("blocks.0.c2", convolved("blocks.0.c1", x, 1).clamp(min=0), 1)
    x, i = halve_side(y) + convolved("blocks.0.c_sc", halve_side(x), 0), 1
    while f"blocks.{i}.c1.bias" in p:
        y = convolved(f"blocks.{i}.c2", convolved(f"blocks.{i}.c1", x.clamp(min=0), 1).clamp(min=0), 1)
        if f"blocks.{i}.c_sc.bias" in p:
            x = halve_side(y) + halve_side(convolved(f"blocks.{i}.c_sc", x, 0))
        else:
            x = y + x
        i += 1
    return x.clamp(min=0)


def sngan_discriminator(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Residual blocks, the sum over places, a linear score, and the projection on the class."""
    channels = p["blocks.0.c1.parametrizations.weight.original"].shape[1]
    features = residual_critic(p, pictures[:, :channels], spectrally_normalised).sum((2, 3))
    score = features @ spectrally_normalised(p, "last")[0] + p["last.bias"]
    label = pictures[:, channels:, 0, 0]
    return (score + (features * (label @ spectrally_normalised(p, "l_y"))).sum(1))[:, None]


def wgan_gp_discriminator(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Residual blocks, the mean over places and a linear score."""
    x = residual_critic(p, pictures, lambda p, name: p[f"{name}.weight"])
    return (x.sum((2, 3)) / x[0, 0].numel() @ p["last.weight"][0] + p["last.bias"])[:, None]


def normalise_maps(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Normalize each map of each image by its own mean and variance."""
    count = x.shape[2] * x.shape[3]
    mean = x.sum((2, 3), keepdim=True) / count
    x = (x - mean) / (((x - mean) ** 2).sum((2, 3), keepdim=True) / count + 1e-5) ** 0.5
    return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None] if f"{name}.weight" in p else x


def extend(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until the sides are multiples."""
    rows, columns = (torch.arange(-(-n // multiple) * multiple).clamp(max=n - 1) for n in x.shape[2:])
    return x[:, :, rows][:, :, :, columns]


def mirror(x: Tensor, border: int) -> Tensor:
    """Extend maps by their reflection at the first and last row and column."""
    rows, columns = ([abs(i) if i < n else 2 * (n - 1) - i for i in range(-border, n + border)] for n in x.shape[2:])
    return x[:, :, rows][:, :, :, columns]


def pix2pix(p: dict[str, Tensor], image: Tensor) -> Tensor:
    """Section 6.1.1 of arXiv:1611.07004, level by level: what a level returns is joined to its input."""
    depth = max(int(name.split(".")[1]) for name in p if name.startswith("down.")) + 1

    def level(number: int, x: Tensor) -> Tensor:
        x = convolve(torch.where(x > 0, x, 0.2 * x) if number else x, p[f"down.{number}.weight"], stride=2, border=1)
        if 0 < number < depth - 1:
            x = normalise_maps(p, f"down_norms.{number}", x)
        if number < depth - 1:
            x = torch.cat([x, level(number + 1, x)], 1)
        y = spread(x.clamp(min=0), p[f"up.{number}.weight"], p.get(f"up.{number}.bias"), 2, 1)
        return normalise_maps(p, f"up_norms.{number}", y) if number else y

    return torch.tanh(level(0, extend(image, 1 << depth))[:, :, : image.shape[2], : image.shape[3]])


def patchgan(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Section 6.1.2 of arXiv:1611.07004: convolutions of 4 x 4, with norms from the second to the last but one."""
    places = sorted(int(name.split(".")[1]) for name in p if name.endswith(".weight") and p[name].ndim == 4)
    for i, place in enumerate(places):
        stride = 2 if i < len(places) - 2 else 1
        x = convolve(x, p[f"model.{place}.weight"], p.get(f"model.{place}.bias"), stride, 1)
        if 0 < i < len(places) - 1:
            x = normalise_maps(p, f"model.{place + 1}", x)
        if i < len(places) - 1:
            x = torch.where(x > 0, x, 0.2 * x)
    return x


def cyclegan(p: dict[str, Tensor], image: Tensor) -> Tensor:
    """Appendix 7.2 of arXiv:1703.10593."""
    halvings = len({name.split(".")[1] for name in p if name.startswith("down.")})
    blocks = len({name.split(".")[1] for name in p if name.startswith("blocks.")})
    layer = lambda name, x, *where: convolve(x, p[f"{name}.weight"], p[f"{name}.bias"], *where)
    norm = lambda x: normalise_maps(p, "", x)
    x = norm(layer("first", mirror(extend(image, 1 << halvings), 3))).clamp(min=0)
    for i in range(halvings):
        x = norm(layer(f"down.{i}", x, 2, 1)).clamp(min=0)
    for i in range(blocks):
        y = norm(layer(f"blocks.{i}.conv1", mirror(x, 1))).clamp(min=0)
        x = x + norm(layer(f"blocks.{i}.conv2", mirror(y, 1)))
    for i in range(halvings):  # the output is twice as large: one row and column more than without padding
        y = spread(x, p[f"up.{i}.weight"], None, 2)[:, :, 1 : 1 + 2 * x.shape[2], 1 : 1 + 2 * x.shape[3]]
        x = norm(y + p[f"up.{i}.bias"][:, None, None]).clamp(min=0)
    return torch.tanh(layer("last", mirror(x, 3)))[:, :, : image.shape[2], : image.shape[3]]


# ---------------------------------------------------------------------------------------------- speech


def conformer_stem(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Two 3x3 convolutions of stride 2 on one spectrogram, T F, padded by one, one output value at a time."""
    grid = x[None]  # channels, T, F
    for number in (1, 2):
        w, b = p[f"stem.conv{number}.weight"], p[f"stem.conv{number}.bias"]
        _, high, wide = grid.shape
        rows = []
        for t in range(0, high, 2):
            columns = []
            for f in range(0, wide, 2):
                total = b
                for dt in (-1, 0, 1):
                    for df in (-1, 0, 1):
                        if 0 <= t + dt < high and 0 <= f + df < wide:
                            total = total + w[:, :, dt + 1, df + 1] @ grid[:, t + dt, f + df]
                columns.append(torch.where(total > 0, total, torch.zeros_like(total)))
            rows.append(torch.stack(columns, -1))  # channels, F/2
        grid = torch.stack(rows, 1)
    return torch.stack([p["stem.proj.weight"] @ grid[:, t].flatten() + p["stem.proj.bias"] for t in range(grid.shape[1])])


# ---------------------------------------------------------------------------------------------- Latte


def latte(c) -> Callable[..., Tensor]:
    """Section 3.1, variant 1, of arXiv:2401.03048 with blocks of arXiv:2212.09748 (adaLN-Zero), one position at a time."""
    side, dim, size = c.image // c.patch, c.dim, c.dim // c.heads

    def waves(place: int, width: int) -> list[float]:
        angles = [place / 10_000 ** (2 * i / width) for i in range(width // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    def normalise(x: Tensor) -> Tensor:  # B D, each row to mean 0 and variance 1
        mean = x.sum(1, keepdim=True) / dim
        return (x - mean) / (((x - mean) ** 2).sum(1, keepdim=True) / dim + 1e-6) ** 0.5

    def gelu_tanh(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def function(p: dict[str, Tensor], video: Tensor, time: Tensor, label: Tensor) -> Tensor:
        linear = lambda name, x: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        silu = lambda x: x * sigmoid(x)
        rate = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)  # in float32, as trained
        whats = []  # of each frame, which may have a time of its own
        for f in range(video.shape[1]):
            angles = [(time if time.ndim == 1 else time[:, f]).float() * r for r in rate]
            said = torch.stack([torch.cos(a) for a in angles] + [torch.sin(a) for a in angles], 1).to(video.dtype)
            what = linear("time2", silu(linear("time1", said)))
            whats.append(what + torch.stack([p["label.weight"][int(one) - 1 if one else c.num_classes] for one in label]))
        xs = {}
        for f in range(video.shape[1]):
            for row in range(side):
                for column in range(side):
                    piece = video[:, f, :, row * c.patch : (row + 1) * c.patch, column * c.patch : (column + 1) * c.patch]
                    x = torch.stack([(piece * kernel).sum((1, 2, 3)) for kernel in p["patch.weight"]], 1) + p["patch.bias"]
                    place = torch.tensor(waves(column, dim // 2) + waves(row, dim // 2), dtype=torch.float32)
                    xs[f, row, column] = x + place
        for i in range(c.depth):
            name = f"blocks.{i}"
            if i == 1:
                xs = {key: x + torch.tensor(waves(key[0], dim), dtype=torch.float32) for key, x in xs.items()}
            parts = [
                [linear(f"{name}.condition", silu(what))[:, part * dim : (part + 1) * dim] for part in range(6)]
                for what in whats
            ]
            qkv = {
                key: linear(f"{name}.attn.qkv", normalise(x) * (1 + parts[key[0]][1]) + parts[key[0]][0])
                for key, x in xs.items()
            }
            ys = {}
            for key, x in xs.items():
                near = [other for other in xs if (other[1:] == key[1:] if i % 2 else other[0] == key[0])]
                heads = []
                for h in range(c.heads):
                    q, k, v = (slice(part * dim + h * size, part * dim + (h + 1) * size) for part in range(3))
                    powers = [torch.exp((qkv[key][:, q] * qkv[other][:, k]).sum(1, keepdim=True) / size**0.5) for other in near]
                    heads.append(sum(power * qkv[other][:, v] for power, other in zip(powers, near)) / sum(powers))
                _, _, gate1, shift2, scale2, gate2 = parts[key[0]]
                x = x + gate1 * linear(f"{name}.attn.proj", torch.cat(heads, 1))
                y = gelu_tanh(linear(f"{name}.mlp.up", normalise(x) * (1 + scale2) + shift2))
                ys[key] = x + gate2 * linear(f"{name}.mlp.down", y)
            xs = ys
        out = torch.zeros_like(video)
        for (f, row, column), x in xs.items():
            shift, scale = (linear("condition", silu(whats[f]))[:, part * dim : (part + 1) * dim] for part in range(2))
            y = linear("head", normalise(x) * (1 + scale) + shift)
            channels = y.shape[1] // c.patch**2
            for i in range(c.patch):
                for j in range(c.patch):
                    for channel in range(c.channels):
                        out[:, f, channel, row * c.patch + i, column * c.patch + j] = y[
                            :, (i * c.patch + j) * channels + channel
                        ]
        return out

    return function
