"""Zero-shot image classification with a network of images and texts, such as CLIP.

It is the task `image-text` with the preprocessing of the pretrained network in place of one fitted to data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fieldguide.checkpoints.load import CLASS_TEMPLATES, Checkpoint, inspect_checkpoint
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, WeightsError, nearest
from fieldguide.core.signature import Signature
from fieldguide.data import read
from fieldguide.data.dataset import Data
from fieldguide.data.preprocessing import Labels
from fieldguide.inference.predictor import Predictions, TaskPredictor, as_list, join_skipped
from fieldguide.inference.run import open_run
from fieldguide.inference.signature import describe_zero_shot
from fieldguide.objectives.contrastive import build_contrastive
from fieldguide.tasks.multimodal.image_text import ImageText
from fieldguide.tasks.multimodal.pretrained import load_image_text

if TYPE_CHECKING:
    from fieldguide.core.card import Network

BATCH_SIZE = 64


class ZeroShotClassifier(TaskPredictor):
    """Classify images into classes given by their names.

    `templates` turn a class name into a text, "{}" in the place of the name; the vectors of several are averaged.
    """

    task: ImageText
    LOAD_OPTIONS: ClassVar = {"tokenizer": str}

    def __init__(self, network: Network, card: Card, task: ImageText, templates: Sequence[str] = ()):
        objective = build_contrastive(network, card).to(distributed.device()).eval()
        super().__init__(task, card, objective, batch_size=BATCH_SIZE)
        self.templates = tuple(templates) or tuple(
            CLASS_TEMPLATES[kind] for kind in card.output_types if kind in CLASS_TEMPLATES
        )

    @functools.cached_property
    def signature(self) -> Signature:
        return describe_zero_shot(self)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Checkpoint,
        *,
        tokenizer: str | Path | None = None,
        name: str | None = None,
        **overrides: Any,
    ) -> ZeroShotClassifier:
        """Load a folder of transformers or open_clip, a file of OpenAI, hf:organization/name, or a run of image-text.

        `tokenizer` is the path of a tokenizer.json if there is none next to the weights; `name` the size if a file could
        be several. Raises `WeightsError` for other networks, and if the tokenizer is missing or too large.
        """
        if not isinstance(checkpoint, Checkpoint) and (Path(checkpoint) / "run.json").is_file():
            run = open_run(checkpoint)
            if not isinstance(run.task, ImageText):
                raise WeightsError(f"{checkpoint} is a run of {run.task.name}; zero-shot classification needs image-text.")
            return cls(run.model, run.card, run.task, [run.task.options.template])
        found = checkpoint if isinstance(checkpoint, Checkpoint) else inspect_checkpoint(checkpoint, name)
        network, task = load_image_text(found, tokenizer, **overrides)
        return cls(network, found.card, task)

    def build_request(self, classes: Sequence[str], templates: Sequence[str]) -> ImageText:
        """Return the task of one request, with its classes. Raises `SettingsError` without classes."""
        if not classes:
            raise SettingsError('no classes: set --set classes="cat,dog"')
        task = self.task.for_request(self.task.PredictOptions(templates="|".join(templates or self.templates)))
        task.classes = list(classes)
        return task

    def predict(
        self, inputs: Any = (), classes: str | Sequence[str] = (), templates: str | Sequence[str] = (), **unknown: Any
    ) -> Predictions:
        """Return for each image its most probable class and the probabilities of all.

        `inputs` is a path or a list of them; folders hold many images. `classes` and `templates` are lists, or texts
        separated by commas and vertical bars.
        """
        check_options(unknown)
        task = self.build_request(split_text(classes, ","), split_text(templates, "|"))
        data = task.read(as_list(inputs))
        outputs = self.run_batches(task, task.predict_batches(data, self.card))
        return Predictions(join_skipped(data, task.format_predictions(outputs)), task.notes)

    def stream(self, source: Any, **options: Any) -> Iterator[str] | None:
        return None

    def evaluate(
        self,
        source: Any,
        classes: Mapping[str, str] | None = None,
        templates: str | Sequence[str] = (),
        **unknown: Any,
    ) -> dict[str, Any]:
        """Return scores on a folder with a folder for each class, or a table with a column of classes.

        `classes` maps a class to its text if that is not its name with spaces for underscores.
        """
        check_options(unknown)
        if isinstance(classes, str):
            raise SettingsError("classes: the folders of the data name the classes; leave them out of evaluate.")
        data = read(source)
        if data.target is None or data.target.kind not in ("category", "boolean") or len(data.features("image")) != 1:
            raise DataError(f"{data.source}: expected a folder of images for each class, or a table with a column of classes.")
        labels = Labels.fit(data.rows[data.target.name])
        if extra := set(classes or ()) - set(labels.names):
            raise DataError(f"{data.source} has no class {', '.join(sorted(extra))}. It has {', '.join(labels.names)}.")
        names = [(classes or {}).get(name, name.replace("_", " ")) for name in labels.names]
        task = self.build_request(names, split_text(templates, "|"))
        images = data.rows.rename({data.features("image")[0].name: task.column})
        columns = {column.name: column for column in task.columns}
        rows = Data(data.source, images.select(task.column), columns, data.manifest)
        outputs = self.run_batches(task, task.predict_batches(rows, self.card))
        targets = {"class": labels.apply(data.rows[data.target.name])}
        return {
            "rows": len(data),
            "scores": task.score(outputs, targets),
            "intervals": task.intervals(outputs, targets),
            "note": f"zero-shot, {len(labels.names)} classes given by name",
        }


def split_text(value: str | Sequence[str], separator: str) -> list[str]:
    """Return a list of texts from a list, or from one text with separators."""
    parts = value.split(separator) if isinstance(value, str) else value
    return [part.strip() for part in parts if part.strip()]


def check_options(unknown: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for unknown prediction options."""
    if unknown:
        known = ("classes", "templates", "tokenizer", "name")
        raise SettingsError(
            f"{next(iter(unknown))!r} is not an option of zero-shot classification.{nearest(next(iter(unknown)), known)} Options "
            f"are {', '.join(known)}."
        )
