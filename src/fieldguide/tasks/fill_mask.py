"""Hidden words: a network that reads both sides learns what is missing, from nothing but texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fieldguide.card import Card
from fieldguide.data.batches import Batches
from fieldguide.data.batches import generator as seeded
from fieldguide.data.dataset import Column, Data
from fieldguide.data.prepare import Text
from fieldguide.data.prepare.text import SPECIAL
from fieldguide.data.roles import Wants
from fieldguide.errors import DataError
from fieldguide.exhibits import Bars, Exhibit, Quote, Quotes, Table
from fieldguide.objectives import MaskedWords, Objective
from fieldguide.objectives.masked import hide
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.supervised import settled
from fieldguide.tasks.text_generation import MOST, PART, TOKENS, TextGeneration
from fieldguide.tasks.typed import Typed
from fieldguide.train.settings import Settings

BLANK = re.compile(r"<mask>|\[MASK\]|_{3,}")             # how a person writes a missing word
SHOWN = 12             # texts in the report
ROWS = 64              # test rows that are looked at word by word


class FillMask(Typed):
    """Rows are full: texts one after another, a separator between them, as RoBERTa's (its table 2, "full sentences")."""

    name = "fill-mask"
    reads = "text files, or a table (CSV, JSON Lines) with a column of text"
    takes = ("tokens",)
    gives = ("words",)
    wants = Wants("none", columns={"text": "text"})
    metrics = (Metric("loss", "min", "nats a hidden token"),
               Metric("accuracy", "max", "of the hidden tokens guessed", percent=True),
               Metric("perplexity", "min", "tokens to choose among, in effect"))
    recipe: ClassVar = {"clip": 1.0, "patience": 8}
    fewest = 8

    @dataclass(frozen=True)
    class Options:
        length: int | None = None        # tokens of a row
        vocab: int | None = None         # tokens in the vocabulary learnt from the training texts
        tokenizer: str | None = None     # a tokenizer.json to use instead; it needs a mask token
        share: float = 0.15              # of the tokens that are hidden

    @dataclass(frozen=True)
    class Asking:
        top: int = 5                     # guesses for each missing word

    text: Text
    counts: np.ndarray                   # how often each token stands in the training texts

    @classmethod
    def lacks(cls, data: Data) -> str | None:
        return None if len(data.features("text")) == 1 else "one column of text (name its kind with --set column.NAME=text)"

    @classmethod
    def examples(cls, data: Data, options: Any) -> Data:
        return TextGeneration.examples(data, options)

    @classmethod
    def learn(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        texts = task.texts(data)
        task.text = (Text.load(options.tokenizer) if options.tokenizer else
                     Text.learn_exact(texts, size=options.vocab, special=SPECIAL))
        if task.text.hidden == task.text.unknown:
            raise DataError(f"{options.tokenizer}: it has no mask token ([MASK] or <mask>), which hidden words are shown as.")
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *task.text.exactly(texts)])
        if not len(tokens):
            raise DataError(f"{data.source}: the training texts are empty.")
        task.counts = np.bincount(tokens, minlength=task.text.size)
        longest = options.length or min(MOST[task.machine()], max(8, len(tokens) // 32))
        task.options = settled(options, length=longest, vocab=task.text.size)
        if not 0 < task.options.share < 1 or task.options.length < 3:
            raise DataError("task.share is between 0 and 1, and task.length at least 3.")
        return task

    @staticmethod
    def machine() -> str:
        from fieldguide.train.distributed import device
        return device().type

    # Rows as tokens

    def stream_of(self, data: Data) -> np.ndarray:
        """All texts as one row of tokens, int64, with a separator behind each."""
        begins = data.rows[PART].to_numpy() == 0 if PART in data.rows.columns else np.ones(len(data), dtype=bool)
        end = np.array([self.text.sep])
        pieces = [piece for ids, begin in zip(self.text.exactly(self.texts(data)), begins)
                  for piece in ((end, ids) if begin else (ids,))]
        return np.concatenate([*pieces[1:], end] if begins[0] else [*pieces, end])

    def packed(self, data: Data) -> Tensor:              # -> N length - 1
        """Full rows of what follows the class token; the last is filled up with padding."""
        tokens, width = self.stream_of(data), self.options.length - 1
        rows = -(-len(tokens) // width)
        full = np.pad(tokens, (0, rows * width - len(tokens)), constant_values=self.text.pad)
        return torch.from_numpy(full).view(rows, width)

    def framed(self, rows: Tensor) -> Tensor:            # B length - 1 -> B length
        return torch.cat([rows.new_full((len(rows), 1), self.text.cls), rows], 1)

    def hidden(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows with words hidden, and what was there; neither padding nor tokens between texts are."""
        open_to = torch.ones_like(tokens, dtype=torch.bool)
        for special in {self.text.pad, self.text.cls, self.text.sep, self.text.hidden}:
            open_to &= tokens != special
        first = len(SPECIAL) if not self.options.tokenizer else 0
        return hide(tokens, open_to, self.text.hidden, first, self.text.size, generator, self.options.share)

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """While training, rows begin anywhere and other words are hidden each time; to score, always the same."""
        packed, width = self.packed(data), self.options.length - 1
        flat = packed.flatten()
        room = int((flat != self.text.pad).nonzero().max()) + 1 - width          # the last place a full row begins
        offsets, fixed = torch.arange(width), []

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            chosen = torch.from_numpy(index)
            if generator is None:
                if not fixed:                                                    # for all rows at once, whoever shares a batch
                    fixed.extend(self.hidden(self.framed(packed), seeded(0)))
                tokens, target = fixed[0][chosen], fixed[1][chosen]
            else:
                first = chosen * width
                if room > 0:
                    first = (first + torch.randint(width, first.shape, generator=generator)).clamp(max=room)
                tokens, target = self.hidden(self.framed(flat[first[:, None] + offsets]), generator)
            mask = tokens != self.text.pad
            return {"tokens": tokens, "target": target} | ({} if mask.all() else {"mask": mask})

        return Batches(len(packed), make)

    def needs(self) -> dict[str, Any]:
        return {"vocab": self.text.size, "length": self.options.length}

    def profile(self) -> dict[str, Any]:
        length = self.options.length
        return {"rows": max(1, int(self.counts.sum()) // length), "tokens": length, "length": length, "vocab": self.text.size}

    @property
    def most(self) -> int:
        return int(np.clip(2 ** int(np.log2(TOKENS / self.options.length)), 1, 256))

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return MaskedWords(model, card.inputs)

    # Scores

    def truth(self, data: Data) -> Arrays:
        """Tokens that are hidden in each row."""
        batches = self.batches(data, None)
        return {"target": batches.make(np.arange(len(batches)), None)["target"].numpy()}

    def score(self, outputs: Arrays, truth: Arrays) -> dict[str, float]:
        count = max(int(outputs["count"].sum()), 1)
        loss = float(outputs["nats"].astype(np.float64).sum() / count)
        return {"loss": loss, "accuracy": float(outputs["right"].sum() / count), "perplexity": float(np.exp(min(loss, 700)))}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        target = self.truth(test)["target"]
        asked, share = target >= 0, (self.counts + 1) / (self.counts.sum() + len(self.counts))
        nats, best = -np.log(share), int(self.counts.argmax())
        return [Baseline("token frequency", f"each token as often as in training; always guesses {self.said([best])!r}", {
            "nats": np.where(asked, nats[np.maximum(target, 0)], 0).sum(1), "right": (target == best).sum(1),
            "count": asked.sum(1)})]

    def said(self, ids: list[int]) -> str:
        return self.text.decode(ids)

    # Answers

    def blanks(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text with missing words, and where these stand."""
        ids, places, pieces = [self.text.cls], [], BLANK.split(text)
        for number, piece in enumerate(pieces):
            if number:
                places.append(len(ids))
                ids.append(self.text.hidden)
            # The blank before a word is part of the word.
            ids += self.text.exactly([piece.rstrip(" ") if number < len(pieces) - 1 else piece])[0].tolist()
        return [*ids, self.text.sep], places

    def questions(self, data: Data, card: Card) -> Batches:
        texts = self.texts(data)
        rows = [self.blanks(text)[0] for text in texts]
        for place, (text, ids) in enumerate(zip(texts, rows)):
            if not BLANK.search(text):
                raise DataError(f"{data.place(place)}: {text[:40]!r} has no missing word; write <mask> where one is.")
            if len(ids) > self.options.length:
                raise DataError(f"{data.place(place)}: {len(ids)} tokens, and the network reads {self.options.length}; "
                                "shorten it.")

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            tokens, mask = self.text.batch([np.array(rows[i]) for i in index])
            return {"ids": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

        return Batches(len(rows), make, np.array([len(r) for r in rows]))

    def ask(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if "ids" not in batch:
                return objective.outputs(batch)
            logits = objective.model(batch["ids"], batch["mask"]).float()
            best = logits.softmax(-1).topk(min(self.asking.top, logits.shape[-1]), -1)
            ids = batch["ids"].masked_fill(~batch["mask"], -1)
            return {"ids": ids, "guess": best.indices, "probability": best.values}
        return answer

    def answers(self, outputs: Arrays) -> list[dict[str, Any]]:
        records = []
        for ids, guess, probability in zip(outputs["ids"].astype(int), outputs["guess"].astype(int), outputs["probability"]):
            places = np.flatnonzero(ids == self.text.hidden)
            whole = ids.copy()
            whole[places] = guess[places, 0]
            kept = [i for i in whole.tolist() if i >= 0 and i not in (self.text.cls, self.text.sep)]
            records.append({"text": self.said(kept), "words": [
                [{"word": self.said([g]).strip(), "probability": float(p)} for g, p in zip(guess[place], probability[place])]
                for place in places]})
        return records

    # Report

    def exhibits(self, test: Data, outputs: Arrays, truth: Arrays, objective: Objective | None = None
                 ) -> dict[str, list[Exhibit]]:
        per_row = outputs["nats"] / np.maximum(outputs["count"], 1)
        found: dict[str, list[Exhibit]] = {"Scores by row": [Bars(
            "How the test rows differ", "Nats a hidden token of rows of the test part, by tenths.", {
                f"{10 * q} %": float(v) for q, v in enumerate(np.quantile(per_row, np.linspace(0, 1, 11)))}, unit="nats")]}
        if objective is not None:
            found["Guesses"] = self.guesses(test, objective)
        return found

    @torch.no_grad()
    def guesses(self, test: Data, objective: Objective) -> list[Exhibit]:
        """Hidden words of the test part: what was guessed, and how that depends on how common a word is."""
        batches = self.batches(test, None)
        batch = batches.make(np.arange(min(ROWS, len(batches))), None)
        device = next(objective.model.parameters()).device
        logits, target, row = objective.answers({name: x.to(device) for name, x in batch.items()})
        probability, target, row = logits.softmax(-1).cpu(), target.cpu().numpy(), row.cpu().numpy()
        best = probability.topk(3, -1)
        right, seen = best.indices[:, 0].numpy() == target, self.counts[target]
        edges = [0, 1, 10, 100, 1000, 10_000, np.inf]
        rows = [(f"{low:g} to {high - 1:g}" if high < np.inf else f"{low:g} or more", int(among.sum()),
                 float(right[among].mean()))
                for low, high in pairwise(edges) if (among := (seen >= low) & (seen < high)).any()]
        quotes, place = [], (batch["target"] >= 0).nonzero()[:, 1].numpy()
        for one in range(min(SHOWN, len(batch["tokens"]))):
            number = int(np.flatnonzero(row == one)[0]) if (row == one).any() else None
            if number is None:
                continue
            at, real = int(place[number]), batch["tokens"][one].tolist()
            real = [t for t in real if t != self.text.pad]
            left, after = self.said(real[max(1, at - 40):at]), self.said(real[at + 1:at + 20])
            guesses = ", ".join(f"{self.said([int(i)]).strip()} {100 * float(p):.0f} %"
                                for i, p in zip(best.indices[number], best.values[number]))
            quotes.append(Quote(f"{left} ▁▁▁{after}", f"was {self.said([int(target[number])]).strip()!r}; guessed: {guesses}",
                                bad=not right[number]))
        return [Quotes("Hidden words of test texts", "One missing word each, and the three likeliest guesses. Other words of "
                       "the row are hidden, too.", quotes),
                Table("By how common a word is", f"Hidden words of {len(batch['tokens'])} test rows, by how often the training "
                      "texts have them.", ("times in training", "hidden", "guessed"), rows, heat=("guessed",))]

    # Saved with the run

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist()}

    @classmethod
    def restore(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.text, task.counts = Text.load(folder), np.array(state["counts"])
        return task

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


TASKS = (FillMask,)
