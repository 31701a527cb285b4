"""Speech recognition: recordings of any sampling rate and length, and their transcripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import Quote, Quotes, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.column_spec import ColumnSpec, normalize_name
from fieldguide.data.dataset import RATE, SECONDS, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import audio
from fieldguide.data.preprocessing.speech import LogMel, SpecAugment, pad_waves, perturb_speed, suggest_hop, suggest_rate
from fieldguide.data.preprocessing.symbol_files import read_symbols
from fieldguide.data.preprocessing.symbol_ngrams import SymbolNGrams
from fieldguide.data.preprocessing.transcripts import Transcripts, normalize_text
from fieldguide.data.preprocessing.waveform import Waveform
from fieldguide.data.readers.recordings import TRANSCRIPT_NAMES
from fieldguide.metrics.speech import Edits, count_edits
from fieldguide.objectives import Objective
from fieldguide.objectives.ctc import CTC, compute_log_probabilities, compute_losses, min_frames
from fieldguide.objectives.ctc_decoding import align, beam_search, collapse, compute_logits_in_chunks
from fieldguide.tasks.audio import report
from fieldguide.tasks.audio.signature import SpeechSignature
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric, Task
from fieldguide.tasks.supervised import fill_options

MAX_AUDIO_CACHE_FRACTION_OF_RAM = 0.3  # beyond it, recordings are decoded batch by batch
MAX_TRAINING_SECONDS = 30.0  # maximum seconds of a training recording, if the user sets none
SHORT_RECORDING_SECONDS = 2.0  # seconds; recordings this short are too short to estimate their own scale
MIN_MASKED_HOURS = 5.0  # hours of training speech from which SpecAugment is used
MAX_SECONDS_TOGETHER = 320.0  # of audio that is processed together during prediction
MAX_ATTENTION_CELLS = 2**24  # rows times squared frames that attention processes together during prediction
PUBLISHED_SECONDS = 30.0  # that published networks were trained on at most
SAMPLED_RECORDINGS = 2000  # recordings that the scale of the spectrogram is fitted on
# For a few hours of speech: fewer and narrower masks than Conformer's (see docs/log.md, spoken digits).
MASKS = SpecAugment(band_masks=2, band_share=0.15, time_masks=2, time_share=0.05)


class SpeechRecognition(SpeechSignature, Task):
    name = "automatic-speech-recognition"
    reads = (
        "recordings with transcripts: a folder of .wav, .flac, .ogg or .mp3 files with a table of file "
        "names and transcripts, or with x.txt next to x.wav; LJ Speech and Common Voice as distributed"
    )
    input_types: tuple[str, ...] = ("speech", "waveform")
    feature = ("audio",)
    output_types = ("ctc",)
    column_spec = ColumnSpec("last", names=TRANSCRIPT_NAMES, kinds={"target": "text", "feature": "audio"})
    metrics = (
        Metric("wer", "min", "of words wrong", percent=True, label="WER"),
        Metric("cer", "min", "of characters wrong", percent=True, label="CER"),
        Metric("loss", "min", "nats per symbol"),
    )
    recipe: ClassVar = {"augmentation": "standard"}
    min_batch_size = 8

    @dataclass(frozen=True)
    class Options:
        rate: int | None = None  # sampling rate of the input in Hz
        bands: int | None = None  # mel bands of the spectrogram
        hop: float | None = None  # seconds between consecutive frames
        scale: str | None = None  # "corpus" or "recording": the statistics used to normalize the bands
        lower: bool = True  # lowercase the transcripts
        pieces: int | None = None  # approximate number of subword symbols; None: characters
        longest: float | None = None  # maximum seconds of a training recording; longer ones are left out and counted
        masks: bool | None = None  # use SpecAugment during training
        normalize: bool | None = None  # networks that read samples: mean 0 and variance 1 in each recording; None: yes
        style: str | None = None  # of the spectrogram: plain, or nemo, which FastConformer's checkpoints expect; None: plain
        symbols: str | None = None  # folder of a checkpoint whose symbols are predicted, and new characters after them
        tokenizer: str | None = None  # of a checkpoint that writes text, such as Whisper; the network predicts its tokens
        language: str | None = None  # code of the language of such a checkpoint, such as de; None: en

    @dataclass(frozen=True)
    class PredictOptions:
        num_beams: Annotated[int, Limits(1, 1000)] = 1  # beam width; 1 takes the most probable symbol of each frame
        language_weight: Annotated[float, Limits(0, 10)] = (
            0.0  # of an n-gram model of the training transcripts, in the beam search
        )
        symbol_bonus: Annotated[float, Limits(-10, 10)] = 0.0  # added to the score of each symbol, in the beam search
        chunk: Annotated[float | None, Limits(0.1, 3600)] = None  # maximum seconds processed at once; longer ones are split

    transcripts: Transcripts
    mel: LogMel
    longest_seconds: float  # seconds of the longest training recording
    shown: list[tuple[str, str]]  # a few training recordings that are transcribed during training
    ngrams: SymbolNGrams | None = None  # of the training transcripts
    typical: float  # median seconds of the training recordings
    hours: float  # total hours of the training recordings
    stride = 4  # steps of the input per output frame
    signal = "features"  # what the network reads: "features" of a spectrogram, or the "waveform"

    # Matching data

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("audio")) != 1:
            return "one audio column"
        return (
            None
            if data.target and data.required_target.kind in ("text", "category")
            else "a transcript column (name it with --target)"
        )

    @classmethod
    def match(cls, data: Data) -> str | None:
        if cls.missing_requirements(data) or not (
            data.required_target.kind == "text" or normalize_name(data.required_target.name) in TRANSCRIPT_NAMES
        ):
            return None
        return f"recordings in column {data.features('audio')[0].name!r} with transcripts in {data.required_target.name!r}"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        return (cls.choose_kind(options)).fit_symbols(data, options)

    @classmethod
    def choose_kind(cls, options: Any) -> type[Self]:
        """Return the class of the task: the one for networks that write text if there is a tokenizer."""
        from fieldguide.tasks.audio.dictation import Dictation

        return Dictation if options.tokenizer else cls  # type: ignore[return-value]

    @classmethod
    def fit_symbols(cls, data: Data, options: Any) -> Self:
        """Fit symbols, features and notes on training rows."""
        wanted = (data.features("audio")[0], data.target)
        task = cls([c for c in data.columns.values() if any(c is w for w in wanted)], options)
        seconds = data.rows[SECONDS].to_numpy()
        longest = options.longest or MAX_TRAINING_SECONDS
        short = np.flatnonzero(seconds <= longest)
        if not short.size:
            raise DataError(
                f"{data.source}: all recordings are longer than {longest:g} s. Cut them at pauses, or raise the "
                "limit with --set task.longest=SECONDS (memory grows with its square)."
            )
        task.longest_seconds = float(seconds[short].max())
        task.transcripts = task.fit_transcripts(data)
        encoded, lengths = task.transcripts.batch(task.transcripts.encode(task.read_transcripts(data))[0])
        frames = min_frames(torch.from_numpy(encoded), torch.from_numpy(lengths)).numpy()
        rate = options.rate or suggest_rate(data.rows[RATE].to_numpy())
        task.options = fill_options(
            options,
            rate=rate,
            bands=40 if rate <= 8000 else 80,
            longest=longest,
            hop=suggest_hop(seconds[short], frames[short], cls.stride),
            scale="corpus" if np.median(seconds) < SHORT_RECORDING_SECONDS else "recording",
            masks=bool(seconds[short].sum() > 3600 * MIN_MASKED_HOURS),
        )
        task.mel = task.fit_features(data, short)
        task.note_durations(seconds, frames, data)
        task.ngrams = SymbolNGrams.fit((row[:n] for row, n in zip(encoded.tolist(), lengths)), task.transcripts.size)
        chosen = np.random.default_rng(0).permutation(short)[:3]
        task.shown = [(data.rows[task.column][int(i)], task.read_transcripts(data)[int(i)]) for i in chosen]
        task.typical = float(np.median(seconds[short]))
        task.hours = float(seconds[short].sum() / 3600)
        return task

    def fit_transcripts(self, data: Data) -> Transcripts:
        """Return the symbols of the training transcripts, or those of a checkpoint and the characters that it lacks."""
        texts, o = self.read_transcripts(data), self.options
        if not o.symbols:
            return Transcripts.fit(texts, lower=o.lower, pieces=o.pieces)
        known = read_symbols(Path(o.symbols))
        known = Transcripts(known.symbols, lower=o.lower, tokenizer=known.saved)
        unknown = known.encode(texts)[1]
        if not unknown:
            return known
        listed = " ".join(f"{c!r}" for c in sorted(unknown))
        if known.saved:
            self.add_note(f"the checkpoint has no symbols for {listed}: these characters are left out of the transcripts")
            return known
        self.add_note(f"the checkpoint has no symbols for {listed}: new ones are added")
        return known.extend(sorted(unknown))

    def fit_features(self, data: Data, short: np.ndarray) -> LogMel:
        o = self.options
        settings = {"rate": o.rate, "bands": o.bands, "hop": o.hop}
        if o.style not in (None, "plain", "nemo"):
            raise SettingsError(f"task.style={o.style!r} must be plain or nemo.")
        if o.style == "nemo":
            return LogMel(**settings, style="nemo")
        if o.scale == "recording":
            return LogMel(**settings)
        paths = data.rows[self.column].to_list()
        some = [paths[i] for i in np.random.default_rng(0).permutation(short)[:SAMPLED_RECORDINGS]]
        waves = sorted(audio.load(some, o.rate), key=len)
        return LogMel.fit((stack_waves(waves[i : i + 64]) for i in range(0, len(waves), 64)), **settings)

    def note_durations(self, seconds: np.ndarray, frames: np.ndarray, data: Data) -> None:
        """Add notes about training recordings that are too long to train on or too short for their transcript."""
        long = seconds > self.options.longest
        if long.any():
            self.notes.append(
                f"{long.sum():,} recordings are longer than {self.options.longest:g} s (for example "
                f"{data.locate_row(int(np.flatnonzero(long)[0]))}, {seconds[long].max():.0f} s) and are left out "
                "of training (change this with task.longest=...)"
            )
        answers = -(-self.mel.frames((seconds * self.options.rate).astype(int)) // self.stride)
        tight = (answers < frames) & ~long
        if (
            tight.any() and self.options.normalize is None
        ):  # checkpoints that read samples set it; they have frames of their own
            self.notes.append(
                f"{tight.sum():,} recordings have fewer frames than their transcripts need (for example "
                f"{data.locate_row(int(np.flatnonzero(tight)[0]))}) and have no effect on training (use a smaller "
                "task.hop or task.pieces=...)"
            )

    def read_transcripts(self, data: Data) -> list[str]:
        return data.rows[self.target.name].fill_null("").to_list()

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, answered)
        if answered and self.target.name not in data.rows.columns:
            raise DataError(
                f"{data.source}: evaluation needs the transcript column {self.target.name!r}, which is "
                f"missing.{nearest(self.target.name, data.rows.columns)} To predict without transcripts, use "
                "`fieldguide predict`."
            )
        return data

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.transcripts.size, "features": self.mel.bands}

    def data_facts(self) -> dict[str, Any]:
        return {
            "tokens": int(self.mel.frames(int(self.typical * self.mel.rate))),
            "seconds": self.typical,
            "hours": self.hours,
            "symbols": self.transcripts.size,
        }

    @property
    def max_batch_size(self) -> int:
        """Return the maximum recordings per step: about two minutes of audio, and at most 32."""
        return int(np.clip(2 ** int(np.log2(120 / max(self.typical, 0.1))), self.min_batch_size, 32))

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        objective = CTC(model, card.inputs)
        self.adopt(objective)
        return objective

    def adopt(self, objective: Any) -> None:
        """Take over what the network reads, and its stride."""
        self.stride, self.signal = objective.model.stride, objective.inputs[0]

    @property
    def reader(self) -> LogMel | Waveform:
        """Return the preprocessing of recordings for the network."""
        return self.wave if self.signal == "waveform" else self.mel

    @property
    def wave(self) -> Waveform:
        """Return the preprocessing of recordings for networks that read samples."""
        return Waveform(self.mel.rate, self.options.normalize is not False)

    @property
    def frame_seconds(self) -> float:
        """Return the seconds between output frames."""
        return self.reader.hop * self.stride

    # Recordings to batches

    def train_batches(self, data: Data, card: Card, settings: Settings) -> Batches:
        return self.batches(data.take(np.flatnonzero(data.rows[SECONDS].to_numpy() <= self.options.longest)), card, settings)

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        paths, signal = data.rows[self.column].to_list(), card.inputs[0]
        reader: LogMel | Waveform = self.wave if signal == "waveform" else self.mel
        samples = data.rows[SECONDS].to_numpy() * reader.rate
        stored = audio.load(paths, reader.rate) if 2 * samples.sum() < MAX_AUDIO_CACHE_FRACTION_OF_RAM * ram() else None
        target = self.encode_transcripts(data)
        # Validation repeats the same batches; if their features are small, they are cached.
        kept: dict[bytes, dict[str, Tensor]] | None = None
        if settings and 4 * reader.bands * samples.sum() / reader.step < MAX_AUDIO_CACHE_FRACTION_OF_RAM * ram() / 2:
            kept = {}
        speed = bool(settings and settings.augmentation != "none")
        masks = MASKS if settings and settings.augmentation == "standard" and self.options.masks else None
        masks = None if signal == "waveform" else masks  # such networks hide frames themselves

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            key = index.tobytes()
            if generator is None and kept is not None and key in kept:
                return dict(kept[key])
            waves, lengths = stack_waves(
                [stored[i] for i in index] if stored else audio.load([paths[i] for i in index], reader.rate)
            )
            if generator is not None and speed:
                waves, lengths = perturb_speed(waves, lengths, generator)
            features, frames = reader.apply(waves, lengths)
            if generator is not None and masks:
                features = masks.apply(features, frames, generator)
            batch = {signal: features, "lengths": frames}
            if target is not None:
                symbols, counts = self.transcripts.batch([target[i] for i in index])
                batch |= {"target": torch.from_numpy(symbols), "target_lengths": torch.from_numpy(counts)}
            if generator is None and kept is not None:
                kept[key] = dict(batch)
            return batch

        return Batches(len(paths), make, samples)

    def encode_transcripts(self, data: Data) -> list[np.ndarray] | None:
        """Return the transcripts as symbol ids; None if there are none."""
        name = self.target.name
        if name not in data.rows.columns or data.rows[name].null_count() == len(data):
            return None
        rows, unknown = self.transcripts.encode(self.read_transcripts(data))
        if unknown:
            listed = " ".join(f"{c!r} ({n})" for c, n in unknown.most_common(5))
            note = f"characters that are not in the training data cannot be predicted and count as errors: {listed}"
            self.notes += [note] * (note not in self.notes)
        return rows

    # Predictions

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        self.adopt(objective)
        self.check_search()

        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            logits, frames = self.compute_logits(objective.model, batch[self.signal], batch["lengths"])
            likely = compute_log_probabilities(logits)
            best, path = likely.max(-1)
            real = torch.arange(path.shape[1], device=path.device) < frames[:, None]
            said, count = collapse(path, frames) if self.predict_options.num_beams <= 1 else self.search(likely, frames)
            spans = align(likely, frames, said, count).spans
            outputs = {
                "said": said.where(torch.arange(said.shape[1], device=said.device) < count[:, None], -1),
                "first": spans[..., 0],
                "end": spans[..., 1],
                "sure": ((best * real).sum(1) / frames.clamp(min=1)).exp(),
            }
            if "target" in batch:
                nll, fits = compute_losses(logits, frames, batch["target"], batch["target_lengths"])
                outputs["loss"] = (nll / batch["target_lengths"].clamp(min=1)).masked_fill(~fits, torch.nan)
            return outputs

        return answer

    def compute_logits(self, model: Any, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # B T *, B -> B S V, B
        """Compute the logits; recordings longer than a chunk are processed in chunks.

        As many rows are processed together as memory allows. The result of a row does not depend on the other rows.
        """
        size, overlap = self.chunk_frames()
        frames = model.frames(lengths)
        most = MAX_SECONDS_TOGETHER / self.reader.hop  # steps
        parts: dict[int, Tensor] = {}
        rows = [i for i in range(len(lengths)) if int(lengths[i]) <= size]
        for i in range(len(lengths)):
            if int(lengths[i]) > size:
                parts[i] = compute_logits_in_chunks(
                    model, features[i, : int(lengths[i])], size=size, overlap=overlap, batch=max(1, int(most // size))
                )
        while rows:
            together = MAX_ATTENTION_CELLS // max(1, int(frames[rows].max())) ** 2
            together = max(1, min(together, int(most // max(1, int(lengths[rows].max())))))
            some, rows = rows[:together], rows[together:]
            heard = model(features[some, : int(lengths[some].max())], lengths[some])
            parts |= {i: heard[k, : int(frames[i])] for k, i in enumerate(some)}
        return torch.nn.utils.rnn.pad_sequence([parts[i] for i in range(len(lengths))], batch_first=True), frames

    def chunk_frames(self) -> tuple[int, int]:
        """Return the number of frames per chunk, and the overlap of consecutive chunks.

        The default is 1.25 times the longest training recording, from 10 to 40 s.
        """
        seconds = self.predict_options.chunk or min(max(10.0, 1.25 * self.longest_seconds), 40.0)
        unit = 2 * self.stride
        size = max(4, round(seconds / self.reader.hop / unit)) * unit
        return size, size // unit // 4 * unit

    def check_search(self) -> None:
        """Raise `SettingsError` for options of the beam search without one, and for a language model that does not exist."""
        o = self.predict_options
        if (o.language_weight or o.symbol_bonus) and o.num_beams == 1:
            raise SettingsError("language_weight and symbol_bonus belong to the beam search: set num_beams to at least 2.")
        if o.language_weight and self.ngrams is None:
            raise SettingsError(
                "language_weight needs an n-gram model of transcripts, which published networks and runs of former versions lack. "
                "Train or fine-tune on transcripts first."
            )

    def search(self, likely: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:  # B S V, B -> B N, B
        o = self.predict_options
        language = self.ngrams if o.language_weight else None
        settings = {"language": language, "weight": o.language_weight, "bonus": o.symbol_bonus, "ends": language is not None}
        best = [
            beam_search(row[:n].cpu(), o.num_beams, symbols=32, **settings)[0].symbols
            for row, n in zip(likely, frames.tolist())
        ]
        symbols, counts = self.transcripts.batch([np.array(b, dtype=np.int64) for b in best])
        return torch.from_numpy(symbols).to(likely.device), torch.from_numpy(counts).to(likely.device)

    def postprocess(self, outputs: Arrays) -> Arrays:
        return {**outputs, "text": self.texts(outputs)}

    def texts(self, outputs: Arrays) -> np.ndarray:
        """Return the predicted texts: from `said`, or during training from the most probable symbol of each frame."""
        if "text" in outputs:
            return outputs["text"]
        symbols = outputs.get("said")
        if symbols is None:
            path = outputs["path"]
            before = np.pad(path[:, :-1], ((0, 0), (1, 0)))
            symbols = np.where(path != before, path, 0)
        return np.array([self.transcripts.decode(row) for row in symbols], dtype=object)

    def words(self, outputs: Arrays, row: int) -> list[dict[str, Any]]:
        """Return each word with the seconds at which it begins and ends."""
        second = self.frame_seconds
        found: list[dict[str, Any]] = []
        gap = True
        for symbol, first, end in zip(*(outputs[name][row].astype(int) for name in ("said", "first", "end"))):
            if symbol <= 0:
                continue
            for part in self.transcripts.spell(symbol):
                if part == " ":
                    gap = True
                elif gap:
                    found.append({"word": part, "start": round(first * second, 3), "end": round(end * second, 3)})
                    gap = False
                else:
                    found[-1] |= {"word": found[-1]["word"] + part, "end": round(end * second, 3)}
        return found

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [
            {"text": text, "sure": float(sure), "words": self.words(outputs, i)}
            for i, (text, sure) in enumerate(zip(outputs["text"], outputs["sure"]))
        ]

    # Scores

    def targets(self, data: Data) -> Arrays:
        return {"text": np.array([normalize_text(t, self.options.lower) for t in self.read_transcripts(data)], dtype=object)}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        heard, said = self.normalize_texts(outputs), targets["text"].tolist()
        scores = {"wer": count_edits(said, heard).rate, "cer": count_edits(said, heard, "characters").rate}
        if "loss" in outputs and not np.isnan(outputs["loss"]).all():
            scores["loss"] = float(np.nanmean(outputs["loss"]))
        return scores

    def normalize_texts(self, outputs: Arrays) -> list[str]:
        """Return the predicted texts in the form of the transcripts that they are compared with."""
        return [normalize_text(text, self.options.lower) for text in self.texts(outputs)]

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over recordings (Bisani and Ney 2004, doi:10.1109/ICASSP.2004.1326009); errors
        are counted once.
        """
        heard, said = self.normalize_texts(outputs), targets["text"].tolist()
        rows = np.random.default_rng(0).integers(0, len(said), (1000, len(said)))

        def drawn(counts: Edits) -> np.ndarray:
            length = counts.length[rows].sum(1)
            return counts.errors[rows].sum(1) / np.maximum(length, 1)

        values = {"wer": drawn(count_edits(said, heard)), "cer": drawn(count_edits(said, heard, "characters"))}
        loss = outputs.get("loss")
        if loss is not None and not np.isnan(loss).all():
            known = loss[~np.isnan(loss)]
            values["loss"] = known[np.random.default_rng(0).integers(0, len(known), (1000, len(known)))].mean(1)
        return {name: tuple(np.percentile(v, [2.5, 97.5]).tolist()) for name, v in values.items()}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        usual, times = Counter(self.targets(train)["text"].tolist()).most_common(1)[0]
        short = usual if len(usual) <= 30 else usual[:29] + "…"
        return [
            Baseline(
                "most frequent transcript",
                f"{short!r}, the transcript of {times:,} training recordings",
                {"text": np.array([usual] * len(test), dtype=object)},
            )
        ]

    # Report

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        waves, lengths = stack_waves(audio.load([path for path, _ in self.shown], self.mel.rate))
        where = next(objective.parameters()).device
        self.adopt(objective)
        features, frames = self.reader.apply(waves, lengths)
        path = objective.outputs({self.signal: features.to(where), "lengths": frames.to(where)})["path"]
        return [
            Quotes(
                "Transcripts during training",
                "Training recordings.",
                [
                    Quote(text or "(nothing)", f"transcript: {said}")
                    for text, (_, said) in zip(self.texts({"path": path.cpu().numpy()}), self.shown)
                ],
            )
        ]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        return report.build_elements(self, test, outputs, targets, objective)

    # Saved with the run

    STATE: ClassVar = {
        "transcripts": {"symbols": list[str], "lower": bool, "tokenizer": str | None},
        "mel": LogMel,
        "heard": float,
        "shown": list[tuple[str, str]],
        "typical": float,
        "hours": float,
        "stride": int,
        "signal?": str,
    }

    def state(self) -> dict[str, Any]:
        return {
            "transcripts": self.transcripts.to_json(),
            "mel": self.mel.to_json(),
            "heard": self.longest_seconds,
            "shown": self.shown,
            "typical": self.typical,
            "hours": self.hours,
            "stride": self.stride,
            "signal": self.signal,
        }

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        """Return the task of a network with the symbols and the preprocessing that are published with it."""
        if not assets.audio or "symbols" not in assets.audio:
            return None
        options = cls.Options(**assets.audio)
        task = cls([Column("audio", "audio"), Column("transcript", "text", "target")], options)
        task.options = fill_options(options, bands=80, longest=MAX_TRAINING_SECONDS, hop=0.010, scale="recording", masks=False)
        task.transcripts, task.shown = read_symbols(Path(task.options.symbols)), []
        o = task.options
        task.mel = LogMel(rate=o.rate, bands=o.bands, hop=o.hop, style="nemo" if o.style == "nemo" else "plain")
        task.longest_seconds, task.typical, task.hours = PUBLISHED_SECONDS, PUBLISHED_SECONDS, 0.0
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.ngrams is not None:
            self.ngrams.save(folder)

    def read_files(self, folder: Path) -> None:
        """Read what was saved next to the state."""
        self.ngrams = SymbolNGrams.load(folder)

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls.choose_kind(options)(columns, options)
        task.read_files(folder)
        task.transcripts, task.mel = Transcripts.from_json(state["transcripts"]), LogMel.from_json(state["mel"])
        task.shown = [tuple(pair) for pair in state["shown"]]
        task.longest_seconds, task.typical, task.hours, task.stride = (
            state[k] for k in ("heard", "typical", "hours", "stride")
        )
        task.signal = state.get("signal", cls.signal)
        return task


def stack_waves(waves: list[np.ndarray]) -> tuple[Tensor, Tensor]:  # each N int16 -> B N, B
    batch, lengths = pad_waves(waves)
    return batch.div_(32768.0), lengths


TASKS = (SpeechRecognition,)
