"""Image-to-text: a caption is written for each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Bars, Gallery, Picture, ReportElement, Table
from fieldguide.core.settings import Settings
from fieldguide.core.structure import Limits
from fieldguide.data.dataset import HASH, Column, Data
from fieldguide.data.loader import Batches
from fieldguide.data.media import images
from fieldguide.metrics.captions import ORDERS, compute_bleu, score_captions
from fieldguide.models.generation import MAX_NEW_TOKENS, BeamSearch, EncoderDecoderState, generate_batch
from fieldguide.models.generation.stop_strings import truncate_at_stop
from fieldguide.objectives import NextToken, Objective
from fieldguide.tasks.base import Arrays, Baseline, CheckpointAssets, Metric
from fieldguide.tasks.multimodal.base import ImageAndTextTask
from fieldguide.tasks.multimodal.image_text import CAPTION_COLUMNS, normalize_captions
from fieldguide.tasks.multimodal.signature import CaptioningSignature

REFERENCES = "references"  # column with all captions of an image
BASELINE_SIDE = 16  # pixels per side by which the baseline compares images
BASELINE_CHUNK = 1000  # images compared with all training images at once
RESAMPLES = 300  # of the test images, for intervals
SHOWN_IMAGES = 16
SHOWN_CAPTIONS = 30  # of the most frequent predictions
MAX_SHOWN_REFERENCES = 2  # next to a prediction


class ImageToText(CaptioningSignature, ImageAndTextTask):
    """Captioning. An image may have several captions: training takes one at random at each step, scores compare with all of them.

    The caption of a prediction begins with `prompt`, if one is given.
    """

    name = "image-to-text"
    reads = (
        "images with captions: COCO captions, a table with an image column and a caption column (--target), or a .txt next to each "
        "image; an image may have several captions"
    )
    input_types = ("image-text",)
    output_types = ("tokens",)
    column_spec = CAPTION_COLUMNS
    metrics = (
        Metric("cider", "max", "CIDEr-D", label="CIDEr"),
        Metric("bleu", "max", "BLEU-4", label="BLEU"),
        Metric("loss", "min", "nats per token of a caption"),
    )
    monitor = "loss"  # scored without generating text
    recipe: ClassVar = {"augmentation": "light", "patience": 8}
    max_test_examples = 1000  # beam search is slow
    prediction_passes = 16.0

    @dataclass(frozen=True)
    class Options:
        side: int | None = None  # pixels per side of the input image
        channels: int | None = None  # 1 gray, 3 color
        vocab_size: int | None = None  # vocabulary size if a tokenizer is fitted on the training captions
        tokenizer: str | None = None  # path of a tokenizer.json to use instead
        pixels: str | None = None  # mean and standard deviation of each channel, from 0 to 1: mean,mean,mean/std,std,std
        resize: str | None = None  # how images are resized, such as crop bicubic; default: padded with white
        length: int | None = None  # maximum tokens of a caption with its markers; longer captions are truncated and counted
        flip: bool = False  # mirror images at random; false if captions mention left and right
        begin: int | None = None  # id of the token that starts a caption, if it is not the tokenizer's class token
        end: int | None = None  # id of the end token, if the tokenizer does not define one

    @dataclass(frozen=True)
    class PredictOptions(BeamSearch):
        max_new_tokens: Annotated[int, Limits(1, MAX_NEW_TOKENS)] = 48  # maximum tokens of a caption
        prompt: str = ""  # text that the caption begins with, such as "a picture of"

    shown: list[tuple[str, str]]  # a few training images that are captioned during training, with their captions

    # Data

    @classmethod
    def match(cls, data: Data) -> str | None:
        return None  # images with captions are image-text by default

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if len(data.features("image")) != 1:
            return "one image column"
        return None if data.target and data.required_target.kind == "text" else "a caption column (name it with --target)"

    @classmethod
    def build_examples(cls, data: Data, options: Any) -> Data:
        """Return one row per image, with the list of its captions; images are equal if their files are."""
        target = data.target
        if REFERENCES in data.rows.columns or target is None or target.name not in data.rows.columns:
            return data
        image = data.features("image")[0].name
        key = HASH if HASH in data.rows.columns else image
        rows = data.rows.with_row_index("place")
        groups = rows.group_by(key, maintain_order=True).agg(
            pl.col("place").first(), pl.col(target.name).drop_nulls().unique(maintain_order=True).alias(REFERENCES)
        )
        built = data.take(groups["place"].to_numpy())
        return replace(built, rows=built.rows.with_columns(groups[REFERENCES]))

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = cls(list(data.columns.values()), options)
        references = task.read_references(data)
        task.fit_inputs(data, [text for texts in references for text in texts])
        chosen = np.random.default_rng(0).permutation(len(data))[: SHOWN_IMAGES // 2]
        task.shown = [(data.rows[task.column][int(i)], " / ".join(references[i][:MAX_SHOWN_REFERENCES])) for i in chosen]
        return task

    def read_references(self, data: Data) -> list[list[str]]:
        """Return all captions of each image; an empty one if it has none."""
        if REFERENCES in data.rows.columns:
            return [list(texts) or [""] for texts in data.rows[REFERENCES].to_list()]
        return [[text or ""] for text in data.rows[self.target.name].to_list()]

    def read_one(self, source: Any, answered: bool) -> Data:
        data = super().read_one(source, answered)
        if answered and self.target.name not in data.rows.columns:
            raise DataError(
                f"{data.source}: evaluation needs the caption column {self.target.name!r}, which is missing. To "
                "predict without captions, use `fieldguide predict`."
            )
        return data

    # Tokens

    @property
    def begin(self) -> int:
        """Return the token that starts a caption."""
        return self.text.cls if self.options.begin is None else self.options.begin

    @property
    def end(self) -> int:
        """Return the token that ends a caption."""
        return self.text.end if self.options.end is None else self.options.end

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts without markers; an empty text becomes the unknown token."""
        return [ids.tolist() or [self.text.unknown] for ids in self.text.encode_exact(list(texts))]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [[self.begin, *ids, self.end] for ids in self.encode_plain(texts)]

    def ends_with_special(self, row: list[int]) -> bool:
        return True

    def model_dims(self) -> dict[str, Any]:
        return {**super().model_dims(), "begin": self.begin, "end": self.end, "pad": self.text.pad}

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        pixels = self.pixels(data, settings)
        captions: list[list[np.ndarray]] | None = None
        if self.target.name in data.rows.columns and data.rows[self.target.name].null_count() < len(data):
            references = self.read_references(data)
            ids, cut = self.tokens([text for texts in references for text in texts])
            if not settings:  # for training texts `fit` has added the note
                self.note_truncated(cut, len(ids), self.options.length)
            rest = iter(ids)
            captions = [[next(rest) for _ in texts] for texts in references]

        def make(index: np.ndarray, generator: torch.Generator | None) -> dict[str, Tensor]:
            batch = {"image": pixels(index, generator), "row": torch.from_numpy(np.asarray(index))}
            if captions is not None:
                batch |= self.build_target([choose_caption(captions[i], generator) for i in index])
            return batch

        return Batches(len(data), make)

    def build_target(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return the tokens of captions up to the last but one, their mask, and the tokens that follow (-1: none)."""
        tokens, mask = self.text.batch([row[:-1] for row in rows])
        follows, _ = self.text.batch([row[1:] for row in rows])
        return {
            "tokens": torch.from_numpy(tokens),
            "mask": torch.from_numpy(mask),
            "target": torch.from_numpy(np.where(mask, follows, -1)),
        }

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return NextToken(model, card.inputs, settings.label_smoothing)

    # Predictions

    def predict_step(self, objective: Objective) -> Callable[[dict[str, Any]], dict[str, Any]]:
        self.start_tokens()  # reports a prompt that is too long before images are read

        def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            scored = objective.outputs(batch) if "target" in batch else {}
            return {**scored, "said": self.write(objective.model, batch["image"], batch["row"].tolist())}

        return answer

    def start_tokens(self) -> list[int]:
        """Return the tokens that captions begin with. Raises `SettingsError` for a prompt that leaves no room."""
        prompt = self.predict_options.prompt.strip()
        start = [self.begin, *(self.encode_plain([prompt])[0] if prompt else [])]
        if len(start) >= self.options.length:
            raise SettingsError(
                f"the prompt has {len(start)} tokens, but captions have at most {self.options.length}: shorten the prompt."
            )
        return start

    def write(self, network: Any, image: Tensor, row_ids: Sequence[int] | None = None) -> Tensor:  # B C S S -> B T
        """Return the tokens of captions, -1 after their end. `row_ids` seed sampling per row."""
        start, how = self.start_tokens(), self.predict_options
        most = min(how.max_new_tokens, self.options.length - len(start))
        found = generate_batch(
            EncoderDecoderState(network, image, None),
            [start] * len(image),
            how,
            eos_token_ids=(self.end,),
            decode=self.text.decode,
            row_ids=row_ids,
            max_lengths=torch.full((len(image),), most),
        )
        width = max(1, *map(len, found))
        return torch.tensor([[*start[1:], *row, *[-1] * (width - len(row))] for row in found])

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
        references = np.empty(len(data), dtype=object)
        references[:] = self.read_references(data)
        return {REFERENCES: references}

    def score(self, outputs: Arrays, targets: Arrays) -> dict[str, float]:
        scores = {}
        if "text" in outputs:
            counts, cider = score_captions(outputs["text"].tolist(), targets[REFERENCES].tolist())
            scores = {"cider": float(cider.mean()), "bleu": float(compute_bleu(counts.sum(0)))}
        if "nats" in outputs:
            scores["loss"] = float(outputs["nats"].sum(dtype=np.float64) / max(outputs["count"].sum(), 1))
        return scores

    def intervals(self, outputs: Arrays, targets: Arrays) -> dict[str, tuple[float, float]]:
        """Return intervals over images (bootstrap, percentiles). The rarity of n-grams stays that of all references."""
        counts, cider = score_captions(outputs["text"].tolist(), targets[REFERENCES].tolist())
        rows = np.random.default_rng(0).integers(0, len(cider), (RESAMPLES, len(cider)))
        drawn = {"cider": cider[rows].mean(1), "bleu": compute_bleu(counts[rows].sum(1))}
        if "nats" in outputs:
            nats, count = (outputs[name].astype(np.float64)[rows].sum(1) for name in ("nats", "count"))
            drawn["loss"] = nats / np.maximum(count, 1)
        return {name: tuple(np.percentile(values, [2.5, 97.5]).tolist()) for name, values in drawn.items()}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        known = self.read_references(train)
        often = Counter(normalize_captions(pl.Series([text for texts in known for text in texts])).to_list()).most_common(1)[0][
            0
        ]
        near = find_nearest_images(*(self.load_small(data) for data in (test, train)))
        repeat = np.array([often] * len(test), dtype=object)
        return [
            Baseline("most frequent caption", f"always {often!r}", {"text": repeat}),
            Baseline(
                "caption of the nearest image",
                "a caption of the training image that is most similar by pixels",
                {"text": np.array([known[i][0] for i in near], dtype=object)},
            ),
        ]

    def load_small(self, data: Data) -> Tensor:  # N -> N F
        """Return small copies of images, centered and of length 1."""
        side, p = min(BASELINE_SIDE, self.pictures.side), self.pictures
        x = images.load(data.rows[self.column].to_list(), side, p.channels, fit="pad", scale=p.scale).float()
        return F.normalize((x - x.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1)

    # Report

    def log_eval_samples(self, objective: Objective) -> list[ReportElement]:
        p, paths = self.pictures, [path for path, _ in self.shown]
        image = p.apply(p.load(paths)).to(next(objective.parameters()).device)
        texts = self.decode(self.write(objective.model, image).numpy())
        data = Data("", pl.DataFrame({self.column: paths}), {}, None)  # type: ignore[arg-type]  # for thumbnails only
        pictures = [
            Picture(self.thumbnail(data, i), f"{said or '(nothing)'}; reference: {known}")
            for i, (said, (_, known)) in enumerate(zip(texts, self.shown))
        ]
        return [Gallery("Captions during training", "Training images.", pictures)]

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        said, known = outputs["text"].tolist(), targets[REFERENCES].tolist()
        counts, cider = score_captions(said, known)

        def show(i: int) -> Picture:
            return Picture(
                self.thumbnail(test, i),
                f"{said[i] or '(nothing)'}; CIDEr {cider[i]:.2f}; reference: {' / '.join(known[i][:MAX_SHOWN_REFERENCES])}",
                bad=bool(cider[i] < np.median(cider) / 4),
            )

        order = np.argsort(cider, kind="stable")
        shuffled = np.random.default_rng(0).permutation(len(said))
        often = Counter(said).most_common(SHOWN_CAPTIONS)
        scored = {text: cider[[i for i, other in enumerate(said) if other == text]].mean() for text, _ in often}
        galleries = [
            Gallery(title, note, [show(int(i)) for i in some[:SHOWN_IMAGES]])
            for title, note, some in (
                ("Worst captions", "Test images whose caption is least like their references.", order),
                ("Random sample", "Random test images.", shuffled),
                ("Best captions", "Test images whose caption is most like their references.", order[::-1]),
            )
        ]
        return {
            "Captions": [
                *galleries,
                Bars(
                    "BLEU by length of the n-grams",
                    "Test captions; up to one, two, three and four words in a row.",
                    {f"BLEU-{order}": float(compute_bleu(counts.sum(0), order)) for order in ORDERS},
                ),
                Table(
                    "Most frequent predictions",
                    f"{len(set(said)):,} different captions are predicted for {len(said):,} test images.",
                    ("caption", "images", "mean CIDEr"),
                    [(text or "(nothing)", count, float(scored[text])) for text, count in often],
                    heat=("mean CIDEr",),
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

    @classmethod
    def published(cls, assets: CheckpointAssets) -> Self | None:
        if assets.pictures is None or assets.folder is None:
            return None
        p = assets.pictures
        return cls.from_state(
            [Column("image", "image"), Column("caption", "text", "target")],
            cls.Options(side=p.side, channels=p.channels, length=assets.length, begin=assets.begin, end=assets.end),
            {"pictures": p.to_json(), "median": 0, "shown": []},
            assets.folder,
        )


def choose_caption(captions: Sequence[np.ndarray], generator: torch.Generator | None) -> np.ndarray:
    """Return one caption of an image: a random one in training, else the first."""
    if generator is None or len(captions) == 1:
        return captions[0]
    return captions[int(torch.randint(len(captions), (1,), generator=generator))]


def find_nearest_images(some: Tensor, known: Tensor) -> list[int]:  # Q F, N F -> Q
    """Return the number of the known image with the largest product, for each of some images."""
    return torch.cat([(part @ known.T).argmax(1) for part in some.split(BASELINE_CHUNK)]).tolist()


TASKS = (ImageToText,)
