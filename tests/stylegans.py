"""Slow references of the StyleGANs, of R3GAN and of WGAN, equation by equation from the papers.

Resampling inserts zeros and convolves; each example has its own kernel, in a loop. `convolve` and `Equations` are those of
`references`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.signal
import scipy.special
import torch
from torch import Tensor

from references import batch_normalise, convolve, halve_side

Tensors = dict[str, Any]


def leak(x: Tensor) -> Tensor:
    """Return x, a fifth of it where it is negative, times sqrt(2)."""
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def insert_zeros(x: Tensor, up: int) -> Tensor:
    large = x.new_zeros(*x.shape[:2], x.shape[2] * up, x.shape[3] * up)
    large[:, :, ::up, ::up] = x
    return large


def pad(x: Tensor, low: int, high: int) -> Tensor:
    """Add zeros before and after both axes, or cut pixels off."""
    x = x[:, :, max(0, -low) : x.shape[2] - max(0, -high), max(0, -low) : x.shape[3] - max(0, -high)]
    low, high = max(0, low), max(0, high)
    out = x.new_zeros(*x.shape[:2], x.shape[2] + low + high, x.shape[3] + low + high)
    out[:, :, low : low + x.shape[2], low : low + x.shape[3]] = x
    return out


def resample(x: Tensor, taps: Tensor, up: int = 1, down: int = 1, low: int = 0, high: int = 0, gain: float = 1.0) -> Tensor:
    """Insert zeros, pad, convolve each map with a matrix, keep every `down`-th pixel."""
    taps = taps[:, None] * taps if taps.ndim == 1 else taps
    x, (rows, columns) = pad(insert_zeros(x, up), low, high), taps.shape
    height, width = x.shape[2] - rows + 1, x.shape[3] - columns + 1
    out = 0
    for i in range(rows):
        for j in range(columns):
            top, left = rows - 1 - i, columns - 1 - j  # a convolution: the first tap meets the last pixel
            out = out + taps[i, j] * x[:, :, top : top + height, left : left + width]
    return gain * out[:, :, ::down, ::down]


def normalised(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def dense(p: Tensors, name: str, x: Tensor, rate: float = 1.0) -> Tensor:
    """Weights are scaled by rate / sqrt(inputs), biases by the rate."""
    weight = p[f"{name}.weight"]
    return rate * (x @ weight.T / math.sqrt(weight.shape[1]) + p[f"{name}.bias"])


def map_style(p: Tensors, z: Tensor, width: int, average: bool = True) -> Tensor:
    """Normalize noise and embedded class, apply the dense layers; in training, update the average."""
    parts = [normalised(z[:, :width])] if width else []
    if "mapping.embed.weight" in p:
        parts.append(normalised(dense(p, "mapping.embed", z[:, width:])))
    w, i = torch.cat(parts, 1), 0
    while f"mapping.layers.{i}.weight" in p:
        w, i = leak(dense(p, f"mapping.layers.{i}", w, 0.01)), i + 1
    if p["training"] and average:
        old = p["mapping.average"]
        old.copy_(old + 0.002 * (w.detach().mean(0) - old))
    return w


def styled(p: Tensors, name: str, x: Tensor, w: Tensor, up: bool, taps: Tensor) -> Tensor:
    """Scale the kernel by the style of an example (equation 1), divide it by its norm (equation 3), convolve; noise and bias."""
    style, rows = dense(p, f"{name}.style", w), []
    for image, s in zip(x, style):
        kernel = p[f"{name}.weight"] * s[None, :, None, None]
        kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            full = convolve(insert_zeros(image[None], 2), kernel.flip(2, 3), border=2)  # 2H + 2, of which the last is zero
            rows.append(resample(full[:, :, :-1, :-1], taps, low=1, high=1, gain=4.0))
        else:
            rows.append(convolve(image[None], kernel, border=1))
    x = torch.cat(rows)
    noise = p[f"{name}.noise"]
    if p["training"]:
        noise = torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype)
    return leak(x + p[f"{name}.strength"] * noise + p[f"{name}.bias"][:, None, None])


def pick(styles: Tensor | None, w: Tensor) -> Callable[[int], Tensor]:
    """Return a function that gives the style of a layer: the same for all, or its own of B L W."""
    return lambda layer: w if styles is None else styles[:, layer]


def stylegan2(config: Any, styles: Tensor | None = None) -> Callable[..., Tensor]:
    """The layer to the image of a resolution has the style of the first convolution of the next one."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8

    def function(p: Tensors, z: Tensor) -> Tensor:
        w, smooth = pick(styles, map_style(p, z, config.noise - config.num_classes)), taps.to(z.dtype)
        x, image, i = p["synthesis.blocks.0.const"].expand(len(z), -1, -1, -1), None, 0
        while f"synthesis.blocks.{i}.rgb.weight" in p:
            name = f"synthesis.blocks.{i}"
            if i:
                x = styled(p, f"{name}.conv0", x, w(2 * i - 1), True, smooth)
            x = styled(p, f"{name}.conv1", x, w(2 * i), False, smooth)
            style = dense(p, f"{name}.rgb.style", w(2 * i + 1)) / math.sqrt(x.shape[1])
            own = torch.einsum("bdhw,bd,cd->bchw", x, style, p[f"{name}.rgb.weight"][:, :, 0, 0])
            own = own + p[f"{name}.rgb.bias"][:, None, None]
            image = own if image is None else resample(image, smooth, up=2, low=2, high=1, gain=4.0) + own
            i += 1
        return image

    return function


def equalised(p: Tensors, name: str, x: Tensor, stride: int = 1, border: int = 0) -> Tensor:
    weight = p[f"{name}.weight"]
    return convolve(x, weight / math.sqrt(weight[0].numel()), p.get(f"{name}.bias"), stride, border)


def group_deviation(x: Tensor, group: int) -> Tensor:
    """Append a map of the mean standard deviation over the images i, i + n, i + 2n, ... of a batch."""
    count = math.ceil(len(x) / group)
    rows = []
    for i in range(len(x)):
        members = torch.stack([x[j] for j in range(len(x)) if j % count == i % count])
        deviation = (members - members.mean(0)).square().mean(0).add(1e-8).sqrt().mean()
        rows.append(torch.cat([x[i], deviation.expand(1, *x.shape[2:])]))
    return torch.stack(rows)


def stylegan2_discriminator(config: Any) -> Callable[..., Tensor]:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8

    def function(p: Tensors, pictures: Tensor) -> Tensor:
        x, label = pictures[:, : config.channels], pictures[:, config.channels :, 0, 0]
        smooth, i = taps.to(x.dtype), 0
        x = leak(equalised(p, "from_image", x))
        while f"blocks.{i}.skip.weight" in p:
            x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            y = leak(equalised(p, f"blocks.{i}.conv0", x, border=1))
            y = leak(equalised(p, f"blocks.{i}.conv1", resample(y, smooth, low=2, high=2), stride=2))
            skip = resample(equalised(p, f"blocks.{i}.skip", x), smooth, low=1, high=1)[:, :, ::2, ::2]
            x, i = (y + skip) / math.sqrt(2), i + 1
        x = leak(equalised(p, "conv", group_deviation(x, config.group), border=1))
        score = dense(p, "last", leak(dense(p, "dense", x.flatten(1))))
        if not config.num_classes:
            return score
        known = normalised(map_style(p, label, 0, average=False))
        return torch.stack([(a @ b)[None] / math.sqrt(len(a)) for a, b in zip(score, known)])

    return function


# ---------------------------------------------------------------------------------------------- StyleGAN 1


def styled_maps(p: Tensors, name: str, x: Tensor, w: Tensor) -> Tensor:
    """Noise, bias, leaky ReLU; each map of each image gets the mean and deviation of its style (equation 1)."""
    noise = p[f"{name}.noise"]
    if p["training"]:
        noise = torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype)
    x = x + p[f"{name}.strength"][:, None, None] * noise + p[f"{name}.bias"][:, None, None]
    x, style, rows = torch.where(x > 0, x, 0.2 * x), dense(p, f"{name}.style", w), []
    for image, s in zip(x, style):
        dim, maps = len(image), []
        for d in range(dim):
            centered = image[d] - image[d].mean()
            maps.append((1 + s[d]) * centered / (centered.square().mean() + 1e-8).sqrt() + s[dim + d])
        rows.append(torch.stack(maps))
    return torch.stack(rows)


def enlarge(x: Tensor, kernel: Tensor, mirrored: bool) -> Tensor:
    """Repeat pixels 2 x 2 and convolve; `mirrored` as a transposed convolution does."""
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return convolve(large, kernel.flip(2, 3) if mirrored else kernel, border=1)


def stylegan1(config: Any, styles: Tensor | None = None) -> Callable[..., Tensor]:
    def function(p: Tensors, z: Tensor) -> Tensor:
        w = pick(styles, map_style(p, z, config.noise - config.num_classes))
        gained = lambda name: p[f"{name}.weight"] * math.sqrt(2 / p[f"{name}.weight"][0].numel())
        taps, i = torch.tensor([0.25, 0.5, 0.25], dtype=z.dtype), 0
        x = styled_maps(p, "synthesis.maps0", p["synthesis.const"].expand(len(z), -1, -1, -1), w(0))
        x = styled_maps(p, "synthesis.maps1", convolve(x, gained("synthesis.conv1"), border=1), w(1))
        while (name := f"synthesis.blocks.{i}") + ".conv0.weight" in p:
            x = enlarge(x, gained(f"{name}.conv0"), 2 * x.shape[2] >= 128)
            x = styled_maps(p, f"{name}.maps0", resample(x, taps, low=1, high=1), w(2 * i + 2))
            x = styled_maps(p, f"{name}.maps1", convolve(x, gained(f"{name}.conv1"), border=1), w(2 * i + 3))
            i += 1
        last = max(int(key.split(".")[2]) for key in p if key.startswith("synthesis.to_image"))
        return equalised(p, f"synthesis.to_image.{last}", x)

    return function


def stylegan1_discriminator(config: Any) -> Callable[..., Tensor]:
    def function(p: Tensors, pictures: Tensor) -> Tensor:
        x, label = pictures[:, : config.channels], pictures[:, config.channels :, 0, 0]
        taps, i = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype), 0
        slope = lambda y: torch.where(y > 0, y, 0.2 * y)

        def gained(name: str, x: Tensor, border: int = 0) -> Tensor:
            weight = p[f"{name}.weight"]
            return convolve(x, weight * math.sqrt(2 / weight[0].numel()), p[f"{name}.bias"], border=border)

        last = max(int(key.split(".")[1]) for key in p if key.startswith("from_image"))
        x = slope(gained(f"from_image.{last}", x))
        while f"blocks.{i}.conv0.weight" in p:
            x = slope(gained(f"blocks.{i}.conv0", x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2], 1))
            x = halve_side(gained(f"blocks.{i}.conv1", resample(x, taps, low=1, high=1), 1))
            x, i = slope(x), i + 1
        x = slope(gained("conv", group_deviation(x, config.group), 1)).flatten(1)
        weight = p["dense.weight"]
        score = dense(p, "last", slope(x @ weight.T * math.sqrt(2 / weight.shape[1]) + p["dense.bias"]))
        if not config.num_classes:
            return score
        chosen = (score * label).sum(1) + (1 - label.sum(1)) * score.sum(1) / config.num_classes
        return chosen[:, None]

    return function


# ---------------------------------------------------------------------------------------------- StyleGAN 3


def kaiser_filter(taps: int, cutoff: float, width: float, rate: float, radial: bool) -> np.ndarray:
    """Return a low-pass filter: scipy's along one axis, the jinc function of the distance under a window for both."""
    if not radial:
        return scipy.signal.firwin(taps, cutoff, width=width, fs=rate)
    beta = scipy.signal.kaiser_beta(scipy.signal.kaiser_atten(taps, width / (rate / 2)))
    window, out = np.kaiser(taps, beta), np.zeros((taps, taps))
    for i in range(taps):
        for j in range(taps):
            r = math.hypot(i - (taps - 1) / 2, j - (taps - 1) / 2) / rate
            out[i, j] = scipy.special.j1(2 * cutoff * math.pi * r) / (math.pi * r) * window[i] * window[j]
    return out / out.sum()


def bands(config: Any) -> list[dict[str, float]]:
    """Return cutoffs, stopbands, sampling rates, sides and channels of the maps: equations of section 3.2."""
    n, nc, s = config.layers, 2, config.image
    out = []
    for i in range(n + 1):
        t = min(i / (n - nc), 1)
        fc = 2 * (s / 2 / 2) ** t
        ft = 2**2.1 * (s / 2 * 2**0.3 / 2**2.1) ** t
        rate = 2 ** math.ceil(math.log2(min(2 * ft, s)))
        side = s if i >= n - 1 else rate + 2 * config.margin
        channels = config.channels if i == n else round(min(config.base / 2 / fc, config.dim))
        out.append({"fc": fc, "rate": rate, "side": side, "half": max(ft, rate / 2) - fc, "channels": channels})
    return out


def waves(p: Tensors, w: Tensor, band: dict[str, float], motion: Tensor | None) -> Tensor:
    """Evaluate sin(2 pi (f R x + phase)) at each pixel, with matrices of the translation and the rotation of the style."""
    rows = []
    for b, t in enumerate(dense(p, "synthesis.input.affine", w)):
        t = t / t[:2].square().sum().sqrt()
        one, zero = torch.ones((), dtype=w.dtype), torch.zeros((), dtype=w.dtype)
        stack = lambda *values: torch.stack(values).reshape(3, 3)
        matrix = stack(t[0], -t[1], zero, t[1], t[0], zero, zero, zero, one)
        matrix = matrix @ stack(one, zero, -t[2], zero, one, -t[3], zero, zero, one)
        matrix = matrix if motion is None else matrix @ motion[b]
        maps = []
        for f, phase in zip(p["synthesis.input.freqs"], p["synthesis.input.phases"]):
            turned, moved = f @ matrix[:2, :2], phase + f @ matrix[:2, 2]
            fade = ((turned.square().sum().sqrt() - band["fc"]) / (band["rate"] / 2 - band["fc"])).clamp(0, 1)
            axis = (torch.arange(band["side"], dtype=w.dtype) + 0.5 - band["side"] / 2) / band["rate"]
            angle = turned[0] * axis[None] + turned[1] * axis[:, None] + moved
            maps.append((1 - fade) * torch.sin(2 * math.pi * angle))
        weight = p["synthesis.input.weight"] / math.sqrt(len(maps))
        rows.append(torch.einsum("dhw,ed->ehw", torch.stack(maps), weight))
    return torch.stack(rows)


def alias_free(p: Tensors, name: str, x: Tensor, w: Tensor, i: int, config: Any) -> Tensor:
    """Normalize the expected magnitude, convolve by the style, enlarge, apply leaky ReLU, filter and reduce."""
    plan, last = bands(config), i == config.layers
    before, after = plan[max(0, i - 1)], plan[i]
    kernel = p[f"{name}.weight"]
    size = kernel.shape[-1]
    if p["training"]:
        old = p[f"{name}.magnitude"]
        old.copy_(0.999 * old + 0.001 * x.detach().square().mean())
    style, rows = dense(p, f"{name}.affine", w), []
    for image, s in zip(x, style):
        own = kernel * s[None, :, None, None]
        if last:
            own = own / math.sqrt(own[0].numel())
        else:
            own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        rows.append(convolve(image[None], own / p[f"{name}.magnitude"].sqrt(), border=size - 1))
    x = torch.cat(rows) + p[f"{name}.bias"][:, None, None]
    rate = max(before["rate"], after["rate"]) * (1 if last else 2)
    up, down = rate // before["rate"], rate // after["rate"]
    first = second = np.ones(1)
    if up > 1 and not last:
        first = kaiser_filter(6 * up, before["fc"], 2 * before["half"], rate, False)
    if down > 1 and not last:
        second = kaiser_filter(6 * down, after["fc"], 2 * after["half"], rate, config.radial and i < config.layers - 2)
    first, second = (torch.from_numpy(np.float32(h)).to(x.dtype) for h in (first, second))
    total = (after["side"] - 1) * down + 1 - (before["side"] + size - 1) * up + len(first) + len(second) - 2
    low = (total + up) // 2
    x = resample(x, first, up=up, low=low, high=total - low, gain=up**2)
    return resample((x if last else leak(x)).clamp(-256, 256), second, down=down)


def stylegan3(config: Any, motion: Tensor | None = None, styles: Tensor | None = None) -> Callable[..., Tensor]:
    def function(p: Tensors, z: Tensor) -> Tensor:
        w = pick(styles, map_style(p, z, config.noise - config.num_classes))
        x = waves(p, w(0), bands(config)[0], motion)
        for i in range(config.layers + 1):
            x = alias_free(p, f"synthesis.layers.{i}", x, w(i + 1), i, config)
        return 0.25 * x

    return function


# ---------------------------------------------------------------------------------------------- R3GAN


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each group of channels by itself."""
    width = weight.shape[1]
    count = x.shape[1] // width
    parts = zip(x.split(width, 1), weight.split(len(weight) // count))
    return torch.cat([convolve(part, kernel, border=weight.shape[-1] // 2) for part, kernel in parts], 1)


def bottleneck(p: Tensors, name: str, x: Tensor) -> Tensor:
    """x plus three convolutions of it, with bias and leaky ReLU after the first two."""
    slope = lambda y: torch.where(y > 0, y, 0.2 * y)
    y = slope(grouped(x, p[f"{name}.conv1.weight"]) + p[f"{name}.bias1"][:, None, None])
    y = slope(grouped(y, p[f"{name}.conv2.weight"]) + p[f"{name}.bias2"][:, None, None])
    return x + grouped(y, p[f"{name}.conv3.weight"])


def bottlenecks(p: Tensors, name: str, x: Tensor) -> Tensor:
    i = 0
    while f"{name}.{i}.bias1" in p:
        x, i = bottleneck(p, f"{name}.{i}", x), i + 1
    return x


def r3gan(config: Any) -> Callable[..., Tensor]:
    def function(p: Tensors, z: Tensor) -> Tensor:
        width = config.noise - config.num_classes
        z = torch.cat([z[:, :width], z[:, width:] @ p["embed.weight"].T], 1) if config.num_classes else z
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=z.dtype) / 8
        x = torch.einsum("bi,di,dhw->bdhw", z, p["first.weight"], p["basis"])
        x, i = bottlenecks(p, "blocks", x), 0
        while f"stages.{i}.blocks.0.bias1" in p:
            weight = p.get(f"stages.{i}.conv.weight")
            x = resample(x if weight is None else convolve(x, weight), taps, up=2, low=2, high=1, gain=4.0)
            x, i = bottlenecks(p, f"stages.{i}.blocks", x), i + 1
        return convolve(x, p["last.weight"])

    return function


def r3gan_discriminator(config: Any) -> Callable[..., Tensor]:
    def function(p: Tensors, pictures: Tensor) -> Tensor:
        x, label = pictures[:, : config.channels], pictures[:, config.channels :, 0, 0]
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
        x, i = convolve(x, p["first.weight"]), 0
        while f"stages.{i}.blocks.0.bias1" in p:
            x = bottlenecks(p, f"stages.{i}.blocks", x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2])
            x, weight = resample(x, taps, down=2, low=1, high=1), p.get(f"stages.{i}.conv.weight")
            x, i = x if weight is None else convolve(x, weight), i + 1
        x = (bottlenecks(p, "blocks", x) * p["basis.weight"][:, 0]).sum((2, 3)) @ p["last.weight"].T
        return (x * (label @ p["embed.weight"].T)).sum(1, keepdim=True) if config.num_classes else x

    return function


# ---------------------------------------------------------------------------------------------- WGAN


def wgan_discriminator(p: Tensors, pictures: Tensor) -> Tensor:
    """Halve the side and normalize, except in the first and last layer; no sigmoid."""
    slope = lambda x: torch.where(x > 0, x, 0.2 * x)
    x, place = slope(convolve(pictures, p["main.0.weight"], stride=2, border=1)), 2
    while f"main.{place + 1}.weight" in p:
        x = convolve(x, p[f"main.{place}.weight"], stride=2, border=1)
        x, place = slope(batch_normalise(p, f"main.{place + 1}", x)), place + 3
    return convolve(x, p[f"main.{place}.weight"]).flatten(1)


def wgan_layers(p: Tensors, x: Tensor) -> Tensor:
    """Four dense layers with ReLU in between."""
    for place in (0, 2, 4, 6):
        x = torch.stack([p[f"main.{place}.weight"] @ row + p[f"main.{place}.bias"] for row in x])
        x = x if place == 6 else torch.where(x > 0, x, torch.zeros_like(x))
    return x


def wgan_mlp(p: Tensors, z: Tensor) -> Tensor:
    x = wgan_layers(p, z)
    return x.reshape(len(z), 2, -1, round((x.shape[1] / 2) ** 0.5))  # two channels


def wgan_mlp_discriminator(p: Tensors, pictures: Tensor) -> Tensor:
    return wgan_layers(p, pictures.reshape(len(pictures), -1))
