"""Transcription with a pretrained Whisper: recordings of any length to text with times, in the language spoken or in English."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fieldguide.checkpoints.load import Checkpoint, build_network, inspect_checkpoint
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError, WeightsError, nearest
from fieldguide.core.options import PREDICT_ALIASES, parse_options
from fieldguide.core.signature import Signature
from fieldguide.data.dataset import Column
from fieldguide.data.media import audio
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.transcripts import normalize_text
from fieldguide.data.preprocessing.whisper_features import (
    FRAMES_PER_SECOND,
    RATE,
    WINDOW_SECONDS,
    compute_features,
    fit_window,
)
from fieldguide.inference.predictor import Predictions, Predictor, as_list, join_skipped
from fieldguide.inference.signature import describe_transcriber
from fieldguide.inference.text_generation import read_tokenizer
from fieldguide.models.generation.transcription import Segment, SpeechTokens, TranscriptionConfig, transcribe
from fieldguide.tasks.audio.speech_recognition import SpeechRecognition, stack_waves
from fieldguide.tasks.audio.speech_tokens import read_speech_tokens

if TYPE_CHECKING:
    from fieldguide.core.card import Network

TASKS = ("transcribe", "translate")
RECORD_DIGITS = 4  # of the numbers of a segment


class Transcriber(Predictor):
    """A Whisper network with its tokenizer, which transcribes recordings or translates them to English."""

    LOAD_OPTIONS: ClassVar[dict[str, type]] = {}
    config_type: ClassVar[type] = TranscriptionConfig

    def __init__(self, network: Network, text: TextTokenizer, tokens: SpeechTokens, card: Card | None = None):
        self.network, self.text, self.tokens, self.card = network.to(distributed.device()).eval(), text, tokens, card
        columns = [Column("audio", "audio"), Column("transcript", "text", "target")]
        self.task = SpeechRecognition(columns, SpeechRecognition.Options(rate=RATE))

    @classmethod
    def load(cls, checkpoint: str | Path | Checkpoint, **overrides: Any) -> Transcriber:
        """Load a folder of transformers or CTranslate2, a file of OpenAI with tokenizer.json next to it, or hf:organization/name.

        Raises `WeightsError` if the network does not read recordings, or its tokenizer is missing or belongs to another network.
        """
        found = checkpoint if isinstance(checkpoint, Checkpoint) else inspect_checkpoint(checkpoint)
        card = found.card
        if card.input_type != "speech-text":
            raise WeightsError(f"{found.path} is {card.name}, which does not write down recordings.")
        network = build_network(card, {**found.values, **overrides}, found.state, found.origin, str(found.path))
        tokenizer = read_tokenizer(found).tokenizer
        vocab_size = network.config.vocab_size
        if tokenizer.get_vocab_size() > vocab_size:
            raise WeightsError(
                f"{found.path}: the tokenizer has {tokenizer.get_vocab_size():,} tokens, but the network {vocab_size:,}. The tokenizer "
                "belongs to another network."
            )
        return cls(network, TextTokenizer(tokenizer), read_speech_tokens(tokenizer, found.path), card)

    @property
    def model(self) -> Network:
        return self.network

    @functools.cached_property
    def signature(self) -> Signature:
        return describe_transcriber(self)

    def parse(self, options: dict[str, Any]) -> TranscriptionConfig:
        """Return the options of a request. Raises `SettingsError` for languages and tasks that the network does not know."""
        config = TranscriptionConfig(**parse_options(TranscriptionConfig, options, owner=self.name, aliases=PREDICT_ALIASES))
        if config.task not in TASKS:
            raise SettingsError(f"task={config.task!r} is not one of {', '.join(TASKS)}.")
        known = list(self.tokens.languages) or ["en"]
        if config.language is not None and config.language not in known:
            raise SettingsError(
                f"language={config.language!r} is unknown to this network.{nearest(config.language, known)} It knows: {', '.join(known)}."
            )
        if config.task == "translate" and not self.tokens.languages:
            raise SettingsError(
                "task=translate: this network knows only English. Leave it out, or load one of several languages."
            )
        return config

    def predict(self, inputs: Any = (), **options: Any) -> Predictions:
        """Return `text`, `language` and `segments` with times for each recording.

        `inputs` is a path or a list of them; folders hold many recordings. `options` are those of `TranscriptionConfig`.
        """
        config = self.parse(options)
        task = self.task.for_request(self.task.predict_options)
        data = task.read(as_list(inputs))
        records = [self.transcribe(path, config) for path in data.rows[task.column].to_list()]
        return Predictions(join_skipped(data, records), task.notes)

    def transcribe(self, path: str, config: TranscriptionConfig) -> dict[str, Any]:
        """Return the record of one recording."""
        waves, _ = stack_waves(audio.load([path], RATE))
        features = compute_features(waves, self.network.config.features, WINDOW_SECONDS * RATE)
        frames = features.shape[1] - WINDOW_SECONDS * FRAMES_PER_SECOND  # none of a recording shorter than 10 ms
        language, segments = transcribe(
            self.network,
            features.to(distributed.device()),
            frames,
            self.tokens,
            config,
            self.decode,
            lambda text: self.text.tokenizer.encode(text, add_special_tokens=False).ids,
            fit_window,
        )
        return {
            "text": " ".join(segment.text for segment in segments),
            "language": language,
            "segments": [describe_segment(segment) for segment in segments],
        }

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.text.tokenizer.decode(list(ids), skip_special_tokens=True)

    def evaluate(self, source: Any, **options: Any) -> dict[str, Any]:
        """Return word and character error rates on recordings with transcripts, without regard to case and punctuation marks."""
        config = self.parse(options)
        task = self.task.for_request(self.task.predict_options)
        data = task.read(as_list(source), answered=True)
        return score_transcripts(task, data, [self.transcribe(p, config)["text"] for p in data.rows[task.column].to_list()])


def score_transcripts(task: SpeechRecognition, data: Any, texts: list[str]) -> dict[str, Any]:
    """Return the scores of predicted texts."""
    clean = lambda text: re.sub(r"[^\w\s']", "", normalize_text(text, True))
    targets = {"text": np.array([clean(t) for t in task.read_transcripts(data)], dtype=object)}
    outputs = {"text": np.array([clean(t) for t in texts], dtype=object)}
    return {
        "rows": len(data),
        "scores": task.score(outputs, targets),
        "intervals": task.intervals(outputs, targets),
        "note": "pretrained, without training on this data; case and punctuation marks are ignored",
        "notes": task.notes,
    }


def describe_segment(segment: Segment) -> dict[str, Any]:
    """Return a phrase as a record."""
    window = segment.window
    numbers = {
        "mean_log_probability": window.mean_log_probability,
        "no_speech": window.no_speech,
        "compression": window.compression,
        "temperature": window.temperature,
    }
    rounded = {name: round(value, RECORD_DIGITS) for name, value in numbers.items()}
    return {"start": round(segment.start, 2), "end": round(segment.end, 2), "text": segment.text, **rounded}
