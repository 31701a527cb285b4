"""What images are generated of: classes, captions, or nothing; and requests of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.data.dataset import Column, Data, Kind, Manifest
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import Labels, TextTokenizer
from fieldguide.data.preprocessing.tokenizer import suggest_length
from fieldguide.data.text_values import blank_missing, has_sentences
from fieldguide.tasks.base import Arrays, Media, Preprocessor
from fieldguide.tasks.supervised import fill_options, is_discrete
from fieldguide.tasks.vision.caption_reader import CaptionReader
from fieldguide.tasks.vision.image_encoding import encode_png

MAX_READ_CAPTIONS = 10_000  # maximum captions whose tokens are counted
MAX_CAPTION_TOKENS = 64  # maximum tokens of a caption, if the user sets no length
MAX_KNOWN_CAPTIONS = 256  # training captions kept for sampling without given captions
MAX_CLASS_TEXTS = 20  # with at most this many different texts, they are class names regardless of length


def infer_target_kind(values: pl.Series) -> Kind | None:
    """Return "text" if the values of a target are captions (many different phrases), None if they look like classes."""
    present = blank_missing(values).drop_nulls() if values.dtype == pl.String else values.head(0)
    return "text" if len(present) and present.n_unique() > MAX_CLASS_TEXTS and has_sentences(present) else None


def is_captioned(data: Data) -> bool:
    """Return whether the target holds captions. Raises `DataError` for a target of numbers or other values."""
    captioned = data.target is not None and data.required_target.kind == "text"
    if data.target is not None and not captioned and not is_discrete(data.target):
        raise DataError(
            f"{data.source}: the label column {data.required_target.name!r} must hold classes or captions, but holds "
            f"{data.required_target.kind}."
        )
    return captioned


class GenerationConditions(Preprocessor):
    """Turns classes and captions into tensors, and back."""

    options: Any
    columns: list[Column]
    predict_options: Any
    labels: list[str]  # empty if the data has no classes
    reader: CaptionReader | None  # set if the data has captions
    text: TextTokenizer | None  # that of the reader
    captions: list[str]  # a sample of the training captions

    def set_reader(self, reader: CaptionReader) -> None:
        """Generate images of captions that this object reads."""
        self.reader, self.text = reader, reader.text

    def fit_labels(self, data: Data) -> None:
        """Fit the classes of a target without captions."""
        classes = data.target is not None and data.required_target.kind != "text"
        self.labels = list(Labels.fit(data.rows[data.required_target.name]).names) if classes else []

    def note_classes(self) -> None:
        """Add a note with a column that could be used as class if there is no target."""
        could = [c.name for c in self.columns if c.role == "ignored" and c.kind in ("category", "boolean")]
        if could and not any(c.role == "target" for c in self.columns):
            self.notes.append(f"there is no target, so generation is unconditional: --target {could[0]} generates by class")

    def fit_captions(self, texts: list[str], reader: CaptionReader) -> None:
        """Fit the length of captions; sets `vocab_size` and `length`."""
        self.set_reader(reader)
        longest = min(MAX_CAPTION_TOKENS, reader.limit or MAX_CAPTION_TOKENS)
        sizes = reader.count_tokens(texts[:MAX_READ_CAPTIONS])
        length = min(suggest_length(sizes, longest), longest)
        self.options = fill_options(self.options, vocab_size=reader.text.size, length=length)
        if reader.limit is not None and self.options.length > reader.limit:
            raise SettingsError(f"task.length={self.options.length}: the encoder of captions reads {reader.limit} tokens.")
        self.note_truncated(sum(size > self.options.length for size in sizes), len(sizes), self.options.length, "captions")
        different = list(dict.fromkeys(texts))
        self.captions = [different[i] for i in np.random.default_rng(0).permutation(len(different))[:MAX_KNOWN_CAPTIONS]]

    def tokens(self, texts: list[str]) -> np.ndarray:  # -> N T int64, 0 beyond a caption's end and for an empty one
        assert self.reader is not None  # captions are read only if there is a reader
        return self.reader.tokenize(texts, self.options.length)

    def codes(self, data: Data) -> np.ndarray:
        """Return labels from 1 (N), or caption tokens (N, T); 0 means none."""
        target = next((c.name for c in self.columns if c.role == "target"), None)
        if self.text is not None:
            if target is None or target not in data.rows.columns:
                return np.zeros((len(data), self.options.length), dtype=np.int64)
            return self.tokens(data.rows[target].fill_null("").to_list())
        if not self.labels or target is None or target not in data.rows.columns:
            return np.zeros(len(data), dtype=np.int64)
        return Labels(tuple(self.labels)).apply(data.rows[target]) + 1

    def describe_conditions(self) -> Mapping[str, Any]:
        """Return the fields of a network's config that depend on classes and captions."""
        return self.reader.model_dims(self.options.length) if self.reader is not None else {"num_classes": len(self.labels)}

    def sample_labels(self, count: int) -> Tensor:
        """Return `count` classes, or training captions, in turn."""
        if self.text is not None:
            return torch.from_numpy(self.tokens([self.captions[i % len(self.captions)] for i in range(count)]))
        return torch.arange(count) % max(len(self.labels), 1) + bool(self.labels)

    def decode_caption(self, tokens: np.ndarray) -> str:
        """Return a caption as the model reads it."""
        assert self.text is not None  # only models of captions decode them
        return self.text.decode(tokens[tokens > 0]).strip()

    # Requests

    def read(self, sources: Sequence[Any], *, answered: bool = False) -> Data:
        """Read the classes or captions to generate; without input, all classes or some training captions in turn."""
        if answered:
            return super().read(sources, answered=True)
        if self.text is not None:
            return self.make_requests(list(map(str, sources)), self.captions)
        self.check_classes(sources)
        return self.make_requests(sources, self.labels or [""])

    def check_classes(self, names: Sequence[Any]) -> None:
        """Raise `DataError` for a name that is no class."""
        for name in names:
            if name not in self.labels:
                raise DataError(
                    f"unknown class {name!r}.{nearest(str(name), self.labels)} Classes are: "
                    f"{', '.join(self.labels) or 'none, so give no class'}."
                )

    def make_requests(self, named: Sequence[str], others: Sequence[str]) -> Data:
        """Return `count` rows of each given text, or else `count` rows of the others in turn."""
        count = self.predict_options.count
        wanted = [n for name in named for n in [name] * count] or [others[i % len(others)] for i in range(count)]
        return Data("made", pl.DataFrame({"wanted": wanted}), {}, Manifest(""))

    def predict_batches(self, data: Data, card: Card) -> Batches:
        known, wanted = {name: i for i, name in enumerate(self.labels, 1)}, data.rows["wanted"].to_list()
        label = torch.from_numpy(self.tokens(wanted)) if self.text else torch.tensor([known.get(name, 0) for name in wanted])
        return Batches(len(data), lambda index, _: {"label": label[torch.from_numpy(index)], "row": torch.from_numpy(index)})

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        if self.text is not None:
            return [
                {"caption": self.decode_caption(label), "image": Media(encode_png(x), ".png")}
                for x, label in zip(outputs["samples"], outputs["label"])
            ]
        names = ["", *self.labels]
        return [
            {**({"class": names[int(label)]} if self.labels else {}), "image": Media(encode_png(x), ".png")}
            for x, label in zip(outputs["samples"], outputs["label"].astype(int))
        ]
