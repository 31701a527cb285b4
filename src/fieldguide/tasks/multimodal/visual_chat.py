"""Visual instruction tuning: a vision-language model learns to answer in conversations about images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.hardware import ram
from fieldguide.core.report_elements import Bars, Gallery, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data import read
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.conversation_images import IMAGE, IMAGE_MARK, MAX_IMAGES, name_columns
from fieldguide.data.dataset import HASH, HEIGHT, WIDTH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.data.preprocessing.image_transform import NativeTransform
from fieldguide.data.preprocessing.visual_conversations import EncodedRow, VisualConversations
from fieldguide.models.generation import MAX_NEW_TOKENS, Greedy, generate_batch
from fieldguide.models.generation.stop_strings import truncate_at_stop
from fieldguide.objectives import NextToken, Objective
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.multimodal.base import (
    IMAGE_GROUP_COLUMN,
    MAX_IMAGE_CACHE_FRACTION_OF_RAM,
    THUMBNAIL_SIDE,
    ImageAndTextTask,
)
from fieldguide.tasks.multimodal.signature import VisualChatSignature
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.text.base import path_like

TOKENS_PER_STEP = 4096  # approximate tokens per step, if the user sets no batch size
ROWS_PER_CALL = 8  # rows that are answered together: each has many tokens
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".pq", ".csv")  # of inputs with conversations
SHOWN_IMAGES = 16
SHOWN_ANSWERS = 30  # of the most frequent ones
SHOWN_CHARACTERS = 200  # of a text under an image
BLANK = " "  # shown for a row without an image


class VisualChat(VisualChatSignature, ImageAndTextTask):
    """Visual instruction tuning. The loss covers the assistant's messages with their end token; scores compare the last answers."""

    name = "image-text-to-text"
    reads = (
        "JSON Lines with conversations about images: `messages` with parts {type: image, path: ...} and {type: text, text: ...}, or with a "
        "column `images`; or `conversations` and `image` as for LLaVA"
    )
    input_types = ("captioned",)
    output_types = ("tokens",)
    feature = ("messages",)
    further = ("image",)
    column_spec = ColumnSpec("none")
    metrics = (
        Metric("loss", "min", "nats per token of the answers"),
        Metric("exact_match", "max", "of the last answers equal to the reference", percent=True),
    )
    recipe: ClassVar = {"grad_clip": 1.0, "patience": 8, "augmentation": "none"}
    max_test_examples = 500  # every test row is answered
    min_batch_size = 4

    @dataclass(frozen=True)
    class Options:
        length: int | None = None  # maximum tokens of a conversation with its image; longer ones are truncated and counted
        tokenizer: str | None = None  # path of the tokenizer of the checkpoint
        picture: int | None = None  # id of the image token
        side: int | None = None  # pixels per side of images, if the network reads one size
        channels: int = 3
        patch: int = 14  # side of a patch in pixels
        merge: int = 1  # patches per side that become one token
        min_pixels: int | None = None  # pixels of an image, if the network reads any size
        max_pixels: int | None = None  # the same: images with more are made smaller
        pixels: str | None = None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std
        resize: str | None = None  # how images are resized, such as crop bicubic

    @dataclass(frozen=True)
    class PredictOptions(Greedy):
        max_new_tokens: Annotated[int, Limits(1, MAX_NEW_TOKENS)] = 128  # maximum tokens of an answer
        prompt: str = ""  # the question about each image, if the inputs are images

    shown: list[tuple[str, str]]  # a few training images that are answered during training, with their conversations as text

    # Data

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        images_of = [c.name for c in data.features("image")]
        if len(data.features("messages")) != 1 or not images_of or images_of != name_columns(len(images_of)):
            return "conversations (`messages`) with images"
        return None

    @classmethod
    def match(cls, data: Data) -> str | None:
        if data.target is None and not cls.missing_requirements(data):
            return "conversations about images"
        return None

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Group rows that share an image, so that splits keep them together; rows without an image are groups of their own."""
        if IMAGE_GROUP_COLUMN in data.columns or HASH not in data.rows.columns:
            return data
        group = Column(IMAGE_GROUP_COLUMN, "identifier", "group", "rows that share an image have the same value")
        content = dict(zip(data.rows[IMAGE].to_list(), data.rows[HASH].to_list()))  # of equal images under other names
        named = [[content.get(path) or path for path in row] for row in list_images(data)]
        own = data.rows[HASH].to_list()
        values = pl.Series(IMAGE_GROUP_COLUMN, [own[row] or f"row {row}" for row in join_rows(named)])
        return replace(data, rows=data.rows.with_columns(values), columns={**data.columns, IMAGE_GROUP_COLUMN: group})

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        o = options
        if o.picture is None or o.tokenizer is None:
            raise SettingsError(
                f"{cls.name} starts from a pretrained vision-language model with its tokenizer: pass its folder, or one of the hub, "
                "with --weights (such as hf:llava-hf/llava-1.5-7b-hf)."
            )
        task = cls([c for c in data.columns.values() if c.kind in (*cls.feature, *cls.further)], options)
        task.text = TextTokenizer.load(o.tokenizer)
        task.pictures = make_transform(o)
        rows = task.encode(data)
        sizes = [len(row.tokens) for row in rows]
        task.median = int(np.median(sizes))
        task.options = fill_options(o, length=max(sizes), side=task.pictures.side)
        task.note_truncated(sum(s > task.options.length for s in sizes), len(sizes), task.options.length, "conversations")
        task.notes.append(task.conversations.describe(task.turns(data), data.locate_row))
        known = np.flatnonzero([len(own) == 1 for own in list_images(data)])
        task.shown = []
        for i in np.random.default_rng(0).permutation(known)[: SHOWN_IMAGES // 2].tolist():
            turns = task.turns(data)[i]
            asked = next((text for role, text in turns if role == "user"), "")
            task.shown.append((data.rows[IMAGE][i], asked))
        return task

    @cached_property
    def conversations(self) -> VisualConversations:
        """Return the encoder of conversations."""
        return VisualConversations(self.text, self.options.picture)

    def turns(self, data: Data) -> list[list[tuple[str, str]]]:
        """Return each conversation as (role, text) pairs."""
        return [[(m["role"], m["content"]) for m in said or ()] for said in data.rows[self.column].to_list()]

    def count_patches(self, data: Data) -> list[list[int]]:
        """Return the number of tokens of each image of each row."""
        unit, p = self.options.patch * self.options.merge, self.pictures
        named = list_images(data)
        known = find_sizes(data, named) if isinstance(p, NativeTransform) else {}
        found: list[list[int]] = [[] for _ in named]
        for row, paths in enumerate(named):
            for path in paths:
                size = (p.side, p.side)
                if isinstance(p, NativeTransform):
                    try:
                        size = p.choose_size(*known[path])
                    except ValueError as error:
                        raise DataError(f"{data.locate_row(row)}: {path}: {error}.") from None
                found[row].append((size[0] // unit) * (size[1] // unit))
        return found

    def encode(self, data: Data) -> list[EncodedRow]:
        """Return the tokens of each conversation, not truncated."""
        return self.conversations.encode(self.turns(data), self.count_patches(data), data.locate_row)

    def truncate(self, rows: Sequence[EncodedRow], data: Data) -> list[EncodedRow]:
        """Return rows of at most `length` tokens. Raises `DataError` if an image does not fit."""
        length = self.options.length
        for i, row in enumerate(rows):
            if (row.tokens[length:] == self.options.picture).any():
                raise DataError(
                    f"{data.locate_row(i)}: the images and the text before them have more than the {length:,} tokens of task.length."
                )
        return [EncodedRow(row.tokens[:length], row.trained[:length]) for row in rows]

    def model_dims(self) -> dict[str, Any]:
        return {"vocab_size": self.text.size, "length": self.options.length, "channels": self.pictures.channels}

    @property
    def max_batch_size(self) -> int:
        return int(np.clip(2 ** int(np.log2(max(TOKENS_PER_STEP / max(self.median, 1), 1))), 4, 64))

    def load_images(self, data: Data) -> Callable[[np.ndarray], dict[str, Tensor]]:
        """Return a function from row numbers to the images of a batch. A batch without any image gets a small one that is not read."""
        named = list_images(data)
        unique = sorted({path for paths in named for path in paths})
        p, cache = self.pictures, {}
        most = p.max_pixels if isinstance(p, NativeTransform) else p.side**2
        if len(unique) * p.channels * most < MAX_IMAGE_CACHE_FRACTION_OF_RAM * ram():
            cache = dict(zip(unique, p.load_each(unique)))
        side = self.options.patch * self.options.merge if isinstance(p, NativeTransform) else p.side

        def load(index: np.ndarray) -> dict[str, Tensor]:
            own = [named[i] for i in index]
            wanted = [path for paths in own for path in paths]
            loaded = iter([cache[path] for path in wanted] if cache else p.load_each(wanted))
            found = p.collate([[next(loaded) for _ in paths] for paths in own])
            return found or {"image": torch.zeros(len(own), p.channels, side, side)}

        return load

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        """Return padded conversations with their images, and the start of the last answer's turn for prediction."""
        rows, load = self.truncate(self.encode(data), data), self.load_images(data)
        prompts = None if settings else self.encode_prompts(data)

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            tokens, mask = self.text.batch([rows[i].tokens[:-1] for i in index])
            target, _ = self.text.batch([np.where(rows[i].trained, rows[i].tokens, -1)[1:] for i in index])
            batch = {
                "tokens": torch.from_numpy(tokens),
                "mask": torch.from_numpy(mask),
                "target": torch.from_numpy(np.where(mask, target, -1)),
                **load(index),
            }
            return batch if prompts is None else {**batch, **self.pad_prompts(prompts, index)}

        return Batches(len(rows), make, np.array([len(row.tokens) for row in rows]))

    def predict_batches(self, data: Data, card: Card) -> Batches:
        prompts, load = self.encode_prompts(data), self.load_images(data)
        return Batches(len(prompts), lambda index, generator: {**self.pad_prompts(prompts, index), **load(index)})

    def encode_prompts(self, data: Data) -> list[np.ndarray]:
        """Return the tokens up to the last answer of each conversation."""
        turns = [row[: -1 if row and row[-1][0] == "assistant" else None] for row in self.turns(data)]
        return self.conversations.encode_prompts(turns, self.count_patches(data), data.locate_row)

    def pad_prompts(self, prompts: Sequence[np.ndarray], index: np.ndarray) -> dict[str, Tensor]:
        """Return prompts padded on the left with -1, and the numbers of their rows."""
        width = max(len(prompts[i]) for i in index)
        padded = [np.concatenate([np.full(width - len(prompts[i]), -1), prompts[i]]) for i in index]
        return {"prompt": torch.from_numpy(np.stack(padded)), "row": torch.from_numpy(np.asarray(index))}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return NextToken(model, (*card.inputs, *card.optional_inputs), settings.label_smoothing)

    # Reading

    def read_one(self, source: Any, answered: bool) -> Data:
        if answered:
            return super().read_one(source, answered)
        if isinstance(source, pl.DataFrame):
            return super().read_one(self.ask(source), answered)
        is_path = isinstance(source, Path) or (isinstance(source, str) and path_like(source))
        if not is_path or Path(source).suffix.lower() in TABLE_SUFFIXES:
            return super().read_one(source, answered)
        data = read(source, schema=[Column(IMAGE, "image")], labels_optional=True, lenient=True)
        return replace(data, rows=self.ask(data.rows), columns={c.name: c for c in self.columns})

    def ask(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return rows with the prompt for images that have no conversation. Raises `SettingsError` without a prompt."""
        has_messages = rows[self.column].is_not_null() if self.column in rows.columns else pl.Series([False] * len(rows))
        if has_messages.all() or IMAGE not in rows.columns:
            return rows
        prompt = self.predict_options.prompt
        if not prompt.strip():
            raise SettingsError('no question about the images: set --set prompt="What is this?"')
        dtype = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
        columns = [rows[name].is_not_null() for name in name_columns(MAX_IMAGES) if name in rows.columns]
        texts = ["\n".join([*[IMAGE_MARK] * sum(known), prompt]) for known in zip(*columns)]
        asked = pl.Series(self.column, [[{"role": "user", "content": text}] for text in texts], dtype=dtype)
        if self.column not in rows.columns or not has_messages.any():
            return rows.with_columns(asked)
        return rows.with_columns(pl.when(has_messages).then(rows[self.column]).otherwise(asked).alias(self.column))

    # Predictions

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            scored = objective.outputs(batch) if "target" in batch else {}
            return {**scored, "said": self.write(objective.model, batch)}

        def answer_all(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            rows = len(batch["prompt"])
            parts = [
                answer({name: x[first : first + ROWS_PER_CALL] for name, x in batch.items()})
                for first in range(0, rows, ROWS_PER_CALL)
            ]
            width = max(part["said"].shape[1] for part in parts)
            for part in parts:
                part["said"] = torch.nn.functional.pad(part["said"], (0, width - part["said"].shape[1]), value=-1)
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        return answer_all

    def write(self, network: Any, batch: dict[str, Tensor]) -> Tensor:  # -> B T
        """Return the tokens of answers, -1 after their end. Raises `SettingsError` for a prompt that leaves no room."""
        prompts = [[i for i in row if i >= 0] for row in batch["prompt"].tolist()]
        longest, most = max(map(len, prompts)), network.config.length
        if longest >= most:
            raise SettingsError(
                f"a prompt has {longest:,} tokens including its image, but the network reads {most:,} in all, with the answer."
            )
        how = replace(self.predict_options, max_new_tokens=min(self.predict_options.max_new_tokens, most - longest))
        sizes = {"grid": batch["grid"]} if "grid" in batch else {}
        decoder = network.with_images(batch["image"], **sizes)
        decoder.needs_image = False
        found = generate_batch(
            decoder, prompts, how, eos_token_ids=self.conversations.ends, decode=self.text.decode, row_ids=batch["row"].tolist()
        )
        rows = [torch.tensor(row, dtype=torch.int64) for row in found]
        width = max(1, *map(len, rows))
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-1) for row in rows])

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Return the texts of rows of tokens, up to the first stop string."""
        stops = self.predict_options.stop_list
        return [truncate_at_stop(self.text.decode(row[row >= 0]), stops).strip() for row in tokens.astype(int)]

    def postprocess(self, outputs: Arrays) -> Arrays:
        return {**outputs, "text": np.array(self.decode(outputs["said"]), dtype=object)} if "said" in outputs else outputs

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{"text": text} for text in outputs["text"]]

    # Scores

    def targets(self, data: Data) -> Arrays:
        """Return the last answer of each conversation; None if it does not end with one."""
        answers = np.empty(len(data), dtype=object)
        answers[:] = [row[-1][1].strip() if row and row[-1][0] == "assistant" else None for row in self.turns(data)]
        return {"answer": answers}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {}
        if "nats" in outputs:
            scores["loss"] = float(outputs["nats"].sum(dtype=np.float64) / max(outputs["count"].sum(), 1))
        if "text" in outputs:
            equal = [normalize(a) == normalize(b) for a, b in zip(outputs["text"], targets["answer"]) if b is not None]
            scores["exact_match"] = float(np.mean(equal)) if equal else float("nan")
        return scores

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        known = [text for text in self.targets(train)["answer"] if text is not None]
        if not known:
            return []
        often = Counter(known).most_common(1)[0][0]
        text = np.array([often] * len(test), dtype=object)
        return [Baseline("most frequent answer", f"always {often[:SHOWN_CHARACTERS]!r}", {"text": text})]

    # Report

    def picture(self, data: Data, row: int) -> np.ndarray:  # -> S S 3 uint8
        path = data.rows[IMAGE][row]
        if path is None:
            return np.full((THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), 255, dtype=np.uint8)
        return images.load([path], THUMBNAIL_SIDE, 3, fit="pad")[0].permute(1, 2, 0).numpy()

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        if not self.shown:
            return []
        data = Data(
            "",
            pl.DataFrame({IMAGE: [path for path, _ in self.shown]}).with_columns(
                pl.Series(self.column, [[{"role": "user", "content": asked}] for _, asked in self.shown])
            ),
            {},
            None,  # type: ignore[arg-type]  # for thumbnails only
        )
        checked = images.check([path for path, _ in self.shown])
        data.rows = data.rows.with_columns(
            pl.Series(HEIGHT, [c.height for c in checked]), pl.Series(WIDTH, [c.width for c in checked])
        )
        batches = self.predict_batches(data, None)  # type: ignore[arg-type]  # the card is not needed
        device = next(objective.parameters()).device
        batch = {name: x.to(device) for name, x in batches.make(np.arange(len(data)), None).items()}
        said = self.decode(self.write(objective.model, batch).cpu().numpy())
        shown = [
            Picture(self.thumbnail(data, i), f"{clip(asked)} ⟶ {clip(text) or '(nothing)'}")
            for i, ((_, asked), text) in enumerate(zip(self.shown, said))
        ]
        return [Gallery("Answers during training", "Training images.", shown)]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        said, known, turns = outputs["text"].tolist(), targets["answer"].tolist(), self.turns(test)
        per_row = outputs["nats"] / np.maximum(outputs["count"], 1)
        right = [a is not None and normalize(t) == normalize(a) for t, a in zip(said, known)]

        def show(i: int) -> Picture:
            asked = next((text for role, text in reversed(turns[i]) if role == "user"), "")
            words = f"{clip(asked)} ⟶ {clip(said[i]) or '(nothing)'}; reference: {clip(known[i] or '(none)')}"
            return Picture(self.thumbnail(test, i), words, bad=not right[i])

        order = np.argsort(-per_row, kind="stable")
        shuffled = np.random.default_rng(0).permutation(len(said))
        often = Counter(said).most_common(SHOWN_ANSWERS)
        share = {text: np.mean([r for r, other in zip(right, said) if other == text]) for text, _ in often}
        return {
            "Answers": [
                Gallery(
                    "Least likely references", "Test rows with the largest loss.", [show(int(i)) for i in order[:SHOWN_IMAGES]]
                ),
                Gallery("Random sample", "Random test rows.", [show(int(i)) for i in shuffled[:SHOWN_IMAGES]]),
                Bars(
                    "Loss by test row",
                    "Nats per token of the answers, by decile.",
                    {f"{10 * q} %": float(v) for q, v in enumerate(np.quantile(per_row, np.linspace(0, 1, 11)))},
                    unit="nats",
                ),
                Table(
                    "Most frequent answers",
                    f"{len(set(said)):,} different answers to {len(said):,} test rows.",
                    ("answer", "rows", "exact match"),
                    [(clip(text) or "(nothing)", count, float(share[text])) for text, count in often],
                    heat=("exact match",),
                ),
            ]
        }

    # Saved with the run

    STATE: ClassVar = {"shown": list[tuple[str, str]]}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "shown": self.shown}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.restore_inputs(state, folder)
        task.shown = [tuple(pair) for pair in state["shown"]]
        return task


def list_images(data: Data) -> list[list[str]]:
    """Return the paths of the images of each row."""
    columns = [data.rows[name].to_list() for name in name_columns(MAX_IMAGES) if name in data.rows.columns]
    return [[path for path in row if path is not None] for row in zip(*columns)]


def find_sizes(data: Data, named: list[list[str]]) -> dict[str, tuple[int, int]]:
    """Return height and width of each image; those of the first images are known."""
    found = dict(zip(data.rows[IMAGE].to_list(), zip(data.rows[HEIGHT].to_list(), data.rows[WIDTH].to_list())))
    others = sorted({path for paths in named for path in paths} - set(found))
    return found | {path: (seen.height, seen.width) for path, seen in zip(others, images.check(others))}


def join_rows(named: list[list[str]]) -> list[int]:
    """Return a row of the group of each row: rows that share a name, directly or by way of others, are in one."""
    parent = list(range(len(named)))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[str, int] = {}
    for row, names in enumerate(named):
        for name in names:
            parent[find(row)] = find(first.setdefault(name, row))
    return [find(row) for row in range(len(named))]


def make_transform(o: Any) -> ImageTransform:
    """Return the image transform that task options describe."""
    if o.max_pixels is not None:
        limits = {"min_pixels": min(o.min_pixels or 1, o.max_pixels), "max_pixels": o.max_pixels}
        made: ImageTransform = NativeTransform(o.side, o.channels, patch=o.patch, unit=o.patch * o.merge, **limits)
    else:
        made = ImageTransform(o.side, o.channels)
    made = made.with_normalization(o.pixels) if o.pixels else made
    return made.with_resize(o.resize) if o.resize else made


def normalize(text: str) -> str:
    """Return a text for comparison: letter case, spaces and a last period do not matter."""
    return " ".join(text.casefold().split()).rstrip(".")


def clip(text: str) -> str:
    """Return a text on one line, cut if it is long."""
    line = " ".join(text.replace(IMAGE_MARK, BLANK).split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 2] + " …"


TASKS = (VisualChat,)
