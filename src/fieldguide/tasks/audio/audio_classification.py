"""Audio classification: one label per recording.

Networks for images see the log-mel spectrogram as a square picture: time to the right, low frequencies at the bottom.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import SettingsError
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import Bars, Gallery, Picture, ReportElement, Sound, Sounds
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import normalize_name
from fieldguide.data.dataset import RATE, SECONDS, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import audio
from fieldguide.data.preprocessing.image_transform import list_smaller_sides
from fieldguide.data.preprocessing.speech import LogMel, SpecAugment, pad_waves, perturb_speed, suggest_rate
from fieldguide.data.preprocessing.waveform import Waveform
from fieldguide.data.readers.recordings import TRANSCRIPT_NAMES
from fieldguide.tasks.analysis.context import ReportContext
from fieldguide.tasks.audio.report import MAX_SHOWN_SECONDS, draw_spectrogram, encode_audio
from fieldguide.tasks.audio.signature import AudioSignature
from fieldguide.tasks.base import CheckpointAssets
from fieldguide.tasks.supervised import ClassificationTask, fill_options, is_discrete, mix_pairs

MAX_AUDIO_CACHE_FRACTION_OF_RAM = 0.3  # beyond it, recordings are decoded batch by batch
MAX_CLIP_SECONDS = 10.0  # that a network sees, if the user sets none
PUBLISHED_SECONDS = 600.0  # of a recording that a published network sees
CLIP_QUANTILE = 0.99  # of the durations; the few longer recordings are cut, so that one of them does not shrink all others
SAMPLED_RECORDINGS = 2000  # recordings that the scale of the spectrogram is fitted on
SIDE_BY_DEVICE = {"cpu": 64, "mps": 96, "cuda": 128}  # pixels per side of the spectrogram, if the user sets no size
MIN_REDUCED_SIDE = 32  # spectrograms are not reduced below this side to save time
HOP_SECONDS = 0.010  # between frames
MASKS = SpecAugment(band_masks=1, band_share=0.15, time_masks=1, time_share=0.15)
SHOWN_SOUNDS, SHOWN_SPECTROGRAMS = 16, 8


class AudioClassification(AudioSignature, ClassificationTask):
    name = "audio-classification"
    reads = (
        "a folder of recordings per class, or a table of audio paths and labels; Speech Commands as distributed; recordings named "
        "LABEL_SPEAKER_TAKE.wav"
    )
    input_types = ("image", "speech", "waveform")
    baseline_models: ClassVar = ("mfcc-linear",)
    feature = ("audio",)
    # Masks ("standard") slow short trainings: resnet20 after 400 steps of 32 on FSDD has .797 without and .727 with them.
    recipe: ClassVar = {"augmentation": "light", "label_smoothing": 0.1, "weight_decay": 0.05}

    @dataclass(frozen=True)
    class Options:
        rate: Annotated[int | None, Limits(1_000, 768_000)] = None  # sampling rate of the input in Hz
        bands: Annotated[int | None, Limits(1, 512)] = None  # mel bands of the spectrogram
        seconds: Annotated[float | None, Limits(0.05, 600)] = None  # length of the input; longer recordings: their middle
        side: Annotated[int | None, Limits(8, 1024)] = None  # pixels per side of the spectrogram that image networks see
        normalize: bool | None = None  # networks that read samples: mean 0 and variance 1 in each recording; None: yes

    mel: LogMel
    has_free_side = False  # whether the side may still be reduced, since the user has set none

    # Matching data

    @classmethod
    def match(cls, data: Data) -> str | None:
        if len(data.features("audio")) != 1 or not data.target or not is_discrete(data.required_target):
            return None
        name = data.required_target.name
        return None if normalize_name(name) in TRANSCRIPT_NAMES else f"recordings and {data.required_target.distinct} classes"

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("audio")) != 1:
            return "one audio column"
        return super().missing_requirements(data)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        seconds = data.rows[SECONDS].to_numpy()
        rate = options.rate or suggest_rate(data.rows[RATE].to_numpy())
        bands = options.bands or (40 if rate <= 8000 else 64)
        longest = options.seconds or min(round(float(np.quantile(seconds, CLIP_QUANTILE)) + 0.05, 1), MAX_CLIP_SECONDS)
        side = options.side or SIDE_BY_DEVICE[device().type]
        task.has_free_side = options.side is None
        task.options = fill_options(options, rate=rate, bands=bands, seconds=longest, side=side)
        paths = data.rows[task.column].to_list()
        sample = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:SAMPLED_RECORDINGS]]
        waves = sorted((task.cut(wave) for wave in audio.load(sample, rate)), key=len)
        pairs = (scale_waves(waves[i : i + 64]) for i in range(0, len(waves), 64))
        task.mel = LogMel.fit(pairs, rate=rate, bands=bands, hop=HOP_SECONDS)
        task.fit_labels(data)
        task.note_cut(data, "training")
        return task

    def note_cut(self, data: Data, what: str) -> None:
        """Tell the user that recordings are longer than the input."""
        seconds = data.rows[SECONDS].to_numpy()
        long = seconds > self.options.seconds
        if long.any():
            first = int(np.flatnonzero(long)[0])
            self.add_note(
                f"{long.sum():,} {what} recordings are longer than {self.options.seconds:g} s (for example {data.locate_row(first)}, "
                f"{seconds[first]:.1f} s): only their middle is used (change this with task.seconds=...)"
            )

    def model_dims(self) -> dict[str, Any]:
        return {
            "num_classes": len(self.labels),
            "channels": 1,
            "image": self.options.side,
            "features": self.options.bands,
        }

    def data_facts(self) -> dict[str, Any]:
        return {
            "side": self.options.side,
            "channels": 1,
            "num_classes": len(self.labels),
            "seconds": self.options.seconds,
            "tokens": self.frames,
        }

    def smaller_inputs(self) -> list[tuple[int, float]]:
        return list_smaller_sides(self.options.side, MIN_REDUCED_SIDE) if self.has_free_side else []

    def with_input_size(self, size: int) -> Self:
        task = copy.copy(self)
        task.options = replace(self.options, side=size)
        return task

    # Recordings to batches

    @property
    def frames(self) -> int:
        """Return the number of frames of the input."""
        return self.mel.frames(round(self.options.seconds * self.options.rate))

    def cut(self, wave: np.ndarray, start: float = 0.5) -> np.ndarray:  # N -> at most seconds * rate
        """Return the part of a recording that fits into the input: the middle, or at another fraction of what is too much."""
        most = round(self.options.seconds * self.options.rate)
        first = int(start * max(0, len(wave) - most))
        return wave[first : first + most]

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        if settings and settings.mixup and card.input_type != "image":
            raise SettingsError(f"mixup is for networks that read spectrograms as images; {card.name} does not.")
        paths, o = data.rows[self.column].to_list(), self.options
        if not settings:
            self.note_cut(data, "of the")
        samples = np.minimum(data.rows[SECONDS].to_numpy(), o.seconds) * o.rate
        fits = 2 * data.rows[SECONDS].sum() * o.rate < MAX_AUDIO_CACHE_FRACTION_OF_RAM * ram()
        stored = audio.load(paths, o.rate) if fits else None
        target = torch.from_numpy(self.targets(data)["label"]) if settings else None
        how = settings.augmentation if settings else "none"
        # Validation repeats the same batches; if their features are small, they are cached.
        kept: dict[bytes, dict[str, Tensor]] | None = None
        largest = max(o.side**2, o.bands * self.frames, o.seconds * o.rate if card.input_type == "waveform" else 0)
        if settings and 4 * largest * len(paths) < MAX_AUDIO_CACHE_FRACTION_OF_RAM * ram() / 2:
            kept = {}

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            key = index.tobytes()
            if generator is None and kept is not None and key in kept:
                return dict(kept[key])
            waves = [stored[i] for i in index] if stored is not None else audio.load([paths[i] for i in index], o.rate)
            drawing = generator if how != "none" else None
            if card.input_type == "waveform":
                samples, counts = self.wave.apply(*self.prepare_waves(waves, drawing)[:2])
                batch = {"waveform": samples, "lengths": counts}
            else:
                features, frames, free = self.build_features(waves, drawing, how == "standard")
                is_image = card.input_type == "image"
                batch = {"image": self.draw(features, frames, free)} if is_image else {"features": features, "lengths": frames}
            if target is not None:
                batch["target"] = target[torch.from_numpy(index)]
            if generator is None and kept is not None:
                kept[key] = dict(batch)
            if generator is not None and settings and settings.mixup:
                batch = mix_pairs(batch, ("image",), len(self.labels), settings.mixup, generator)
            return batch

        return Batches(len(paths), make, samples)

    def build_features(
        self, waves: Sequence[np.ndarray], generator: torch.Generator | None, masked: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # -> B T F, B, B
        """Return features, numbers of frames, and where each recording is placed in the free time of the input, 0 to 1.

        With a generator, speed and place are random, and bands and times are hidden if `masked`.
        """
        batch, lengths, free = self.prepare_waves(waves, generator)
        features, frames = self.mel.apply(batch, lengths)
        return (MASKS.apply(features, frames, generator) if generator and masked else features), frames, free

    def prepare_waves(
        self, waves: Sequence[np.ndarray], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # -> B N, B, B
        """Return recordings that fit into the input, their numbers of samples, and where each is placed, 0 to 1.

        With a generator, speed and place are random.
        """
        if generator is None:
            return *scale_waves([self.cut(w) for w in waves]), torch.full((len(waves),), 0.5)
        drawn = torch.rand(2, len(waves), generator=generator)
        parts = [self.cut(w, float(start)) for w, start in zip(waves, drawn[0])]
        batch, lengths = perturb_speed(*scale_waves(parts), generator)
        most = round(self.options.seconds * self.options.rate)
        return batch[:, :most], lengths.clamp(max=most), drawn[1]

    @property
    def wave(self) -> Waveform:
        """Return the preprocessing of recordings for networks that read samples."""
        return Waveform(self.options.rate, self.options.normalize is not False)

    def draw(self, features: Tensor, frames: Tensor, free: Tensor) -> Tensor:  # B T F, B, B -> B 1 side side
        """Return spectrograms as square images. A shorter recording is surrounded by the mean of the bands, 0."""
        rows, _, bands = features.shape
        canvas = features.new_zeros(rows, self.frames, bands)
        for row, (count, place) in enumerate(zip(frames.tolist(), free.tolist())):
            first = round(place * (self.frames - count))
            canvas[row, first : first + count] = features[row, :count]
        image = canvas.transpose(1, 2).flip(1)[:, None]  # B 1 F T
        return F.interpolate(image, (self.options.side,) * 2, mode="bilinear", antialias=True)

    # Report

    def show_predictions(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> list[ReportElement]:
        wrong, right = self.mistakes(probabilities, targets, SHOWN_SOUNDS), self.correct(probabilities, targets, 4)
        shown: list[ReportElement] = []
        if wrong:
            about = "Test recordings that are wrong with the highest confidence. Listen: is the prediction wrong, or the label?"
            sounds = self.play(
                test, [row for row, _ in wrong], [f"{words}: {Path(test.locate_row(i)).name}" for i, words in wrong]
            )
            shown.append(Sounds("Worst mistakes", about, [replace(sound, bad=True) for sound in sounds]))
        captions = [self.describe(probabilities, targets, i) for i in right]
        shown.append(Sounds("Correct predictions", "Random test recordings.", self.play(test, right, captions)))
        chosen = [*(row for row, _ in wrong[: SHOWN_SPECTROGRAMS // 2]), *right][:SHOWN_SPECTROGRAMS]
        captions = [self.describe(probabilities, targets, i) for i in chosen]
        note = "Log-mel spectrograms: time runs to the right, low frequencies are at the bottom, brighter is louder. Mistakes first."
        shown.append(Gallery("Spectrograms", note, self.show_spectrograms(test, chosen, captions, len(wrong)), wide=True))
        return [*shown, self.compare_durations(test, probabilities, targets)]

    def play(self, test: Data, rows: Sequence[int], captions: Sequence[str]) -> list[Sound]:
        """Return recordings that can be played."""
        waves = audio.load([test.rows[self.column][i] for i in rows], self.mel.rate)
        most = int(MAX_SHOWN_SECONDS * self.mel.rate)
        return [Sound(encode_audio(wave[:most], self.mel.rate), caption) for wave, caption in zip(waves, captions)]

    def show_spectrograms(self, test: Data, rows: Sequence[int], captions: Sequence[str], wrong: int) -> list[Picture]:
        """Return spectrograms of recordings, the first `wrong` of which are mistakes."""
        pictures = []
        for k, (row, caption) in enumerate(zip(rows, captions)):
            waves, lengths = scale_waves([self.cut(audio.load([test.rows[self.column][row]], self.mel.rate)[0])])
            loud = self.mel.spectrogram(waves)[0, : int(self.mel.frames(lengths)[0])]
            pictures.append(Picture(draw_spectrogram(loud.numpy(), []), caption, bad=k < min(wrong, SHOWN_SPECTROGRAMS // 2)))
        return pictures

    def compare_durations(self, test: Data, probabilities: np.ndarray, targets: np.ndarray) -> ReportElement:
        """Return the accuracy of short and long recordings."""
        seconds, right = test.rows[SECONDS].to_numpy(), self.decide(probabilities) == targets
        edges = np.unique(np.quantile(seconds, np.linspace(0, 1, 5)))
        groups = {}
        for low, high in pairwise(edges):
            inside = (seconds >= low) & ((seconds < high) | (high == edges[-1]))
            if inside.any():
                groups[f"{low:.2f} to {high:.2f} s"] = 100 * float(right[inside].mean())
        return Bars("Accuracy by duration", "", groups or {f"{seconds[0]:.2f} s": 100 * float(right.mean())}, unit="%")

    def explain(self, context: ReportContext) -> list[ReportElement]:
        rows = self.choose_explained(context.outputs["probabilities"], context.targets["label"])
        is_image = "image" in context.make_batch(context.test.take(rows[:1] or [0]))
        return [*(self.weigh_images(context, rows) if is_image else []), *super().explain(context)]

    # Saved with the run

    STATE: ClassVar = {"mel": LogMel}

    def state(self) -> dict[str, Any]:
        return {"mel": self.mel.to_json(), **self.target_state()}

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        """Return the task of a network with the classes and the preprocessing that are published with it."""
        if not assets.audio or "normalize" not in assets.audio:  # spectrograms of published networks are not read
            return None
        options: Any = cls.Options(**assets.audio, bands=64, seconds=PUBLISHED_SECONDS, side=SIDE_BY_DEVICE["cpu"])
        task = cls([Column("audio", "audio"), Column("label", "category", "target")], options)
        task.mel = LogMel(rate=options.rate, bands=options.bands, hop=HOP_SECONDS)
        task.load_target_state(cls.label_state(assets.names))
        return task

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.mel = LogMel.from_json(state["mel"])
        task.load_target_state(state)
        return task


def scale_waves(waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:  # each N int16 -> B N, B
    """Return recordings as one batch, -1 to 1, and their numbers of samples."""
    batch, lengths = pad_waves(waves)
    return batch.div_(32768.0), lengths


TASKS = (AudioClassification,)
