"""Printing of plans of memory and time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fieldguide.core.terminal import echo


def format_bytes(count: float) -> str:
    """Return a size in MiB or GiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def format_time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


def print_plans(plans: Sequence[Any], as_json: bool) -> None:
    """Print plans as text, or as JSON Lines."""
    for number, plan in enumerate(plans):
        if as_json:
            content = plan.to_dict()
            content["error"] = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in content["error"].items()}
            echo(json.dumps(content, ensure_ascii=False))
            continue
        if number:
            echo("")
        print_plan(plan)


def print_plan(plan: Any) -> None:
    what = {"train": "training", "predict": "prediction", "serve": "serving"}[plan.mode]
    weights = f"{plan.dtype} weights" if plan.dtype != "float32" else plan.precision
    settings = [weights, *([plan.optimizer] if plan.optimizer else []), f"batches of {plan.batch:,}"]
    shared = f" with {plan.strategy.upper()} on each of {plan.devices} devices" if plan.devices > 1 else ""
    echo(f"{plan.network}: {what}, {', '.join(settings)}, on {plan.machine}{shared}")
    for name, size in sorted(plan.parts.items(), key=lambda part: -part[1]):
        if size:
            echo(f"  {name:<14} {format_bytes(size):>12}")
    verdict = "fits into" if plan.fits else "does NOT fit into"
    echo(
        f"  {'peak':<14} {format_bytes(plan.peak):>12}, at most {format_bytes(plan.upper)}; {verdict} {format_bytes(plan.memory)}"
    )
    if plan.serving:
        print_serving(plan)
    time = f"  time           {format_time(plan.step_seconds):>12} per step"
    echo(time + (f", {format_time(plan.seconds)} for {plan.steps:,} steps" if plan.steps > 1 else ""))
    if plan.largest_batch is not None:
        unit = "most sequences" if plan.serving and "decode_seconds" in plan.serving else "largest batch "
        longest = f", longest sequence at this batch {plan.largest_length:,}" if plan.largest_length else ""
        echo(f"  {unit} {plan.largest_batch:>12,}{longest}")
    error = plan.error
    if error["cells"]:
        echo(
            f"  measured error of such plans: peak {100 * error['peak_median']:.0f} % median, {100 * error['peak_p95']:.0f} % at the "
            f"95th percentile ({error['cells']} measurements of {plan.family or 'all'} networks on a CPU)"
        )
    for note in plan.notes:
        echo(f"  note: {note}")


def print_serving(plan: Any) -> None:
    """Print latency and rates of a server."""
    found = plan.serving
    if "decode_seconds" not in found:
        echo(
            f"  latency        {format_time(found['latency_seconds']):>12} per batch, {found['rows_per_second']:,.4g} rows per second"
        )
        return
    echo(
        f"  prefill        {format_time(found['prefill_seconds']):>12} per prompt of {plan.length:,} tokens, "
        f"{found['prefill_tokens_per_second']:,.4g} tokens per second (at most {found['prefill_bound']:,.4g} by computing)"
    )
    echo(
        f"  decode         {format_time(found['decode_seconds']):>12} per token of all {plan.batch:,} sequences, "
        f"{found['tokens_per_second']:,.4g} tokens per second (at most {found['decode_bound']:,.4g} by memory bandwidth)"
    )
    cache, windowed = found["cache_per_sequence"], found["windowed_cache_per_sequence"]
    less = f"; {format_bytes(windowed)} if local layers kept only their window" if windowed < cache else ""
    echo(f"  cache          {format_bytes(cache):>12} per sequence{less}")
