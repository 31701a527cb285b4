"""Graphs of recordings: samples -> log-mel spectrogram -> image or frames -> class, or symbols of a transcript."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.preprocessing.speech import MIN_POWER, LogMel, mel_filters
from fieldguide.exporting.graph import BATCH, ExportError, Graph, build_pipeline
from fieldguide.exporting.supervised import finish

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

EXAMPLE_FRAMES = 40  # of the recording that is traced
MIN_CLOSE = 0.98  # fraction of frames: two symbols may be equally probable


class Spectrogram(nn.Module):
    """Return what `LogMel.apply` returns: features B T F, 0 after the end of a recording, and the number of frames, B.

    The Fourier transform is a convolution with windowed waves, which every runtime executes.
    """

    kernel: Tensor  # 2 bins, 1, width
    filters: Tensor  # bins F

    def __init__(self, mel: LogMel):
        super().__init__()
        self.mel, fft = mel, 1 << (mel.width - 1).bit_length()
        angle = 2 * np.pi * np.outer(np.arange(fft // 2 + 1), np.arange(mel.width)) / fft
        waves = np.concatenate([np.cos(angle), np.sin(angle)]) * np.hanning(mel.width + 1)[:-1]
        filters = mel_filters(mel.rate, fft, mel.bands, mel.low, mel.high or mel.rate / 2)
        self.register_buffer("kernel", torch.from_numpy(waves.astype(np.float32))[:, None], persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # B N, B
        mel = self.mel
        inside = torch.ones_like(waveform).cumsum(1) - 1 < lengths[:, None]
        padded = F.pad(torch.where(inside, waveform, 0.0), (0, mel.width))  # at least one window
        real, imaginary = F.conv1d(padded[:, None], self.kernel, stride=mel.step).transpose(1, 2).chunk(2, -1)
        x = ((real.square() + imaginary.square()) @ self.filters).clamp(min=MIN_POWER).log()
        frames = ((lengths - mel.width) // mel.step + 1).clamp(min=1)
        there = (torch.ones_like(x[..., 0]).cumsum(1) - 1 < frames[:, None])[..., None]
        if mel.scale == "corpus":
            mean, std = torch.tensor(mel.mean), torch.tensor(mel.std)
        else:
            count = frames[:, None, None]
            mean = (x * there).sum(1, keepdim=True) / count
            std = (((x - mean) * there).square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-3)
        return torch.where(there, (x - mean) / std, 0.0), frames


class AudioSteps(nn.Module):
    """Return the batch of `AudioClassification` for a network that reads spectrograms as images or as frames."""

    def __init__(self, task: Any, as_image: bool):
        super().__init__()
        self.spectrogram, self.as_image, self.frames, self.side = (
            Spectrogram(task.mel),
            as_image,
            task.frames,
            task.options.side,
        )

    def forward(self, waveform: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # B N, B
        features, frames = self.spectrogram(waveform, lengths)
        if not self.as_image:
            return {"features": features, "lengths": frames}
        features = F.pad(features, (0, 0, 0, self.frames))[:, : self.frames]
        first = torch.round(0.5 * (self.frames - frames).double()).long()  # half to even, like Python
        place = torch.arange(self.frames) - first[:, None]  # B T
        inside = (place >= 0) & (place < frames[:, None])
        index = place.clamp(0, self.frames - 1)[..., None].expand(-1, -1, features.shape[-1])
        canvas = torch.where(inside[..., None], features.gather(1, index), 0.0)
        image = canvas.transpose(1, 2).flip(1)[:, None]  # B 1 F T
        return {"image": F.interpolate(image, (self.side,) * 2, mode="bilinear", antialias=True)}


def build_audio_classification(predictor: TaskPredictor) -> Graph:
    """Return the graph of audio classification: samples of recordings, as long as the task's input at most."""
    task: Any = predictor.task
    if predictor.card.input_type == "waveform":
        raise ExportError("networks that read samples cannot be exported yet. Train one that reads spectrograms.")
    most = round(task.options.seconds * task.options.rate)
    axes = (BATCH, Axis("samples", least=task.mel.width, most=most))
    inputs = (
        TensorSpec("waveform", "float32", axes),
        TensorSpec("lengths", "int64", (BATCH,), low=task.mel.width, high=most),
    )
    values = {"column": task.column, "rate": task.options.rate, "samples": most}
    front = AudioSteps(task, predictor.card.input_type == "image")
    return finish(
        predictor, front, inputs, parts=("media", "waves", "classes", "sounds"), values=values, requires=("soundfile", "scipy")
    )


class SpeechSteps(nn.Module):
    """Return the batch of `SpeechRecognition`."""

    def __init__(self, mel: LogMel):
        super().__init__()
        self.spectrogram = Spectrogram(mel)

    def forward(self, waveform: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # B N, B
        features, frames = self.spectrogram(waveform, lengths)
        return {"features": features, "lengths": frames}


def build_speech_recognition(predictor: TaskPredictor) -> Graph:
    """Return the graph of speech recognition: samples of recordings -> the most probable symbol of each frame (CTC)."""
    task: Any = predictor.task
    task.adopt(predictor.objective)
    if task.signal != "features" or task.options.style not in (None, "plain"):
        raise ExportError("networks that read samples or another spectrogram cannot be exported yet. Train a Conformer.")
    frames, _ = task.for_request(task.PredictOptions()).chunk_frames()
    most = (frames - 1) * task.mel.step + task.mel.width
    inputs = (
        TensorSpec("waveform", "float32", (BATCH, Axis("samples", least=EXAMPLE_FRAMES * task.mel.step, most=most))),
        TensorSpec("lengths", "int64", (BATCH,), low=task.mel.width, high=EXAMPLE_FRAMES * task.mel.step),
    )
    values = {
        "column": task.column,
        "rate": task.mel.rate,
        "samples": most,
        "symbols": ["", *(task.transcripts.spell(i) for i in range(1, task.transcripts.size))],
        "seconds": task.frame_seconds,
    }
    outputs, parts = ("path", "sure"), ("media", "waves", "speech")
    module = build_pipeline(predictor, SpeechSteps(task.mel), nn.Identity(), outputs, lambda objective: objective.outputs)
    return Graph(module, inputs, outputs, parts, values, requires=("soundfile", "scipy"), min_close=MIN_CLOSE)
