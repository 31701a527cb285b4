"""Text generation: a language model that continues prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Bars, Quote, Quotes, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.column_types import CHAT_ROLES
from fieldguide.data.dataset import LINE, Column, Data, Finding
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.conversations import Conversations, take_until_answer, to_messages
from fieldguide.data.preprocessing.tokenizer import END_OF_TEXT
from fieldguide.data.preprocessing.tokenizer_files import CHAT_TEMPLATE_FILE
from fieldguide.data.validation.checks import enforce
from fieldguide.data.validation.findings import places
from fieldguide.metrics.ngram_baseline import NGram
from fieldguide.models.generation import GenerationConfig, generate, generate_batch, stream_text
from fieldguide.models.generation.stop_strings import truncate_at_stop
from fieldguide.objectives import NextToken, Objective
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import TextTask
from fieldguide.tasks.text.signature import TextGenerationSignature

PASSAGE_CHARACTERS = 2000  # approximate characters of the passages that long texts are split into, at line ends
MIN_LONG_TEXT_PASSAGES = 20  # a text of at least this many passages is split by position: its end is the test set
TEST_FRACTION, VALIDATION_FRACTION = 0.1, 0.05  # fractions of a long text, from its end, if the source has no splits
CHAT_SPECIAL_TOKENS = (END_OF_TEXT, *(f"<|{who}|>" for who in CHAT_ROLES))
MAX_TOKENS_BY_DEVICE = {"cpu": 128, "mps": 512, "cuda": 1024}  # maximum tokens of a row by device, if the user sets no length
TOKENS_PER_STEP = 4096  # approximate tokens per step, if the user sets no batch size
PART_COLUMN = "#part"  # index of the row's passage within its text; 0 begins a text
PROMPT_WORDS = 8  # of a text that is shown as an example of a prompt
SAMPLE_TOKENS = 160  # tokens of a sample in the report


class TextGeneration(TextGenerationSignature, TextTask):
    name = "text-generation"
    reads = (
        "text files, or a table (CSV, JSON Lines) with a text column, or JSON Lines with conversations "
        "(`messages` with role and content)"
    )
    input_types = ("tokens",)
    feature = ("text", "messages")
    output_types = ("tokens",)
    column_spec = ColumnSpec("none", columns={"text": "text"})
    metrics = (
        Metric("loss", "min", "nats per token"),
        Metric("perplexity", "min", "effective number of tokens to choose from"),
        Metric("bits_per_byte", "min", "bits per byte of text"),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8}

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # tokens of a row
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str = "bytes"  # bytes: byte-level BPE; characters; or the path of a tokenizer.json

    PredictOptions = GenerationConfig  # type: ignore[assignment]  # any dataclass of options

    text: TextTokenizer
    tokens: int  # of the training rows
    chat: bool = False  # whether rows are conversations
    first: Sequence[tuple[str, str]] = ()  # an example conversation up to its first answer

    # Reading

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("text")) + len(data.features("messages")) == 1:
            return None
        return "one column of text or messages (set its kind with --set column.NAME=text)"

    @classmethod
    def match(cls, data: Data) -> str | None:
        if data.target is None and not cls.missing_requirements(data) and len(data.features()) == 1:
            return "texts and no other column"
        return None

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Split long texts into passages, the last of which are the test set; short texts stay whole."""
        if not data.features("text"):
            return drop_rejected(data, options.tokenizer)
        name = data.features("text")[0].name
        cut = [split_passages(text) for text in data.rows[name].to_list()]
        counts = np.array([len(pieces) for pieces in cut])
        rows = np.repeat(np.arange(len(data)), counts)
        part = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        whole = data.take(rows)
        line = np.concatenate([np.cumsum([0, *(p.count("\n") for p in pieces[:-1])]) for pieces in cut])
        whole.rows = whole.rows.with_columns(
            pl.Series(name, [p for pieces in cut for p in pieces], dtype=pl.String),
            pl.Series(PART_COLUMN, part),
            pl.col(LINE) + line,
        )
        side = np.full(len(rows), "train", dtype=object) if whole.splits is None else whole.splits
        lacking = [
            (split, share) for split, share in (("test", TEST_FRACTION), ("val", VALIDATION_FRACTION)) if split not in side
        ]
        for row in np.flatnonzero(counts >= MIN_LONG_TEXT_PASSAGES):
            own = np.flatnonzero(rows == row)
            end = len(own) if side[own[0]] == "train" else 0
            for split, share in lacking:
                take = round(share * end)
                side[own[end - take : end]] = split
                end -= take
                whole.splits = side
        return whole

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        task.chat = not data.features("text")
        texts = [text for row in task.turns(data) for _, text in row]
        task.fit_tokenizer(texts)
        if task.template:
            turns = task.turns(data)
            task.notes.append(task.template.describe(turns, data.locate_row))
            task.first = next((turns_before for row in turns if (turns_before := take_until_answer(row))), [("user", "")])
        tokens = len(task.concatenate_texts(data)[0]) if task.template else sum(map(len, task.text.encode_exact(texts)))
        longest = options.length or min(MAX_TOKENS_BY_DEVICE[device().type], max(8, tokens // 32))
        task.options = fill_options(options, length=longest, vocab_size=task.text.size)
        task.tokens = tokens
        return task

    def fit_tokenizer(self, texts: Sequence[str]) -> None:
        """Fit a tokenizer on texts, or load the one that the options name.

        Raises `DataError` if rows are conversations and a loaded tokenizer cannot write them.
        """
        options = self.options
        if options.tokenizer in ("bytes", "characters"):
            self.text = TextTokenizer.fit_exact(
                texts,
                size=options.vocab_size,
                characters=options.tokenizer == "characters",
                special=CHAT_SPECIAL_TOKENS if self.chat else (END_OF_TEXT,),
            )
            return
        self.text = TextTokenizer.load(options.tokenizer)
        lacking = [s for s in CHAT_SPECIAL_TOKENS if self.text.tokenizer.token_to_id(s) is None]
        if self.chat and not self.template and lacking:
            raise DataError(
                f"{options.tokenizer}: conversations need a chat template in the tokenizer's folder "
                f"({CHAT_TEMPLATE_FILE}, or chat_template in tokenizer_config.json) or the tokens "
                f"{', '.join(CHAT_SPECIAL_TOKENS)}. Missing tokens: {', '.join(lacking)}."
            )

    # Token rows

    def turns(self, data: Data) -> list[list[tuple[str, str]]]:
        """Return each row as (speaker, text) pairs; a plain text has one pair with an empty speaker."""
        values = data.rows[self.column].to_list()
        if not self.chat:
            return [[("", text or "")] for text in values]
        return [[(m["role"], m["content"]) for m in said or ()] for said in values]

    @cached_property
    def template(self) -> Conversations | None:
        """Return the chat template if rows are conversations and the tokenizer has one."""
        return Conversations(self.text) if self.chat and self.text.template else None

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the tokens that end an answer, including the token that the chat template puts after answers."""
        closing = self.template.closing if self.template else None
        return tuple(dict.fromkeys((*self.text.ends, *([] if closing is None else [closing]))))

    def concatenate_texts(self, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows as one int64 array of token ids, and which of them have a loss.

        In conversations the loss covers the assistant's messages with their end token. Texts are separated by the
        end token and the tokenizer's prefix.
        """
        if self.template:
            return self.template.stream(self.turns(data), data.locate_row)
        begins = data.rows[PART_COLUMN].to_numpy() == 0 if PART_COLUMN in data.rows.columns else np.ones(len(data), dtype=bool)
        turns = self.turns(data)
        encoded = iter(self.text.encode_exact([text for row in turns for _, text in row]))
        special, end = (lambda who: self.text.tokenizer.token_to_id(f"<|{who}|>")), np.array([self.text.end])
        between = np.array([self.text.end, *([] if self.chat else self.text.prefix_ids())])
        tokens, has_loss = [], []
        for row, begin in zip(turns, begins):
            if begin:
                tokens.append(between)
                has_loss.append(np.arange(len(between)) < (not self.chat))  # the tokenizer's prefix is not predicted
            for who, _ in row:
                ids = next(encoded)
                if who:
                    ids = np.concatenate([[special(who)], ids, end])
                tokens.append(ids)
                has_loss.append(np.full(len(ids), who in ("", "assistant")))
                if who:
                    has_loss[-1][0] = False  # the next speaker is not predicted
        return np.concatenate(tokens), np.concatenate(has_loss)

    def batches(self, data: Data, card: Card | None, settings: Settings | None = None) -> Batches:
        """Return packed rows of `length` tokens. Training rows begin at random offsets, so that every epoch differs."""
        tokens, has_loss = self.concatenate_texts(data)
        length = self.options.length
        count = max(1, -(-(len(tokens) - 1) // length))
        room = len(tokens) - 1 - length  # the last position at which a full row can begin
        packed = torch.from_numpy(np.pad(tokens, (0, max(0, count * length + 1 - len(tokens))), constant_values=self.text.end))
        target = torch.from_numpy(np.pad(np.where(has_loss, tokens, -1), (0, len(packed) - len(tokens)), constant_values=-1))
        offsets = torch.arange(length)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            first = torch.from_numpy(index) * length
            if generator is not None and room > 0:
                first = (first + torch.randint(length, first.shape, generator=generator)).clamp(max=room)
            at = first[:, None] + offsets
            return {"tokens": packed[at], "target": target[at + 1]}

        return Batches(count, make)

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.text.size, "length": self.options.length}

    def data_facts(self) -> dict[str, Any]:
        length = self.options.length
        return {"rows": max(1, self.tokens // length), "tokens": length, "length": length, "vocab_size": self.text.size}

    @property
    def max_batch_size(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS_PER_STEP / self.options.length)), 1, 256))

    min_batch_size = 8

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return NextToken(model, card.inputs, settings.label_smoothing)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the UTF-8 bytes of each packed row's targets."""
        target = self.batches(data, None).make(np.arange(len(self.batches(data, None))), None)["target"].numpy()
        sizes = np.append(self.text.count_token_bytes(), 0)  # the last entry for -1
        return {"bytes": sizes[target].sum(1)}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        nats, count, size = outputs["nats"].astype(np.float64).sum(), outputs["count"].sum(), targets["bytes"].sum()
        loss = float(nats / max(count, 1))
        return {
            "loss": loss,
            "perplexity": float(np.exp(min(loss, 700))),
            "bits_per_byte": float(nats / np.log(2) / size) if size else float("nan"),
        }

    def prepare_test(self, train: Data, held: Data) -> None:
        self.ngram = NGram(self.concatenate_texts(train)[0], self.text.size)

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        tokens, _ = self.concatenate_texts(test)
        nats = np.append(self.ngram.compute_nats(tokens)[1:], 0)  # of the token that follows each token
        batches = self.batches(test, None)
        every = batches.make(np.arange(len(batches)), None)
        target = every["target"].numpy()
        padded = np.zeros(target.size)
        padded[: len(nats)] = nats
        has_loss = target >= 0
        rows = np.where(has_loss, padded.reshape(target.shape), 0).sum(1)
        return [
            Baseline(
                f"{self.ngram.order}-gram",
                f"counts of up to {self.ngram.order} consecutive tokens, with Witten-Bell backoff",
                {"nats": rows, "count": has_loss.sum(1)},
            )
        ]

    # Predictions

    def predict_batches(self, data: Data, card: Card) -> Batches:
        prompts = [self.prompt(row) for row in self.turns(data)]

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            width = max(len(prompts[i]) for i in index)
            rows = torch.tensor([[-1] * (width - len(prompts[i])) + prompts[i] for i in index])
            return {"prompt": rows, "row": torch.from_numpy(index)}

        return Batches(len(prompts), make, np.array([len(p) for p in prompts]))

    def prompt(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids that the model continues: the start of a text, or the conversation so far."""
        if self.template:
            return self.template.prompt(turns)
        ids = [self.text.end] if self.chat else self.text.prefix_ids() or [self.text.end]
        for (who, _), encoded in zip(turns, self.text.encode_exact([text for _, text in turns])):
            ids += [self.text.token_id(f"<|{who}|>"), *encoded, self.text.end] if who else encoded.tolist()
        return ids + ([self.text.token_id("<|assistant|>")] if self.chat else [])

    def generate_tokens(
        self, objective: Objective, prompts: list[list[int]], predict_options: GenerationConfig
    ) -> Iterator[Tensor]:
        return generate(
            objective.model,
            prompts,
            predict_options.max_new_tokens,
            sampling=predict_options.sampling,
            eos_token_ids=self.ends,
            seed=predict_options.seed,
        )

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if "prompt" not in batch:
                return objective.outputs(batch)
            prompts = [[i for i in prompt if i >= 0] for prompt in batch["prompt"].tolist()]
            said = generate_batch(
                objective.model,
                prompts,
                self.predict_options,
                eos_token_ids=self.ends,
                decode=self.text.decode,
                row_ids=batch["row"].tolist(),
            )  # sampling depends on the row number, not on the batch
            return {
                "said": torch.nn.utils.rnn.pad_sequence(
                    [torch.tensor(row, dtype=torch.int64) for row in said], batch_first=True, padding_value=-1
                )
            }

        return answer

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        ends = {-1, *self.ends}
        return [
            {"text": self.truncate_at_stop(self.text.decode([i for i in row if i not in ends]))}
            for row in outputs["said"].astype(int)
        ]

    def truncate_at_stop(self, text: str) -> str:
        return truncate_at_stop(text, self.predict_options.stop_list)

    def make_row(self, text: str) -> pl.DataFrame:
        """Return a row of the table for a text given as input; in a conversation it is the user's message."""
        return pl.DataFrame({self.column: [to_messages([("user", text)])]}) if self.chat else super().make_row(text)

    def stream(self, objective: Objective, source: Any) -> Iterator[str] | None:
        data = self.read([source])
        if len(data) != 1 or self.predict_options.effective_beams > 1:
            return None
        return stream_text(
            objective.model,
            self.prompt(self.turns(data)[0]),
            self.predict_options,
            eos_token_ids=self.ends,
            decode=self.text.decode,
        )

    # Report

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        predict_options = self.PredictOptions(max_new_tokens=min(SAMPLE_TOKENS, 2 * self.options.length))
        start, ends = self.prompt(self.first or [("", "")]), self.ends
        said = torch.cat(list(self.generate_tokens(objective, [start], predict_options))).tolist()
        what = f"Answers to {self.first[-1][1][:SAMPLE_TOKENS]!r}" if self.first else "Generated without a prompt"
        return [
            Quotes(
                "Samples during training",
                f"{what}, with the same random seed each time.",
                [Quote(self.text.decode([i for i in said if i not in ends]), "")],
            )
        ]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        per_row = outputs["nats"] / np.maximum(outputs["count"], 1)
        shown: list[ReportElement] = [
            Bars(
                "Loss by test row",
                "Nats per token of the test rows, by decile.",
                {f"{10 * q} %": float(v) for q, v in enumerate(np.quantile(per_row, np.linspace(0, 1, 11)))},
                unit="nats",
            )
        ]
        found = {"Scores by row": shown}
        if objective is not None:
            found["Samples"] = self.sample_elements(test, objective)
        return found

    def sample_elements(self, test: Data, objective: Objective) -> list[ReportElement]:
        """Return continuations of test texts at several temperatures, and the generation speed."""
        if self.template:
            prompts = [self.prompt(take_until_answer(turns) or self.first) for turns in self.turns(test)[:3]]
        else:
            prompts = [p[: 1 + self.options.length // 4] for p in map(self.prompt, self.turns(test)[:3])]
        ends = self.ends
        quotes, speeds = [], []
        for temperature in (0.0, 0.7, 1.0):
            predict_options = self.PredictOptions(max_new_tokens=SAMPLE_TOKENS, temperature=temperature, top_p=1.0)
            started, steps = time.perf_counter(), list(self.generate_tokens(objective, prompts, predict_options))
            taken = time.perf_counter() - started
            speeds.append((f"{temperature:g}", len(prompts), len(steps) * len(prompts) / taken))
            for prompt, row in zip(prompts, torch.stack(steps, 1).tolist()):
                quotes.append(
                    Quote(
                        self.text.decode(prompt[1:])[-300:]
                        + " ⟶ "
                        + self.text.decode([i for i in row if i >= 0 and i not in ends]),
                        f"temperature {temperature:g}",
                    )
                )
        return [
            Quotes("Continued beginnings of test texts", "The text before the arrow is the prompt.", quotes),
            Table(
                "Speed",
                "Measured while generating these samples, with a key-value cache.",
                ("temperature", "batch size", "tokens per second"),
                speeds,
            ),
        ]

    def example_input(self, test: Data) -> ExampleInput | None:
        turns = self.turns(test.take([0]))[0] if len(test) else []
        words = turns[0][1].split() if turns else []
        return ExampleInput(" ".join(words[:PROMPT_WORDS])) if words else None

    # Saved with the run

    STATE: ClassVar = {"chat": bool, "tokens": float, "first?": list[tuple[str, str]]}

    def state(self) -> dict[str, Any]:
        return {"chat": self.chat, "tokens": self.tokens, **({"first": self.first} if self.first else {})}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.chat, task.tokens = TextTokenizer.load(folder), state["chat"], state["tokens"]
        task.first = [tuple(turn) for turn in state.get("first", ())]
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


def drop_rejected(data: Data, tokenizer: str) -> Data:
    """Return the conversations without those that the chat template of a tokenizer folder rejects, which become a finding.

    Raises `BadData`, with all places, if more are rejected than may be dropped.
    """
    columns = data.features("messages")
    if not columns or tokenizer in ("bytes", "characters"):
        return data
    text = TextTokenizer.load(tokenizer)
    if not text.template:
        return data
    rows = [[(m["role"], m["content"]) for m in messages or ()] for messages in data.rows[columns[0].name].to_list()]
    rejected = Conversations(text).find_rejected(rows)
    if not rejected:
        return data
    bad = np.zeros(len(data), dtype=bool)
    bad[list(rejected)] = True
    reasons = list(dict.fromkeys(rejected.values()))
    what = f"conversations that cannot be rendered: {'; '.join(reasons[:3])}"
    found = Finding(
        "chat-template", "warning", what, places(data, bad), len(rejected), "Correct or remove them.", len(rejected)
    )
    enforce([found], len(data), source=data.source, offer=False)
    kept = data.drop_rows(bad)
    kept.findings = [*data.findings, found]
    return kept


def split_passages(text: str | None) -> list[str]:
    """Split a text into pieces of about `PASSAGE` characters that end at line ends; joined they are the text."""
    text = text or ""
    pieces, start = [], 0
    while len(text) - start > 1.5 * PASSAGE_CHARACTERS:
        end = text.find("\n", start + PASSAGE_CHARACTERS) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if start < len(text) or not pieces else pieces


TASKS = (TextGeneration,)
