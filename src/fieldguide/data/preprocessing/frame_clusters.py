"""Clusters of the frames of recordings, which HuBERT's pre-training predicts (Hsu et al. 2021, arXiv:2106.07447, section II.A).

Shapes: N samples, T frames, F mel bands, C features of a frame, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fieldguide.core.errors import DataError, RunError
from fieldguide.core.validation import guard
from fieldguide.data.preprocessing.speech import LogMel

if TYPE_CHECKING:
    from torch import Tensor

FILE = "frame_clusters.safetensors"
BANDS, COEFFICIENTS, LIFTER = 23, 13, 22  # of Kaldi's MFCCs
DELTA_REACH = 2  # frames before and after, over which a change is measured
# Settings of the authors' k-means (section IV.B, and their code).
KMEANS: dict[str, Any] = {
    "batch_size": 10_000,
    "n_init": 20,
    "max_no_improvement": 100,
    "max_iter": 100,
    "tol": 0.0,
    "reassignment_ratio": 0.0,
}
MAX_CLUSTERED_FRAMES = 500_000  # that the clusters are fitted on


def compute_mfcc(wave: np.ndarray, rate: int) -> np.ndarray:  # N int16 -> T 39
    """Return cepstral coefficients every 10 ms, their changes, and the changes of those.

    There are 13 coefficients of 23 mel bands, multiplied as in Kaldi so that high ones have about the same size (lifter 22).
    """
    import torch
    from scipy.fft import dct

    mel = LogMel(rate=rate, bands=BANDS)
    loud = mel.spectrogram(torch.from_numpy(wave.astype(np.float32) / 32768.0)[None])[0].numpy()  # T F
    order = np.arange(COEFFICIENTS)
    cepstra = dct(loud, norm="ortho")[:, :COEFFICIENTS] * (1 + LIFTER / 2 * np.sin(np.pi * order / LIFTER))
    change = compute_deltas(cepstra)
    return np.concatenate([cepstra, change, compute_deltas(change)], 1).astype(np.float32)


def compute_deltas(x: np.ndarray) -> np.ndarray:  # T C -> T C
    """Return the slope of each feature over two frames before and after; the first and the last frame are repeated."""
    padded, size = np.pad(x, ((DELTA_REACH, DELTA_REACH), (0, 0)), mode="edge"), len(x)
    steps = range(1, DELTA_REACH + 1)
    slopes = [
        n * (padded[DELTA_REACH + n : DELTA_REACH + n + size] - padded[DELTA_REACH - n : DELTA_REACH - n + size]) for n in steps
    ]
    return np.sum(slopes, 0) / (2 * sum(n * n for n in steps))


@dataclass(frozen=True)
class FrameClusters:
    """The centers of clusters, and where the frames are: the middle of frame t is at sample `first + t * step`."""

    centers: np.ndarray  # K C
    first: float
    step: float

    STATE: ClassVar = {"first": float, "step": float}

    @classmethod
    def fit(cls, features: Iterable[np.ndarray], clusters: int, *, first: float, step: float) -> FrameClusters:  # T C each
        """Find clusters of the frames of training recordings. Raises `DataError` if there are fewer frames than clusters."""
        from sklearn.cluster import MiniBatchKMeans

        frames = np.concatenate(list(features))
        if len(frames) < clusters:
            raise DataError(f"the training recordings have {len(frames):,} frames, too few for task.clusters={clusters}.")
        if len(frames) > MAX_CLUSTERED_FRAMES:
            frames = frames[np.random.default_rng(0).permutation(len(frames))[:MAX_CLUSTERED_FRAMES]]
        found = MiniBatchKMeans(clusters, random_state=0, **KMEANS).fit(frames)
        return cls(found.cluster_centers_.astype(np.float32), first, step)

    def assign(self, features: np.ndarray) -> np.ndarray:  # T C -> T int16
        """Return the nearest center of each frame."""
        distances = (self.centers**2).sum(1) - 2 * features @ self.centers.T
        return distances.argmin(1).astype(np.int16)

    def to_json(self) -> dict[str, Any]:
        """Return all but the centers, as JSON values."""
        return {"first": self.first, "step": self.step}

    def save(self, folder: Path) -> None:
        """Write the centers to a folder."""
        from safetensors.numpy import save

        (folder / FILE).write_bytes(save({"centers": self.centers}))

    @classmethod
    def load(cls, folder: Path, saved: dict[str, Any]) -> FrameClusters:
        """Return what `save` and `to_json` wrote. Raises `RunError` if the file is missing or damaged."""
        from safetensors.numpy import load_file

        with guard(folder / FILE, RunError):
            return cls(load_file(folder / FILE)["centers"], **saved)


def locate_mfcc(rate: int) -> tuple[float, float]:
    """Return the middle of the first frame of MFCCs and the distance of frames, in samples."""
    mel = LogMel(rate=rate, bands=BANDS)
    return mel.width / 2, float(mel.step)


def pad_clusters(rows: list[np.ndarray]) -> Tensor:  # T each -> B T int64
    """Return the clusters of recordings as a batch, -1 after the end of each."""
    import torch

    batch = np.full((len(rows), max((len(row) for row in rows), default=1)), -1, np.int64)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return torch.from_numpy(batch)
