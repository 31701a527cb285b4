"""Signatures of the audio tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fieldguide.core.card import Card
from fieldguide.core.signature import AudioFormat, InputField, Limits, RecordField, Step, TensorSpec
from fieldguide.data.media import audio
from fieldguide.data.preprocessing.nemo_features import FFT, PREEMPHASIS
from fieldguide.data.preprocessing.speech import LogMel
from fieldguide.data.preprocessing.transcripts import Transcripts
from fieldguide.data.preprocessing.waveform import Waveform
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import describe_column, fix_axes, limit_axis


class AudioSignature(SignatureBuilder):
    """The signature of the classification of recordings, by networks for images or for log-mel features."""

    options: Any
    mel: LogMel

    @property
    def frames(self) -> int:
        """Return the number of frames of the input."""
        raise NotImplementedError

    @property
    def wave(self) -> Waveform:
        """Return the preprocessing of recordings for networks that read samples."""
        raise NotImplementedError

    def describe_inputs(self) -> Sequence[InputField]:
        form = AudioFormat(self.mel.rate, self.options.seconds)
        return [describe_column(c, audio=form) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        seconds, side = self.options.seconds, self.options.side
        cut = Step("cut", f"the middle {seconds:g} s of longer recordings", False, {"seconds": seconds})
        wave = list_waveform_steps(self.wave) if card.input_type == "waveform" else None
        decode, resample, *features = wave or list_log_mel_steps(self.mel)
        steps = [decode, resample, cut, *features]
        if card.input_type != "image":
            return steps
        about = f"place in the middle of {self.frames} frames of zeros; low frequencies at the bottom"
        size = {"side": side, "fit": "stretch", "antialias": True}
        return [
            *steps,
            Step("pad", about, True, {"frames": self.frames}),
            Step("resize", f"resize to {side} x {side} pixels", True, size),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        sizes = {"height": self.options.side, "width": self.options.side, "channels": 1}
        about = "a log-mel spectrogram: time to the right, low frequencies at the bottom"
        images = [
            replace(spec, axes=fix_axes(spec.axes, sizes), about=about) if spec.name == "image" else spec for spec in tensors
        ]
        if any(spec.name == "waveform" for spec in tensors):
            return limit_axis(images, "samples", round(self.options.seconds * self.options.rate))
        return limit_axis(images, "frames", self.frames)

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), samples=audio.MAX_SAMPLES)


def list_log_mel_steps(mel: LogMel) -> list[Step]:
    """Return the steps from an audio file to normalized log-mel features."""
    settings: dict[str, Any] = {"rate": mel.rate, "bands": mel.bands, "window": mel.window, "hop": mel.hop, "low": mel.low}
    if mel.style == "nemo":
        shape = {
            "rate": mel.rate,
            "bands": mel.bands,
            "hop": mel.hop,
            "fft": FFT,
            "preemphasis": PREEMPHASIS,
            "scale": "slaney",
        }
        return [
            Step("decode_audio", "decode the file, mean of its channels, -1 to 1", False),
            Step("resample", f"resample to {mel.rate:,} Hz (polyphase)", False, {"rate": mel.rate}),
            Step("nemo_log_mel", "log-mel spectrogram as in NeMo, each band standardized over the recording", True, shape),
        ]
    return [
        Step("decode_audio", "decode the file, mean of its channels, -1 to 1", False),
        Step("resample", f"resample to {mel.rate:,} Hz (polyphase)", False, {"rate": mel.rate}),
        Step("log_mel", "log-mel spectrogram of Hann windows", True, settings | {"high": mel.high}),
        Step("normalize", f"standardize each band over the {mel.scale}", True, {"scale": mel.scale}, state="mel"),
    ]


def list_waveform_steps(wave: Waveform) -> list[Step]:
    """Return the steps from an audio file to samples."""
    steps = [
        Step("decode_audio", "decode the file, mean of its channels, -1 to 1", False),
        Step("resample", f"resample to {wave.rate:,} Hz (polyphase)", False, {"rate": wave.rate}),
    ]
    return [*steps, *([Step("normalize", "standardize the recording", True)] if wave.normalize else [])]


class SpeechSignature(SignatureBuilder):
    """The signature of speech recognition with frame-wise symbols (CTC)."""

    mel: LogMel
    transcripts: Transcripts
    longest_seconds: float
    stride: int

    @property
    def wave(self) -> Waveform:
        """Return the preprocessing of recordings for networks that read samples."""
        raise NotImplementedError

    @property
    def frame_seconds(self) -> float:
        """Return the seconds between output frames."""
        raise NotImplementedError

    def describe_inputs(self) -> Sequence[InputField]:
        form = AudioFormat(self.mel.rate, self.longest_seconds)
        return [describe_column(c, audio=form) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        steps = list_waveform_steps(self.wave) if card.input_type == "waveform" else list_log_mel_steps(self.mel)
        return [
            *steps,
            Step("chunk", "split longer recordings into overlapping chunks (option chunk)", False),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        axis = "samples" if any(spec.name == "waveform" for spec in tensors) else "frames"
        return limit_axis(tensors, axis, None, least=2 * self.stride)

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        second = self.frame_seconds
        return [
            Step("log_softmax", "log-probabilities of the symbols of each frame", True),
            Step("search", "the best symbols: of each frame, or by beam search (option num_beams)", False),
            Step("collapse", "join repeated symbols, drop blanks", True),
            Step("align", "first and last frame of each symbol", False, {"seconds_per_frame": second}),
            Step("decode", "symbols to text", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        word = (
            RecordField("word", "string"),
            RecordField("start", "number", "seconds from the beginning", low=0),
            RecordField("end", "number", "seconds from the beginning", low=0),
        )
        return [
            RecordField("text", "string", "the transcript"),
            RecordField("sure", "number", "geometric mean of the probabilities of the frames", low=0, high=1),
            RecordField("words", "array", "the words with their times", items=RecordField("", "object", fields=word)),
        ]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), samples=audio.MAX_SAMPLES)


class PretrainingSignature(SignatureBuilder):
    """The signature of pre-training: codes of the frames of recordings."""

    options: Any

    @property
    def wave(self) -> Waveform:
        """Return the preprocessing of recordings."""
        raise NotImplementedError

    def describe_inputs(self) -> Sequence[InputField]:
        form = AudioFormat(self.options.rate, self.options.seconds)
        return [describe_column(c, audio=form) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        return list_waveform_steps(self.wave)

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [Step("codes", "the most probable code of each frame, in each codebook", False)]

    def describe_record(self) -> Sequence[RecordField]:
        frame = RecordField("", "array", "a code for each codebook", items=RecordField("", "integer", low=0))
        return [
            RecordField("codes", "array", "the frames in order", items=frame),
            RecordField("frame_seconds", "number", "seconds from one frame to the next", low=0),
        ]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), samples=audio.MAX_SAMPLES)
