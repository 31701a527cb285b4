"""Recordings as samples, for networks that read no spectrogram.

Shapes: B recordings, N samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MIN_VARIANCE = 1e-7  # added to the variance of a recording, as in the authors' code of Wav2Vec 2.0


@dataclass(frozen=True)
class Waveform:
    """The samples of a recording, by default with mean 0 and variance 1 over the recording.

    It has the methods of `speech.LogMel` that concern time; its steps are samples.
    """

    rate: int = 16_000  # samples per second
    normalize: bool = True

    step = 1  # samples per step
    bands = 1  # values per step

    @property
    def hop(self) -> float:
        """Seconds between steps."""
        return 1 / self.rate

    def frames(self, samples: Any) -> Any:
        """Return the number of steps for a number of samples (integer, array or tensor)."""
        return samples

    def apply(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # B N, B -> B N, B
        """Return the samples, zero after the end of each recording, and their number."""
        import torch

        real = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
        if self.normalize:
            count = lengths.clamp(min=1)[:, None]
            centered = waves - (waves * real).sum(1, keepdim=True) / count
            variance = (centered.square() * real).sum(1, keepdim=True) / count
            waves = centered / (variance + MIN_VARIANCE).sqrt()
        return waves.masked_fill(~real, 0.0), lengths


@dataclass(frozen=True)
class FrameGrid:
    """Which samples the frames of a stack of convolutions without padding cover. The defaults are those of Wav2Vec 2.0."""

    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.strides)

    @property
    def field(self) -> int:
        """Samples that a frame covers."""
        steps = [math.prod(self.strides[:i]) for i in range(len(self.strides))]
        return 1 + sum((kernel - 1) * step for kernel, step in zip(self.kernels, steps))

    def frames(self, samples: Any) -> Any:
        """Return the number of frames for a number of samples (integer, array or tensor)."""
        count = (samples - self.field) // self.stride + 1
        return max(count, 0) if isinstance(count, int) else count.clip(0)
