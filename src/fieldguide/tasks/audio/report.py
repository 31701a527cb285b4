"""Report elements of speech recognition: spectrograms with alignments, audio examples and mistakes."""

from __future__ import annotations

import io
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fieldguide.core.report_elements import Bars, Gallery, Picture, ReportElement, Sound, Sounds, Table
from fieldguide.data.dataset import SECONDS, Data
from fieldguide.data.media import audio
from fieldguide.metrics.speech import compare, count_edits
from fieldguide.objectives import Objective
from fieldguide.objectives.ctc import compute_log_probabilities
from fieldguide.objectives.ctc_decoding import align
from fieldguide.tasks.base import Arrays

if TYPE_CHECKING:
    from fieldguide.tasks.audio.speech_recognition import SpeechRecognition

SHOWN_MISTAKES, SHOWN_SPECTROGRAMS, SHOWN_SOUNDS = 40, 8, 16  # rows of the table, spectrograms, audio examples
MAX_SHOWN_SECONDS = 15.0  # maximum seconds of a recording in the report
WIDTH, BAND, TEXT = 640, 3, 26  # pixels: spectrogram width, height per band, height of the line of symbols below
# Dark violet over teal to yellow: perceptually uniform and readable with color blindness (matplotlib's
# viridis).
COLORMAP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


def build_elements(
    task: SpeechRecognition, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None
) -> dict[str, list[ReportElement]]:
    said, heard = targets["text"].tolist(), outputs["text"].tolist()
    counts = count_edits(said, heard, "words")
    characters = count_edits(said, heard, "characters")
    # By word error rate; ties by character error rate.
    rank = counts.errors / np.maximum(counts.length, 1) + characters.errors / np.maximum(characters.length, 1) / 100
    worst = [int(i) for i in np.argsort(-rank, kind="stable") if counts.errors[i]]
    chance = [int(i) for i in np.random.default_rng(0).permutation(len(said)) if i not in worst[:SHOWN_SPECTROGRAMS]]
    pictures = (
        spectrograms(task, test, [*worst[: SHOWN_SPECTROGRAMS // 2], *chance][:SHOWN_SPECTROGRAMS], outputs, said, objective)
        if objective
        else []
    )
    row = lambda i: (test.locate_row(i), said[i], heard[i], int(counts.errors[i]), float(outputs["sure"][i]))
    recordings: list[ReportElement] = []
    if worst:
        recordings.append(
            Sounds(
                "Worst recordings",
                "Test recordings with the highest word error rate. Listen: is the prediction wrong, or the transcript?",
                sounds(task, test, worst[:SHOWN_SOUNDS], said, heard),
            )
        )
        recordings.append(
            Table(
                "Worst rows",
                "",
                ("recording", "transcript", "predicted", "wrong words", "confidence"),
                [row(i) for i in worst[:SHOWN_MISTAKES]],
            )
        )
    recordings.append(Sounds("Random sample", "Random test recordings.", sounds(task, test, chance[:4], said, heard)))
    if pictures:
        recordings.append(
            Gallery(
                "Alignment",
                "Log-mel spectrograms: time runs to the right, low frequencies are at the bottom, brighter is "
                "louder. Below each, the predicted symbols at their time (most probable alignment).",
                pictures,
                wide=True,
            )
        )
    return {"Recordings": recordings, "Mistakes": mistake_elements(test, said, heard, counts)}


def mistake_elements(test: Data, said: list[str], heard: list[str], counts: Any) -> list[ReportElement]:
    """Return which words are confused, and the error rate by duration."""
    pairs = Counter(pair for i in np.flatnonzero(counts.errors) for pair in compare(said[i], heard[i]) if pair[0] != pair[1])
    spoken = Counter(word for text in said for word in text.split())
    rows = [
        (a or "(nothing)", b or "(nothing)", n, spoken[a] if a else None) for (a, b), n in pairs.most_common(SHOWN_MISTAKES)
    ]
    totals = counts.totals()
    seconds = test.rows[SECONDS].to_numpy()
    edges = np.unique(np.quantile(seconds, np.linspace(0, 1, 5)))
    groups = {}
    for low, high in pairwise(edges):
        inside = (seconds >= low) & ((seconds < high) | (high == edges[-1]))
        if counts.length[inside].sum():
            groups[f"{low:.1f} to {high:.1f} s"] = 100 * float(counts.errors[inside].sum() / counts.length[inside].sum())
    return [
        Table(
            "Confused words",
            f"{totals['substitutions']:,} substitutions, {totals['deletions']:,} deletions and "
            f"{totals['insertions']:,} insertions in {totals['length']:,} words.",
            ("transcript", "predicted", "count", "total"),
            rows,
        ),
        Bars("Word error rate by duration", "", groups, unit="%"),
    ]


# Sounds


def sounds(task: SpeechRecognition, test: Data, rows: list[int], said: list[str], heard: list[str]) -> list[Sound]:
    waves = audio.load([test.rows[task.column][i] for i in rows], task.mel.rate)
    most = int(MAX_SHOWN_SECONDS * task.mel.rate)
    return [
        Sound(
            encode_audio(wave[:most], task.mel.rate),
            f"transcript “{said[i]}”, predicted “{heard[i] or '(nothing)'}”"
            + (f" (the first {MAX_SHOWN_SECONDS:g} of {len(wave) / task.mel.rate:.0f} s)" if len(wave) > most else ""),
            bad=said[i] != heard[i],
        )
        for i, wave in zip(rows, waves)
    ]


def encode_audio(wave: np.ndarray, rate: int) -> bytes:
    """Encode a waveform for browsers: MP3, or WAV if libsndfile is too old for MP3."""
    import soundfile

    file = io.BytesIO()
    form = "MP3" if "MP3" in soundfile.available_formats() else "WAV"
    soundfile.write(file, wave, rate, format=form)
    return file.getvalue()


# Spectrograms


@torch.inference_mode()
def spectrograms(
    task: SpeechRecognition, test: Data, rows: list[int], outputs: Arrays, said: list[str], objective: Objective
) -> list[Picture]:
    from fieldguide.tasks.audio.speech_recognition import stack_waves

    where = next(objective.parameters()).device
    rows = [i for i in rows if test.rows[SECONDS][i] <= MAX_SHOWN_SECONDS]
    if not rows:
        return []
    waves, lengths = stack_waves(audio.load([test.rows[task.column][i] for i in rows], task.mel.rate))
    task.adopt(objective)
    features, steps = task.reader.apply(waves, lengths)
    logits, answers = task.compute_logits(objective.model, features.to(where), steps.to(where))
    symbols, count = task.transcripts.batch([outputs["said"][i][outputs["said"][i] > 0].astype(np.int64) for i in rows])
    found = align(
        compute_log_probabilities(logits), answers, torch.from_numpy(symbols).to(where), torch.from_numpy(count).to(where)
    )
    spans = found.spans.cpu().numpy() * task.stride * task.reader.step // task.mel.step  # frames of the spectrogram
    pictures, frames = [], task.mel.frames(lengths)
    loud = task.mel.spectrogram(waves)
    for k, i in enumerate(rows):
        letters = [(task.transcripts.spell(int(s)), *spans[k, j]) for j, s in enumerate(symbols[k, : count[k]])]
        heard = outputs["text"][i]
        caption = f"“{said[i]}”" if heard == said[i] else f"“{said[i]}”, predicted “{heard or '(nothing)'}”"
        pictures.append(Picture(draw_spectrogram(loud[k, : frames[k]].numpy(), letters), caption, bad=heard != said[i]))
    return pictures


def draw_spectrogram(loud: np.ndarray, letters: list[tuple[str, int, int]]) -> bytes:  # T F
    """Return a spectrogram as PNG, with each symbol below the middle of its frames."""
    from PIL import Image, ImageDraw, ImageFont

    steps, bands = loud.shape
    low, high = np.quantile(loud, [0.05, 0.995])
    share = np.clip((loud - low) / max(high - low, 1e-6), 0, 1).T[::-1] * (len(COLORMAP) - 1)
    first = np.minimum(share.astype(int), len(COLORMAP) - 2)
    colour = COLORMAP[first] + (share - first)[..., None] * (COLORMAP[first + 1] - COLORMAP[first])
    height = BAND * min(bands, 48)
    picture = Image.new("RGB", (WIDTH, height + (TEXT if letters else 0)), "white")
    picture.paste(Image.fromarray(colour.astype(np.uint8)).resize((WIDTH, height), Image.Resampling.BILINEAR))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(21)
    for letter, start, end in letters:
        left, right = (WIDTH * v / steps for v in (start, min(end, steps)))
        if letter.strip():
            pen.line([(left, height), (left, height + 4)], fill="#888888")
            pen.text(((left + right) / 2, height + TEXT / 2 + 1), letter, fill="black", font=font, anchor="mm")
    file = io.BytesIO()
    picture.quantize(64).save(file, "PNG", optimize=True)
    return file.getvalue()
