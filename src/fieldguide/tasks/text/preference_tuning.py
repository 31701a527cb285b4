"""Preference tuning: a language model learns from pairs of a chosen and a rejected answer (DPO, IPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Bars, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing.preferences import CHOSEN, COLUMN_SPEC, REJECTED, find_columns, prepare
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.objectives import Objective
from fieldguide.objectives.preference import Preference
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.embedding_report import shorten
from fieldguide.tasks.text.text_generation import TextGeneration

MAX_TOKENS_BY_DEVICE = {"cpu": 256, "mps": 512, "cuda": 1024}  # maximum tokens of a row by device, if the user sets no length
TOKENS_PER_STEP = 4096  # approximate tokens per step, if the user sets no batch size
LOSSES = ("sigmoid", "ipo")
SHOWN = 16  # pairs of a table in the report


class PreferenceTuning(TextGeneration):
    """Preference tuning of a language model, normally of one that was trained on instructions (`--weights`).

    The reference model is the network as it was at the start. The answers alone are scored: not the prompt, nor the template
    before the answer. Prompts that are too long lose their beginning, except the first token; answers lose their end.
    """

    name = "preference-tuning"
    reads = (
        "a table (CSV, JSON Lines) with columns prompt, chosen and rejected (texts or lists of messages), or chosen and rejected with "
        "whole conversations"
    )
    column_spec = COLUMN_SPEC
    metrics = (  # type: ignore[assignment]  # the inferred type of the base class has its own length
        Metric("accuracy", "max", "of pairs whose chosen answer gained more than the rejected one", percent=True),
        Metric("margin", "max", "mean difference of the rewards of chosen and rejected answers"),
        Metric("loss", "min", "preference loss"),
        Metric("likelihood_accuracy", "max", "of pairs whose chosen answer is more likely", percent=True),
    )
    monitor = "loss"
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8}
    needs_reference = True
    finetune_rate = 0.05  # larger steps leave the reference quickly, and texts degrade
    min_batch_size = 4

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # maximum tokens of a prompt with an answer
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str = "bytes"  # bytes: byte-level BPE; characters; or the path of a tokenizer.json
        beta: float = 0.1  # how much moving away from the reference costs: larger values stay closer
        loss: str = "sigmoid"  # sigmoid (DPO) or ipo

    smoothing: float = 0.0  # of the labels, for the loss that is scored
    reference_difference: np.ndarray | None = None  # of the log-probabilities under the reference, for the rows scored last

    # Reading

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        return None if find_columns(data) else "columns chosen and rejected, and prompt unless they hold whole conversations"

    @classmethod
    def match(cls, data: Data) -> str | None:
        return None if cls.missing_requirements(data) else "chosen and rejected answers"

    @classmethod
    def select_columns(cls, data: Data) -> Data:
        return data  # `build_examples` selects them

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        columns = find_columns(data)
        if columns is None:
            raise DataError(f"{data.source}: {cls.missing_requirements(data)} are needed. It has: {', '.join(data.columns)}.")
        return prepare(data, columns)

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        if options.loss not in LOSSES:
            raise SettingsError(f"task.loss={options.loss!r} is unknown. Choose {' or '.join(LOSSES)}.")
        if options.beta <= 0:
            raise SettingsError("task.beta must be above 0.")
        task = cls([c for c in data.columns.values() if c.kind in cls.feature], options)
        task.chat = bool(data.features("messages"))
        turns = task.turns(data)
        answers = [text for name in (CHOSEN, REJECTED) for text in data.rows[name].to_list()]
        task.fit_tokenizer([*(text for row in turns for _, text in row), *answers])
        task.first = turns[0]
        prompts, chosen, rejected = task.encode_pairs(data)
        sizes = [len(p) + max(len(a), len(b)) for p, a, b in zip(prompts, chosen, rejected)]
        length = suggest_length(sizes, MAX_TOKENS_BY_DEVICE[device().type])
        task.options = fill_options(options, length=length, vocab_size=task.text.size)
        if task.options.length < 4:
            raise SettingsError("task.length must be at least 4.")
        task.note_truncated(sum(size > task.options.length for size in sizes), len(sizes), task.options.length, "pairs")
        task.tokens = sum(map(len, (*prompts, *prompts, *chosen, *rejected)))
        return task

    def read_one(self, source: Any, answered: bool) -> Data:
        if not answered:
            return super().read_one(source, answered)
        data = read(source, column_spec=self.column_spec)
        if lacking := self.missing_requirements(data):
            raise DataError(f"{data.source}: evaluation needs {lacking}.")
        built = self.build_examples(data, self.options)
        if self.column not in built.rows.columns:
            expected = "conversations" if self.chat else "texts"
            raise DataError(f"{data.source}: the prompts of this run are {expected} in the column {self.column!r}.")
        return built

    # Token rows

    def encode_pairs(self, data: Data) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Return the token ids of each prompt and of its two answers, each with its end."""
        turns = self.turns(data)
        prompts = [np.array(self.prompt(row), dtype=np.int64) for row in turns]
        chosen, rejected = (self.encode_answers(turns, data.rows[name].to_list(), data) for name in (CHOSEN, REJECTED))
        return prompts, chosen, rejected

    def encode_answers(
        self, turns: Sequence[Sequence[tuple[str, str]]], answers: Sequence[str], data: Data
    ) -> list[np.ndarray]:
        """Return the token ids of answers up to the token that ends them, as they follow their prompts."""
        if not self.template:
            return [np.append(ids, self.text.end) for ids in self.text.encode_exact(list(answers))]
        rest = []
        for row, (prompt, answer) in enumerate(zip(turns, answers)):
            messages = [{"role": role, "content": text} for role, text in prompt]
            try:
                before = self.template.template(messages)
                whole = self.template.template([*messages, {"role": "assistant", "content": answer}], answer=False)
            except DataError as error:
                raise DataError(f"{data.locate_row(row)}: {error}") from None
            if not whole.startswith(before):
                raise DataError(
                    f"{data.locate_row(row)}: the chat template writes the prompt in another way if an answer follows, so the tokens of "
                    "the answer are unknown. Use another template."
                )
            rest.append(whole[len(before) :])
        found = []
        for ids, _ in self.text.encode_rendered(rest):
            ends = np.flatnonzero(np.isin(ids, self.ends))
            found.append(ids[: ends[-1] + 1] if len(ends) else np.append(ids, self.text.end))
        return found

    def batches(self, data: Data, card: Card | None, settings: Settings | None = None) -> Batches:
        """Return the pairs: rows with the chosen answers, then rows with the rejected ones."""
        rows = [truncate(*triple, self.options.length) for triple in zip(*self.encode_pairs(data))]

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            pairs = [(rows[i][0], rows[i][side]) for side in (1, 2) for i in index]
            width = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
            tokens = np.full((len(pairs), width), self.text.pad, dtype=np.int64)
            target = np.full((len(pairs), width), -1, dtype=np.int64)
            for place, (prompt, answer) in enumerate(pairs):
                whole = np.concatenate([prompt, answer])
                tokens[place, : len(whole) - 1] = whole[:-1]  # padding follows, which causal networks do not see
                target[place, len(prompt) - 1 : len(whole) - 1] = answer
            return {"tokens": torch.from_numpy(tokens), "target": torch.from_numpy(target)}

        return Batches(len(rows), make, np.array([len(p) + max(len(a), len(b)) for p, a, b in rows]))

    def data_facts(self) -> dict[str, Any]:
        length = self.options.length
        return {"tokens": length, "length": length, "vocab_size": self.text.size}

    @property
    def max_batch_size(self) -> int:
        return int(np.clip(2 ** int(np.log2(max(TOKENS_PER_STEP / (2 * self.options.length), 1))), 4, 64))

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        self.smoothing = settings.label_smoothing
        return Preference(model, card.inputs, parts.get("reference"), self.options.beta, self.smoothing, self.options.loss)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the number of tokens of both answers."""
        _, chosen, rejected = self.encode_pairs(data)
        return {"chosen_tokens": np.array([len(a) for a in chosen]), "rejected_tokens": np.array([len(a) for a in rejected])}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        if "difference" in outputs:  # of a baseline
            return {"accuracy": compute_win_rate(outputs["difference"])}
        scores = {}
        if "reference_chosen" in outputs:
            h = compute_gains(outputs)
            loss = Preference(torch.nn.Identity(), (), None, self.options.beta, self.smoothing, self.options.loss)
            scores = {
                "accuracy": compute_win_rate(h),
                "margin": float(self.options.beta * h.mean()),
                "loss": float(loss.compute_losses(torch.from_numpy(h)).mean()),
            }
        return {**scores, "likelihood_accuracy": compute_win_rate(outputs["chosen"] - outputs["rejected"])}

    def find_doubts(self, targets: Arrays) -> list[str]:
        longer = float((targets["chosen_tokens"] > targets["rejected_tokens"]).mean())
        return (
            [f"{100 * longer:.0f} % of the chosen answers are longer: length alone explains most preferences"]
            if longer > 0.9
            else []
        )

    def prepare_test(self, train: Data, held: Data) -> None:
        """Do nothing: there are no counts of tokens to prepare, as text generation has."""

    def postprocess(self, outputs: Arrays) -> Arrays:
        if "reference_chosen" in outputs:  # for the baseline
            self.reference_difference = outputs["reference_chosen"].astype(np.float64) - outputs["reference_rejected"]
        return outputs

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return the longer answer, and the one that was more likely under the reference."""
        targets = self.targets(test)
        longer = targets["chosen_tokens"] - targets["rejected_tokens"]
        found = [Baseline("longer answer", "prefers the answer with more tokens", {"difference": longer})]
        before = self.reference_difference
        if before is not None and len(before) == len(test):
            found.append(
                Baseline("reference", "prefers the answer that was more likely before training", {"difference": before})
            )
        return found

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        gains = self.options.beta * compute_gains(outputs)
        difference = targets["chosen_tokens"] - targets["rejected_tokens"]
        groups = {
            "chosen answer shorter": difference < 0,
            "equally long": difference == 0,
            "chosen answer longer": difference > 0,
        }
        rewards = {
            side: float(self.options.beta * (outputs[side] - outputs[f"reference_{side}"]).mean())
            for side in ("chosen", "rejected")
        }
        prompts = [row[-1][1] for row in self.turns(test)]
        texts = [test.rows[name].to_list() for name in (CHOSEN, REJECTED)]
        order = np.argsort(gains, kind="stable")
        row = lambda i: (test.locate_row(int(i)), *(shorten(column[i]) for column in (prompts, *texts)), f"{gains[i]:.3g}")
        header = ("row", "prompt", "chosen", "rejected", "margin")
        sample = np.random.default_rng(0).permutation(len(gains))[:SHOWN]
        found: dict[str, list[ReportElement]] = {
            "Preferences": [
                Bars(
                    "Accuracy by length",
                    "Whether preferences are more than a preference for long answers.",
                    {name: compute_win_rate(gains[rows]) for name, rows in groups.items() if rows.any()},
                ),
                Bars("Mean rewards", "Log-probability gained over the reference, times beta.", rewards),
                Table(
                    "Wrong preferences",
                    "Test pairs whose rejected answer gained most over the chosen one: mistakes, or wrong labels.",
                    header,
                    [row(i) for i in order[:SHOWN] if gains[i] < 0],
                ),
                Table("Random pairs", "", header, [row(i) for i in sample]),
            ]
        }
        found["Preferences"] = [e for e in found["Preferences"] if not isinstance(e, Table) or e.rows]
        if objective is not None:
            found["Samples"] = self.sample_elements(test, objective)
        return found

    def preview_data(self, training: Data) -> list[ReportElement]:
        prompts = [row[-1][1] for row in self.turns(training.take(range(min(len(training), 4))))]
        answers = [training.rows[name].head(len(prompts)).to_list() for name in (CHOSEN, REJECTED)]
        rows = [tuple(map(shorten, values)) for values in zip(prompts, *answers)]
        return [Table("Examples", "The first training pairs.", ("prompt", "chosen", "rejected"), rows)]


def truncate(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """Return a prompt and two answers that fit into `length` tokens together.

    Answers keep at least half of the tokens, and lose their end. The prompt, the same for both, loses its beginning but for the
    first token, which begins every text.
    """
    longest = max(len(chosen), len(rejected))
    room = max(length - min(len(prompt), length // 2), 1)  # for answers
    chosen, rejected = chosen[:room], rejected[:room]
    left = max(length - min(longest, room), 1)
    if len(prompt) > left:
        prompt = np.concatenate([prompt[:1], prompt[len(prompt) - left + 1 :]])
    return prompt, chosen, rejected


def compute_gains(outputs: Arrays) -> np.ndarray:
    """Return the log-ratio of the chosen answer minus that of the rejected one."""
    better, worse = (outputs[side].astype(np.float64) - outputs[f"reference_{side}"] for side in ("chosen", "rejected"))
    return better - worse


def compute_win_rate(difference: np.ndarray) -> float:
    """Return the fraction of positive differences; those of 0 count half."""
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


TASKS = (PreferenceTuning,)
