"""Graphs of recordings: samples -> log-mel spectrogram or standardized samples -> class, or symbols of a transcript."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.preprocessing.speech import MIN_POWER, LogMel, mel_filters
from fieldguide.data.preprocessing.waveform import Waveform
from fieldguide.exporting.graph import BATCH, ExportError, Graph, build_pipeline
from fieldguide.exporting.supervised import finish
from fieldguide.objectives.ctc import CTC

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

EXAMPLE_FRAMES = 40  # of random recordings, at least
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
    """Return the batch of `AudioClassification` for a network that reads spectrograms as images or as frames.

    Images are resized by two matrix products, which every runtime has for any number of rows.
    """

    down: Tensor  # F S
    across: Tensor  # T S

    def __init__(self, task: Any, as_image: bool):
        super().__init__()
        self.spectrogram, self.as_image, self.frames, self.side = (
            Spectrogram(task.mel),
            as_image,
            task.frames,
            task.options.side,
        )
        if as_image:
            self.register_buffer("down", build_resizing(task.mel.bands, self.side), persistent=False)
            self.register_buffer("across", build_resizing(self.frames, self.side), persistent=False)

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
        image = canvas.transpose(1, 2).flip(1)  # B F T
        return {"image": (self.down.mT @ image @ self.across)[:, None]}


def build_resizing(size: int, side: int) -> Tensor:  # -> size side
    """Return the matrix that resizes an axis as `interpolate` does, with antialiasing."""
    each = torch.eye(size)[None, :, None]  # 1 size 1 size
    return F.interpolate(each, (1, side), mode="bilinear", antialias=True)[0, :, 0]


class WaveformSteps(nn.Module):
    """Return what `Waveform.apply` returns, with more zeros at the end, so that one frame of the network fits into each batch."""

    def __init__(self, wave: Waveform, field: int):
        super().__init__()
        self.wave, self.field = wave, field

    def forward(self, waveform: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # B N, B
        samples, counts = self.wave.apply(waveform, lengths)
        return {"waveform": F.pad(samples, (0, self.field)), "lengths": counts}


def build_audio_classification(predictor: TaskPredictor) -> Graph:
    """Return the graph of audio classification: samples of recordings, as long as the task's input at most."""
    task: Any = predictor.task
    model: Any = predictor.objective.model
    most = round(task.options.seconds * task.options.rate)
    front: nn.Module
    if predictor.card.input_type == "waveform":
        front, least, step = WaveformSteps(task.wave, model.field), 1, model.stride
    else:
        front, least, step = AudioSteps(task, predictor.card.input_type == "image"), task.mel.width, task.mel.step
    values = {"column": task.column, "rate": task.options.rate, "samples": most}
    return finish(
        predictor,
        front,
        describe_waves(least, most),
        parts=("media", "waves", "classes", "sounds"),
        values=values,
        requires=("soundfile", "scipy"),
        example=make_waves(least, step, most),
    )


def describe_waves(least: int, most: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the graph's inputs: samples of recordings, and how many are real."""
    axes = (BATCH, Axis("samples", least=least, most=most))
    return TensorSpec("waveform", "float32", axes), TensorSpec("lengths", "int64", (BATCH,), low=least, high=most)


def make_waves(least: int, step: int, most: int) -> Callable[[int, int, int], dict[str, Tensor]]:
    """Return a function that makes noise of several lengths, the last of which is the whole batch's."""

    def make(seed: int, rows: int, size: int) -> dict[str, Tensor]:
        samples = min(most, least + (EXAMPLE_FRAMES + size) * step)
        generator = torch.Generator().manual_seed(seed)
        waves = 0.1 * torch.randn(rows, samples, generator=generator)
        lengths = torch.randint(least, samples + 1, (rows,), generator=generator)
        lengths[-1] = samples
        return {"waveform": waves, "lengths": lengths}

    return make


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
    if not isinstance(predictor.objective, CTC):
        raise ExportError(
            f"{predictor.name} writes text token by token, which has no step graph yet. Train a network with CTC."
        )
    task.adopt(predictor.objective)
    if task.signal == "features" and task.mel.style != "plain":
        raise ExportError(f"spectrograms of style {task.mel.style} cannot be part of a graph yet. Train a Conformer.")
    steps, _ = task.for_request(task.PredictOptions()).chunk_frames()
    front: nn.Module
    if task.signal == "waveform":
        model: Any = predictor.objective.model
        front, least, step, most = WaveformSteps(task.wave, model.field), 1, model.stride, steps
    else:
        front, least, step = SpeechSteps(task.mel), task.mel.width, task.mel.step
        most = (steps - 1) * step + task.mel.width
    values = {
        "column": task.column,
        "rate": task.reader.rate,
        "samples": most,
        "symbols": ["", *(task.transcripts.spell(i) for i in range(1, task.transcripts.size))],
        "seconds": task.frame_seconds,
    }
    outputs, parts = ("path", "sure"), ("media", "waves", "speech")
    module = build_pipeline(predictor, front, nn.Identity(), outputs, lambda objective: objective.outputs)
    return Graph(
        module,
        describe_waves(least, most),
        outputs,
        parts,
        values,
        requires=("soundfile", "scipy"),
        min_close=MIN_CLOSE,
        example=make_waves(least, step, most),
    )
