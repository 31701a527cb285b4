"""Pictures and captions: both as points of one space, so that each finds the other and any text can be a class."""

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
from fieldguide.core.report_elements import Exhibit, Gallery, Picture, Table
from fieldguide.core.settings import Settings
from fieldguide.data.column_spec import CAPTION_NAMES, TARGET_NAMES, ColumnSpec, normalize_name
from fieldguide.data.dataset import HASH, Column, Data, Finding
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.data.preprocessing import Labels
from fieldguide.data.validation import checks
from fieldguide.data.validation.duplicates import number_rows
from fieldguide.data.validation.findings import places as first_places
from fieldguide.objectives import Contrastive, Objective
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.multimodal.base import Pictured
from fieldguide.tasks.supervised import binomial_interval

AT = (1, 5, 10)  # of the best answers, among which a right one counts
FEW = 100  # different captions that are taken for names of classes, where each stands on many rows
KEPT = 1000  # training captions that answers are chosen from, where nobody names others
CHUNK = 1000  # questions compared with all answers at once
START = "<|startoftext|>"  # of CLIP: a token that begins texts, in tokenizers that have it
NEAR = 5  # training pictures that the simple baseline takes its words from


def pairs(data: Data) -> Iterator[Finding]:
    """Rows that say the same of the same picture."""
    column = data.target
    if column is None or HASH not in data.rows.columns or not len(data):
        return
    same = number_rows(pl.DataFrame([data.rows[HASH], simplified(data.rows[column.name])]))
    first = np.unique(same, return_index=True)[1]
    again = np.ones(len(data), dtype=bool)
    again[first] = False
    if again.any():
        yield Finding(
            "duplicate-pair",
            "warning",
            "rows whose picture and caption are there before",
            first_places(data, again),
            int(again.sum()),
            "Remove them; until then they count twice.",
        )
    name = data.rows[column.name].str.contains(r"(?i)^\S+\.(png|jpe?g|gif|webp|bmp|tiff?)$").fill_null(False).to_numpy()
    if name.any():
        yield Finding(
            "caption-is-file",
            "warning",
            "captions that are the name of a picture file",
            first_places(data, name),
            int(name.sum()),
            "Have the columns slipped in these rows?",
        )


def simplified(captions: pl.Series) -> pl.Series:
    return captions.fill_null("").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars(" .")


class ImageText(Pictured):
    """`predict RUN photo.jpg --set classes="a cat,a dog"` says how probable each is, and how near each is to the picture
    (`similarity`, by which pictures can be ranked for one text); without `classes` those of the training data."""

    name = "image-text"
    reads = "a table with a column of pictures and one of captions (--target), several captions of a picture in several rows"
    input_types = ("captioned",)
    output_types = ("embeddings",)
    column_spec = ColumnSpec(
        "last",
        names=(*CAPTION_NAMES, "text", "sentence", "description", "title"),
        kinds={"target": "text"},
        columns={"image": "image", "image_path": "image"},
        checks=(*checks.CHECKS, pairs),
    )
    metrics = (
        Metric("mean_recall", "max", "mean of the six recalls below", percent=True),
        *(Metric(f"text_r{k}", "max", f"pictures with a right caption among the best {k}", percent=True) for k in AT),
        *(Metric(f"image_r{k}", "max", f"captions with a right picture among the best {k}", percent=True) for k in AT),
        Metric("zero_shot_accuracy", "max", "pictures whose class is named by words alone", percent=True),
    )
    recipe: ClassVar = {"augmentation": "light", "patience": 10}
    fewest, most = 64, 512  # what is learnt is told from the rest of the batch

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels a side that the network sees
        channels: int | None = None  # 1 grey, 3 colour
        vocab_size: int | None = None  # tokens in the vocabulary learnt from the training captions
        tokenizer: str | None = None  # a tokenizer.json to use instead
        pixels: str | None = None  # mean and deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std
        resize: str | None = None  # how a picture gets its side, such as crop bicubic; else it is filled up with white
        length: int | None = None  # tokens of a caption that are read; the rest is cut off, and counted
        flip: bool = False  # a mirrored picture keeps its caption: false where these say left and right
        end: int | None = None  # token that ends a text, where a given tokenizer leaves it open
        template: str = "{}"  # how a class is said, such as "a photo of a {}"

    @dataclass(frozen=True)
    class PredictOptions:
        classes: str = ""  # texts to choose from, with commas between
        templates: str = ""  # how a class is said, with | between several, whose vectors are averaged

    classes: list[str]  # that pictures are tested on: of a class column, or few captions; or none
    known: list[str]  # captions to choose from where nobody names others

    @classmethod
    def match(cls, data: Data) -> str | None:
        asked = any(normalize_name(c.name) == "question" for c in data.features())
        if len(data.features("image")) != 1 or asked or data.target is None:
            return None
        said = data.target.kind == "text" or (
            data.target.kind == "category" and normalize_name(data.target.name) in CAPTION_NAMES
        )
        return f"pictures and what is said of each in {data.target.name!r}" if said else None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("image")) != 1:
            return "one column of pictures"
        return None if data.target and data.target.kind == "text" else "a column of captions (name it with --target)"

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        if "{}" not in options.template:
            raise SettingsError(f"task.template={options.template!r} has no {{}}, where the class is to stand.")
        task = cls(list(data.columns.values()), options)
        captions = task.captions(data)
        task.learn_inputs(data, captions)
        different = list(dict.fromkeys(captions))
        column, few = task.class_column, len(different) <= min(FEW, len(captions) // 5)
        task.classes = list(Labels.fit(data.rows[column]).names) if column else sorted(different) if few else []
        task.known = [different[i] for i in np.sort(np.random.default_rng(0).permutation(len(different))[:KEPT])]
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
                f"{data.source}: the captions are to be in column {self.target.name!r}, which is not there. "
                "To ask for answers, use `fieldguide predict`."
            )
        return data

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return Contrastive(model, card.inputs)

    @property
    def end(self) -> int:
        """The token at which a text ends, where the network reads it out."""
        return self.text.end if self.options.end is None else self.options.end

    def framed(self, texts: list[str]) -> list[list[int]]:
        """Each text with the token at which it ends, and before it the one that begins it, where there is such a token."""
        start, rows = self.text.tokenizer.token_to_id(START), []
        for encoding in self.text.tokenizer.encode_batch(texts):
            ids = encoding.ids[:-1] if encoding.ids[-1:] == [self.end] else encoding.ids
            first = [] if ids[:1] == [start] or start is None else [start]
            rows.append([*first, *(ids or ([self.text.unknown] if start is None else [])), self.end])
        return rows

    def closes(self, row: list[int]) -> bool:
        return True

    def padded(self, ids: list[np.ndarray]) -> dict[str, Tensor]:
        tokens, mask = self.text.batch(ids)
        return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        pixels = self.pixels(data, settings)
        there = self.target.name in data.rows.columns and data.rows[self.target.name].null_count() < len(data)
        ids, cut = self.tokens(self.captions(data)) if there else ([], 0)
        if not settings:  # of training texts it was said when the length was chosen
            self.note_cut(cut, len(ids))
        same = (
            {
                name: torch.from_numpy(number_rows(pl.DataFrame([values])))
                for name, values in (("text", simplified(data.rows[self.target.name])), ("picture", data.rows[HASH]))
            }
            if there
            else {}
        )

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            batch = {"image": pixels(index, generator)}
            if same:
                batch |= {**self.padded([ids[i] for i in index]), **{n: x[torch.from_numpy(index)] for n, x in same.items()}}
            return batch

        return Batches(len(data), make)

    def names(self) -> list[str]:
        """The texts that a picture is compared with."""
        asked = [name.strip() for name in self.predict_options.classes.split(",") if name.strip()]
        return asked or self.classes or self.known

    def templates(self) -> list[str]:
        """How each of `names` is said. Raises `SettingsError` for one without {}, where the class is to stand."""
        asked = [each.strip() for each in self.predict_options.templates.split("|") if each.strip()]
        if lost := [each for each in asked if "{}" not in each]:
            raise SettingsError(f"templates: {lost[0]!r} has no {{}}, where the class is to stand.")
        return asked or [self.options.template if self.class_column or self.predict_options.classes else "{}"]

    def said(self, model: Any, where: torch.device) -> Tensor:  # -> K E, of length 1
        """The vector of each of `names`, averaged over the templates."""
        ways = []
        for template in self.templates():
            ids = self.tokens([template.replace("{}", name) for name in self.names()])[0]
            parts = [self.padded(ids[i : i + CHUNK]) for i in range(0, len(ids), CHUNK)]
            ways.append(torch.cat([model.encode_text(part["tokens"].to(where), part["mask"].to(where)) for part in parts]))
        return ways[0] if len(ways) == 1 else F.normalize(torch.stack(ways).mean(0), dim=-1)

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        said: list[Tensor] = []  # of all batches
        self.templates()  # what is wrong with them is said before pictures are read

        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            model = objective.model
            if not said:
                said.append(self.said(model, batch["image"].device))
            image = model.encode_image(batch["image"])
            near = image @ said[0].T
            out = {"image": image, "similarity": near, "probabilities": (near * model.logit_scale.exp()).softmax(1)}
            return out | ({"text": model.encode_text(batch["tokens"], batch["mask"])} if "tokens" in batch else {})

        return answer

    # Scores

    def targets(self, data: Data) -> Arrays:
        captions, column = data.rows[self.target.name], self.class_column
        said = data.rows[column] if column and column in data.rows.columns else captions
        labels = Labels(tuple(self.classes)).apply(said) if self.classes else np.full(len(data), -1)
        return {
            "picture": number_rows(pl.DataFrame([data.rows[HASH]])),
            "caption": number_rows(pl.DataFrame([simplified(captions)])),
            "class": labels.copy(),
        }

    def hits(self, outputs: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
        """Metric -> of each question, whether it was answered rightly. Equal pictures are one picture, and so are captions;
        all that stand together in a row are right."""
        found: dict[str, np.ndarray] = {}
        if "text" in outputs:
            image, text = (
                outputs[n][np.unique(truth[k], return_index=True)[1]] for n, k in (("image", "picture"), ("text", "caption"))
            )
            places = [np.unique(truth[k], return_inverse=True)[1] for k in ("picture", "caption")]
            right = np.unique(np.stack(places, 1), axis=0)
            for name, rank in (("text", ranks(image, text, right)), ("image", ranks(text, image, right[:, ::-1]))):
                found |= {f"{name}_r{k}": rank < k for k in AT}
        known, said = truth["class"] >= 0, outputs.get("probabilities")
        if self.classes and known.any() and said is not None and said.shape[1] == len(self.classes):
            found["zero_shot_accuracy"] = (said.argmax(1) == truth["class"])[known]
        return found

    def score(self, outputs: Arrays, truth: Arrays) -> dict[str, float]:
        scores = {name: float(hit.mean()) for name, hit in self.hits(outputs, truth).items()}
        recalls = [scores[f"{way}_r{k}"] for way in ("text", "image") for k in AT if f"{way}_r{k}" in scores]
        return ({"mean_recall": float(np.mean(recalls))} if recalls else {}) | scores

    def intervals(self, outputs: Arrays, truth: Arrays) -> dict[str, tuple[float, float]]:
        """Over questions; what they are asked among stays, or a recall would rise with the pictures drawn twice."""
        hits = self.hits(outputs, truth)
        between = {name: binomial_interval(int(hit.sum()), len(hit)) for name, hit in hits.items()}
        ways = [np.mean([hits[f"{way}_r{k}"] for k in AT], 0) for way in ("text", "image") if f"{way}_r{AT[0]}" in hits]
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
            sublinear_tf=True, max_features=20_000, token_pattern=r"\w+", ngram_range=(1, 2), dtype=np.float32
        )
        theirs, ours = words.fit_transform(self.captions(train)), words.transform(self.captions(test))
        side = min(16, self.pictures.side)
        small = []
        for data in (train, test):
            x = images.load(data.rows[self.column].to_list(), side, self.pictures.channels, fit="pad").float()
            small.append(F.normalize((x - x.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1))
        near = torch.cat([(part @ small[0].T).topk(min(NEAR, len(train)), 1).indices for part in small[1].split(CHUNK)]).numpy()
        some = sum(theirs[near[:, i]] for i in range(near.shape[1]))
        # A dense product of so many words would not fit: their random projection keeps angles.
        down = rng.normal(size=(theirs.shape[1], 512)).astype(np.float32)
        return [
            Baseline("chance", "vectors by chance", blind),
            Baseline(
                "words of similar pictures",
                f"a picture has the words (TF-IDF) of the {near.shape[1]} nearest training pictures, by pixels",
                {"image": some @ down, "text": ours @ down},
            ),
        ]

    # Answers and report

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        names, answers = self.names(), []
        for p, near in zip(outputs["probabilities"], outputs["similarity"]):
            best = np.argsort(-p, kind="stable")[: None if len(names) <= FEW else 5]
            answers.append(
                {
                    "label": names[best[0]],
                    "probability": float(p[best[0]]),
                    "probabilities": {names[i]: float(p[i]) for i in best},
                    "similarity": {names[i]: float(near[i]) for i in best},
                }
            )
        return answers

    def exhibits(
        self, test: Data, outputs: Arrays, truth: Arrays, objective: Objective | None = None
    ) -> dict[str, list[Exhibit]]:
        near, captions = outputs["image"] @ outputs["text"].T, self.captions(test)
        pairs_ = set(zip(truth["picture"].tolist(), truth["caption"].tolist()))
        right = lambda i, j: (int(truth["picture"][i]), int(truth["caption"][j])) in pairs_
        chosen = np.random.default_rng(0).permutation(len(test))
        told, shown, rows = near.argmax(1), near.argmax(0), []
        gap = near.max(1) - near.diagonal()
        worst = [i for i in np.argsort(-gap, kind="stable") if not right(i, told[i])][:12]
        pair = lambda i, j: Picture(self.thumbnail(test, int(i)), captions[j], bad=not right(i, j))
        by_picture, by_caption = [pair(i, told[i]) for i in chosen[:16]], [pair(shown[j], j) for j in chosen[:16]]
        for i in chosen[:20]:
            order = np.argsort(-near[i], kind="stable")
            best = list(dict.fromkeys(captions[j] for j in order[:60]))[:3]
            rows.append((Path(str(test.rows[self.column][int(i)])).name, captions[i], *best, *[""] * (3 - len(best))))
        sections: dict[str, list[Exhibit]] = {
            "Retrieved": [
                Gallery(
                    "Captions found for pictures",
                    "Test pictures by chance, each with the nearest caption of all; framed where it belongs to another.",
                    by_picture,
                ),
                Gallery("Pictures found for captions", "Test captions by chance, each with the nearest picture.", by_caption),
                Table(
                    "The nearest three",
                    "Captions nearest to test pictures.",
                    ("picture", "its caption", "first", "second", "third"),
                    rows,
                ),
            ]
        }
        if worst:
            sections["Retrieved"].append(
                Gallery(
                    "Worst mistakes",
                    "A wrong caption is much nearer than the picture's own.",
                    [
                        Picture(self.thumbnail(test, int(i)), f"says: {captions[told[i]]}; is: {captions[i]}", bad=True)
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
                    "Where it looked",
                    "Test pictures, and in red the patches that count most for the picture's vector (attention rollout).",
                    [Picture(self.overlay(test, int(i), h), captions[i]) for i, h in zip(some, heat)],
                    wide=True,
                )
            ]
        return sections

    def state(self) -> dict[str, Any]:
        return {**super().state(), "classes": self.classes, "known": self.known}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = cls(columns, options)
        task.restore_inputs(state, folder)
        task.classes, task.known = state["classes"], state["known"]
        return task


def ranks(questions: np.ndarray, answers: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each question (Q E), how many wrong answers (of A E) are as near as its nearest right one or nearer.

    `right` holds pairs (question, answer), and every question has one.
    """
    found = np.empty(len(questions), dtype=np.int64)
    for first in range(0, len(questions), CHUNK):
        near = questions[first : first + CHUNK].astype(np.float64) @ answers.T.astype(np.float64)
        mine = right[(right[:, 0] >= first) & (right[:, 0] < first + CHUNK)]
        good = np.zeros(near.shape, dtype=bool)
        good[mine[:, 0] - first, mine[:, 1]] = True
        best = np.where(good, near, -np.inf).max(1, keepdims=True)
        found[first : first + CHUNK] = (~good & (near >= best)).sum(1)
    return found


TASKS = (ImageText,)
