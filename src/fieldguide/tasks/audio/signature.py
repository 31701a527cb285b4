"""The signature of speech recognition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fieldguide.core.card import Card
from fieldguide.core.signature import AudioFormat, InputField, Limits, RecordField, Step, TensorSpec
from fieldguide.data.media import audio
from fieldguide.data.preprocessing.speech import LogMel
from fieldguide.data.preprocessing.transcripts import Transcripts
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import describe_column, limit_axis


class SpeechSignature(SignatureBuilder):
    """The signature of speech recognition with frame-wise symbols (CTC)."""

    mel: LogMel
    transcripts: Transcripts
    longest_seconds: float
    stride: int

    def describe_inputs(self) -> Sequence[InputField]:
        form = AudioFormat(self.mel.rate, self.longest_seconds)
        return [describe_column(c, audio=form) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        mel = self.mel
        settings: dict[str, Any] = {"rate": mel.rate, "bands": mel.bands, "window": mel.window, "hop": mel.hop, "low": mel.low}
        return [
            Step("decode_audio", "decode the file, mean of its channels, -1 to 1", False),
            Step("resample", f"resample to {mel.rate:,} Hz (polyphase)", False, {"rate": mel.rate}),
            Step("log_mel", "log-mel spectrogram of Hann windows", True, settings | {"high": mel.high}),
            Step("normalize", f"standardize each band over the {mel.scale}", True, {"scale": mel.scale}, state="mel"),
            Step("chunk", "split longer recordings into overlapping chunks (option chunk)", False),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return limit_axis(tensors, "frames", None, least=2 * self.stride)

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        second = self.mel.hop * self.stride
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
