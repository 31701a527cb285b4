"""The result of a run in one sentence, and how it compares with the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fieldguide.core.numbers import format_plain
from fieldguide.report.render import Badge
from fieldguide.tasks.spec import Metric


def summarize_result(record: Mapping[str, Any], metric: Metric) -> str:
    """Return the result in one sentence, next to the baselines."""
    scores = record["scores"]
    interval = metric.interval_text(*scores["intervals"][metric.name])
    bounds = [b for b in scores["baselines"] if b.get("bound")]
    value = metric.text(scores["test"][metric.name])
    if metric.words == "correct":
        result = f"{value} of the held-out examples correct"
    else:
        result = f"{value} {metric.label or metric.words} on held-out examples"
    best = f" Upper bound: {list_scores(bounds, metric)}." if bounds else ""
    better = find_better_baselines(record, metric)
    advice = describe_better(better, metric, scores["intervals"][metric.name])
    if replaced := find_replaced_network(record):
        advice = (
            f" {record['model']['size']} is the model of this run because {replaced} did not score better on the validation rows; "
            "more minutes, more data or pretrained weights may change that."
        )
    if partner := find_partner(record):
        advice += f" The model is the mean of {record['model']['size']} and {partner}, which is better than each alone."
    compared = list_scores(list_baselines(record), metric)
    return f"{result} (95 % interval {interval}).{f' Baselines: {compared}.' if compared else ''}{best}{advice}"


def describe_better(better: Sequence[Mapping[str, Any]], metric: Metric, interval: Sequence[float]) -> str:
    """Return what baselines that score better imply: those outside the 95 % interval are better beyond chance."""
    if not better:
        return ""
    low, high = sorted(interval)
    beyond = [b["name"] for b in better if not low <= b["scores"][metric.name] <= high]
    if beyond:
        return f" The network does not beat {' and '.join(beyond)}: use that, or train with more minutes or data."
    names = " and ".join(b["name"] for b in better)
    return f" The difference to {names} is within the interval: these examples do not show which is better."


def find_replaced_network(record: Mapping[str, Any]) -> str:
    """Return the name of the network whose place a baseline took; empty if the network is the model of the run."""
    if find_partner(record):
        return ""
    choice = record.get("choice", {})
    return next((rival["name"] for rival in choice.get("rivals", ()) if rival.get("network")), "")


def find_partner(record: Mapping[str, Any]) -> str:
    """Return the name of the baseline that the network is averaged with; empty if the model is the network alone."""
    return record.get("model", {}).get("parts", {}).get("baseline", {}).get("size", "")


def judge(record: Mapping[str, Any], metric: Metric) -> Badge | None:
    """Return a badge if the network is not clearly better than every baseline.

    If a baseline is better, the badge is red if its score is outside the network's 95 % interval, else amber; it is amber too
    if a baseline is equally good.
    """
    scores = record["scores"]
    known = [b["scores"][metric.name] for b in list_scored(list_baselines(record), metric)]
    own, interval = scores["test"][metric.name], scores["intervals"][metric.name]
    if not known or own != own:
        return None
    sign = 1 if metric.better == "max" else -1
    best = max(sign * value for value in known)
    low, high = sorted(sign * value for value in interval)
    if best > sign * own:
        return Badge("below the baseline", "bad" if best > high else "warning")
    if best == sign * own:
        return Badge("no better than the baseline", "warning")
    return Badge("not clearly above the baseline", "neutral") if best >= low else None


def list_baselines(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the baselines without upper bounds."""
    return [b for b in record["scores"]["baselines"] if not b.get("bound")]


def find_better_baselines(record: Mapping[str, Any], metric: Metric) -> list[dict[str, Any]]:
    """Return the baselines that score better than the network."""
    sign, own = (1 if metric.better == "max" else -1), record["scores"]["test"][metric.name]
    return [b for b in list_scored(list_baselines(record), metric) if sign * b["scores"][metric.name] > sign * own]


def list_scores(baselines: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """Return names and scores of baselines as text."""
    return "; ".join(f"{b['name']} {metric.text(b['scores'][metric.name])}" for b in list_scored(baselines, metric))


def list_scored(baselines: Sequence[Mapping[str, Any]], metric: Metric) -> list[Any]:
    """Return the baselines that have a score; one that is undefined, such as for rows without labels, is None or NaN."""
    has_score = lambda value: value is not None and value == value
    return [b for b in baselines if has_score(b["scores"].get(metric.name))]


def list_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return size, data, cost and speed of a run as labels and values."""
    cost, split = record["cost"], record["data"]["split"]
    tested = record["scores"].get("tested", split["test"])
    latency = cost.get("latency", {})
    speed = [("one prediction", format_duration(latency["one"]))] if "one" in latency else []
    if (count := latency.get("batch_examples", 1)) > 1:
        speed.append((f"in batches of {count}", f"{format_plain(count / max(latency['batch'], 1e-9), 2)} per second"))
    return [
        ("network", " and ".join(filter(None, (record["model"]["size"], find_partner(record))))),
        ("parameters", f"{cost['parameters']:,}"),
        *([("multiply-adds", f"{cost['multiply_adds']:,}")] if cost["multiply_adds"] else []),
        ("trained on", f"{split['train']:,} examples"),
        ("tested on", f"{tested:,} examples"),
        ("training", f"{format_duration(cost['seconds'])}, {record['settings']['precision']}"),
        *speed,
        ("peak memory", f"{cost['peak_memory'] / 2**20:,.0f} MiB"),
        ("machine", f"{record['machine']['cores']} cores, {record['machine']['device']}"),
    ]


def format_duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
