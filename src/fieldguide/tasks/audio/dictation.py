"""Speech recognition by networks that write text, such as Whisper, from a checkpoint with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.report_elements import Quote, Quotes, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.signature import Loop, RecordField, Step, TensorSpec
from fieldguide.core.structure import Limits
from fieldguide.data.dataset import SECONDS, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import audio
from fieldguide.data.preprocessing.speech import perturb_speed
from fieldguide.data.preprocessing.tokenizer import TextTokenizer
from fieldguide.data.preprocessing.transcripts import normalize_text
from fieldguide.data.preprocessing.whisper_features import FFT, HOP, RATE, WINDOW_SECONDS, compute_features
from fieldguide.models.generation import EncoderDecoderState, Greedy, generate_batch
from fieldguide.models.generation.token_rules import TokenRules
from fieldguide.models.generation.transcription import SpeechTokens
from fieldguide.objectives import Objective
from fieldguide.objectives.language import NextToken
from fieldguide.tasks.audio import report
from fieldguide.tasks.audio.speech_recognition import SpeechRecognition, stack_waves
from fieldguide.tasks.audio.speech_tokens import TIMES, read_speech_tokens
from fieldguide.tasks.base import Arrays

WINDOW = WINDOW_SECONDS * RATE  # samples that the network reads at once
MAX_TOKENS = 224  # of a text, half of what the network reads, as in the authors' code


class FirstWindow(NextToken):
    """Next-token loss of the first 30 seconds of each recording; training recordings are not longer."""

    def compute_logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["features"][:, : WINDOW // HOP], batch["tokens"], batch["mask"])


class Dictation(SpeechRecognition):
    """Speech recognition whose network writes the tokens of a text after those of language and task.

    Transcripts keep their case and marks in training, since the network was trained with them; scores ignore case as for other
    networks. Longer recordings are predicted in parts of 30 seconds.
    """

    input_types = ("speech-text",)
    output_types = ("tokens",)
    monitor = "loss"  # scored without generating text
    recipe: ClassVar = {}
    min_batch_size = 4
    text: TextTokenizer
    tokens: SpeechTokens

    @dataclass(frozen=True)
    class PredictOptions:
        num_beams: Annotated[int, Limits(1, 1000)] = 1  # beam width; 1 takes the most probable token

    # Fitting

    @classmethod
    def fit_symbols(cls, data: Data, options: Any) -> Self:
        if options.longest and options.longest > WINDOW_SECONDS:
            raise SettingsError(f"task.longest={options.longest:g}: the network reads at most {WINDOW_SECONDS} s at once.")
        if options.rate not in (None, RATE):
            raise SettingsError(f"task.rate={options.rate}: the network reads {RATE:,} samples per second.")
        task = super().fit_symbols(data, replace(options, rate=RATE, scale=options.scale or "recording"))
        task.ngrams = None  # its tokens are searched without one
        task.text = TextTokenizer.load(options.tokenizer)
        task.tokens = read_speech_tokens(task.text.tokenizer, options.tokenizer)
        known = list(task.tokens.languages) or ["en"]
        language = options.language or "en"
        if language not in known:
            raise SettingsError(f"task.language={language!r} is unknown to the network. It knows: {', '.join(known)}.")
        task.options = replace(task.options, language=language)
        if cut := sum(len(ids) > MAX_TOKENS for ids in task.encode_texts_of(data)):
            task.add_note(f"{cut} transcripts are longer than {MAX_TOKENS} tokens and are truncated in training")
        return task

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.tokens.time + TIMES, "features": self.options.bands}

    @property
    def sequence(self) -> list[int]:
        """Return the tokens before a text."""
        return self.tokens.build_sequence(self.options.language, "transcribe", False)

    def encode_texts_of(self, data: Data) -> list[list[int]]:
        """Return the tokens of the transcripts, which begin with a space."""
        texts = [" " + text.strip() for text in self.read_transcripts(data)]
        return [ids.tolist() for ids in self.text.encode_exact(texts)]

    # Recordings to batches

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        paths, bands = data.rows[self.column].to_list(), self.options.bands
        samples = data.rows[SECONDS].to_numpy() * RATE
        name, texts = self.target.name, None
        if name in data.rows.columns and data.rows[name].null_count() < len(data):
            texts = self.encode_texts_of(data)
        speed = bool(settings and settings.augmentation not in ("none", "light"))

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            waves, lengths = stack_waves(audio.load([paths[i] for i in index], RATE))
            if generator is not None and speed:
                waves, lengths = perturb_speed(waves, lengths, generator)
            parts = max(1, -(-int(lengths.max()) // WINDOW))
            windows = torch.nn.functional.pad(waves, (0, max(0, parts * WINDOW - waves.shape[1])))[:, : parts * WINDOW]
            features = compute_features(windows.reshape(-1, WINDOW), bands).reshape(len(index), -1, bands)  # B T F
            batch = {"features": features, "parts": (lengths + WINDOW - 1) // WINDOW}
            if texts is not None:
                batch |= self.build_target([texts[i] for i in index])
            return batch

        return Batches(len(paths), make, samples)

    def build_target(self, texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return input tokens, their mask, and the tokens to predict: the text and its end."""
        before, end = self.sequence, self.tokens.end
        rows = [[*before, *ids[:MAX_TOKENS]] for ids in texts]
        width = max(map(len, rows))
        tokens, target = np.full((2, len(rows), width), end), np.full((len(rows), width), -1)
        mask = np.zeros((len(rows), width), dtype=bool)
        for k, row in enumerate(rows):
            tokens[0, k, : len(row)], mask[k, : len(row)] = row, True
            target[k, len(before) - 1 : len(row)] = [*row[len(before) :], end]
        return {"tokens": torch.from_numpy(tokens[0]), "mask": torch.from_numpy(mask), "target": torch.from_numpy(target)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return FirstWindow(model, card.inputs, settings.label_smoothing)

    # Predictions

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            scored = objective.outputs(batch) if "target" in batch else {}
            return {**scored, "written": self.write(objective.model, batch["features"], batch["parts"])}

        return answer

    def write(self, network: Any, features: Tensor, parts: Tensor) -> Tensor:  # B T F, B -> B N
        """Return the tokens of each recording, window by window, -1 after their end."""
        rows: list[list[int]] = [[] for _ in features]
        rules = TokenRules(suppress_tokens=self.tokens.suppressed, begin_suppress_tokens=self.tokens.first_suppressed)
        config = Greedy(max_new_tokens=MAX_TOKENS, num_beams=self.predict_options.num_beams)
        for part, window in enumerate(features.split(WINDOW // HOP, 1)):
            some = [row for row in range(len(rows)) if part < int(parts[row])]
            if not some:
                break
            state = EncoderDecoderState(network, window[some], None)
            found = generate_batch(state, [self.sequence] * len(some), config, eos_token_ids=(self.tokens.end,), rules=rules)
            for row, ids in zip(some, found):
                rows[row] += ids
        width = max(1, *map(len, rows))
        return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])

    def texts(self, outputs: Arrays) -> np.ndarray:
        if "text" in outputs:
            return outputs["text"]
        decoded = [self.text.decode(row[row >= 0]).strip() for row in outputs["written"].astype(int)]
        return np.array(decoded, dtype=object)

    def postprocess(self, outputs: Arrays) -> Arrays:
        return {**outputs, "text": self.texts(outputs)} if "written" in outputs else outputs

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{"text": text} for text in outputs["text"]]

    # Scores and report

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {}
        if "text" in outputs:
            scores = super().score({"text": self.normalize(outputs["text"])}, targets)
        if "nats" in outputs:
            scores["loss"] = float(outputs["nats"].sum(dtype=np.float64) / max(outputs["count"].sum(), 1))
        return scores

    def normalize(self, texts: np.ndarray) -> np.ndarray:
        """Return predicted texts in the form of the transcripts that they are compared with."""
        return np.array([normalize_text(text, self.options.lower) for text in texts], dtype=object)

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        given = {"text": self.normalize(outputs["text"])}
        if "nats" in outputs:
            given["loss"] = outputs["nats"] / np.maximum(outputs["count"], 1)
        return super().intervals(given, targets)

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        waves, lengths = stack_waves(audio.load([path for path, _ in self.shown], RATE))
        windows = torch.nn.functional.pad(waves, (0, max(0, WINDOW - waves.shape[1])))[:, :WINDOW]
        features = compute_features(windows, self.options.bands).to(next(objective.parameters()).device)
        written = self.write(objective.model, features, torch.ones_like(lengths))
        texts = self.texts({"written": written.numpy()})
        quotes = [Quote(text or "(nothing)", f"transcript: {said}") for text, (_, said) in zip(texts, self.shown)]
        return [Quotes("Transcripts during training", "Training recordings.", quotes)]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        probability = np.exp(-outputs["nats"] / np.maximum(outputs["count"], 1))  # of the transcript, per token
        given = {"text": self.normalize(outputs["text"]), "sure": probability}
        return report.build_elements(self, test, given, targets, None)

    # Signature

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        mel = {"rate": RATE, "bands": self.options.bands, "fft": FFT, "hop": HOP, "scale": "slaney"}
        return [
            Step("decode_audio", "decode the file, mean of its channels, -1 to 1", False),
            Step("resample", f"resample to {RATE:,} Hz (polyphase)", False, {"rate": RATE}),
            Step("window", f"split into parts of {WINDOW_SECONDS} s, padded with silence", False),
            Step("whisper_log_mel", "log-mel spectrogram of the authors", True, mel),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return tensors

    def describe_loop(self, loop: Loop | None) -> Loop | None:
        return loop and replace(loop, start_tokens=tuple(self.sequence), eos_tokens=(self.tokens.end,))

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [Step("decode", "tokens to text; the parts of a recording one after the other", False)]

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField("text", "string", "the transcript")]

    # Saved with the run

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)

    def read_files(self, folder: Path) -> None:
        self.text = TextTokenizer.load(folder)
        self.tokens = read_speech_tokens(self.text.tokenizer, folder)
