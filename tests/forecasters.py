"""Slow references of forecasting networks, equation by equation from the papers; see references.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from references import gelu, lstm_step, sigmoid


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layer_norm(p: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    mean = x.sum() / len(x)
    deviation = (((x - mean) ** 2).sum() / len(x) + eps) ** 0.5
    return (x - mean) / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]


def softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x)
    return powers / powers.sum()


def arrange(values: Tensor, count: int) -> Tensor:
    """Q values of each step, one step after the other -> H Q."""
    return torch.stack([values[start : start + count] for start in range(0, len(values), count)])


def itransformer(heads: int, values: int) -> Callable[..., Tensor]:
    """Section 3 of arXiv:2310.06625, one token at a time."""

    def function(p: dict[str, Tensor], series: Tensor, past: Tensor, known: Tensor) -> Tensor:
        rows = []
        for row, beside, sure in zip(series, past, known):
            tokens, scales = [], []
            for x in [*row.T, *beside.T]:
                mean = x.sum() / len(x)
                deviation = (((x - mean) ** 2).sum() / len(x) + 1e-5) ** 0.5
                scales.append((mean, deviation))
                tokens.append(linear(p, "embed", (x - mean) / deviation))
            tokens += [linear(p, "embed_known", x) for x in sure.T]
            block, dim = 0, len(tokens[0])
            while f"blocks.{block}.proj.weight" in p:
                name, size, after = f"blocks.{block}", dim // heads, []
                qkv = [linear(p, f"{name}.qkv", x) for x in tokens]
                for token, mine in zip(tokens, qkv):
                    z = []
                    for h in range(heads):
                        q, k, v = (slice(i * dim + h * size, i * dim + (h + 1) * size) for i in range(3))
                        scores = torch.stack([(mine[q] * other[k]).sum() / size**0.5 for other in qkv])
                        z.append(sum(weight * other[v] for weight, other in zip(softmax(scores), qkv)))
                    y = layer_norm(p, f"{name}.norm1", token + linear(p, f"{name}.proj", torch.cat(z)), 1e-5)
                    y = y + linear(p, f"{name}.down", gelu(linear(p, f"{name}.up", y)))
                    after.append(layer_norm(p, f"{name}.norm2", y, 1e-5))
                tokens, block = after, block + 1
            columns = [
                linear(p, "head", layer_norm(p, "norm", token, 1e-5)) * deviation + mean
                for token, (mean, deviation) in zip(tokens[: row.shape[1]], scales)
            ]
            rows.append(torch.stack([arrange(y, values) for y in columns], 1))
        return torch.stack(rows)

    return function


def nhits(pools: Sequence[int], horizon: int, values: int) -> Callable[..., Tensor]:
    """Section 3 of arXiv:2201.12886 with the interpolation of its equation 2, one window and value at a time."""

    def interpolate(knots: Tensor) -> Tensor:  # K -> H; knots and steps are the centers of equal parts of the horizon
        found = []
        for step in range(horizon):
            place = (step + 0.5) * len(knots) / horizon - 0.5
            place = min(max(place, 0), len(knots) - 1)
            left = min(int(place), len(knots) - 1)
            right = min(left + 1, len(knots) - 1)
            found.append(knots[left] + (place - left) * (knots[right] - knots[left]))
        return torch.stack(found)

    def function(p: dict[str, Tensor], series: Tensor) -> Tensor:
        rows = []
        for row in series:
            columns = []
            for x in row.T:
                steps = len(x)
                total = torch.stack([x[-1]] * (horizon * values)).reshape(horizon, values)
                left = torch.stack([x[steps - 1 - t] for t in range(steps)])
                for block, pool in enumerate(pools):
                    y = torch.stack([left[start : start + pool].max() for start in range(0, steps, pool)])
                    layer = 0
                    while f"blocks.{block}.layers.{layer}.weight" in p:
                        y, layer = linear(p, f"blocks.{block}.layers.{layer}", y).clamp(min=0), layer + 1
                    y = linear(p, f"blocks.{block}.head", y)
                    left, knots = left - y[:steps], y[steps:]
                    size = len(knots) // values
                    total = total + torch.stack([interpolate(knots[q * size : (q + 1) * size]) for q in range(values)], 1)
                columns.append(total)
            rows.append(torch.stack(columns, 1))
        return torch.stack(rows)

    return function


def tide(values: int, horizon: int) -> Callable[..., Tensor]:
    """Section 4 of arXiv:2304.08424, one window, series and step at a time."""

    def residual(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        y = linear(p, f"{name}.down", linear(p, f"{name}.up", x).clamp(min=0)) + linear(p, f"{name}.skip", x)
        return layer_norm(p, f"{name}.norm", y, 1e-5) if f"{name}.norm.weight" in p else y

    def function(p: dict[str, Tensor], series: Tensor, past: Tensor, known: Tensor, static: Tensor) -> Tensor:
        rows = []
        for row, beside, sure, own in zip(series, past, known, static):
            steps = len(row)
            measured = [residual(p, "reduce_past", x) for x in beside]
            ahead = [residual(p, "reduce_known", x) for x in sure]
            columns = []
            for x in row.T:
                y = torch.cat([x, *measured, *ahead, own])
                for part in ("encoder", "decoder"):
                    layer = 0
                    while f"{part}.{layer}.up.weight" in p:
                        y, layer = residual(p, f"{part}.{layer}", y), layer + 1
                size, straight = len(y) // horizon, arrange(linear(p, "skip", x), values)
                columns.append(
                    torch.stack(
                        [
                            residual(p, "local", torch.cat([y[k * size : (k + 1) * size], ahead[steps + k]])) + straight[k]
                            for k in range(horizon)
                        ]
                    )
                )
            rows.append(torch.stack(columns, 1))
        return torch.stack(rows)

    return function


def tft(heads: int, horizon: int, past: Sequence[int], known: Sequence[int], static: Sequence[int]) -> Callable[..., Tensor]:
    """Section 4 of arXiv:1912.09363 with the norms of the authors' code, one window, series and step at a time."""

    def unit(p: dict[str, Tensor], name: str, x: Tensor, skip: Tensor) -> Tensor:  # equation 5, gated and added
        value, gate = linear(p, f"{name}.gate", x).chunk(2)
        return layer_norm(p, f"{name}.norm", skip + value * sigmoid(gate), 1e-3)

    def grn(p: dict[str, Tensor], name: str, x: Tensor, context: Tensor | None = None) -> Tensor:  # equations 2 to 4
        y = linear(p, f"{name}.up", x)
        if context is not None:
            y = y + linear(p, f"{name}.context", context)
        y = torch.where(y > 0, y, torch.exp(y) - 1)
        skip = linear(p, f"{name}.skip", x) if f"{name}.skip.weight" in p else x
        return unit(p, f"{name}.unit", linear(p, f"{name}.down", y), skip)

    def select(p: dict[str, Tensor], name: str, variables: list[Tensor], context: Tensor | None) -> Tensor:  # equations 6 to 8
        parts = [linear(p, f"{name}.embed.{i}", x) for i, x in enumerate(variables)]
        weights = softmax(grn(p, f"{name}.weigh", torch.cat(parts), context))
        return sum(weight * grn(p, f"{name}.each.{i}", x) for i, (weight, x) in enumerate(zip(weights, parts)))

    def split(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        ends = [sum(widths[:i]) for i in range(len(widths) + 1)]
        return [x[a:b] for a, b in itertools.pairwise(ends)]

    def run(p: dict[str, Tensor], name: str, xs: list[Tensor], state: tuple) -> tuple[list[Tensor], tuple]:
        found = []
        for x in xs:
            state = lstm_step(*(p[f"{name}.{kind}_l0"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")), x, state)
            found.append(state[0])
        return found, state

    def forecast(p: dict[str, Tensor], x: Tensor, beside: Tensor, sure: Tensor, own: Tensor) -> Tensor:
        steps = len(x)
        properties = select(p, "static", split(own, static), None)
        choice, rich, hidden, cell = (grn(p, f"contexts.{i}", properties) for i in range(4))
        before = [
            select(p, "past", [x[t : t + 1], *split(beside[t], past), *split(sure[t], known)], choice) for t in range(steps)
        ]
        after = [select(p, "known", split(sure[steps + k], known), choice) for k in range(horizon)]
        seen, state = run(p, "encoder", before, (hidden, cell))
        ahead, _ = run(p, "decoder", after, state)
        local = [unit(p, "local", y, skip) for y, skip in zip([*seen, *ahead], [*before, *after])]
        enriched = [grn(p, "enrich", y, rich) for y in local]
        keys, values = [linear(p, "key", y) for y in enriched], [linear(p, "value", y) for y in enriched]
        found, size = [], len(values[0])
        for t in range(steps, steps + horizon):
            query, means = linear(p, "query", enriched[t]), []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                scores = torch.stack([(query[part] * key[part]).sum() / math.sqrt(size) for key in keys[: t + 1]])
                means.append(sum(weight * value for weight, value in zip(softmax(scores), values)))
            y = unit(p, "attended", linear(p, "proj", sum(means) / heads), enriched[t])
            found.append(linear(p, "head", unit(p, "last", grn(p, "mlp", y), local[t])))
        return torch.stack(found)

    def function(p: dict[str, Tensor], series: Tensor, past: Tensor, known: Tensor, static: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.stack([forecast(p, x, beside, sure, own) for x in row.T], 1)
                for row, beside, sure, own in zip(series, past, known, static)
            ]
        )

    return function


# ------------------------------------------------------------------------------------------------ classification


def rocket(kernels: Sequence, channels: int) -> Callable[..., Tensor]:
    """Section 3 of arXiv:1910.13051, one kernel and step at a time."""

    def function(p: dict[str, Tensor], series: Tensor) -> Tensor:
        rows = []
        for row in series:
            positive, largest = [], []
            for kernel in kernels:
                values = []
                last = len(row) + 2 * kernel.padding - (kernel.length - 1) * kernel.dilation
                for start in range(-kernel.padding, last - kernel.padding):
                    total = torch.tensor(kernel.bias, dtype=torch.float32).to(row.dtype)
                    for channel, weights in kernel.weights.items():
                        for place, weight in enumerate(torch.tensor(weights).to(row.dtype)):
                            step = start + place * kernel.dilation
                            if 0 <= step < len(row):
                                total = total + weight * row[step, channel]
                    values.append(total)
                positive.append(sum(float(value > 0) for value in values) / len(values))
                largest.append(torch.stack(values).max())
            features = torch.cat([torch.tensor(positive, dtype=row.dtype), torch.stack(largest)])
            rows.append(linear(p, "head", features))
        return torch.stack(rows)

    return function


def inceptiontime(lengths: Sequence[int]) -> Callable[..., Tensor]:
    """Section 3 of arXiv:1909.04939 with the padding and norms of the authors' code (Keras), one filter and step at a time."""

    def convolve(
        x: Tensor, w: Tensor
    ) -> Tensor:  # B C T, D C N -> B D T; with an even length, one more step follows than precedes
        steps, size = x.shape[2], w.shape[2]
        found = []
        for t in range(steps):
            total: Tensor | float = 0.0
            for n in range(size):
                place = t + n - (size - 1) // 2
                if 0 <= place < steps:
                    total = total + torch.einsum("bc,dc->bd", x[:, :, place], w[:, :, n])
            found.append(total)
        return torch.stack(found, 2)

    def normalize(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        mean, variance = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        if p["training"]:
            count = x.shape[0] * x.shape[2]
            mean = x.sum((0, 2)) / count
            variance = ((x - mean[:, None]) ** 2).sum((0, 2)) / count
            with torch.no_grad():
                p[f"{name}.running_mean"].mul_(0.99).add_(0.01 * mean)
                p[f"{name}.running_var"].mul_(0.99).add_(0.01 * variance * count / (count - 1))
                p[f"{name}.num_batches_tracked"].add_(1)
        y = (x - mean[:, None]) / (variance[:, None] + 1e-3) ** 0.5
        return y * p[f"{name}.weight"][:, None] + p[f"{name}.bias"][:, None]

    def function(p: dict[str, Tensor], series: Tensor) -> Tensor:
        x = start = torch.stack([series[:, :, c] for c in range(series.shape[2])], 1)
        block = 0
        while f"blocks.{block}.norm.weight" in p:
            name = f"blocks.{block}"
            y = convolve(x, p[f"{name}.bottleneck.weight"]) if f"{name}.bottleneck.weight" in p else x
            parts = [convolve(y, p[f"{name}.convs.{i}.weight"]) for i in range(len(lengths))]
            steps = x.shape[2]
            highest = torch.stack([x[:, :, max(t - 1, 0) : min(t + 2, steps)].amax(2) for t in range(steps)], 2)
            parts.append(convolve(highest, p[f"{name}.pooled.weight"]))
            x = normalize(p, f"{name}.norm", torch.cat(parts, 1)).clamp(min=0)
            if block % 3 == 2:
                straight = f"shortcuts.{block // 3}"
                bridge = normalize(p, f"{straight}.1", convolve(start, p[f"{straight}.0.weight"]))
                x = start = (x + bridge).clamp(min=0)
            block += 1
        mean = x.sum(2) / x.shape[2]
        return mean @ p["head.weight"].T + p["head.bias"]

    return function


# ------------------------------------------------------------------------------------------------ autoencoders


def autoencoder(p: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """The layers of doi:10.1126/science.1127647 with ReLU, one row at a time; neither the code nor the output has a nonlinearity."""
    rows = []
    for x in vectors:
        for part in ("encoder", "decoder"):
            places = sorted(int(name.split(".")[1]) for name in p if name.startswith(f"{part}.") and name.endswith("weight"))
            for place in places:
                x = linear(p, f"{part}.{place}", x)
                x = x if place == places[-1] else x.clamp(min=0)
        rows.append(x)
    return torch.stack(rows)


def conv_autoencoder(p: dict[str, Tensor], series: Tensor) -> Tensor:
    """Strided convolutions, and transposed ones that spread each value over four steps, one value at a time."""

    def convolve(name: str, x: Tensor, stride: int) -> Tensor:  # C T -> D N
        w, b = p[f"{name}.weight"], p[f"{name}.bias"]
        edge, steps, found = w.shape[2] // 2, x.shape[1], []
        for start in range(-edge, steps + 2 * edge - w.shape[2] - edge + 1, stride):
            total = b
            for n in range(w.shape[2]):
                if 0 <= start + n < steps:
                    total = total + w[:, :, n] @ x[:, start + n]
            found.append(total)
        return torch.stack(found, 1)

    def spread(name: str, x: Tensor) -> Tensor:  # C N -> D 2N
        w, b = p[f"{name}.weight"], p[f"{name}.bias"]
        found = [b for _ in range(2 * x.shape[1])]
        for t in range(x.shape[1]):
            for n in range(w.shape[2]):
                if 0 <= (place := 2 * t + n - 1) < len(found):
                    found[place] = found[place] + w[:, :, n].T @ x[:, t]
        return torch.stack(found, 1)

    rows = []
    for row in series:
        x, layer = row.T, 0
        while f"down.{layer}.weight" in p:
            x, layer = convolve(f"down.{layer}", x, 2).clamp(min=0), layer + 1
        x = convolve("wide", convolve("narrow", x, 1), 1).clamp(min=0)
        for place in range(layer):
            x = spread(f"up.{place}", x).clamp(min=0)
        rows.append(convolve("last", x, 1)[:, : len(row)].T)
    return torch.stack(rows)
