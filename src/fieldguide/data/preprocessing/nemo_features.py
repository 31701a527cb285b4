"""The log-mel features of NeMo's networks, such as FastConformer, as transformers computes them.

They differ from `speech.LogMel`: samples are pre-emphasized, frames are centered and padded with silence, the window is symmetric,
filters are Slaney's with equal areas, and a small number is added before the logarithm. Each band has mean 0 and standard deviation
1 over the recording.
Shapes: B recordings, N samples, T frames, F mel bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fieldguide.data.preprocessing.whisper_features import slaney_filters

FFT, WINDOW_SECONDS, HOP_SECONDS = 512, 0.025, 0.010
PREEMPHASIS = 0.97
MIN_POWER, MIN_STD = 2.0**-24, 1e-5  # added to the power of a band, and to its standard deviation


def compute_log_mel(waves: Tensor, lengths: Tensor, rate: int, bands: int, step: int) -> Tensor:  # B N, B -> B T F
    """Return the logarithm of the power in each band, before normalization; N/step + 1 frames."""
    real = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
    waves = waves.float()
    waves = torch.cat([waves[:, :1], waves[:, 1:] - PREEMPHASIS * waves[:, :-1]], 1).masked_fill(~real, 0.0)
    window = torch.hann_window(round(WINDOW_SECONDS * rate), periodic=False, device=waves.device)
    spectra = torch.stft(waves, FFT, step, len(window), window, pad_mode="constant", return_complex=True)
    filters = torch.from_numpy(slaney_filters(bands, FFT, rate)).to(waves.device)
    return (spectra.abs().square().transpose(1, 2) @ filters + MIN_POWER).log()


def normalize(x: Tensor, frames: Tensor) -> Tensor:  # B T F, B -> B T F
    """Return features with mean 0 and standard deviation 1 in each band over the real frames, and zeros after them."""
    x = x[:, : max(1, int(frames.max()))]
    real = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[..., None]
    mean = (x * real).sum(1, keepdim=True) / frames.clamp(min=1)[:, None, None]
    centered = (x - mean) * real
    std = (centered.square().sum(1, keepdim=True) / (frames - 1).clamp(min=1)[:, None, None]).sqrt()
    return centered / (std + MIN_STD)
