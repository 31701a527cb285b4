"""The section on training: losses, validation scores and the learning rate by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fieldguide.core.report_elements import Lines, Numbers, ReportElement
from fieldguide.inference.run import Run
from fieldguide.report.eval_samples import EvalSamples
from fieldguide.report.render import Section
from fieldguide.report.verdict import format_duration
from fieldguide.tasks.spec import Metric

VALIDATION_LOSS = "validation_loss"  # among the scores of metrics.jsonl
MIN_SMOOTHED_POINTS = 20  # shorter curves are drawn as they are
SMOOTHING_FRACTION = 0.02  # standard deviation of the smoothing kernel, as a fraction of the curve

Curve = tuple[Numbers, Numbers]


def build_training_section(run: Run, metric: Metric) -> Section:
    """Return the curves of a run and the samples taken during training."""
    lines, elements = run.losses(), list[ReportElement]()
    scored = [(r["step"], r["scores"]) for r in lines if "scores" in r]
    best = {"kept": run.record["cost"]["best_step"]}
    if losses := collect_curves(lines, "loss"):
        elements.append(draw_losses(losses, collect_scores(scored, VALIDATION_LOSS)))
    steps, values = collect_scores(scored, metric.name)
    if len(steps):
        note = "Score on the validation examples, which selects the weights that are kept."
        curves = {"validation": (steps, values)}
        elements.append(Lines(f"Validation {metric.title}", note, x="step", y=metric.title, lines=curves, marks=best))
    if rates := collect_curves(lines, "lr"):
        elements.append(Lines("Learning rate", "", x="step", y="rate", lines=rates))
    elements += EvalSamples(run.path).merge()
    cost = run.record["cost"]
    lead = f"{cost['steps']:,} steps in {format_duration(cost['seconds'])}; the weights of step {cost['best_step']:,} are kept."
    return Section("Training", lead + (f" Stopped early: {cost['stopped']}." if cost["stopped"] else ""), elements)


def draw_losses(losses: Mapping[str, Curve], validation: Curve) -> Lines:
    """Return the chart of the losses: every logged value pale, smoothed curves, and the validation loss."""
    curves: dict[str, Curve] = {}
    faint = []
    for key, (steps, values) in losses.items():
        name = key.removesuffix(".loss") if key != "loss" else "training"
        if len(steps) >= MIN_SMOOTHED_POINTS:
            curves |= {f"{name}, as logged": (steps, values), name: (steps, smooth(np.array(values, dtype=float)))}
            faint.append(f"{name}, as logged")
        else:
            curves[name] = (steps, values)
    note = "Smoothed." if faint else ""
    if len(validation[0]):
        curves["validation"] = validation
        note += (
            " The loss of some validation examples, without augmentation and dropout, which is why it may be lower. If it rises "
            "while the training loss falls, the network overfits."
        )
    return Lines("Loss", note.strip(), x="step", y="loss", lines=curves, faint=faint)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return values averaged with a Gaussian kernel, which is narrower at the start, where losses fall fast."""
    places = np.arange(len(values))
    width = np.clip(places / 3, 0.5, max(1.0, SMOOTHING_FRACTION * len(values)))[:, None]
    weights = np.exp(-0.5 * ((places[None] - places[:, None]) / width) ** 2) * np.isfinite(values)
    return weights @ np.nan_to_num(values, posinf=0, neginf=0) / weights.sum(1)


def collect_curves(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, Curve]:
    """Return the logged values called `name` of every phase: phase -> (steps, values)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key == name or key.endswith("." + name):
                found.setdefault(key, []).append((line["step"], value))
    return {key: ([step for step, _ in points], [value for _, value in points]) for key, points in found.items()}


def collect_scores(scored: Sequence[tuple[int, Mapping[str, float]]], name: str) -> Curve:
    """Return (steps, values) of a score of the evaluations."""
    points = [(step, scores[name]) for step, scores in scored if name in scores]
    return [step for step, _ in points], [value for _, value in points]
