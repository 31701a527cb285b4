"""Image-text retrieval and zero-shot classification: images and captions in one embedding space."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Gallery, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.words import find_words
from fieldguide.data.column_spec import CAPTION_NAMES, TARGET_NAMES, ColumnSpec, normalize_name
from fieldguide.data.dataset import HASH, Column, Data, Finding
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.preprocessing import Labels
from fieldguide.data.validation import checks
from fieldguide.data.validation.duplicates import number_rows
from fieldguide.data.validation.findings import places as first_places
from fieldguide.objectives import Objective
from fieldguide.objectives.contrastive import IMAGE_TEXT_OBJECTIVES, build_contrastive, compute_probabilities
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.multimodal.base import ImageAndTextTask
from fieldguide.tasks.multimodal.signature import ImageTextSignature
from fieldguide.tasks.supervised_evaluator import binomial_interval

RECALL_AT = (1, 5, 10)  # k of recall at k
MAX_CAPTION_CLASSES = 100  # maximum number of different captions that are treated as class names
MAX_KNOWN_CAPTIONS = 1000  # maximum training captions to choose from, if the user names no classes
QUERY_CHUNK = 1000  # queries compared with all candidates at once
START_TOKEN = "<|startoftext|>"  # CLIP's start token, which some tokenizers have
BASELINE_NEIGHBORS = 5  # training images whose captions the baseline uses


def check_pairs(data: Data) -> Iterator[Finding]:
    """Find rows that repeat a caption of the same image, and captions that are file names."""
    column = data.target
    if column is None or HASH not in data.rows.columns or not len(data):
        return
    same = number_rows(pl.DataFrame([data.rows[HASH], normalize_captions(data.rows[column.name])]))
    first = np.unique(same, return_index=True)[1]
    again = np.ones(len(data), dtype=bool)
    again[first] = False
    if again.any():
        yield Finding(
            "duplicate-pair",
            "warning",
            "rows that repeat an earlier image and caption",
            first_places(data, again),
            int(again.sum()),
            "Remove them; each counts twice.",
        )
    name = data.rows[column.name].str.contains(r"(?i)^\S+\.(png|jpe?g|gif|webp|bmp|tiff?)$").fill_null(False).to_numpy()
    if name.any():
        yield Finding(
            "caption-is-file",
            "warning",
            "captions that are the name of an image file",
            first_places(data, name),
            int(name.sum()),
            "Check the columns of these rows.",
        )


def normalize_captions(captions: pl.Series) -> pl.Series:
    return captions.fill_null("").str.normalize("NFC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars(" .")


CAPTION_COLUMNS = ColumnSpec(
    "last",
    names=(*CAPTION_NAMES, "text", "sentence", "description", "title"),
    kinds={"target": "text"},
    columns={"image": "image", "image_path": "image"},
    checks=(*checks.CHECKS, check_pairs),
)


class ImageText(ImageTextSignature, ImageAndTextTask):
    """Contrastive image-text learning.

    `predict RUN photo.jpg --set classes="a cat,a dog"` returns each text's probability and its cosine `similarity`,
    which can rank images for one text. Without `classes` the candidates are those of the training data.
    """

    name = "image-text"
    reads = "a table with an image column and a caption column (--target); several captions of an image are several rows"
    input_types = ("captioned",)
    output_types = tuple(IMAGE_TEXT_OBJECTIVES)
    column_spec = CAPTION_COLUMNS
    metrics = (
        Metric("mean_recall", "max", "mean of the six recalls", percent=True),
        *(
            Metric(f"{name}_r{k}", "max", f"{words} in the top {k}", percent=True, label=f"{name} R@{k}")
            for name, words in (("text", "images with a correct caption"), ("image", "captions with a correct image"))
            for k in RECALL_AT
        ),
        Metric("zero_shot_accuracy", "max", "images classified correctly by class names alone", percent=True),
    )
    recipe: ClassVar = {"augmentation": "light", "patience": 10}
    min_batch_size, max_batch_size = 64, 512  # contrastive learning needs many negatives per batch

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels per side of the input image
        channels: int | None = None  # 1 gray, 3 color
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training captions
        tokenizer: str | None = None  # path of a tokenizer.json to use instead
        pixels: str | None = None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std
        resize: str | None = None  # how images are resized, such as crop bicubic; default: padded with white
        length: int | None = None  # maximum tokens of a caption; longer captions are truncated and counted
        flip: bool = False  # mirror images at random; false if captions mention left and right
        end: int | None = None  # id of the end token, if the tokenizer does not define one
        template: str = "{}"  # text made from a class name, such as "a photo of a {}"

    @dataclass(frozen=True)
    class PredictOptions:
        classes: str = ""  # texts to choose from, separated by commas
        templates: str = ""  # texts made from a class name, separated by |; their embeddings are averaged

    classes: list[str]  # test classes: of a class column, or of few captions; or empty
    known: list[str]  # captions to choose from if no classes are named

    @classmethod
    def match(cls, data: Data) -> str | None:
        has_question = any(normalize_name(c.name) == "question" for c in data.features())
        if len(data.features("image")) != 1 or has_question or data.target is None:
            return None
        said = data.required_target.kind == "text" or (
            data.required_target.kind == "category" and normalize_name(data.required_target.name) in CAPTION_NAMES
        )
        return f"images and captions in {data.required_target.name!r}" if said else None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("image")) != 1:
            return "one image column"
        return None if data.target and data.required_target.kind == "text" else "a caption column (name it with --target)"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        if "{}" not in options.template:
            raise SettingsError(f"task.template={options.template!r} has no {{}}. Put {{}} where the class name goes.")
        task = cls(list(data.columns.values()), options)
        captions = task.captions(data)
        task.fit_inputs(data, captions)
        different = list(dict.fromkeys(captions))
        column, few = task.class_column, len(different) <= min(MAX_CAPTION_CLASSES, len(captions) // 5)
        task.classes = list(Labels.fit(data.rows[column]).names) if column else sorted(different) if few else []
        task.known = [different[i] for i in np.sort(np.random.default_rng(0).permutation(len(different))[:MAX_KNOWN_CAPTIONS])]
        return task

    @property
    def class_column(self) -> str | None:
        return next(
            (
                c.name
                for c in self.columns
                if c.role == "ignored" and c.kind in ("category", "boolean") and normalize_name(c.name) in TARGET_NAMES
            ),
            None,
        )

    def captions(self, data: Data) -> list[str]:
        return data.rows[self.target.name].fill_null("").to_list()

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, answered)
        if answered and self.target.name not in data.rows.columns:
            raise DataError(
                f"{data.source}: evaluation needs the caption column {self.target.name!r}, which is missing. To "
                "predict without captions, use `fieldguide predict`."
            )
        return data

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return build_contrastive(model, card)

    @property
    def end(self) -> int:
        """Return the end token, at which the text embedding is read."""
        return self.text.end if self.options.end is None else self.options.end

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text with an end token, and a start token if the tokenizer has one."""
        start, rows = self.text.tokenizer.token_to_id(START_TOKEN), []
        for encoding in self.text.tokenizer.encode_batch(texts):
            ids = encoding.ids[:-1] if encoding.ids[-1:] == [self.end] else encoding.ids
            first = [] if ids[:1] == [start] or start is None else [start]
            rows.append([*first, *(ids or ([self.text.unknown] if start is None else [])), self.end])
        return rows

    def ends_with_special(self, row: list[int]) -> bool:
        return True

    def pad(self, ids: list[np.ndarray]) -> dict[str, Tensor]:
        tokens, mask = self.text.batch(ids)
        return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        pixels = self.pixels(data, settings)
        there = self.target.name in data.rows.columns and data.rows[self.target.name].null_count() < len(data)
        ids, cut = self.tokens(self.captions(data)) if there else ([], 0)
        if not settings:  # for training texts `fit` has added the note
            self.note_truncated(cut, len(ids), self.options.length)
        same = (
            {
                name: torch.from_numpy(number_rows(pl.DataFrame([values])))
                for name, values in (("text", normalize_captions(data.rows[self.target.name])), ("picture", data.rows[HASH]))
            }
            if there
            else {}
        )

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            batch = {"image": pixels(index, generator)}
            if same:
                batch |= {**self.pad([ids[i] for i in index]), **{n: x[torch.from_numpy(index)] for n, x in same.items()}}
            return batch

        return Batches(len(data), make)

    def names(self) -> list[str]:
        """Return the texts that an image is compared with."""
        requested = [name.strip() for name in self.predict_options.classes.split(",") if name.strip()]
        return requested or self.classes or self.known

    def templates(self) -> list[str]:
        """Return the templates of `names`. Raises `SettingsError` for a template without {}."""
        requested = [each.strip() for each in self.predict_options.templates.split("|") if each.strip()]
        if lost := [each for each in requested if "{}" not in each]:
            raise SettingsError(f"templates: {lost[0]!r} has no {{}}. Put {{}} where the class name goes.")
        return requested or [self.options.template if self.class_column or self.predict_options.classes else "{}"]

    def encode_names(self, model: Any, where: torch.device) -> Tensor:  # -> K E, of length 1
        """Return the normalized embedding of each of `names`, averaged over the templates."""
        ways = []
        for template in self.templates():
            ids = self.tokens([template.replace("{}", name) for name in self.names()])[0]
            parts = [self.pad(ids[i : i + QUERY_CHUNK]) for i in range(0, len(ids), QUERY_CHUNK)]
            ways.append(torch.cat([model.encode_text(part["tokens"].to(where), part["mask"].to(where)) for part in parts]))
        return ways[0] if len(ways) == 1 else F.normalize(torch.stack(ways).mean(0), dim=-1)

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        said: list[Tensor] = []  # computed at the first batch
        self.templates()  # report invalid templates before images are read

        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            model = objective.model
            if not said:
                said.append(self.encode_names(model, batch["image"].device))
            image = model.encode_image(batch["image"])
            near = image @ said[0].T
            out = {"image": image, "similarity": near, "probabilities": compute_probabilities(model, near)}
            return out | ({"text": model.encode_text(batch["tokens"], batch["mask"])} if "tokens" in batch else {})

        return answer

    # Scores

    def targets(self, data: Data) -> Arrays:
        captions, column = data.rows[self.target.name], self.class_column
        said = data.rows[column] if column and column in data.rows.columns else captions
        labels = Labels(tuple(self.classes)).apply(said) if self.classes else np.full(len(data), -1)
        return {
            "picture": number_rows(pl.DataFrame([data.rows[HASH]])),
            "caption": number_rows(pl.DataFrame([normalize_captions(captions)])),
            "class": labels.copy(),
        }

    def compute_hits(self, outputs: Arrays, targets: Arrays) -> dict[str, np.ndarray]:
        """Return, by metric, whether each query was answered correctly.

        Equal images count as one image and equal captions as one caption; all pairs that occur in a row are
        correct.
        """
        found: dict[str, np.ndarray] = {}
        if "text" in outputs:
            image, text = (
                outputs[n][np.unique(targets[k], return_index=True)[1]] for n, k in (("image", "picture"), ("text", "caption"))
            )
            places = [np.unique(targets[k], return_inverse=True)[1] for k in ("picture", "caption")]
            right = np.unique(np.stack(places, 1), axis=0)
            for name, rank in (
                ("text", compute_ranks(image, text, right)),
                ("image", compute_ranks(text, image, right[:, ::-1])),
            ):
                found |= {f"{name}_r{k}": rank < k for k in RECALL_AT}
        known, said = targets["class"] >= 0, outputs.get("probabilities")
        if self.classes and known.any() and said is not None and said.shape[1] == len(self.classes):
            found["zero_shot_accuracy"] = (said.argmax(1) == targets["class"])[known]
        return found

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {name: float(hit.mean()) for name, hit in self.compute_hits(outputs, targets).items()}
        recalls = [scores[f"{way}_r{k}"] for way in ("text", "image") for k in RECALL_AT if f"{way}_r{k}" in scores]
        return ({"mean_recall": float(np.mean(recalls))} if recalls else {}) | scores

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return intervals over queries. The candidates stay fixed, else recall would rise with images drawn twice."""
        hits = self.compute_hits(outputs, targets)
        between = {name: binomial_interval(int(hit.sum()), len(hit)) for name, hit in hits.items()}
        ways = [
            np.mean([hits[f"{way}_r{k}"] for k in RECALL_AT], 0)
            for way in ("text", "image")
            if f"{way}_r{RECALL_AT[0]}" in hits
        ]
        if ways:
            mean = float(np.mean([each.mean() for each in ways]))
            error = 1.96 / len(ways) * float(sum(each.var() / len(each) for each in ways)) ** 0.5
            between["mean_recall"] = (max(0.0, mean - error), min(1.0, mean + error))
        return between

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        rng = np.random.default_rng(0)
        blind = {name: rng.normal(size=(len(test), 64)).astype(np.float32) for name in ("image", "text")}
        words = TfidfVectorizer(
            sublinear_tf=True,
            max_features=20_000,
            tokenizer=find_words,
            token_pattern=None,
            ngram_range=(1, 2),
            dtype=np.float32,
        )
        theirs, ours = words.fit_transform(self.captions(train)), words.transform(self.captions(test))
        side = min(16, self.pictures.side)
        small = []
        for data in (train, test):
            p = self.pictures
            x = images.load(data.rows[self.column].to_list(), side, p.channels, fit="pad", scale=p.scale).float()
            small.append(F.normalize((x - x.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1))
        near = torch.cat(
            [(part @ small[0].T).topk(min(BASELINE_NEIGHBORS, len(train)), 1).indices for part in small[1].split(QUERY_CHUNK)]
        ).numpy()
        some = sum(theirs[near[:, i]] for i in range(near.shape[1]))
        # A dense product of so many words would not fit in memory; a random projection keeps angles.
        down = rng.normal(size=(theirs.shape[1], 512)).astype(np.float32)
        return [
            Baseline("chance", "random vectors", blind),
            Baseline(
                "words of similar images",
                f"an image gets the words (TF-IDF) of the {near.shape[1]} nearest training images, by pixels",
                {"image": some @ down, "text": ours @ down},
            ),
        ]

    # Predictions and report

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        names, answers = self.names(), []
        for p, near in zip(outputs["probabilities"], outputs["similarity"]):
            best = np.argsort(-p, kind="stable")[: None if len(names) <= MAX_CAPTION_CLASSES else 5]
            answers.append(
                {
                    "label": names[best[0]],
                    "probability": float(p[best[0]]),
                    "probabilities": {names[i]: float(p[i]) for i in best},
                    "similarity": {names[i]: float(near[i]) for i in best},
                }
            )
        return answers

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        near, captions = outputs["image"] @ outputs["text"].T, self.captions(test)
        pairs_ = set(zip(targets["picture"].tolist(), targets["caption"].tolist()))
        right = lambda i, j: (int(targets["picture"][i]), int(targets["caption"][j])) in pairs_
        chosen = np.random.default_rng(0).permutation(len(test))
        nearest_captions, shown, rows = near.argmax(1), near.argmax(0), []
        gap = near.max(1) - near.diagonal()
        worst = [i for i in np.argsort(-gap, kind="stable") if not right(i, nearest_captions[i])][:12]
        pair = lambda i, j: Picture(self.thumbnail(test, int(i)), captions[j], bad=not right(i, j))
        by_picture, by_caption = [pair(i, nearest_captions[i]) for i in chosen[:16]], [pair(shown[j], j) for j in chosen[:16]]
        for i in chosen[:20]:
            order = np.argsort(-near[i], kind="stable")
            best = list(dict.fromkeys(captions[j] for j in order[:60]))[:3]
            rows.append((Path(str(test.rows[self.column][int(i)])).name, captions[i], *best, *[""] * (3 - len(best))))
        sections: dict[str, list[ReportElement]] = {
            "Retrieved": [
                Gallery(
                    "Captions retrieved for images",
                    "Random test images with the nearest caption of all; framed if the caption belongs to another image.",
                    by_picture,
                ),
                Gallery("Images retrieved for captions", "Random test captions with the nearest image.", by_caption),
                Table(
                    "Nearest three",
                    "Captions nearest to test images.",
                    ("image", "own caption", "first", "second", "third"),
                    rows,
                ),
            ]
        }
        if worst:
            sections["Retrieved"].append(
                Gallery(
                    "Worst mistakes",
                    "A wrong caption is much nearer than the image's own.",
                    [
                        Picture(
                            self.thumbnail(test, int(i)),
                            f"predicted: {captions[nearest_captions[i]]}; target: {captions[i]}",
                            bad=True,
                        )
                        for i in worst
                    ],
                )
            )
        if objective is not None and hasattr(objective.model, "attention"):
            where, some = next(objective.parameters()).device, chosen[:12]
            with torch.inference_mode():
                seen = self.pixels(test.take(some))(np.arange(len(some)), None).to(where)
                heat = objective.model.attention(seen).cpu().numpy()
            sections["Attention"] = [
                Gallery(
                    "Attention",
                    "Test images; red marks the patches that contribute most to the image embedding (attention rollout).",
                    [Picture(self.overlay(test, int(i), h), captions[i]) for i, h in zip(some, heat)],
                    wide=True,
                )
            ]
        return sections

    STATE: ClassVar = {"classes": list[str], "known": list[str]}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "classes": self.classes, "known": self.known}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.restore_inputs(state, folder)
        task.classes, task.known = state["classes"], state["known"]
        return task


def compute_ranks(questions: np.ndarray, answers: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return, per query (Q, E), how many wrong candidates (A, E) are at least as near as its nearest correct one.

    `right` holds pairs (query, candidate); every query has one.
    """
    found = np.empty(len(questions), dtype=np.int64)
    for first in range(0, len(questions), QUERY_CHUNK):
        near = questions[first : first + QUERY_CHUNK].astype(np.float64) @ answers.T.astype(np.float64)
        mine = right[(right[:, 0] >= first) & (right[:, 0] < first + QUERY_CHUNK)]
        good = np.zeros(near.shape, dtype=bool)
        good[mine[:, 0] - first, mine[:, 1]] = True
        best = np.where(good, near, -np.inf).max(1, keepdims=True)
        found[first : first + QUERY_CHUNK] = (~good & (near >= best)).sum(1)
    return found


TASKS = (ImageText,)
