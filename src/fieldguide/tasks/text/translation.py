"""Translation: a text and its translation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Bars, Quote, Quotes, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.words import compose
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.sequence_markers import SequenceMarkers, resolve_markers
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.metrics.scripts import HAN, OTHER_UNSPACED
from fieldguide.models.generation import BeamSearch, EncoderDecoderState, GenerationConfig, generate_batch, stream_text
from fieldguide.models.generation.stop_strings import truncate_at_stop
from fieldguide.objectives import NextToken, Objective
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import TextTask
from fieldguide.tasks.text.signature import EncoderDecoderSignature

MAX_VOCAB_SIZE = 8192  # maximum tokens of the vocabulary of both languages, if the user sets no size
RESAMPLES = 400  # of the sentences, for intervals of BLEU and chrF
MAX_SENTENCE_TOKENS = 200  # maximum tokens of a sentence, if the user sets no length
TOKENS_PER_STEP = 4096  # approximate target tokens per step, if the user sets no batch size
SHOWN_SENTENCES = 40  # sentences in the report


class Translation(EncoderDecoderSignature, TextTask):
    prediction_passes = 16.0  # beam search with one token a step
    name = "translation"
    reads = (
        "a table with a text column and a translation column (--target), or two files of parallel lines (train.de, train.en)"
    )
    input_types = ("pair",)
    output_types = ("tokens",)
    column_spec = ColumnSpec("last", names=("translation", "target_text", "tgt"), kinds={"target": "text", "feature": "text"})
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("bleu", "max", "BLEU", label="BLEU"),
        Metric("chrf", "max", "chrF", label="chrF"),
        Metric("loss", "min", "nats per token"),
    )
    monitor = "loss"
    recipe: ClassVar = {"patience": 6}
    longest: ClassVar[int] = MAX_SENTENCE_TOKENS
    made: ClassVar[str] = "Translations"

    @dataclass(frozen=True)
    class Options:
        vocab_size: int | None = None  # vocabulary size of both languages if a tokenizer is fitted on the training texts
        length: int | None = None  # maximum tokens of a source or target; longer texts are truncated and counted
        tokenizer: str | None = None  # path of a tokenizer.json to use instead
        begin: int | None = None  # id of the token that starts the target
        source_language: str | None = None  # language code of a multilingual tokenizer (de_DE, deu_Latn)
        target_language: str | None = None  # the language of the targets, as the tokenizer names it
        prefix: str = ""  # text before each source, such as T5's "translate English to German: "

    @dataclass(frozen=True)
    class PredictOptions(BeamSearch):
        length_penalty: float = 0.6  # exponent of the length in the beam score: 0 = none, 1 = mean log-probability

    text: TextTokenizer
    frame: SequenceMarkers
    median: int
    shown: list[tuple[str, str]]  # a few training pairs that are translated during training

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("text")) != 1:
            return "one text column to translate"
        return None if data.target and data.required_target.kind == "text" else "a translation column (name it with --target)"

    @classmethod
    def match(cls, data: Data) -> str | None:
        if len(data.features()) == 1 and not cls.missing_requirements(data):
            return f"texts in column {data.features()[0].name!r} with translations in {data.required_target.name!r}"
        return None

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        sources, targets = task.texts(data), task.translations(data)
        if options.tokenizer:
            task.text = TextTokenizer.load(options.tokenizer)
        else:
            size = options.vocab_size or min(
                MAX_VOCAB_SIZE, suggest_vocab_size(sum(map(len, sources)) + sum(map(len, targets)))
            )
            task.text = TextTokenizer.fit([*sources, *targets], size=size, lower=False)
        task.frame = resolve_markers(task.text, options)
        sizes = [
            len(t) + task.frame.longest
            for t in (*task.encode_plain(sources), *task.encode_plain(targets, task.text.for_targets))
        ]
        task.median = int(np.median(sizes))
        task.shown = [(sources[i], targets[i]) for i in np.random.default_rng(0).permutation(len(sources))[:3]]
        task.options = fill_options(
            options, vocab_size=task.text.size, length=min(cls.longest, int(1.5 * suggest_length(sizes, 10_000)))
        )
        task.note_truncated(sum(s > task.options.length for s in sizes), len(sizes), task.options.length)
        return task

    def translations(self, data: Data) -> list[str]:
        return data.rows[self.target.name].fill_null("").to_list()

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, answered)
        if answered and self.target.name not in data.rows.columns:
            raise DataError(
                f"{data.source}: evaluation needs the translation column {self.target.name!r}, which is missing. "
                "To predict without translations, use `fieldguide predict`."
            )
        return data

    def model_dims(self) -> dict[str, Any]:
        return {
            "vocab_size": self.text.size,
            "length": self.options.length,
            "begin": self.frame.target_start[0],
            "end": self.frame.end,
            "pad": self.text.pad,
        }

    def data_facts(self) -> dict[str, Any]:
        return {"vocab_size": self.text.size, "length": self.options.length, "tokens": self.median}

    @property
    def max_batch_size(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS_PER_STEP / max(self.median, 1))), 16, 512))

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return NextToken(model, card.inputs, settings.label_smoothing)

    def batches(self, data: Data, card: Card | None, settings: Settings | None = None) -> Batches:
        frame = self.frame
        sources = [
            np.array([*frame.before, *ids, *frame.after])
            for ids in self.encode_truncated(
                [self.options.prefix + t for t in self.texts(data)], self.options.length - len(frame.before) - len(frame.after)
            )
        ]
        if self.target.name not in data.rows.columns:
            targets = None
        else:
            targets = self.encode_truncated(
                self.translations(data), self.options.length - len(frame.target_start), self.text.for_targets
            )
        lengths = np.array([len(s) for s in sources])
        begin, end, known = np.array(frame.target_start), np.array([frame.end]), np.full(len(frame.target_start) - 1, -1)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            source, mask = self.text.batch([sources[i] for i in index])
            batch = {
                "source": torch.from_numpy(source),
                "source_mask": torch.from_numpy(mask),
                "row": torch.from_numpy(np.asarray(index)),
            }
            if targets is not None:
                said, _ = self.text.batch([np.concatenate([begin, targets[i]]) for i in index])
                follows, real = self.text.batch([np.concatenate([known, targets[i], end]) for i in index])
                # Padding comes last and attention is causal, so that no mask is needed.
                batch |= {"tokens": torch.from_numpy(said), "target": torch.from_numpy(np.where(real, follows, -1))}
            return batch

        return Batches(len(sources), make, lengths if targets is None else lengths + np.array([len(t) for t in targets]))

    def encode_plain(self, texts: list[str], tokenizer: TextTokenizer | None = None) -> list[np.ndarray]:
        """Return token ids without special tokens; an empty text becomes the unknown token."""
        text = tokenizer or self.text
        if not self.options.tokenizer:
            return text.encode(texts, 100_000)[0]
        return [ids if len(ids) else np.array([text.unknown]) for ids in text.encode_exact(texts)]

    def encode_truncated(self, texts: list[str], length: int, tokenizer: TextTokenizer | None = None) -> list[np.ndarray]:
        tokens = self.encode_plain(texts, tokenizer)
        cut = sum(len(t) > length for t in tokens)
        if cut and (note := f"{cut} texts are longer than {length} tokens and are truncated") not in self.notes:
            self.notes.append(note)
        return [t[:length] for t in tokens]

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            scored = objective.outputs(batch) if "target" in batch else {}
            return {**scored, "said": self.generate(objective.model, batch["source"], batch["source_mask"], batch["row"])}

        return answer

    def generate(self, model: Any, source: Tensor, mask: Tensor, numbers: Tensor | None = None) -> Tensor:  # B S -> B T
        """Generate outputs, -1 after their end; `numbers` are row numbers that seed sampling per row."""
        limits = self.limits(mask.sum(1)).clamp(max=self.options.length - len(self.frame.target_start))
        return generate_targets(
            model,
            source,
            mask,
            self.frame,
            limits,
            self.predict_options,
            self.text,
            None if numbers is None else numbers.tolist(),
        )

    def limits(self, lengths: Tensor) -> Tensor:  # B source lengths -> B maximum output lengths
        """Return 1.5 times the source length plus 10 tokens."""
        return (lengths * 3 // 2 + 10).clamp(max=self.predict_options.max_new_tokens)

    def stream(self, objective: Objective, source: Any) -> Iterator[str] | None:
        data = self.read([source])
        if len(data) != 1 or self.predict_options.effective_beams > 1:
            return None
        batch = self.batches(data, None).make(np.arange(1), None)
        tokens, mask = (batch[name].to(next(objective.parameters()).device) for name in ("source", "source_mask"))
        most = int(self.limits(mask.sum(1)).clamp(max=self.options.length - len(self.frame.target_start))[0])
        return stream_text(
            EncoderDecoderState(objective.model, tokens, mask),
            self.frame.target_start,
            replace(self.predict_options, max_new_tokens=most),
            eos_token_ids=(self.frame.end,),
            decode=self.text.decode,
        )

    def postprocess(self, outputs: Arrays) -> Arrays:
        if "said" not in outputs:
            return outputs
        texts = [
            truncate_at_stop(self.text.decode(row[row >= 0]), self.predict_options.stop_list).strip()
            for row in outputs["said"].astype(int)
        ]
        return {**outputs, "text": np.array(texts, dtype=object)}

    def targets(self, data: Data) -> Arrays:
        return {"text": np.array(self.translations(data), dtype=object), "source": np.array(self.texts(data), dtype=object)}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {}
        if "text" in outputs:
            said, right = list(map(compose, outputs["text"])), [list(map(compose, targets["text"]))]
            bleu, chrf = build_bleu_and_chrf(right[0])
            scores = {"bleu": bleu.corpus_score(said, right).score, "chrf": chrf.corpus_score(said, right).score}
        if "nats" in outputs:
            scores["loss"] = float(outputs["nats"].sum(dtype=np.float64) / max(outputs["count"].sum(), 1))
        return scores

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return bootstrap intervals over sentences, those of BLEU and chrF from counts that sacreBLEU takes once."""
        from fieldguide.tasks.base import bootstrap_intervals

        found = bootstrap_intervals(self, {name: values for name, values in outputs.items() if name != "text"}, targets)
        if "text" in outputs:
            said, right = list(map(compose, outputs["text"])), list(map(compose, targets["text"]))
            for name, metric in zip(("bleu", "chrf"), build_bleu_and_chrf(right)):
                score = metric.corpus_score(said, [right], n_bootstrap=RESAMPLES)
                found[name] = (float(score._mean - score._ci), float(score._mean + score._ci))
        return found

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{"text": text} for text in outputs["text"]]

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        return [Baseline("copy", "returns the source itself", {"text": np.array(self.texts(test), dtype=object)})]

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        frame, texts = self.frame, [self.options.prefix + source for source, _ in self.shown]
        tokens, mask = self.text.batch(
            [
                np.array([*frame.before, *ids, *frame.after])
                for ids in self.encode_truncated(texts, self.options.length - len(frame.before) - len(frame.after))
            ]
        )
        where = next(objective.parameters()).device
        said = self.generate(objective.model, torch.from_numpy(tokens).to(where), torch.from_numpy(mask).to(where))
        return [
            Quotes(
                f"{self.made} during training",
                "",
                [
                    Quote(self.text.decode(row[row >= 0]).strip(), f"source: {source} (reference: {right})")
                    for row, (source, right) in zip(said.cpu().numpy(), self.shown)
                ],
            )
        ]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        said, right, source = (list(map(compose, texts)) for texts in (outputs["text"], targets["text"], targets["source"]))
        bleu, chrf = build_bleu_and_chrf(right)
        each = np.array([chrf.sentence_score(s, [r]).score for s, r in zip(said, right)])
        length = np.array([len(s.split()) for s in source])
        groups = [
            (f"{low}-{high} words", (length >= low) & (length <= high))
            for low, high in ((1, 5), (6, 10), (11, 15), (16, 20), (21, 30), (31, 1000))
        ]
        order = np.argsort(each, kind="stable")
        row = lambda i: (test.locate_row(int(i)), source[i], right[i], said[i], float(each[i]))
        bleu.corpus_score(said, [right])  # signatures exist only after a score was computed
        chrf.corpus_score(said, [right])
        signatures = f"{bleu.get_signature()} and {chrf.get_signature()}"
        header = ("row", "source", "reference translation", "predicted translation", "chrF")
        return {
            "Sentences": [
                Bars(
                    "chrF by length of the source",
                    f"Scores by sacreBLEU: {signatures}.",
                    {name: float(each[rows].mean()) for name, rows in groups if rows.any()},
                ),
                Table(
                    "Worst",
                    "Test sentences with the lowest chrF: wrong predictions or wrong references.",
                    header,
                    [row(i) for i in order[:SHOWN_SENTENCES]],
                    heat=("chrF",),
                ),
                Table(
                    "Random sample",
                    "Random test sentences.",
                    header,
                    [row(i) for i in np.random.default_rng(0).permutation(len(each))[: SHOWN_SENTENCES // 2]],
                    heat=("chrF",),
                ),
            ]
        }

    STATE: ClassVar = {"median": float, "shown": list[tuple[str, str]]}

    def state(self) -> dict[str, Any]:
        return {"median": self.median, "shown": self.shown}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.median = TextTokenizer.load(folder), state["median"]
        task.frame = resolve_markers(task.text, options)
        task.shown = [tuple(pair) for pair in state["shown"]]
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


def generate_targets(
    model: Any,
    source: Tensor,
    mask: Tensor,
    frame: SequenceMarkers,
    limits: Tensor,
    how: GenerationConfig,
    text: TextTokenizer,
    numbers: list[int] | None = None,
) -> Tensor:
    """Generate outputs of at most `limits` (B) tokens from sources: B S, B S bool -> B T, -1 after their end."""
    rows = generate_batch(
        EncoderDecoderState(model, source, mask),
        [frame.target_start] * len(source),
        how,
        eos_token_ids=(frame.end,),
        decode=text.decode,
        row_ids=numbers,
        max_lengths=limits,
        prefix_length=len(frame.target_start) - 1,
    )
    said = torch.full((len(rows), max(map(len, rows))), -1)
    for place, row in zip(said, rows):
        place[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return said


def suggest_vocab_size(characters: int) -> int:
    """Return a vocabulary size for this many characters of two languages: a power of two, at least 512."""
    return 2 ** round(max(9.0, np.log2(4 * np.sqrt(max(characters, 1)))))


def build_bleu_and_chrf(right: list[str]) -> tuple[Any, Any]:
    """Return BLEU (Papineni et al. 2002, doi:10.3115/1073083.1073135) and chrF (Popović 2015,
    doi:10.18653/v1/W15-3049).

    If the references are in a language written without spaces, BLEU counts characters: Chinese as sacreBLEU's "zh"
    does.
    """
    from sacrebleu.metrics import BLEU, CHRF

    text = "".join(right)
    han, others, every = (len(re.findall(kind, text)) for kind in (f"[{HAN}]", f"[{OTHER_UNSPACED}]", r"[^\W\d_]"))
    if 2 * (han + others) <= every:
        return BLEU(), CHRF()
    return BLEU(tokenize="zh" if han > 9 * others else "char"), CHRF()


TASKS = (Translation,)
