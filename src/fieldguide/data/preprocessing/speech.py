"""Speech: recordings of any rate as log-mel spectrograms of one scale, and the noise that training adds.

Waves are float, -1 to 1, one channel; a batch is padded at the end, with the real samples of each row beside it. What is
padding changes nothing, here or in the network. Nothing depends on the rows beside.
Shapes: B recordings, N samples, T frames, F mel bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fieldguide.core.errors import DataError, SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RATES = (8_000, 16_000)  # samples a second that models hear; speech has little above 8 kHz
HOPS = (0.010, 0.008, 0.005)
# The power in a band that counts as silence. The rounding of 16-bit samples makes about as much in one bin, so
# recordings with digital silence in them, whose logarithm would be infinite, look like those without.
FLOOR = 1e-8


def suggest_rate(rates: Sequence[int] | np.ndarray) -> int:
    """8 kHz where at least half of the recordings have no more (telephone), else 16 kHz."""
    return max((r for r in RATES if r <= np.median(np.asarray(rates))), default=RATES[0])


def suggest_hop(seconds: np.ndarray, needed: np.ndarray, stride: int = 4) -> float:
    """The longest usual hop, in seconds, at which all but one recording in a thousand have the frames that their
    transcripts need (see `objectives.ctc.needed`) when the network keeps one of `stride`; else the shortest."""
    for hop in HOPS:
        frames = np.floor((np.asarray(seconds) - LogMel.window) / hop + 1e-6).clip(0) + 1
        if (np.ceil(frames / stride) < needed).mean() <= 1e-3:
            return hop
    return HOPS[-1]


def mono(wave: np.ndarray) -> np.ndarray:  # N | N C -> N
    """The mean of the channels, which lie along the second axis as soundfile gives them. Whole numbers (PCM) are
    brought to -1 to 1."""
    if wave.dtype.kind == "u":  # 8-bit files: 128 is silence
        wave = (wave.astype(np.float32) - 2.0 ** (8 * wave.itemsize - 1)) / 2.0 ** (8 * wave.itemsize - 1)
    elif wave.dtype.kind == "i":
        wave = wave.astype(np.float32) / 2.0 ** (8 * wave.itemsize - 1)
    if wave.ndim not in (1, 2):
        raise DataError(f"a recording has {wave.ndim} axes; give samples, or samples x channels")
    return (wave if wave.ndim == 1 else wave.mean(1)).astype(np.float32, copy=False)


def resample(waves: np.ndarray, rate: int, wanted: int) -> np.ndarray:  # ... N -> ... ceil(N wanted / rate)
    """Waves at another number of samples a second, along the last axis.

    scipy's polyphase filter: it computes only the samples that are kept, in C, and its low-pass (Kaiser window) keeps
    out what the lower rate cannot hold. Rows with zeros after their end come out as they would alone.
    """
    from scipy.signal import resample_poly

    if rate == wanted:
        return waves
    shared = math.gcd(rate, wanted)
    return resample_poly(waves, wanted // shared, rate // shared, axis=-1).astype(waves.dtype, copy=False)


def padded(waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:  # each N -> B N, B
    """Recordings as one batch with zeros after their end, and the samples of each."""
    import torch

    lengths = np.array([len(w) for w in waves])
    real = np.arange(lengths.max(initial=1)) < lengths[:, None]
    batch = np.zeros(real.shape, np.float32)
    batch[real] = np.concatenate(list(waves))
    return torch.from_numpy(batch), torch.from_numpy(lengths)


@cache
def mel_filters(rate: int, fft: int, bands: int, low: float, high: float) -> np.ndarray:  # fft/2+1 F
    """Triangles that are equally wide on HTK's mel scale, 2595 log10(1 + f/700), and 1 at their peak, between `low`
    and `high` Hz. Slaney's scale, linear below 1 kHz, and its equal areas differ by little and by a constant."""
    if not 0 <= low < high <= rate / 2:
        raise SettingsError(f"bands from {low:g} to {high:g} Hz do not lie between 0 and {rate / 2:g} Hz, half of the rate")
    mel = lambda f: 2595 * np.log10(1 + np.asarray(f) / 700)
    edges = 700 * (10 ** (np.linspace(mel(low), mel(high), bands + 2) / 2595) - 1)
    bins = np.arange(fft // 2 + 1) * rate / fft
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    if empty := int((filters.max(0) == 0).sum()):
        raise SettingsError(
            f"{empty} of {bands} mel bands hold no frequency of a window of {fft} samples at {rate} Hz: "
            f"choose fewer bands or a longer window"
        )
    return filters.astype(np.float32)


@dataclass(frozen=True)
class LogMel:
    """How waves become features: power spectra of Hann windows, mel bands, natural logarithm, one scale.

    Frame t covers the samples from t * hop on, whole windows only, so that no frame reaches into padding; a recording
    shorter than a window is one frame. `scale="recording"` gives each band mean 0 and deviation 1 over the recording,
    which takes away loudness and microphone; "corpus" uses `mean` and `std` of the training part (see `learn`), which
    keeps them, and suits recordings of a word or less. Pre-emphasis would add a constant to each band, and is left out.
    """

    rate: int = 16_000  # samples a second
    bands: int = 80  # F
    window: float = 0.025  # seconds
    hop: float = 0.010  # seconds from one frame to the next
    low: float = 20.0  # Hz
    high: float | None = None  # Hz; None is half of the rate
    scale: Literal["recording", "corpus"] = "recording"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Samples of a window."""
        return max(1, round(self.window * self.rate))

    @property
    def step(self) -> int:
        """Samples from one frame to the next."""
        return max(1, round(self.hop * self.rate))

    def frames(self, samples: Any) -> Any:
        """Frames of so many samples; a number, an array or a tensor of whole numbers."""
        count = (samples - self.width) // self.step + 1
        return max(count, 1) if isinstance(count, int) else count.clip(1)

    def spectrogram(self, waves: Tensor) -> Tensor:  # B N -> B T F
        """Natural logarithm of the power in each band, not less than `FLOOR`."""
        import torch

        waves = torch.nn.functional.pad(waves.float(), (0, max(0, self.width - waves.shape[-1])))
        fft = 1 << (self.width - 1).bit_length()
        hann = torch.hann_window(self.width, device=waves.device)
        spectra = torch.fft.rfft(waves.unfold(-1, self.width, self.step) * hann, fft)
        filters = torch.from_numpy(mel_filters(self.rate, fft, self.bands, self.low, self.high or self.rate / 2))
        power = spectra.real.square() + spectra.imag.square()
        return (power @ filters.to(waves.device)).clamp(min=FLOOR).log()

    @classmethod
    def fit(cls, batches: Iterable[tuple[Tensor, Tensor]], **settings: Any) -> LogMel:
        """With mean and deviation of each band over all real frames of training batches (waves, lengths)."""
        import torch

        self = cls(scale="corpus", **settings)
        count, total, squares = 0, torch.zeros(self.bands).double(), torch.zeros(self.bands).double()
        for waves, lengths in batches:
            x = self.spectrogram(waves).double()
            x = x[torch.arange(x.shape[1]) < self.frames(lengths)[:, None]]
            count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
        if not count:
            raise DataError("there is no recording to learn the scale of the spectrogram from")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
        return replace(self, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def apply(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # B N, B -> B T F, B
        """Features, zero after the end of each recording, and its frames."""
        import torch

        waves = waves.masked_fill(torch.arange(waves.shape[1], device=waves.device) >= lengths[:, None], 0.0)
        x, frames = self.spectrogram(waves), self.frames(lengths)
        real = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[..., None]
        if self.scale == "corpus":
            if len(self.mean) != self.bands:
                raise SettingsError('scale="corpus" needs a mean and std of each band: use LogMel.learn')
            mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype) for v in (self.mean, self.std))
        else:
            mean = (x * real).sum(1, keepdim=True) / frames[:, None, None]
            std = (((x - mean) * real).square().sum(1, keepdim=True) / frames[:, None, None]).sqrt().clamp(min=1e-3)
        return ((x - mean) / std).masked_fill(~real, 0.0), frames

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> LogMel:
        return cls(**saved | {"mean": tuple(saved["mean"]), "std": tuple(saved["std"])})


@dataclass(frozen=True)
class SpecAugment:
    """Stripes of a spectrogram hidden behind its mean, 0 (Park et al. 2019, arXiv:1904.08779, without time warping).

    Widths are drawn evenly from 0 to a share of the real frames (adaptive, Park et al. 2020, arXiv:1912.05533) or of
    the bands. The defaults are Conformer's: 27 of 80 bands twice, 5 % of the frames ten times.
    """

    band_masks: int = 2
    band_share: float = 27 / 80
    time_masks: int = 10
    time_share: float = 0.05

    def apply(self, features: Tensor, frames: Tensor, generator: torch.Generator) -> Tensor:  # B T F, B -> B T F
        import torch

        rows, steps, bands = features.shape
        hidden_bands = stripes(torch.full((rows,), bands), bands, self.band_masks, self.band_share, generator)
        hidden_steps = stripes(frames.cpu(), steps, self.time_masks, self.time_share, generator)
        hidden = hidden_steps[:, :, None] | hidden_bands[:, None]
        return features.masked_fill(hidden.to(features.device), 0.0)


def stripes(lengths: Tensor, size: int, count: int, share: float, generator: torch.Generator) -> Tensor:  # B -> B size
    """Where any of `count` stripes lies, each within the first `lengths` places and at most a `share` of them wide."""
    import torch

    drawn = torch.rand(2, len(lengths), count, generator=generator, dtype=torch.float64)
    width = (drawn[0] * ((share * lengths[:, None]).floor() + 1)).floor()
    first = (drawn[1] * (lengths[:, None] - width + 1)).floor()
    place = torch.arange(size)[:, None]
    return ((place >= first[:, None]) & (place < (first + width)[:, None])).any(-1)


def perturb_speed(
    waves: Tensor, lengths: Tensor, generator: torch.Generator, speeds: Sequence[float] = (0.9, 1.0, 1.1)
) -> tuple[Tensor, Tensor]:  # B N, B -> B N', B
    """Each recording faster or slower by a factor drawn from `speeds`, pitch with it (Ko et al. 2015)."""
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
