"""Self-supervised pre-training on unlabeled recordings: a network learns to tell what hidden frames are.

With `task.objective=contrastive` it chooses the quantized vector of a hidden frame among those of other frames (Wav2Vec 2.0); with
`clusters` it predicts the frame's cluster, which is found before (HuBERT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import RATE, SECONDS, Column, Data
from fieldguide.data.loader import Batches, iterate_in_order
from fieldguide.data.media import audio
from fieldguide.data.preprocessing.frame_clusters import FrameClusters, pad_clusters
from fieldguide.data.preprocessing.speech import pad_waves, suggest_rate
from fieldguide.data.preprocessing.waveform import FrameGrid, Waveform
from fieldguide.objectives import Objective
from fieldguide.objectives.contrastive_frames import ContrastiveFrames
from fieldguide.objectives.hidden_frames import HiddenFrames
from fieldguide.objectives.masked_clusters import MaskedClusters
from fieldguide.tasks.audio import pretraining_report
from fieldguide.tasks.audio.frame_features import FrameFeatures
from fieldguide.tasks.audio.signature import PretrainingSignature
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric, Task
from fieldguide.tasks.supervised import fill_options

MAX_AUDIO_CACHE_FRACTION_OF_RAM = 0.3  # beyond it, recordings are decoded batch by batch
MAX_CROP_SECONDS = 15.6  # of a recording in a batch, if the user sets none (arXiv:2006.11477, section 4.2)
MIN_SECONDS = 0.1  # below which a recording has hardly a frame to hide
MAX_SECONDS_PER_STEP = 120.0  # of audio, if the user sets no batch size
BASELINE_BATCH = 256  # recordings
MAX_CLUSTER_SAMPLE = 2000  # recordings that the clusters are fitted on
OUTPUT_OF_OBJECTIVE = {"contrastive": "contexts", "clusters": "clusters"}
CONVOLUTION_PENALTY = 10.0  # of the authors' configurations; in contrastive training, only of networks without LayerNorm there


class SpeechPretraining(PretrainingSignature, Task):
    """Frames of recordings are hidden, and the network tells what they are."""

    name = "speech-pretraining"
    reads = "recordings without labels: a folder of .wav, .flac, .ogg or .mp3 files, or a table with a column of their paths"
    input_types = ("waveform",)
    output_types: tuple[str, ...] = tuple(OUTPUT_OF_OBJECTIVE.values())
    feature = ("audio",)
    column_spec = ColumnSpec("none")
    metrics = (
        Metric("accuracy", "max", "of the hidden frames identified", percent=True),
        Metric("loss", "min", "nats per hidden frame"),
        Metric("code_perplexity", "the number of codes", "effective number of codes in use, per codebook"),
    )
    recipe: ClassVar = {"ema": 0.0, "patience": 0}
    compares_networks = False
    max_validation_examples = 2000
    min_batch_size = 8

    @dataclass(frozen=True)
    class Options:
        objective: str = "contrastive"  # contrastive (Wav2Vec 2.0) | clusters (HuBERT)
        rate: Annotated[int | None, Limits(1_000, 768_000)] = None  # sampling rate of the input in Hz
        normalize: bool | None = None  # mean 0 and variance 1 in each recording; None: yes
        seconds: Annotated[float | None, Limits(0.1, 600)] = None  # longer recordings are cut, at a random place in training
        share: Annotated[float | None, Limits(0.001, 1)] = (
            None  # fraction of frames that begin a hidden span; None: .065 or .08
        )
        span: Annotated[int, Limits(1, 1000)] = 10  # frames of a hidden span
        distractors: Annotated[int, Limits(1, 10_000)] = 100  # of a hidden frame, from the same recording (contrastive)
        diversity: Annotated[float, Limits(0, 1000)] = (
            0.1  # factor of the loss that asks for an even use of the codes (contrastive)
        )
        penalty: Annotated[float | None, Limits(0, 1000)] = None  # factor of the convolutions' mean square output
        clusters: Annotated[int, Limits(2, 30_000)] = 100  # number of clusters (clusters)
        features_from: str | None = None  # run or checkpoint whose outputs are clustered (clusters); None: MFCCs
        layer: Annotated[int | None, Limits(1, 1000)] = None  # the block whose outputs are clustered; None: the middle one

    clusters: FrameClusters | None = None
    features: FrameFeatures | None = None  # what is clustered
    grid: FrameGrid  # frames of the network
    typical: float  # median seconds of the training recordings
    known: dict[str, np.ndarray]  # clusters of the frames of recordings by path

    def __init__(self, columns: list[Column], options: Any):
        super().__init__(columns, options)
        if options.objective not in OUTPUT_OF_OBJECTIVE:
            raise SettingsError(f"task.objective={options.objective!r} is unknown. Choose {' or '.join(OUTPUT_OF_OBJECTIVE)}.")
        self.output_types = (OUTPUT_OF_OBJECTIVE[options.objective],)
        self.grid, self.typical, self.known = FrameGrid(), MAX_CROP_SECONDS, {}

    # Matching data

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if len(data.features("audio")) == 1 else "one audio column"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls([data.features("audio")[0]], options)
        seconds = data.rows[SECONDS].to_numpy()
        task.options = fill_options(
            options, rate=options.rate or suggest_rate(data.rows[RATE].to_numpy()), seconds=options.seconds or MAX_CROP_SECONDS
        )
        task.typical = float(np.median(seconds.clip(max=task.options.seconds)))
        long, short = seconds > task.options.seconds, seconds < MIN_SECONDS
        if long.any():
            task.add_note(
                f"{long.sum():,} recordings are longer than {task.options.seconds:g} s (for example "
                f"{data.locate_row(int(np.flatnonzero(long)[0]))}, {seconds[long].max():.1f} s): a part of them is used at a time "
                "(change this with task.seconds=...)"
            )
        if short.any():
            task.add_note(
                f"{short.sum():,} recordings are shorter than {MIN_SECONDS:g} s (for example "
                f"{data.locate_row(int(np.flatnonzero(short)[0]))}) and have hardly a frame to hide"
            )
        if options.objective == "clusters":
            task.fit_clusters(data)
        elif options.features_from or options.layer:
            raise SettingsError("task.features_from and task.layer belong to task.objective=clusters.")
        return task

    def fit_clusters(self, data: Data) -> None:
        """Find clusters of the frames of training recordings. Raises `DataError` if there are too few frames."""
        o, paths = self.options, data.rows[self.column].to_list()
        self.features = FrameFeatures.choose(o.features_from, o.layer, o.rate, o.normalize is not False)
        paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:MAX_CLUSTER_SAMPLE]]
        waves = audio.load(paths, o.rate)
        self.clusters = FrameClusters.fit(
            map(self.features, waves), o.clusters, first=self.features.first, step=self.features.step
        )

    def model_dims(self) -> dict[str, Any]:
        return {"clusters": self.options.clusters} if self.options.objective == "clusters" else {}

    def data_facts(self) -> dict[str, Any]:
        return {"tokens": max(1, int(100 * self.typical)), "seconds": self.typical}

    @property
    def max_batch_size(self) -> int:
        """Return the maximum recordings per step: about two minutes of audio, and at most 64."""
        return int(np.clip(2 ** int(np.log2(MAX_SECONDS_PER_STEP / max(self.typical, 0.1))), self.min_batch_size, 64))

    # Objective

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        self.grid = FrameGrid(tuple(model.config.stem_kernels), tuple(model.config.stem_strides))
        penalty = 0.0 if model.config.stem_norm == "layer" else CONVOLUTION_PENALTY
        return self.build_objective(model, card.inputs, penalty)

    def build_objective(self, model: Any, inputs: Sequence[str], penalty: float) -> HiddenFrames:
        """Return the objective around a network, or around its `FrameGrid` to hide frames alone. `penalty` is the published one
        for contrastive training.
        """
        o = self.options
        if o.objective == "contrastive":
            return ContrastiveFrames(
                model,
                inputs,
                diversity=o.diversity,
                distractors=o.distractors,
                share=o.share,
                length=o.span,
                penalty=penalty if o.penalty is None else o.penalty,
            )
        assert self.clusters is not None
        return MaskedClusters(
            model,
            inputs,
            first=self.clusters.first,
            step=self.clusters.step,
            share=o.share,
            length=o.span,
            penalty=CONVOLUTION_PENALTY if o.penalty is None else o.penalty,
        )

    # Recordings to batches

    @property
    def wave(self) -> Waveform:
        """Return the preprocessing of recordings."""
        return Waveform(self.options.rate, self.options.normalize is not False)

    def batches(self, data: Data, card: Card | None, settings: Settings | None = None) -> Batches:
        """Return the examples. Scored ones hide the same frames each time, and are the middle of long recordings."""
        o, paths = self.options, data.rows[self.column].to_list()
        samples = data.rows[SECONDS].to_numpy() * o.rate
        stored = audio.load(paths, o.rate) if 2 * samples.sum() < MAX_AUDIO_CACHE_FRACTION_OF_RAM * ram() else None
        if self.clusters is not None:
            for i, path in enumerate(paths):
                if path not in self.known:
                    self.known[path] = self.label(stored[i] if stored is not None else audio.load([path], o.rate)[0])
        # Cuts begin with a clustered frame.
        step, most = 1 if self.clusters is None else round(self.clusters.step), round(o.seconds * o.rate)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            waves = [stored[i] for i in index] if stored is not None else audio.load([paths[i] for i in index], o.rate)
            places = torch.full((len(index),), 0.5) if generator is None else torch.rand(len(index), generator=generator)
            firsts = [
                int(place * (max(0, len(wave) - most) // step + 1 - 1e-6)) * step for place, wave in zip(places.tolist(), waves)
            ]
            samples, counts = self.wave.apply(*scale_waves([wave[at : at + most] for wave, at in zip(waves, firsts)]))
            batch = {"waveform": samples, "lengths": counts}
            if self.clusters is not None:
                rows = [self.known[paths[i]][at // step :] for i, at in zip(index, firsts)]
                batch["clusters"] = pad_clusters(rows)[:, : -(-most // step)]
            if generator is None:
                batch["seed"] = torch.from_numpy(index.astype(np.int64))
            return batch

        return Batches(len(paths), make, np.minimum(samples, most))

    def label(self, wave: np.ndarray) -> np.ndarray:  # N int16 -> T int16
        """Return the cluster of each frame of a recording."""
        assert self.clusters is not None and self.features is not None
        return self.clusters.assign(self.features(wave))

    # Predictions

    def predict_batches(self, data: Data, card: Card) -> Batches:
        paths = data.rows[self.column].to_list()

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            samples, counts = self.wave.apply(*scale_waves(audio.load([paths[i] for i in index], self.options.rate)))
            return {"waveform": samples, "lengths": counts}

        return Batches(len(paths), make, data.rows[SECONDS].to_numpy() if SECONDS in data.rows.columns else None)

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return objective.outputs(batch) if "seed" in batch else self.predict_codes(objective, batch)

        return answer

    def predict_codes(self, objective: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the codes of all frames. Recordings longer than `task.seconds` are processed in parts."""
        model, waves, lengths = objective.model, batch["waveform"], batch["lengths"]
        size = max(1, model.frames(round(self.options.seconds * self.options.rate)))  # frames of a part
        codes = []
        for first in range(0, max(1, model.frames(waves.shape[1])), size):
            at, width = first * model.stride, (size - 1) * model.stride + model.field
            part = {"waveform": waves[:, at : at + width], "lengths": (lengths - at).clamp(0, width)}
            codes.append(objective.predict_codes(part)["codes"])
        return {"codes": torch.cat(codes, 1)}

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        seconds = self.grid.stride / self.options.rate
        return [{"codes": codes[codes[:, 0] >= 0].astype(int).tolist(), "frame_seconds": seconds} for codes in outputs["codes"]]

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the durations of the recordings: what is hidden is part of the batches."""
        return {"seconds": data.rows[SECONDS].to_numpy()}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        count = max(int(outputs["count"].sum()), 1)
        total = lambda name: float(outputs[name].astype(np.float64).sum() / count)
        scores = {"accuracy": total("right"), "loss": total("nats")}
        if "used" in outputs:
            scores["code_perplexity"] = float(pretraining_report.compute_perplexity(outputs["used"].sum(0)).mean())
        return scores

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        batches = self.batches(test, None)
        objective = self.build_objective(self.grid, ("waveform", "lengths"), 0.0).eval()
        if isinstance(objective, ContrastiveFrames):
            about = "a different hidden frame of the recording at random"
            return [Baseline("chance", about, self.collect_baseline(batches, objective, guess_frames))]
        self.batches(train, None)  # finds the clusters of its frames
        frames = np.concatenate([self.known[path] for path in train.rows[self.column].to_list()])
        counts = np.bincount(frames, minlength=self.options.clusters)
        nats, best = -torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())), int(counts.argmax())

        def guess(objective: MaskedClusters, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            target = objective.align(batch, batch["hidden"].shape[1])
            return nats[target], (target == best).double()

        about = f"cluster {best}, that of {100 * counts[best] / max(counts.sum(), 1):.1f} % of the training frames"
        return [Baseline("most frequent cluster", about, self.collect_baseline(batches, objective, guess))]

    def collect_baseline(self, batches: Batches, objective: Any, guess: Callable[..., tuple[Tensor, Tensor]]) -> Arrays:
        """Return the sums of what `guess` returns for each frame (nats and probability of being right) over the hidden frames."""
        found: dict[str, list[np.ndarray]] = {"row": [], "nats": [], "right": [], "count": []}
        for index, batch in iterate_in_order(batches, BASELINE_BATCH):
            hidden = (batch := objective.hide(batch))["hidden"]
            nats, right = guess(objective, batch)
            found["row"].append(index)
            for name, values in (("nats", nats), ("right", right), ("count", torch.ones_like(hidden, dtype=torch.int64))):
                found[name].append((values * hidden).sum(1).numpy())
        joined = {name: np.concatenate(parts) for name, parts in found.items()}
        order = np.argsort(joined.pop("row"))
        return {name: values[order] for name, values in joined.items()}

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        return pretraining_report.build_elements(self, test, outputs)

    # Saved with the run

    STATE: ClassVar = {
        "kernels": list[int],
        "strides": list[int],
        "typical": float,
        "clusters?": FrameClusters.STATE,
        "features?": FrameFeatures.STATE,
    }

    def state(self) -> dict[str, Any]:
        state = {"kernels": list(self.grid.kernels), "strides": list(self.grid.strides), "typical": self.typical}
        if self.clusters is None or self.features is None:
            return state
        return {**state, "clusters": self.clusters.to_json(), "features": self.features.to_json()}

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.clusters is not None and self.features is not None:
            self.clusters.save(folder)
            self.features.save(folder)

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.grid = FrameGrid(tuple(state["kernels"]), tuple(state["strides"]))
        task.typical = state["typical"]
        if "clusters" in state:
            task.clusters = FrameClusters.load(folder, state["clusters"])
            task.features = FrameFeatures.load(folder, state["features"], options.rate, options.normalize is not False)
        return task

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        """Return the task of a network with the preprocessing that is published with it."""
        if not assets.audio or "normalize" not in assets.audio:
            return None
        known = {name: assets.audio[name] for name in ("rate", "normalize") if name in assets.audio}
        return cls([Column("audio", "audio")], fill_options(cls.Options(**known), rate=16_000, seconds=MAX_CROP_SECONDS))


def guess_frames(objective: ContrastiveFrames, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return nats and probability of being right of a random choice among the frame and its different distractors: B S each."""
    places = batch["distractors"].sort(-1).values  # B S K
    different = 1 + (places.diff(dim=-1) > 0).sum(-1)
    nats = torch.full(different.shape, np.log(1 + places.shape[-1]), dtype=torch.float64)
    return nats, 1 / (1 + different).double()


def scale_waves(waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:  # each N int16 -> B N, B
    """Return recordings as one batch, -1 to 1, and their numbers of samples."""
    batch, lengths = pad_waves(waves)
    return batch.div_(32768.0), lengths


TASKS = (SpeechPretraining,)
