"""Serving: prompts are read one at a time (prefill), and all sequences get one token per step (decode).

The cache is the one that the network makes, with keys and values of all positions and layers, in the dtype of the weights. Networks
with local layers would need only their window; `count_windowed_bytes` tells how much that would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fieldguide.models.generation.encoder_decoder import EncoderDecoderState
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.planning.machines import Machine
from fieldguide.planning.records import Trace, Work
from fieldguide.planning.timing import plan_seconds
from fieldguide.planning.trace import Tracer, undisturbed
from fieldguide.planning.workload import Shape, Workload
from fieldguide.training.precision import autocast

PREFILL, DECODE = "prefill", "decode"
REDUCE_SECONDS = 10e-6  # of starting an all-reduce between devices (assumed)
LINK_BYTES_PER_SECOND = 300e9  # of an all-reduce within one server with NVLink (assumed)
REDUCES_PER_LAYER = 2  # after attention and after the MLP (Shoeybi et al. 2019, arXiv:1909.08053, section 3)


def generates(workload: Workload) -> bool:
    """Return whether a network writes token by token with a cache."""
    return hasattr(workload.objective.model, "new_cache")


def trace_serving(workload: Workload, shape: Shape, new_tokens: int, precision: str = "float32") -> Trace:
    """Trace reading one prompt of `shape.length` tokens, and then a step of all `shape.batch` sequences at their full length.

    The phases of the work are `PREFILL` and `DECODE`. Cache and weights exist before.
    """
    tracer = Tracer()
    network = tracer.fake_module(workload.objective).eval().model
    for tensor in (*network.parameters(), *network.buffers()):
        tracer.label(tensor, "weights")
    text = {name: row for name, row in workload.batch.items() if name in ("source", "source_mask", "image", "tokens")}
    longest = (
        getattr(network, "max_target_length", None) or getattr(network.config, "length", None) or shape.length + new_tokens
    )
    context = min(shape.length + max(new_tokens, 1), longest)
    prompt = min(text["tokens"].shape[1], context - 1) if "source" not in text else 1
    with undisturbed(), tracer, torch.inference_mode():
        cache = build_cache(tracer, network, text, shape.batch, context)
        dtype = next(network.parameters()).dtype
        inputs = {
            name: tracer.fake_tensor(row[:1].to(dtype) if row.is_floating_point() else row[:1]) for name, row in text.items()
        }
        tokens = tracer.fake_tensor(text["tokens"][:1, :prompt].contiguous())
        small = network.new_cache(1, context)
        step = tracer.fake_tensor(torch.ones(shape.batch, 1, dtype=torch.int64))
        tracer.begin_steps()
        with autocast(torch.device("cpu"), precision):
            tracer.phase = PREFILL
            read(network, inputs, tokens, small)
            tracer.phase = DECODE
            cache.used = context - 1
            wrap(network, {}).last(step, None, cache)
    held = {tracer.number_of(t) for t in small.tensors}
    trace = tracer.finish()
    trace.initial = {number: size for number, size in trace.initial.items() if number not in held}  # rows of the large cache
    return trace


def build_cache(tracer: Tracer, network: Any, text: dict[str, Tensor], rows: int, context: int) -> Cache:
    """Return a fake cache, with what a decoder needs of its encoded sources."""
    cache: Cache = network.new_cache(rows, context)
    tensors = cache.tensors
    if "source" in text:
        source = tracer.fake_tensor(text["source"][:1].expand(rows, -1).contiguous())
        state = EncoderDecoderState(network, source, None)
        cache.cross = state.cross
        tensors += [t for pair in cache.cross[0] for t in pair]
    for tensor in tensors:
        tracer.label(tensor, "cache")
    return cache


def wrap(network: Any, inputs: dict[str, Tensor]) -> Any:
    """Return the decoder of a network with its image, as generation uses it."""
    return network.with_images(inputs.get("image")) if hasattr(network, "with_images") else network


def read(network: Any, inputs: dict[str, Tensor], tokens: Tensor, cache: Cache) -> None:
    """Read a prompt, or encode a source and read the first token of its target."""
    if "source" in inputs:
        cache.cross = EncoderDecoderState(network, inputs["source"], None).cross
    wrap(network, inputs).last(tokens, None, cache)


def count_windowed_bytes(config: Any, cache: int, context: int) -> int:
    """Return what the cache would take if local layers kept only their window."""
    window, depth = getattr(config, "window", 0), getattr(config, "depth", 0)
    if not window or not depth or window >= context:
        return cache
    every = getattr(config, "every", 2)  # each `every`th layer attends to all positions
    whole = depth // every
    return round(cache * (whole + (depth - whole) * window / context) / depth)


def plan_serving(
    trace: Trace, workload: Workload, shape: Shape, machine: Machine, devices: int, factors: Mapping[str, float] | None
) -> dict[str, float]:
    """Return seconds and rates of serving on one device, or on several that share each layer.

    `factors` correct times. The bounds are those of an ideal program: decoding reads the weights and the cache once per
    step, and prefill computes its operations at the rate of large matrix products.
    """
    config = workload.objective.model.config
    width, depth = getattr(config, "dim", 0), getattr(config, "depth", 0)

    def seconds_of(phase: str, tokens: int) -> float:
        work = [
            replace(each, flops=each.flops / devices, bytes=each.bytes / devices) for each in trace.work if each.phase == phase
        ]
        reducing = 0.0
        if devices > 1:
            moved = 2 * (devices - 1) / devices * tokens * width * 2
            reducing = REDUCES_PER_LAYER * depth * (REDUCE_SECONDS + moved / LINK_BYTES_PER_SECOND)
        return plan_seconds(work, machine, factors) + reducing

    prompt = shape.length
    prefill, decode = seconds_of(PREFILL, prompt), seconds_of(DECODE, shape.batch)
    state = sum(trace.initial.values()) / devices
    computing = [each for each in trace.work if each.phase == PREFILL]
    cache = sum(size for number, size in trace.initial.items() if trace.parts.get(number) == "cache")
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": prompt / prefill,
        "prefill_bound": prompt / max(sum_flops(computing, machine) / devices, 1e-12),
        "decode_seconds": decode,
        "tokens_per_second": shape.batch / decode,
        "decode_bound": shape.batch * machine.get_bandwidth(state) / state,
        "cache_per_sequence": cache / shape.batch,
    }


def sum_flops(work: Iterable[Work], machine: Machine) -> float:
    """Return the seconds of computing alone."""
    return sum(each.flops / machine.get_flops(each.kind, each.dtype, each.flops) for each in work if each.flops)
