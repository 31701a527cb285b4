"""Denoising: a sequence-to-sequence model learns to restore corrupted texts, from plain texts alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Annotated, Any, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import PRETRAINING_OBJECTIVES, Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Quote, Quotes, ReportElement
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.sequence_markers import SequenceMarkers, resolve_markers
from fieldguide.data.preprocessing.tokenizer import END_OF_TEXT, SPECIAL_TOKENS
from fieldguide.models.generation import BeamSearch
from fieldguide.objectives import DenoisingObjective, Objective
from fieldguide.objectives import denoising as damage
from fieldguide.tasks.base import Arrays
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.packing import PackedTextTask
from fieldguide.tasks.text.signature import DenoisingSignature
from fieldguide.tasks.text.translation import generate_targets

SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))  # sentinels that replace the removed spans, in this order
DEFAULT_CORRUPTION = {"spans": (damage.T5_CORRUPTED_FRACTION, damage.T5_MEAN_SPAN_LENGTH), "infill": damage.BART_INFILLING}
SHOWN = 12  # test rows in the report


class Denoising(DenoisingSignature, PackedTextTask):
    """Packed rows are corrupted by the card's `pretraining_objective`, and the model writes the original.

    The loss covers all target tokens; the scores cover the removed tokens alone.
    """

    name = "denoising"
    input_types = ("pair",)
    output_types = ("tokens",)

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # tokens of a row, including special tokens
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str | None = None  # path of a tokenizer.json to use instead
        begin: int | None = None  # id of the token that starts the target
        language: str | None = None  # language code of a multilingual tokenizer (de_DE, deu_Latn)
        damage: str | None = None  # spans | infill; None: the model's own pretraining objective
        share: float | None = None  # fraction of the tokens that is removed; None: .15 for spans, .30 for infill
        mean: float | None = None  # mean tokens per removed span; None: 3

    @dataclass(frozen=True)
    class PredictOptions:
        num_beams: Annotated[int, Limits(1, 1000)] = 4  # number of beams; 1 = greedy decoding
        length_penalty: float = 1.0  # exponent of the length in the beam score: 0 = none, 1 = mean log-probability
        max_new_tokens: Annotated[int, Limits(1, 1000)] = 12  # maximum tokens per gap, on average

    frame: SequenceMarkers
    sentinels: np.ndarray  # their token ids, in the order of use

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        if options.damage not in (None, *PRETRAINING_OBJECTIVES):
            raise SettingsError(
                f"task.damage={options.damage!r} is unknown. Choose one of {', '.join(PRETRAINING_OBJECTIVES)}."
            )
        if not 0 < (options.share or 0.5) < 1 or (options.mean or 1) < 1:
            raise SettingsError("task.share must be between 0 and 1, and task.mean must be at least 1.")
        task = cls.create(data, options, (*SPECIAL_TOKENS, END_OF_TEXT, *SENTINELS))
        if options.begin is None and len(find_sentinels(task.text)) < len(SENTINELS):
            # With a checkpoint, `begin` is known and the vocabulary cannot grow.
            task.text.tokenizer.add_special_tokens(list(SENTINELS))
            task.counts = np.pad(task.counts, (0, task.text.size - len(task.counts)))
            task.options = replace(task.options, vocab_size=task.text.size)
            task.notes.append(f"{options.tokenizer} has no sentinel tokens <extra_id_0> ... for removed spans: they are added")
        task.find_frame()
        if task.options.length < task.special_tokens_per_row + 8:
            raise SettingsError(f"task.length must be at least {task.special_tokens_per_row + 8}.")
        return task

    def find_frame(self) -> None:
        o = self.options
        self.frame = resolve_markers(
            self.text,
            SimpleNamespace(tokenizer=o.tokenizer, begin=o.begin, source_language=o.language, target_language=o.language),
        )
        self.sentinels = find_sentinels(self.text)

    @property
    def separator(self) -> list[int]:
        """Return the separator, or nothing if it also ends the target: the model would stop there."""
        return [self.text.sep] if self.text.sep != self.frame.end else []

    @property
    def special_tokens_per_row(self) -> int:
        """Return the maximum number of special tokens in a row."""
        return self.frame.longest + 2

    def resolve_corruption(self, card: Card | None) -> None:
        """Set the corruption options that are None. Raises `SettingsError` if the tokenizer lacks the tokens."""
        if self.options.damage is None:
            self.options = fill_options(self.options, damage=card.pretraining_objective if card else "spans")
        share, mean = DEFAULT_CORRUPTION[self.options.damage]
        self.options = fill_options(self.options, share=share, mean=mean)
        o = self.options
        spans = round((o.length - self.special_tokens_per_row) * o.share / o.mean) + 1
        if o.damage == "spans" and len(self.sentinels) <= spans:
            raise SettingsError(
                f"{o.tokenizer or 'the tokenizer'} has {len(self.sentinels)} tokens <extra_id_0> ..., but rows of "
                f"{o.length} tokens need {spans + 1}. Use shorter rows (task.length), longer spans (task.mean) or "
                "task.damage=infill."
            )
        if o.damage == "infill" and self.text.mask_token == self.text.unknown:
            raise SettingsError(
                f"{o.tokenizer} has no mask token (<mask> or [MASK]) to replace the removed tokens. Use task.damage=spans."
            )

    # Rows

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:  # N L int64, padded
        """Corrupt rows; returns source, source_mask, tokens, target and the mask `removed` of the removed tokens."""
        text, frame, o = self.text, self.frame, self.options
        lengths = (tokens != text.pad).sum(1)
        plain = tokens != text.sep  # separators are not scored
        if o.damage == "spans":
            span = damage.sample_spans(lengths, tokens.shape[1], rng, o.share, o.mean)
            source, mask, target = damage.corrupt_spans(tokens, span, lengths, self.sentinels, frame.end, text.pad)
            removed = (target >= 0) & ~np.isin(target, self.sentinels) & (target != frame.end) & (target != text.sep)
        else:
            begins, gone = damage.sample_infill_masks(lengths, tokens.shape[1], rng, o.share, o.mean)
            source, mask = damage.apply_infilling(tokens, lengths, text.mask_token, text.pad, begins, gone)
            source, mask = surround_rows(source, mask, frame.before, frame.after, text.pad)
            target, real = surround_rows(tokens, tokens != text.pad, (), (frame.end,), text.pad)
            target = np.where(real, target, -1)
            removed = np.pad(gone & plain, ((0, 0), (0, 1)))[:, : target.shape[1]]  # narrower if every row is short
        said = np.where(target < 0, text.pad, target)[:, :-1]
        lead = np.broadcast_to(np.array(frame.target_start), (len(tokens), len(frame.target_start)))
        skip = ((0, 0), (len(frame.target_start) - 1, 0))  # the tokens that start every target have no loss
        return {
            name: torch.from_numpy(np.ascontiguousarray(x[:, : o.length]))
            for name, x in {
                "source": source,
                "source_mask": mask,
                "tokens": np.concatenate([lead, said], 1),
                "target": np.pad(target, skip, constant_values=-1),
                "removed": np.pad(removed, skip),
            }.items()
        }

    def batches(self, data: Data, card: Card | None, settings: Settings | None = None) -> Batches:
        """Return the examples. Training rows get random offsets and new corruption each time; scored rows are always
        the same.
        """
        self.resolve_corruption(card)
        packed, drawn = self.rows(data, self.options.length - self.special_tokens_per_row)
        fixed: dict[str, Tensor] = {}

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            chosen = torch.from_numpy(index)
            if generator is None:
                if not fixed:  # for all rows at once, so that the batch size has no effect
                    fixed.update(self.corrupt(packed.numpy(), np.random.default_rng(0)))
                return {name: x[chosen] for name, x in fixed.items()}
            rows = drawn(chosen, generator).numpy()
            return self.corrupt(rows, np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator))))

        return Batches(len(packed), make)

    def model_dims(self) -> dict[str, Any]:
        return {**super().model_dims(), "begin": self.frame.target_start[0], "end": self.frame.end, "pad": self.text.pad}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return DenoisingObjective(model, card.inputs, settings.label_smoothing)

    def targets(self, data: Data) -> Arrays:
        batches = self.batches(data, None)
        batch = batches.make(np.arange(len(batches)), None)
        return {"target": torch.where(batch["removed"], batch["target"], -1).numpy()}

    # Predictions

    def predict_batches(self, data: Data, card: Card) -> Batches:
        self.resolve_corruption(card)
        cut = [self.split_at_gaps(text) for text in self.texts_with_gaps(data)]
        spans, frame = self.options.damage == "spans", self.frame
        rows = []
        for place, pieces in enumerate(cut):
            if spans and len(pieces) > len(self.sentinels):
                raise DataError(
                    f"{data.locate_row(place)}: the text has {len(pieces) - 1} gaps, but at most "
                    f"{len(self.sentinels) - 1} can be filled."
                )
            ids = list(pieces[0])
            for number, piece in enumerate(pieces[1:]):
                ids += [int(self.sentinels[number]) if spans else self.text.mask_token, *piece]
            close = (frame.end,) if spans else frame.after
            rows.append(np.array([*frame.before, *ids, *self.separator, *close], dtype=np.int64))
            if len(rows[-1]) > self.options.length:
                raise DataError(
                    f"{data.locate_row(place)}: the text has {len(rows[-1])} tokens, but the model reads "
                    f"at most {self.options.length}. Shorten it."
                )
        gaps = np.array([len(pieces) - 1 for pieces in cut])
        self.request = cut

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            source, mask = self.text.batch([rows[i] for i in index])
            return {
                "source": torch.from_numpy(source),
                "source_mask": torch.from_numpy(mask),
                "gaps": torch.from_numpy(gaps[index]),
            }

        return Batches(len(rows), make, np.array([len(row) for row in rows]))

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if "gaps" not in batch:
                return objective.outputs(batch)
            return {"said": self.generate(objective.model, batch["source"], batch["source_mask"], batch["gaps"])}

        return answer

    def generate(self, model: Any, source: Tensor, mask: Tensor, gaps: Tensor) -> Tensor:  # B S -> B T, -1 behind the end
        """Generate the fillings of all gaps, or the whole text; -1 after the end."""
        limits = gaps * (self.predict_options.max_new_tokens + 1) + 2 + (0 if self.options.damage == "spans" else mask.sum(1))
        limits = limits.clamp(max=self.options.length - len(self.frame.target_start))
        return generate_targets(
            model,
            source,
            mask,
            self.frame,
            limits,
            BeamSearch(num_beams=self.predict_options.num_beams, length_penalty=self.predict_options.length_penalty),
            self.text,
        )

    def split_fillings(self, said: list[int], gaps: int) -> list[list[int]]:
        """Return the tokens generated after each sentinel; empty for a sentinel that was not generated."""
        number = {int(token): i for i, token in enumerate(self.sentinels)}
        found: list[list[int]] = [[] for _ in range(max(gaps, len(number)))]
        at = None
        for token in said:
            if token in number:
                at = number[token]
            elif at is not None and token not in (self.frame.end, self.text.sep):
                found[at].append(token)
        return found[:gaps]

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        """Return the text with its gaps filled and, for the objective "spans", the filling of each gap."""
        records: list[dict[str, Any]] = []
        for (first, *others), row in zip(self.request, outputs["said"].astype(int)):
            said = [token for token in row.tolist() if token >= 0]
            if self.options.damage == "infill":  # training rows are packed, so the model would continue with another text
                stop = next((place for place, token in enumerate(said) if token in self.separator), len(said))
                records.append({"text": self.decode(said[:stop]).strip()})
                continue
            filled, whole = self.split_fillings(said, len(others)), list(first)
            for filling, piece in zip(filled, others):
                whole += [*filling, *piece]
            records.append({"text": self.decode(whole), "gaps": [self.decode(filling).strip() for filling in filled]})
        return records

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        found = self.loss_elements(outputs)
        return found if objective is None else {**found, "Restored": self.restoration_elements(test, objective)}

    @torch.no_grad()
    def restoration_elements(self, test: Data, objective: Any) -> list[ReportElement]:
        """Return test rows as they were read, with the removed spans and the predictions under teacher forcing."""
        batches = self.batches(test, None)
        batch = batches.make(np.arange(min(SHOWN, len(batches))), None)
        device = next(objective.model.parameters()).device
        guess = objective.compute_logits({name: x.to(device) for name, x in batch.items()}).argmax(-1).cpu()
        quotes = []
        rows = zip(*(batch[k] for k in ("source", "source_mask", "removed", "target")), guess)
        for source, mask, removed, target, said in rows:
            runs = np.flatnonzero(np.diff(removed.numpy().astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
            pairs = [
                f"{self.decode(target[a:b].tolist()).strip()!r}: {self.decode(said[a:b].tolist()).strip()!r}" for a, b in runs
            ]
            quotes.append(Quote(self.decode_source(source[mask].tolist()), " · ".join(pairs), bad=False))
        return [
            Quotes(
                "Corrupted texts and their removed spans",
                "Each removed span, and the model's prediction of it: each token given the correct ones before it.",
                quotes,
            )
        ]

    def decode_source(self, ids: list[int]) -> str:
        """Return tokens as text, with ▁▁▁ for the removed spans."""
        marks = {*self.sentinels.tolist(), self.text.mask_token}
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token in marks:
                pieces.append([])
            elif token not in (self.text.cls, self.text.sep, self.frame.end):
                pieces[-1].append(token)
        return " ▁▁▁".join(self.decode(piece) for piece in pieces)

    # Saved with the run

    @classmethod
    def from_state(cls, columns: list[Any], options: Any, state: dict[str, Any], folder: Any) -> Self:
        task = super().from_state(columns, options, state, folder)
        task.find_frame()
        return task


def find_sentinels(text: TextTokenizer) -> np.ndarray:
    """Return the ids of the sentinels that the tokenizer has, up to the first missing one."""
    ids = [text.tokenizer.token_to_id(name) for name in SENTINELS]
    return np.array(ids[: ids.index(None) if None in ids else len(ids)], dtype=np.int64)


def surround_rows(
    tokens: np.ndarray, mask: np.ndarray, before: tuple[int, ...], after: tuple[int, ...], pad: int
) -> tuple[np.ndarray, np.ndarray]:  # N L, N L bool -> N M, N M bool
    """Return padded rows with `before` and `after` added around the real tokens of each."""
    count = len(tokens)
    first, last = (np.broadcast_to(np.array(ids, dtype=np.int64), (count, len(ids))) for ids in (before, after))
    real = [np.ones(first.shape, dtype=bool), mask, np.ones(last.shape, dtype=bool)]
    return damage.pack_kept(np.concatenate([first, tokens, last], 1), np.concatenate(real, 1), pad)


TASKS = (Denoising,)
