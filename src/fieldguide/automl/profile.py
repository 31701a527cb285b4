"""Cost of networks and speed of this machine: parameters, multiply-adds, memory."""

from __future__ import annotations

import functools
import platform
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fieldguide.core.card import SAMPLES_PER_FRAME, Card
from fieldguide.core.hardware import cores, ram
from fieldguide.models.initialization import make_on_meta

FLOPS_REPEATS, MAX_FLOPS_SECONDS = 4, 0.1  # of measuring a precision
NOMINAL_FLOPS = {"cpu": 1e11, "mps": 2e12, "cuda": 2e13}  # floating-point operations per second, by device


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, without buffers, counting tied ones once."""
    return sum(p.numel() for p in model.parameters())


def build_example_inputs(
    card: Card, config: Any, batch: int = 1, length: int = 64, side: int = 224, device: str = "meta"
) -> tuple:
    """Return zero inputs with the shapes that a network of this config takes. `length` tokens and `side` pixels
    apply if the config leaves them open.
    """

    def get(word: str, default: Any) -> Any:
        return getattr(config, card.names.get(word, word), default)

    if card.input_type == "image":
        side = get("image", side)
        return (torch.zeros(batch, get("channels", 3), side, side, device=device),)
    if card.input_type == "table":
        return (
            torch.zeros(batch, get("numbers", 8), device=device),
            torch.zeros(batch, len(get("categories", ())), dtype=torch.int64, device=device),
        )
    if card.input_type == "sequence":
        return (torch.zeros(batch, length, get("dim", 64), device=device),)
    if card.input_type in ("tokens", "pair", "items"):
        length = min(length, get("length", length))
        row = (
            torch.zeros(batch, length, dtype=torch.int64, device=device),
            torch.ones(batch, length, dtype=torch.bool, device=device),
        )
        return row * 2 if card.input_type == "pair" else row
    if card.input_type == "series":
        return (torch.zeros(batch, get("length", length), get("channels", 1), device=device),)
    if card.input_type in ("covariates", "static-covariates"):
        length = get("length", length)
        past = (length, get("channels", 1)), (length, get("past", 0))
        widths = *past, (length + get("horizon", 1), get("known", 0)), (get("static", 0),)
        return tuple(torch.zeros(batch, *width, device=device) for width in widths[: len(card.inputs)])
    if card.input_type == "speech":
        return torch.zeros(batch, length, get("features", 80), device=device), torch.full((batch,), length, device=device)
    if card.input_type == "waveform":
        samples = SAMPLES_PER_FRAME * length
        return torch.zeros(batch, samples, device=device), torch.full((batch,), samples, device=device)
    if card.input_type == "speech-text":
        words = min(length, get("length", length))
        return (
            torch.zeros(batch, 2 * get("source_length", length), get("features", 80), device=device),
            torch.zeros(batch, words, dtype=torch.int64, device=device),
            torch.ones(batch, words, dtype=torch.bool, device=device),
        )
    if card.input_type in ("captioned", "image-text"):
        side, length = get("image", side), min(length, get("length", length))
        return (
            torch.zeros(batch, get("channels", 3), side, side, device=device),
            torch.zeros(batch, length, dtype=torch.int64, device=device),
            torch.ones(batch, length, dtype=torch.bool, device=device),
        )
    if card.input_type == "prompted-image":
        side = get("image", side)
        return (
            torch.zeros(batch, get("channels", 3), side, side, device=device),
            torch.zeros(batch, 1, 2, 2, device=device),
            torch.ones(batch, 1, 2, dtype=torch.int64, device=device),
        )
    if card.input_type == "noisy-target":
        side = get("image", side)
        return (
            torch.zeros(batch, get("outputs", 3), side, side, device=device),
            torch.zeros(batch, device=device),
            torch.zeros(batch, get("channels", 3), side, side, device=device),
        )
    if card.input_type in ("noisy", "noisy-video"):
        side = get("image", side)
        frames = (get("frames", 16),) if card.input_type == "noisy-video" else ()
        words = [min(length, get("length", length))] if get("vocab_size", 0) else []
        width = get("embedding", 0)
        label = torch.zeros(batch, width, device=device) if width else None
        return (
            torch.zeros(batch, *frames, get("channels", 3), side, side, device=device),
            torch.zeros(batch, device=device),
            torch.zeros(batch, *words, dtype=torch.int64, device=device) if label is None else label,
        )
    if card.input_type == "video":
        side = get("image", side)
        return (torch.zeros(batch, get("frames", 16), get("channels", 3), side, side, device=device),)
    if "latent" in card.inputs:
        side, channels = get("image", side), get("channels", 4) + get("extra", 0)
        frames = (get("frames", 16),) if "video" in card.input_type else ()
        inputs = {
            "latent": torch.zeros(batch, *frames, channels, side, get("width", side), device=device),
            "time": torch.zeros(batch, device=device),
            "text": torch.zeros(batch, get("length", 0) or length, get("text_dim", 768), device=device),
            "pooled": torch.zeros(batch, get("pooled_dim", 768), device=device),
        }
        return tuple(inputs[name] for name in card.inputs)
    width = {"vector": get("features", 784), "noise": get("noise", 100)}[card.input_type]
    return (torch.zeros(batch, width, device=device),)


class RecurrentFlops:
    """Count recurrent layers by formula inside the block, and compute only their output shapes.

    torch's counter gives fused recurrent layers 0, and on the meta device they would run every token in Python.
    """

    def __init__(self, model: nn.Module):
        self.total = 0
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.forward = functools.partial(self.count, module)

    def count(self, module: nn.RNNBase, x: torch.Tensor, state: Any = None) -> tuple:
        rows, positions = x.shape[0 if module.batch_first else 1], x.shape[0] * x.shape[1]
        self.total += 2 * positions * sum(p.numel() for n, p in module.named_parameters() if n.startswith("weight"))
        directions = 2 if module.bidirectional else 1
        last = x.new_empty(module.num_layers * directions, rows, module.hidden_size)
        states = (last, last) if isinstance(module, nn.LSTM) else last
        return x.new_empty(*x.shape[:2], directions * module.hidden_size), states


@functools.cache
def count_costs(card_name: str, config: Any, length: int = 64, side: int = 224) -> tuple[int, int]:
    """Return the parameters, and the multiply-adds of one forward pass of one example: half of the floating-point operations."""
    from fieldguide.models import registry

    card = registry.cards()[card_name]
    model = make_on_meta(card, config).eval()
    return count_parameters(model), count_forward(model, build_example_inputs(card, config, length=length, side=side))


def count_forward(model: nn.Module, inputs: tuple) -> int:
    """Return the multiply-adds of one forward pass of a network on the meta device, which is not usable afterwards."""
    model.requires_grad_(False)  # hooks of the counter stumble over what needs a gradient
    recurrent = RecurrentFlops(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return (counter.get_total_flops() + recurrent.total) // 2


def count_multiply_adds(card_name: str, config: Any, length: int = 64, side: int = 224) -> int:
    """Return the multiply-adds of one forward pass of one example."""
    return count_costs(card_name, config, length, side)[1]


@functools.cache
def measure_machine() -> dict[str, Any]:
    """Return this machine's device, cores, memory in bytes, and measured floating-point operations per second."""
    from fieldguide.core import distributed

    device = distributed.device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = platform.processor() or platform.machine(), ram()
    return {
        "device": device.type,
        "name": name,
        "cores": cores(),
        "memory": memory,
        "flops": {str(d)[6:]: measure_flops(device, d) for d in (torch.float32, torch.bfloat16)},
    }


def get_nominal_machine() -> dict[str, Any]:
    """Return this machine with a fixed speed for its kind of device, so that plans do not depend on its load."""
    machine = measure_machine()
    return {**machine, "flops": {"float32": NOMINAL_FLOPS.get(machine["device"], NOMINAL_FLOPS["cpu"])}}


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of square matrix products of growing size, the best of all.

    Sizes grow while a product is fast: without hardware for bfloat16, one of size 1024 takes seconds.
    """
    best, started = 0.0, time.perf_counter()
    for side in (256, 512, 1024):
        x = torch.randn(side, side, device=device).to(dtype)
        for number in range(1 + FLOPS_REPEATS):
            before = time.perf_counter()
            x @ x
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if number:  # the first one also prepares kernels
                best = max(best, 2 * side**3 / (now - before))
            if number and now - started > MAX_FLOPS_SECONDS:
                return best
    return best
