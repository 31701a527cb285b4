"""Report elements of pre-training on recordings: accuracy by duration, use of the codes, recordings."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fieldguide.core.report_elements import Bars, Lines, Numbers, ReportElement, Sound, Sounds
from fieldguide.data.dataset import SECONDS, Data
from fieldguide.data.media import audio
from fieldguide.tasks.audio.report import MAX_SHOWN_SECONDS, encode_audio
from fieldguide.tasks.base import Arrays

if TYPE_CHECKING:
    from fieldguide.tasks.audio.speech_pretraining import SpeechPretraining

SHOWN_SOUNDS = 6  # of the easiest, and of the hardest recordings


def compute_perplexity(counts: np.ndarray) -> np.ndarray:  # ... V -> ...
    """Return the effective number of codes, the exponential of the entropy of their frequencies; 1 if none is used."""
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return np.exp(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1))


def build_elements(task: SpeechPretraining, test: Data, outputs: Arrays) -> dict[str, list[ReportElement]]:
    """Return the elements of the report."""
    accuracy = outputs["right"] / np.maximum(outputs["count"], 1)
    used = outputs["used"].sum(0)  # G V
    most, perplexity = used.shape[1], compute_perplexity(used)
    curves: dict[str, tuple[Numbers, Numbers]] = {}
    for i, counts in enumerate(np.sort(used, 1)[:, ::-1]):
        name = f"codebook {i + 1}" if len(used) > 1 else "codes"
        curves[name] = (np.arange(1, most + 1), 100 * counts / max(counts.sum(), 1))
    about = " and ".join(f"{value:.1f}" for value in perplexity)
    order = np.argsort(accuracy, kind="stable")
    order = order[outputs["count"][order] > 0]
    return {
        "Hidden frames": [
            compare_durations(test, outputs),
            Bars(
                "Accuracy by recording",
                "Accuracy of the test recordings, by decile.",
                {f"{10 * q} %": 100 * float(v) for q, v in enumerate(np.quantile(accuracy, np.linspace(0, 1, 11)))},
                unit="%",
            ),
            Lines(
                "Use of the codes",
                f"Share of the hidden test frames, most frequent codes first. Effective number: {about} of {most}.",
                "code, by frequency",
                "% of the frames",
                curves,
            ),
        ],
        "Recordings": [
            Sounds(
                "Hardest recordings",
                "Test recordings with the lowest accuracy.",
                play(task, test, order[:SHOWN_SOUNDS], accuracy),
            ),
            Sounds(
                "Easiest recordings",
                "Test recordings with the highest accuracy.",
                play(task, test, order[::-1][:SHOWN_SOUNDS], accuracy),
            ),
        ],
    }


def compare_durations(test: Data, outputs: Arrays) -> ReportElement:
    """Return the accuracy in short and long recordings."""
    seconds = test.rows[SECONDS].to_numpy()
    edges = np.unique(np.quantile(seconds, np.linspace(0, 1, 5)))
    groups = {}
    for low, high in pairwise(edges):
        inside = (seconds >= low) & ((seconds < high) | (high == edges[-1]))
        if count := outputs["count"][inside].sum():
            groups[f"{low:.2f} to {high:.2f} s"] = 100 * float(outputs["right"][inside].sum() / count)
    return Bars("Accuracy by duration", "", groups, unit="%")


def play(task: SpeechPretraining, test: Data, rows: np.ndarray, accuracy: np.ndarray) -> list[Sound]:
    """Return recordings that can be played."""
    waves = audio.load([test.rows[task.column][int(i)] for i in rows], task.options.rate)
    most = int(MAX_SHOWN_SECONDS * task.options.rate)
    return [
        Sound(encode_audio(wave[:most], task.options.rate), f"accuracy {100 * accuracy[i]:.0f} %")
        for i, wave in zip(rows, waves)
    ]
