"""Slow references for detection: the network of the published diagram, and loops over single boxes from the papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from references import convolve, sigmoid

# ---------------------------------------------------------------------------------------------- network


def normalise(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Apply batch normalization with epsilon 0.001 and momentum 0.03."""
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    if p["training"]:
        kept, n = (mean, var), x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / n
        var = ((x - mean[:, None, None]) ** 2).sum((0, 2, 3)) / n
        with torch.no_grad():
            kept[0].mul_(0.97).add_(0.03 * mean)
            kept[1].mul_(0.97).add_(0.03 * var * n / (n - 1))
            p[f"{name}.num_batches_tracked"] += 1
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-3) ** 0.5
    return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def step(p: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = p[f"{name}.conv.weight"]
    x = normalise(p, f"{name}.norm", convolve(x, weight, None, stride, (weight.shape[-1] - 1) // 2))
    return x * sigmoid(x)


def c2f(p: dict[str, Tensor], name: str, x: Tensor, residual: bool) -> Tensor:
    x = step(p, f"{name}.conv1", x)
    half = x.shape[1] // 2
    maps = [x[:, :half], x[:, half:]]
    i = 0
    while f"{name}.blocks.{i}.conv1.conv.weight" in p:
        y = step(p, f"{name}.blocks.{i}.conv2", step(p, f"{name}.blocks.{i}.conv1", maps[-1]))
        maps.append(maps[-1] + y if residual else y)
        i += 1
    return step(p, f"{name}.conv2", torch.cat(maps, 1))


def largest(maps: Tensor, reach: int) -> Tensor:
    """Return the maximum within `reach` pixels in each direction, within the map."""
    out = torch.empty_like(maps)
    rows, columns = maps.shape[2:]
    for y in range(rows):
        for x in range(columns):
            out[:, :, y, x] = maps[:, :, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].amax((2, 3))
    return out


def twice(maps: Tensor, like: Tensor) -> Tensor:
    """Repeat each pixel four times, cropped to the size of `like`."""
    return maps[:, :, torch.arange(like.shape[2]) // 2][..., torch.arange(like.shape[3]) // 2]


def yolov8(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Apply the modules of the diagram in order, 0 to 22."""
    x = step(p, "stem", pictures, 2)
    x = c2f(p, "stages.0.mix", step(p, "stages.0.down", x, 2), True)
    four = c2f(p, "stages.1.mix", step(p, "stages.1.down", x, 2), True)
    six = c2f(p, "stages.2.mix", step(p, "stages.2.down", four, 2), True)
    x = c2f(p, "stages.3.mix", step(p, "stages.3.down", six, 2), True)
    x = step(p, "pool.conv1", x)
    nine = step(p, "pool.conv2", torch.cat([x, largest(x, 2), largest(x, 4), largest(x, 6)], 1))
    twelve = c2f(p, "up.0", torch.cat([twice(nine, six), six], 1), False)
    fifteen = c2f(p, "up.1", torch.cat([twice(twelve, four), four], 1), False)
    eighteen = c2f(p, "mix.0", torch.cat([step(p, "down.0", fifteen, 2), twelve], 1), False)
    last = c2f(p, "mix.1", torch.cat([step(p, "down.1", eighteen, 2), nine], 1), False)
    answers = []
    for level, x in enumerate((fifteen, eighteen, last)):
        parts = []
        others = [part for part in ("pose", "mask") if f"heads.{level}.{part}.2.bias" in p]
        for part in ("box", "label", *others):
            name = f"heads.{level}.{part}"
            y = step(p, f"{name}.1", step(p, f"{name}.0", x))
            parts.append(convolve(y, p[f"{name}.2.weight"], p[f"{name}.2.bias"]))
        x = torch.cat(parts, 1)
        answers += [x[:, :, row, column] for row in range(x.shape[2]) for column in range(x.shape[3])]
    grid = torch.stack(answers, 1)
    return grid if "prototypes.up.weight" not in p else torch.cat([grid.flatten(1), prototypes(p, fifteen).flatten(1)], 1)


def prototypes(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the prototype masks; a transposed convolution of 2 x 2 with stride 2 makes four pixels of each one."""
    x = step(p, "prototypes.conv1", x)
    weight = p["prototypes.up.weight"]  # D D 2 2, first the inputs
    larger = torch.zeros(*x.shape[:1], weight.shape[1], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    for row in range(2):
        for column in range(2):
            larger[:, :, row::2, column::2] = torch.einsum("bihw,io->bohw", x, weight[:, :, row, column])
    larger = larger + p["prototypes.up.bias"][:, None, None]
    return step(p, "prototypes.conv3", step(p, "prototypes.conv2", larger))


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Apply a convolution and its norm; each channel alone if the kernel has one input channel."""
    weight = p[f"{name}.conv.weight"]
    pad = (weight.shape[-1] - 1) // 2
    if weight.shape[1] == x.shape[1]:
        x = convolve(x, weight, None, 1, pad)
    else:
        x = torch.cat([convolve(x[:, c : c + 1], weight[c : c + 1], None, 1, pad) for c in range(x.shape[1])], 1)
    return normalise(p, f"{name}.norm", x)


def swish(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = linear(p, name, x)
    return x * sigmoid(x)


def c3k(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = step(p, f"{name}.conv1", x)
    for i in range(2):
        y = y + step(p, f"{name}.blocks.{i}.conv2", step(p, f"{name}.blocks.{i}.conv1", y))
    return step(p, f"{name}.conv3", torch.cat([y, step(p, f"{name}.conv2", x)], 1))


def c3k2(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = step(p, f"{name}.conv1", x)
    half = x.shape[1] // 2
    maps = [x[:, :half], x[:, half:]]
    i = 0
    while (inner := f"{name}.blocks.{i}") + ".conv1.conv.weight" in p:
        nested = f"{inner}.conv3.conv.weight" in p
        y = maps[-1]
        maps.append(c3k(p, inner, y) if nested else y + step(p, f"{inner}.conv2", step(p, f"{inner}.conv1", y)))
        i += 1
    return step(p, f"{name}.conv2", torch.cat(maps, 1))


def spatial_attention(p: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Apply attention head by head and position by position; queries and keys have half the width of values."""
    dim, width = x.shape[1], x.shape[1] // heads
    half = width // 2
    made = linear(p, f"{name}.qkv", x).flatten(2)
    out, values = torch.zeros_like(x.flatten(2)), torch.zeros_like(x.flatten(2))
    for head in range(heads):
        part = made[:, head * (2 * half + width) : (head + 1) * (2 * half + width)]
        q, k, v = part[:, :half], part[:, half : 2 * half], part[:, 2 * half :]
        values[:, head * width : (head + 1) * width] = v
        for place in range(x.shape[2] * x.shape[3]):
            scores = (q[:, :, place, None] * k).sum(1) / half**0.5
            powers = torch.exp(scores - scores.amax(1, keepdim=True))
            shares = powers / powers.sum(1, keepdim=True)
            out[:, head * width : (head + 1) * width, place] = (v * shares[:, None]).sum(-1)
    assert dim == heads * width
    out, values = out.view_as(x), values.view_as(x)
    x = x + linear(p, f"{name}.proj", out + linear(p, f"{name}.place", values))
    return x + linear(p, f"{name}.mlp.1", step(p, f"{name}.mlp.0", x))


def yolo11(p: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Apply the modules of the diagram in order, 0 to 23."""
    x = step(p, "stem", pictures, 2)
    x = c3k2(p, "stages.0.mix", step(p, "stages.0.down", x, 2))
    four = c3k2(p, "stages.1.mix", step(p, "stages.1.down", x, 2))
    six = c3k2(p, "stages.2.mix", step(p, "stages.2.down", four, 2))
    x = c3k2(p, "stages.3.mix", step(p, "stages.3.down", six, 2))
    x = step(p, "pool.pool.conv1", x)
    x = step(p, "pool.pool.conv2", torch.cat([x, largest(x, 2), largest(x, 4), largest(x, 6)], 1))
    x = step(p, "pool.attention.conv1", x)
    first, x = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    i = 0
    while f"pool.attention.blocks.{i}.qkv.conv.weight" in p:
        x = spatial_attention(p, f"pool.attention.blocks.{i}", x, max(1, x.shape[1] // 64))
        i += 1
    ten = step(p, "pool.attention.conv2", torch.cat([first, x], 1))
    thirteen = c3k2(p, "up.0", torch.cat([twice(ten, six), six], 1))
    sixteen = c3k2(p, "up.1", torch.cat([twice(thirteen, four), four], 1))
    nineteen = c3k2(p, "mix.0", torch.cat([step(p, "down.0", sixteen, 2), thirteen], 1))
    last = c3k2(p, "mix.1", torch.cat([step(p, "down.1", nineteen, 2), ten], 1))
    answers = []
    for level, x in enumerate((sixteen, nineteen, last)):
        name = f"heads.{level}"
        box = step(p, f"{name}.box.1", step(p, f"{name}.box.0", x))
        label = step(p, f"{name}.label.0.1", swish(p, f"{name}.label.0.0", x))
        label = step(p, f"{name}.label.1.1", swish(p, f"{name}.label.1.0", label))
        parts = [
            convolve(y, p[f"{name}.{part}.2.weight"], p[f"{name}.{part}.2.bias"])
            for part, y in (("box", box), ("label", label))
        ]
        x = torch.cat(parts, 1)
        answers += [x[:, :, row, column] for row in range(x.shape[2]) for column in range(x.shape[3])]
    return torch.stack(answers, 1)


# ---------------------------------------------------------------------------------------------- one box at a time


def overlap(a, b) -> float:
    """Return the intersection over union of two boxes."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    both = wide * high
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def complete(a, b) -> float:
    """Return the complete IoU (arXiv:1911.08287, eqs. 8 to 11)."""
    u = overlap(a, b)
    middles = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a, b)]
    rho = (middles[0][0] - middles[1][0]) ** 2 + (middles[0][1] - middles[1][1]) ** 2
    c = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    angles = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (a, b)]
    v = 4 / math.pi**2 * (angles[1] - angles[0]) ** 2
    return u - rho / c - (v / (1 - u + v) * v if v else 0.0)


def greedy(boxes, scores, labels, limit: float) -> list[int]:
    """Return the boxes kept by greedy suppression: take the best one left, drop those that overlap it."""
    order = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    kept = []
    while order:
        best = order.pop(0)
        kept.append(best)
        order = [i for i in order if labels[i] != labels[best] or not overlap(boxes[best], boxes[i]) > limit]
    return kept


def expected(logits) -> float:
    powers = [math.exp(x) for x in logits]
    return sum(i * power for i, power in enumerate(powers)) / sum(powers)


def answers(raw, bins: int, height: int, width: int, strides=(8, 16, 32)):
    """Return (x, y, stride, box, logits of four distances, class logits) of every point of an image; `raw` A 4R+K lists."""
    rows = iter(raw)
    found = []
    for stride in strides:
        for row in range(math.ceil(height / stride)):
            for column in range(math.ceil(width / stride)):
                one = next(rows)
                x, y = stride * (column + 0.5), stride * (row + 0.5)
                sides = [one[i * bins : (i + 1) * bins] for i in range(4)]
                left, top, right, bottom = (stride * expected(side) for side in sides)
                found.append((x, y, stride, (x - left, y - top, x + right, y + bottom), sides, one[4 * bins :]))
    assert next(rows, None) is None
    return found


def assigned(points, truth, labels, topk: int = 10, alpha: float = 0.5, beta: float = 6.0, smallest: float = 8.0):
    """Return owner and quality of each point of an image (arXiv:2108.07755, section 3.2)."""

    def score(point, label):
        return 1 / (1 + math.exp(-point[5][label]))

    wanted: dict[int, list[int]] = {}
    for n, (box, label) in enumerate(zip(truth, labels)):
        if label < 0:
            continue
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        half = max(box[2] - box[0], smallest) / 2, max(box[3] - box[1], smallest) / 2
        rated = []
        for a, point in enumerate(points):
            if all(-half[i] <= point[i] - middle[i] < half[i] for i in (0, 1)):
                t = score(point, label) ** alpha * overlap(point[3], box) ** beta
                if t > 0:
                    rated.append((-t, a))
        for _, a in sorted(rated)[:topk]:
            wanted.setdefault(a, []).append(n)
    owner = [max(wanted[a], key=lambda n: overlap(points[a][3], truth[n])) if a in wanted else -1 for a in range(len(points))]
    quality = [0.0] * len(points)
    for n, (box, label) in enumerate(zip(truth, labels)):
        mine = [a for a in range(len(points)) if owner[a] == n]
        t = {a: score(points[a], label) ** alpha * overlap(points[a][3], box) ** beta for a in mine}
        for a in mine:
            quality[a] = t[a] / max(t.values()) * max(overlap(points[b][3], box) for b in mine)
    return owner, quality


def losses(pictures, truths, labels, classes: int) -> dict[str, float]:
    """Return the three parts of the loss over several images, computed point by point."""
    box = distance = label = total = 0.0
    for points, truth, names in zip(pictures, truths, labels):
        owner, quality = assigned(points, truth, names)
        for (x, y, stride, predicted, sides, logits), n, q in zip(points, owner, quality):
            total += q
            for k in range(classes):
                p, want = 1 / (1 + math.exp(-logits[k])), q if n >= 0 and names[n] == k else 0.0
                label -= want * math.log(p) + (1 - want) * math.log(1 - p)
            if n < 0:
                continue
            box += q * (1 - complete(predicted, truth[n]))
            real = [x - truth[n][0], y - truth[n][1], truth[n][2] - x, truth[n][3] - y]
            for side, d in zip(sides, real):
                d = min(max(d / stride, 0.0), len(side) - 1.01)
                low = math.floor(d)
                logs = [s - math.log(sum(math.exp(z) for z in side)) for s in side]
                distance -= q / 4 * ((low + 1 - d) * logs[low] + (d - low) * logs[low + 1])
    total = max(total, 1.0)
    return {"box": box / total, "label": label / total, "distance": distance / total}
