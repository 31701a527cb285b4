"""Masked language modeling: an encoder learns to predict hidden tokens, from plain texts alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError
from fieldguide.core.report_elements import Quote, Quotes, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.loader import make_generator as seeded
from fieldguide.data.preprocessing.tokenizer import SPECIAL_TOKENS
from fieldguide.objectives import MaskedLM, Objective
from fieldguide.objectives.masked_lm import mask_tokens
from fieldguide.tasks.base import Arrays, CheckpointAssets
from fieldguide.tasks.text.packing import PackedTextTask
from fieldguide.tasks.text.signature import FillMaskSignature

SHOWN = 12  # texts in the report
ROWS = 64  # test rows whose single predictions are shown


class FillMask(FillMaskSignature, PackedTextTask):
    """Some tokens of each row are masked, and the model predicts them."""

    name = "fill-mask"
    input_types = ("tokens",)
    output_types = ("words",)

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # tokens of a row
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training texts
        tokenizer: str | None = None  # path of a tokenizer.json to use instead; it must have a mask token
        share: float = 0.15  # fraction of the tokens that is masked

    @dataclass(frozen=True)
    class PredictOptions:
        top: Annotated[int, Limits(1, 1000)] = 5  # predictions per missing word

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls.create(data, options, SPECIAL_TOKENS)
        if task.text.mask_token == task.text.unknown:
            raise DataError(
                f"{options.tokenizer} has no mask token ([MASK] or <mask>) to replace hidden words. Use a tokenizer with one."
            )
        if not 0 < task.options.share < 1 or task.options.length < 3:
            raise DataError("task.share must be between 0 and 1, and task.length must be at least 3.")
        return task

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self:
        return cls.from_state(assets.texts(), cls.Options(length=assets.length), {"counts": []}, assets.tokenizer_folder)

    # Token rows

    def prepend_cls(self, rows: Tensor) -> Tensor:  # B length - 1 -> B length
        return torch.cat([rows.new_full((len(rows), 1), self.text.cls), rows], 1)

    def mask(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mask tokens of rows, and return the masked rows and the targets. Padding and separators are never masked."""
        open_to = torch.ones_like(tokens, dtype=torch.bool)
        for special in {self.text.pad, self.text.cls, self.text.sep, self.text.mask_token}:
            open_to &= tokens != special
        first = len(SPECIAL_TOKENS) if not self.options.tokenizer else 0
        return mask_tokens(tokens, open_to, self.text.mask_token, first, self.text.size, generator, self.options.share)

    def batches(self, data: Data, card: Card | None, settings: Settings | None = None) -> Batches:
        """Return the examples. Training rows get random offsets and new masks each time; scored rows are always the
        same.
        """
        packed, drawn = self.rows(data, self.options.length - 1)
        fixed: list[Tensor] = []

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            chosen = torch.from_numpy(index)
            if generator is None:
                if not fixed:  # for all rows at once, so that the batch size has no effect
                    fixed.extend(self.mask(self.prepend_cls(packed), seeded(0)))
                tokens, target = fixed[0][chosen], fixed[1][chosen]
            else:
                tokens, target = self.mask(self.prepend_cls(drawn(chosen, generator)), generator)
            mask = tokens != self.text.pad
            return {"tokens": tokens, "target": target} | ({} if mask.all() else {"mask": mask})

        return Batches(len(packed), make)

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return MaskedLM(model, card.inputs)

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the hidden tokens of each row."""
        batches = self.batches(data, None)
        return {"target": batches.make(np.arange(len(batches)), None)["target"].numpy()}

    # Predictions

    def encode_gaps(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a text with gaps, and the positions of the gaps."""
        first, *others = self.split_at_gaps(text)
        ids, places = [self.text.cls, *first], []
        for piece in others:
            places.append(len(ids))
            ids += [self.text.mask_token, *piece]
        return [*ids, self.text.sep], places

    def predict_batches(self, data: Data, card: Card) -> Batches:
        rows = [self.encode_gaps(text)[0] for text in self.texts_with_gaps(data)]
        for place, ids in enumerate(rows):
            if len(ids) > self.options.length:
                raise DataError(
                    f"{data.locate_row(place)}: the text has {len(ids)} tokens, but the model reads at "
                    f"most {self.options.length}. Shorten it."
                )

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            tokens, mask = self.text.batch([np.array(rows[i]) for i in index])
            return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

        return Batches(len(rows), make, np.array([len(r) for r in rows]))

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if "target" in batch:
                return objective.outputs(batch)
            logits = objective.model(batch["tokens"], batch["mask"]).float()
            best = logits.softmax(-1).topk(min(self.predict_options.top, logits.shape[-1]), -1)
            ids = batch["tokens"].masked_fill(~batch["mask"], -1)
            return {"ids": ids, "guess": best.indices, "probability": best.values}

        return answer

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        records = []
        for ids, guess, probability in zip(outputs["ids"].astype(int), outputs["guess"].astype(int), outputs["probability"]):
            places = np.flatnonzero(ids == self.text.mask_token)
            whole = ids.copy()
            whole[places] = guess[places, 0]
            kept = [i for i in whole.tolist() if i >= 0 and i not in (self.text.cls, self.text.sep)]
            records.append(
                {
                    "text": self.decode(kept),
                    "words": [
                        [
                            {"word": self.decode([g]).strip(), "probability": float(p)}
                            for g, p in zip(guess[place], probability[place])
                        ]
                        for place in places
                    ],
                }
            )
        return records

    # Report

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        found = self.loss_elements(outputs)
        if objective is not None:
            found["Guesses"] = self.prediction_elements(test, objective)
        return found

    @torch.no_grad()
    def prediction_elements(self, test: Data, objective: Any) -> list[ReportElement]:
        """Return predictions of hidden test words, and the accuracy by word frequency."""
        batches = self.batches(test, None)
        batch = batches.make(np.arange(min(ROWS, len(batches))), None)
        device = next(objective.model.parameters()).device
        logits, target, row = objective.compute_masked_logits({name: x.to(device) for name, x in batch.items()})
        probability, target, row = logits.softmax(-1).cpu(), target.cpu().numpy(), row.cpu().numpy()
        best = probability.topk(3, -1)
        right, seen = best.indices[:, 0].numpy() == target, self.counts[target]
        edges = [0, 1, 10, 100, 1000, 10_000, np.inf]
        rows = [
            (f"{low:g} to {high - 1:g}" if high < np.inf else f"{low:g} or more", int(among.sum()), float(right[among].mean()))
            for low, high in pairwise(edges)
            if (among := (seen >= low) & (seen < high)).any()
        ]
        quotes, place = [], (batch["target"] >= 0).nonzero()[:, 1].numpy()
        for one in range(min(SHOWN, len(batch["tokens"]))):
            number = int(np.flatnonzero(row == one)[0]) if (row == one).any() else None
            if number is None:
                continue
            at, real = int(place[number]), batch["tokens"][one].tolist()
            real = [t for t in real if t != self.text.pad]
            left, after = self.decode(real[max(1, at - 40) : at]), self.decode(real[at + 1 : at + 20])
            guesses = ", ".join(
                f"{self.decode([int(i)]).strip()} {100 * float(p):.0f} %"
                for i, p in zip(best.indices[number], best.values[number])
            )
            quotes.append(
                Quote(
                    f"{left} ▁▁▁{after}",
                    f"was {self.decode([int(target[number])]).strip()!r}; predicted: {guesses}",
                    bad=not right[number],
                )
            )
        return [
            Quotes(
                "Hidden words of test texts",
                "One missing word each, and the three most probable predictions. Other words of the row are hidden, too.",
                quotes,
            ),
            Table(
                "By word frequency",
                f"Hidden words of {len(batch['tokens'])} test rows, by their frequency in the training texts.",
                ("times in training", "hidden", "accuracy"),
                rows,
                heat=("accuracy",),
            ),
        ]


TASKS = (FillMask,)
