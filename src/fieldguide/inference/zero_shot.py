"""ZeroShot: a network of pictures and texts, such as a published CLIP, that tells classes by their names alone.

It is the task `image-text` with preparation as its publisher had it, in the place of one learnt from data; so what can be
asked of a run can be asked of it, in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fieldguide.checkpoints.load import TEMPLATE, Checkpoint, filled, inspect_checkpoint
from fieldguide.checkpoints.preprocessor_config import shown
from fieldguide.core import distributed
from fieldguide.core.card import OPENAI, Card, Scale
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.data import read
from fieldguide.data.dataset import Column, Data
from fieldguide.data.preprocessing import Labels, Pictures, Text
from fieldguide.inference.predictor import listed, records
from fieldguide.inference.run import open_run
from fieldguide.objectives import Contrastive
from fieldguide.tasks.multimodal.image_text import ImageText
from fieldguide.training.inference_loop import collect

TEMPLATES = (TEMPLATE,)
BATCH = 64


def published(text: Text, pictures: Pictures, end: int, length: int) -> ImageText:
    """The task of a network whose tokenizer puts its own tokens around a text, and whose pictures are prepared as told."""
    task = ImageText(
        [Column("image", "image"), Column("caption", "text", "target")],
        ImageText.Options(side=pictures.side, channels=pictures.channels, vocab_size=text.size, length=length, end=end),
    )
    task.text, task.pictures, task.classes, task.known = text, pictures, [], []
    return task


class ZeroShot:
    """`predict(pictures, classes)` says how probable each class is, `evaluate(folder)` how often the right one is chosen."""

    def __init__(self, network: nn.Module, card: Card, task: ImageText, templates: Sequence[str] = TEMPLATES):
        self.card, self.task, self.templates = card, task, tuple(templates)
        self.objective = Contrastive(network, card.inputs).to(distributed.device()).eval()

    @classmethod
    def load(
        cls, source: str | Path | Checkpoint, *, tokenizer: str | Path | None = None, name: str | None = None, **overrides: Any
    ) -> ZeroShot:
        """From a folder of transformers or open_clip, a file of OpenAI, hf:organisation/name, or a run of the task image-text.

        `tokenizer` names a tokenizer.json where none lies beside the weights; `name` the size where a file could be several.
        Raises `WeightsError` for other networks, and where the tokenizer is missing or too large.
        """
        if not isinstance(source, Checkpoint) and (Path(source) / "run.json").is_file():
            run = open_run(source)
            if not isinstance(run.task, ImageText):
                raise WeightsError(f"{source} is a run of {run.task.name}: classes by name alone are told by image-text")
            return cls(run.model, run.card, run.task, [run.task.options.template])
        found = source if isinstance(source, Checkpoint) else inspect_checkpoint(source, name)
        if "embeddings" not in found.card.output_types:
            raise WeightsError(
                f"{found.path} is {found.card.name}, which gives {' or '.join(found.card.output_types)}: to tell "
                "classes by name, a network must give vectors of pictures and of texts"
            )
        network = filled(found.card, {**found.values, **overrides}, found.state, found.origin, str(found.path))
        folder = found.path if found.path.is_dir() else found.path.parent
        file = Path(tokenizer) if tokenizer else folder / "tokenizer.json"
        if not file.is_file():
            raise WeightsError(
                f"{file} is not there: without a tokenizer names of classes cannot be read. Say "
                "tokenizer=PATH; that of every CLIP is in the folder openai/clip-vit-base-patch32."
            )
        text, c = Text.load(file), network.config
        if text.size > c.vocab_size:
            raise WeightsError(f"{file} has {text.size:,} tokens, the network {c.vocab_size:,}")
        pictures = prepared(folder, c.image, c.channels, found.card.scale)
        return cls(network, found.card, published(text, pictures, c.end, c.length))

    def asked(self, classes: Sequence[str], templates: Sequence[str]) -> None:
        if not classes:
            raise SettingsError('say which classes there are, such as classes="cat,dog"')
        self.task.classes = list(classes)
        self.task.asking = self.task.PredictOptions(templates="|".join(templates or self.templates))

    def respond(self, data: Data) -> dict[str, np.ndarray]:
        return collect(
            self.objective,
            self.task.predict_batches(data, self.card),
            ask=self.task.predict_step(self.objective),
            batch=BATCH,
            device=distributed.device(),
        )

    def predict(self, inputs: Any, classes: Sequence[str], templates: Sequence[str] = ()) -> list[dict[str, Any]]:
        """One record for each picture: where it is, the likeliest class, and how probable each is.

        `inputs` is a path or a list of them; folders hold many pictures. Each class is said as the templates say it, and its
        vectors averaged. One picture of many that cannot be read has a record of nothing but `input` and `error`.
        """
        self.asked(classes, templates)
        data = self.task.read(listed(inputs))
        return records(data, self.task.format_predictions(self.respond(data)))

    def evaluate(self, source: Any, classes: Mapping[str, str] | None = None, templates: Sequence[str] = ()) -> dict[str, Any]:
        """How many pictures of a folder with a folder for each class, or of a table with a column of classes, are told
        rightly: {"rows", "scores", "intervals", "note"}. `classes` says what a class is called in a text, where that is
        another thing than its name with blanks for underscores."""
        data = read(source)
        if data.target is None or data.target.kind not in ("category", "boolean") or len(data.features("image")) != 1:
            raise DataError(
                f"{data.source}: to be scored, pictures must lie in a folder for each class, or in a table with a "
                "column of classes."
            )
        labels = Labels.fit(data.rows[data.target.name])
        if strange := set(classes or ()) - set(labels.names):
            raise DataError(f"{data.source} has no class {', '.join(sorted(strange))}; it has {', '.join(labels.names)}.")
        self.asked([(classes or {}).get(name, name.replace("_", " ")) for name in labels.names], templates)
        images = data.rows.rename({data.features("image")[0].name: self.task.column})
        out = self.respond(Data(data.source, images.select(self.task.column), self.task.columns, data.manifest))
        truth = {"class": labels.apply(data.rows[data.target.name])}
        return {
            "rows": len(data),
            "scores": self.task.score(out, truth),
            "intervals": self.task.intervals(out, truth),
            "note": f"{len(labels.names)} classes by name alone",
        }


def prepared(folder: Path, side: int, channels: int, scale: Scale = OPENAI) -> Pictures:
    """How pictures are to be prepared, as the files beside the weights say it; else with this scale."""
    said = shown(folder, side, channels, scale)
    return Pictures(side, channels).scaled(said["pixels"]).resized(said["resize"])


def settled(asked: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a user says on the command line: arguments of `load`, and those of `predict`. Raises `SettingsError`."""
    known = ("classes", "name", "templates", "tokenizer")
    if strange := [key for key in asked if key not in known]:
        raise SettingsError(f"a network of pictures and texts is not asked with {strange[0]!r}. It knows {', '.join(known)}.")
    parts = lambda key, between: [part.strip() for part in asked.get(key, "").split(between) if part.strip()]
    return (
        {key: asked[key] for key in ("name", "tokenizer") if key in asked},
        {"classes": parts("classes", ","), "templates": parts("templates", "|")},
    )
