"""The log-mel features of Whisper (Radford et al. 2022, arXiv:2212.04356, section 2.2), as in the authors' code.

They differ from `speech.LogMel`: frames are centered and reflected at the ends, filters are Slaney's with equal areas, the logarithm
is decimal, and everything more than 80 dB below the loudest value is raised to it. Scale and shift are fixed.
Shapes: B recordings, N samples, T frames, F mel bands.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RATE = 16_000  # samples per second
FFT, HOP = 400, 160  # samples per window and between frames: 25 and 10 ms
WINDOW_SECONDS = 30
WINDOW_FRAMES = WINDOW_SECONDS * RATE // HOP  # 3,000 frames that the network reads at once
FRAMES_PER_SECOND = RATE // HOP
MIN_POWER, RANGE = 1e-10, 8.0  # floor of the power; range below the loudest value, in powers of ten


@cache
def slaney_filters(bands: int, fft: int = FFT, rate: int = RATE) -> np.ndarray:  # -> fft/2+1 F
    """Return triangular filters of equal area on Slaney's mel scale, linear below 1 kHz, from 0 Hz to half the sample rate."""
    step, knee = 200 / 3, 1000.0  # Hz per mel below the knee
    ratio = np.log(6.4) / 27  # logarithm of the factor per mel above it
    to_mel = lambda f: np.where(f < knee, f / step, knee / step + np.log(np.maximum(f, knee) / knee) / ratio)
    to_hertz = lambda m: np.where(m < knee / step, m * step, knee * np.exp(ratio * (m - knee / step)))
    edges = to_hertz(np.linspace(0.0, float(to_mel(np.array(rate / 2))), bands + 2))
    bins = np.arange(fft // 2 + 1) * rate / fft
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return filters.astype(np.float32)


def compute_features(waves: Tensor, bands: int, padding: int = 0) -> Tensor:  # B N -> B (N + padding)/HOP F
    """Return the features of recordings from -1 to 1 at `RATE`, followed by `padding` samples of silence."""
    waves = F.pad(waves.float(), (0, padding))
    if waves.shape[1] <= FFT // 2:  # too short to be reflected
        waves = F.pad(waves, (0, FFT // 2 + 1 - waves.shape[1]))
    spectra = torch.stft(waves, FFT, HOP, window=torch.hann_window(FFT, device=waves.device), return_complex=True)
    power = spectra[..., :-1].abs().square().transpose(1, 2)  # B T FFT/2+1
    mel = power @ torch.from_numpy(slaney_filters(bands)).to(waves.device)
    logs = mel.clamp(min=MIN_POWER).log10()
    logs = torch.maximum(logs, logs.amax((1, 2), keepdim=True) - RANGE)
    return (logs + 4.0) / 4.0


def fit_window(features: Tensor) -> Tensor:  # B T F -> B WINDOW_FRAMES F
    """Return features with zeros up to the length of a window, as the authors pad the last part of a recording."""
    return F.pad(features[:, :WINDOW_FRAMES], (0, 0, 0, max(0, WINDOW_FRAMES - features.shape[1])))
