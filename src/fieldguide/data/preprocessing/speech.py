"""Speech: recordings of any sample rate as normalized log-mel spectrograms, and augmentation for training.

Waveforms are float, -1 to 1, one channel; a batch is padded at the end and accompanied by the number of samples per row.
Padding does not affect the result, and rows do not affect each other.
Shapes: B recordings, N samples, T frames, F mel bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.structure import Limits
from fieldguide.data.media.audio import MAX_CANCELLED_ENERGY

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAMPLE_RATES = (8_000, 16_000)  # sample rates used by models, in Hz; speech has little energy above 8 kHz
HOPS = (0.010, 0.008, 0.005)
# Minimum power per band. It is about the power that rounding to 16 bits causes in one bin, so that recordings with
# digital silence, whose logarithm would be infinite, look like those without.
MIN_POWER = 1e-8


def suggest_rate(rates: Sequence[int] | np.ndarray) -> int:
    """Return 8 kHz if at least half of the recordings have no higher rate (telephone), else 16 kHz."""
    return max((r for r in SAMPLE_RATES if r <= np.median(np.asarray(rates))), default=SAMPLE_RATES[0])


def suggest_hop(seconds: np.ndarray, needed: np.ndarray, stride: int = 4) -> float:
    """Return the longest usual hop in seconds at which 99.9 % of the recordings have the frames that their transcripts
    need (see `objectives.ctc`) when the model keeps one frame in `stride`; else the shortest hop."""
    for hop in HOPS:
        frames = np.floor((np.asarray(seconds) - LogMel.window) / hop + 1e-6).clip(0) + 1
        if (np.ceil(frames / stride) < needed).mean() <= 1e-3:
            return hop
    return HOPS[-1]


def to_mono(wave: np.ndarray) -> np.ndarray:  # N | N C -> N
    """Return the mean of the channels (second axis, as in soundfile), or the loudest channel if they cancel out.

    Integer PCM is scaled to -1 to 1. Raises DataError for arrays with other than one or two axes.
    """
    if wave.dtype.kind == "u":  # 8-bit files: 128 is silence
        wave = (wave.astype(np.float32) - 2.0 ** (8 * wave.itemsize - 1)) / 2.0 ** (8 * wave.itemsize - 1)
    elif wave.dtype.kind == "i":
        wave = wave.astype(np.float32) / 2.0 ** (8 * wave.itemsize - 1)
    if wave.ndim not in (1, 2):
        raise DataError(f"a recording has {wave.ndim} axes; expected samples or samples x channels")
    if wave.ndim == 2:
        mean, energy = wave.mean(1), np.square(wave, dtype=np.float64).sum(0)
        cancels = np.square(mean, dtype=np.float64).sum() < MAX_CANCELLED_ENERGY * energy.max(initial=0.0)
        wave = wave[:, energy.argmax()] if cancels else mean
    return wave.astype(np.float32, copy=False)


def resample(waves: np.ndarray, rate: int, wanted: int) -> np.ndarray:  # ... N -> ... ceil(N wanted / rate)
    """Resample waveforms along the last axis.

    Uses scipy's polyphase filter, which computes only the samples that are kept and prevents aliasing (Kaiser window).
    Rows with trailing zeros give the same result as without them.
    """
    from scipy.signal import resample_poly

    if rate == wanted:
        return waves
    shared = math.gcd(rate, wanted)
    return resample_poly(waves, wanted // shared, rate // shared, axis=-1).astype(waves.dtype, copy=False)


def pad_waves(waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:  # each N -> B N, B
    """Pad recordings with trailing zeros to one batch, and return their lengths in samples."""
    import torch

    lengths = np.array([len(w) for w in waves])
    real = np.arange(lengths.max(initial=1)) < lengths[:, None]
    batch = np.zeros(real.shape, np.float32)
    batch[real] = np.concatenate(list(waves))
    return torch.from_numpy(batch), torch.from_numpy(lengths)


@cache
def mel_filters(rate: int, fft: int, bands: int, low: float, high: float) -> np.ndarray:  # fft/2+1 F
    """Return triangular filters, equally wide on the HTK mel scale, 2595 log10(1 + f/700), with peak 1, from `low` to
    `high` Hz. Slaney's scale, linear below 1 kHz, with equal areas differs little and by a constant.

    Raises SettingsError if the range is invalid or a band contains no frequency bin.
    """
    if not 0 <= low < high <= rate / 2:
        raise SettingsError(f"mel bands from {low:g} to {high:g} Hz are not within 0 to {rate / 2:g} Hz, half the sample rate")
    mel = lambda f: 2595 * np.log10(1 + np.asarray(f) / 700)
    edges = 700 * (10 ** (np.linspace(mel(low), mel(high), bands + 2) / 2595) - 1)
    bins = np.arange(fft // 2 + 1) * rate / fft
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    if empty := int((filters.max(0) == 0).sum()):
        raise SettingsError(
            f"{empty} of {bands} mel bands contain no frequency bin of a window of {fft} samples at {rate} Hz: "
            f"use fewer bands or a longer window"
        )
    return filters.astype(np.float32)


@dataclass(frozen=True)
class LogMel:
    """Log-mel features: power spectra of Hann windows, mel bands, natural logarithm, normalization.

    Frame t covers the samples from t * hop on, whole windows only, so that no frame includes padding; a recording
    shorter than a window is one frame. `scale="recording"` standardizes each band over the recording, which removes
    loudness and microphone characteristics; "corpus" uses `mean` and `std` of the training data (see `fit`), which
    keeps them and suits recordings of a word or less. Pre-emphasis would only add a constant to each band and is omitted.
    """

    rate: Annotated[int, Limits(1_000, 1_000_000)] = 16_000  # samples per second
    bands: Annotated[int, Limits(1, 4096)] = 80  # F
    window: Annotated[float, Limits(1e-3, 10)] = 0.025  # seconds
    hop: Annotated[float, Limits(1e-4, 10)] = 0.010  # seconds between frames
    low: float = 20.0  # Hz
    high: float | None = None  # Hz; None: half the sample rate
    scale: Literal["recording", "corpus"] = "recording"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    style: Literal["plain", "nemo"] = "plain"  # nemo: the features of `nemo_features`, of which only rate, bands and hop vary

    @property
    def width(self) -> int:
        """Samples per window."""
        return max(1, round(self.window * self.rate))

    @property
    def step(self) -> int:
        """Samples between frames."""
        return max(1, round(self.hop * self.rate))

    def frames(self, samples: Any) -> Any:
        """Return the number of frames for a number of samples (integer, array or tensor)."""
        count = samples // self.step if self.style == "nemo" else (samples - self.width) // self.step + 1
        return max(count, 1) if isinstance(count, int) else count.clip(1)

    def spectrogram(self, waves: Tensor) -> Tensor:  # B N -> B T F
        """Return the natural logarithm of the power in each band, at least that of `FLOOR`."""
        import torch

        if self.style == "nemo":
            from fieldguide.data.preprocessing import nemo_features

            lengths = torch.full((len(waves),), waves.shape[1], device=waves.device)
            return nemo_features.compute_log_mel(waves, lengths, self.rate, self.bands, self.step)
        waves = torch.nn.functional.pad(waves.float(), (0, max(0, self.width - waves.shape[-1])))
        fft = 1 << (self.width - 1).bit_length()
        hann = torch.hann_window(self.width, device=waves.device)
        spectra = torch.fft.rfft(waves.unfold(-1, self.width, self.step) * hann, fft)
        filters = torch.from_numpy(mel_filters(self.rate, fft, self.bands, self.low, self.high or self.rate / 2))
        power = spectra.real.square() + spectra.imag.square()
        return (power @ filters.to(waves.device)).clamp(min=MIN_POWER).log()

    @classmethod
    def fit(cls, batches: Iterable[tuple[Tensor, Tensor]], **settings: Any) -> LogMel:
        """Fit mean and standard deviation of each band on all frames of training batches (waves, lengths)."""
        import torch

        self = cls(scale="corpus", **settings)
        count, total, squares = 0, torch.zeros(self.bands).double(), torch.zeros(self.bands).double()
        for waves, lengths in batches:
            x = self.spectrogram(waves).double()
            x = x[torch.arange(x.shape[1]) < self.frames(lengths)[:, None]]
            count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
        if not count:
            raise DataError("no recordings to fit the scale of the spectrogram on")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
        return replace(self, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def apply(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # B N, B -> B T F, B
        """Return the features, zero after the end of each recording, and the number of frames."""
        import torch

        if self.style == "nemo":
            from fieldguide.data.preprocessing import nemo_features

            frames = self.frames(lengths)
            x = nemo_features.compute_log_mel(waves, lengths, self.rate, self.bands, self.step)
            return nemo_features.normalize(x, frames), frames
        waves = waves.masked_fill(torch.arange(waves.shape[1], device=waves.device) >= lengths[:, None], 0.0)
        x, frames = self.spectrogram(waves), self.frames(lengths)
        real = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[..., None]
        if self.scale == "corpus":
            if len(self.mean) != self.bands:
                raise SettingsError('scale="corpus" requires mean and std for each band: use LogMel.fit')
            mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype) for v in (self.mean, self.std))
        else:
            mean = (x * real).sum(1, keepdim=True) / frames[:, None, None]
            std = (((x - mean) * real).square().sum(1, keepdim=True) / frames[:, None, None]).sqrt().clamp(min=1e-3)
        return ((x - mean) / std).masked_fill(~real, 0.0), frames

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> LogMel:
        """Restore from `to_json`."""
        return cls(**saved | {"mean": tuple(saved["mean"]), "std": tuple(saved["std"])})


@dataclass(frozen=True)
class SpecAugment:
    """SpecAugment: mask stripes of a spectrogram with its mean, 0 (Park et al. 2019, arXiv:1904.08779, no time warping).

    Widths are uniform from 0 to a fraction of the frames (adaptive, Park et al. 2020, arXiv:1912.05533) or of the bands.
    The defaults are those of the Conformer: 27 of 80 bands twice, 5 % of the frames ten times.
    """

    band_masks: int = 2
    band_share: float = 27 / 80
    time_masks: int = 10
    time_share: float = 0.05

    def apply(self, features: Tensor, frames: Tensor, generator: torch.Generator) -> Tensor:  # B T F, B -> B T F
        """Return the features with random bands and frames set to 0."""
        import torch

        rows, steps, bands = features.shape
        hidden_bands = sample_stripes(torch.full((rows,), bands), bands, self.band_masks, self.band_share, generator)
        hidden_steps = sample_stripes(frames.cpu(), steps, self.time_masks, self.time_share, generator)
        hidden = hidden_steps[:, :, None] | hidden_bands[:, None]
        return features.masked_fill(hidden.to(features.device), 0.0)


def sample_stripes(lengths: Tensor, size: int, count: int, share: float, generator: torch.Generator) -> Tensor:  # B -> B size
    """Return a mask of `count` random stripes within the first `lengths` positions, each at most `share` of them wide."""
    import torch

    drawn = torch.rand(2, len(lengths), count, generator=generator, dtype=torch.float64)
    width = (drawn[0] * ((share * lengths[:, None]).floor() + 1)).floor()
    first = (drawn[1] * (lengths[:, None] - width + 1)).floor()
    place = torch.arange(size)[:, None]
    return ((place >= first[:, None]) & (place < (first + width)[:, None])).any(-1)


def perturb_speed(
    waves: Tensor, lengths: Tensor, generator: torch.Generator, speeds: Sequence[float] = (0.9, 1.0, 1.1)
) -> tuple[Tensor, Tensor]:  # B N, B -> B N', B
    """Change speed and pitch of each recording by a factor sampled from `speeds` (Ko et al. 2015)."""
    import torch

    drawn = torch.randint(len(speeds), (len(waves),), generator=generator).numpy()
    factors = np.round(100 * np.asarray(speeds)).astype(int)  # in percent: 110 samples become 100
    new = -(-lengths.numpy() * 100 // factors[drawn])
    out = np.zeros((len(waves), new.max(initial=1)), np.float32)
    for number in np.unique(drawn):
        rows = drawn == number
        faster = resample(waves.numpy()[rows], int(factors[number]), 100)[:, : out.shape[1]]
        out[rows, : faster.shape[1]] = faster
    out[np.arange(out.shape[1]) >= new[:, None]] = 0.0
    return torch.from_numpy(out), torch.from_numpy(new)
