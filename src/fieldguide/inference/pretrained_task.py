"""Prediction with a pretrained network and its own head, tokenizer and image preprocessing.

It performs the task of its head, with the same options as a run of that task. A network without a head returns embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fieldguide.checkpoints import config_mapping, sentence_transformers
from fieldguide.checkpoints.load import Checkpoint, build_network, inspect_checkpoint
from fieldguide.checkpoints.names import CONFIG_FILE
from fieldguide.checkpoints.preprocessor_config import build_transform, get_input_side
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, WeightsError, WeightsWarning
from fieldguide.core.settings import Settings
from fieldguide.core.signature import RecordField, Step
from fieldguide.core.validation import get_checked, guard
from fieldguide.data.dataset import Data
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.inference.predictor import TaskPredictor, as_list
from fieldguide.objectives import EmbeddingObjective, Objective
from fieldguide.objectives.embedding import Pooling
from fieldguide.tasks import Task, tasks
from fieldguide.tasks.base import Arrays, CheckpointAssets
from fieldguide.tasks.text.base import TextTask
from fieldguide.tasks.text.signature import EmbeddingSignature
from fieldguide.tasks.timeseries.zero_shot import ZeroShotForecasting
from fieldguide.tasks.vision.image_classification import ImageClassification
from fieldguide.tasks.vision.prompted_segmentation import PromptedSegmentation

if TYPE_CHECKING:
    from fieldguide.core.card import Network

MIN_LENGTH = 3  # tokens of a text with its two frame tokens
DEFAULT_SIDE_PIXELS = 224  # if neither the network nor the files specify the size
UNSUPPORTED_PROBLEMS = {"regression": "a number", "multi_label_classification": "several classes at once"}


class PretrainedTask(TaskPredictor):
    """A pretrained network that performs the task of its head; without a head it returns embeddings."""

    LOAD_OPTIONS: ClassVar = {"output_type": str, "gives": str, "columns": str, "horizon": int}

    def __init__(self, network: Network, card: Card, task: Task, pooling: Pooling | None = None):
        objective = task.objective(network, card, Settings()).to(distributed.device()).eval()
        super().__init__(task, card, objective, batch_size=min(self.batch_size, task.max_batch_size), pooling=pooling)

    @classmethod
    def load(
        cls,
        source: str | Path | Checkpoint,
        *,
        name: str | None = None,
        columns: str = "",
        output_type: str | None = None,
        gives: str | None = None,
        horizon: int = 0,
        **overrides: Any,
    ) -> PretrainedTask:
        """Load a folder or file of transformers or timm, or hf:organization/name.

        `output_type="vector"` leaves out the head. `columns` names the text columns of tables, "text" by default; two,
        separated by a comma, for a network that reads pairs. `horizon` is the number of steps that a network for series forecasts.
        `gives` is the former name of `output_type`.

        Raises `WeightsError` for a network that cannot perform a task without training, and if its tokenizer is
        missing or belongs to another network.
        """
        found = source if isinstance(source, Checkpoint) else inspect_checkpoint(source, name)
        values = {**found.values, **overrides}
        if horizon:
            if not (found.card.endless and "forecast" in found.card.output_types) or horizon < 1:
                raise SettingsError(f"horizon={horizon} is not possible for {found.card.name}. Leave it out.")
            values["horizon"] = horizon
        if output_type or gives:
            values["output_type"] = output_type or gives
        chosen = values.get("output_type", found.card.output_types[0])
        assets = replace(read_assets(found, values, chosen), columns=tuple(filter(None, columns.split(","))))
        kinds: list[type[Task]] = [*tasks().values(), ZeroShotForecasting, TextVectors, ImageVectors, PromptedSegmentation]
        candidates = (
            kind.published(assets)
            for kind in kinds
            if found.card.input_type in kind.input_types and chosen in kind.output_types
        )
        if (task := next((candidate for candidate in candidates if candidate is not None), None)) is None:
            raise WeightsError(
                f"{found.path} is {found.card.name}, which maps {found.card.input_type} to {chosen}; no task can use "
                "that without training. Train it on your data with `fieldguide fit --weights`."
            )
        with warnings.catch_warnings():
            if chosen == "vector":  # leaves out the head on purpose
                warnings.simplefilter("ignore", WeightsWarning)
            network = build_network(found.card, values, found.state, found.origin, str(found.path))
        text = getattr(task, "text", None)
        vocab_size = getattr(network.config, found.card.names.get("vocab_size", "vocab_size"), None)
        if text is not None and text.size > vocab_size:
            raise WeightsError(
                f"{assets.folder}: the tokenizer has {text.size:,} tokens, but the network {vocab_size:,}. The tokenizer "
                "belongs to another network."
            )
        return cls(network, found.card, task, assets.pooled)

    def evaluate(self, source: Any, **options: Any) -> dict[str, Any]:
        """Return scores on data with known targets: {"rows", "scores", "intervals", "note", "notes"}.

        Raises `DataError` for targets that the network does not know, and `SettingsError` for any option.
        """
        if options:
            raise SettingsError(f"{', '.join(sorted(options))}: a pretrained network is evaluated without options.")
        task = self.task.for_request(self.task.PredictOptions())
        return self.score(task.read(as_list(source), answered=True), "pretrained, without training on this data", task)


def read_assets(found: Checkpoint, values: dict[str, Any], gives: str) -> CheckpointAssets:
    """Return the preprocessing and class names next to the weights. Raises `WeightsError` if the tokenizer is missing."""
    folder, card = found.path if found.path.is_dir() else found.path.parent, found.card
    config = card.config(**{card.names.get(k, k): v for k, v in values.items()})
    public_config = config_mapping.read(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    words, pictures = None, None
    if card.input_type in ("tokens", "captioned", "image-text"):
        words, why = found.find_tokenizer()
        if words is None:
            raise WeightsError(f"no tokenizer found in {folder}; this model needs one. {why}")
    if card.input_type in ("image", "captioned", "image-text", "prompted-image"):
        side = getattr(config, "image", None) or get_input_side(folder) or DEFAULT_SIDE_PIXELS
        pictures = build_transform(folder, side, found.channels, card.scale)
    score = ""
    if (
        gives == "label"
        and card.input_type == "tokens"
        and getattr(config, card.names.get("num_classes", "num_classes"), 0) == 1
    ):
        score = sentence_transformers.find_score(public_config, folder)
    names = (
        get_class_names(public_config, getattr(config, card.names.get("num_classes", "num_classes"), 0), found.path)
        if gives in ("label", "labels") and not score
        else []
    )
    length = getattr(config, "length", 0)
    stated = folder / sentence_transformers.LENGTH_FILE
    if gives == "vector" and stated.is_file():
        limit = get_checked(config_mapping.read(stated), "max_seq_length", int, stated, WeightsError, least=MIN_LENGTH)
        length = min(length, limit or length)
    text = TextTokenizer.load(words) if words else None
    horizon = getattr(config, "horizon", 0) if card.endless else 0
    audio = found.preprocessing_defaults() if card.input_type in ("speech", "waveform") else None
    pooling = read_pooling(folder, text, getattr(config, "dim", 0))
    begin, end = (getattr(config, name, None) for name in ("begin", "end"))
    return CheckpointAssets(
        names, words, length, pictures, pooling, audio=audio, horizon=horizon, begin=begin, end=end, score=score
    )


def get_class_names(config: dict[str, Any], classes: int, where: Path) -> list[str]:
    """Return the class names in the configuration, else the class numbers as text.

    Raises `WeightsError` for a network that does not predict one of several classes.
    """
    if classes < 2 or config.get("problem_type") in UNSUPPORTED_PROBLEMS:
        output = UNSUPPORTED_PROBLEMS.get(str(config.get("problem_type")), "a number")
        raise WeightsError(f"{where} predicts {output}, not one of several classes. Load it with fieldguide.load.")
    known = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or config.get("id2label") or {}
    known = {str(i): name for i, name in enumerate(known)} if isinstance(known, list) else known
    return [str(known.get(str(i), i)) for i in range(classes)]


def read_pooling(folder: Path, text: TextTokenizer | None, dim: int) -> Pooling:
    """Return how the files of sentence-transformers turn the states of a text, of width `dim`, into a vector.

    By default this is the mean of its tokens. Raises `WeightsError` if the layers after the pooling do not fit each other or `dim`.
    """
    modes, head, has_prompt = sentence_transformers.read_modules(folder)
    if head is not None:
        with guard(folder / sentence_transformers.MODULES_FILE, WeightsError):
            head(torch.zeros(1, dim * len(modes)))
    prompt = sentence_transformers.read_prompt(folder)
    skip = 0 if has_prompt or not prompt or text is None else 1 + len(text.encode_exact([prompt])[0])
    return Pooling(modes, prompt, skip, head)


class EmbeddingTask(Task):
    """A task whose predictions are embeddings of length 1."""

    output_types = ("vector",)

    def format_predictions(self, outputs: Arrays) -> list[dict[str, Any]]:
        return [{"vector": [round(number, 8) for number in row]} for row in outputs["vector"].astype(float).tolist()]

    def postprocess(self, outputs: Arrays) -> Arrays:
        return outputs

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [Step("normalize", "divide by the length of the vector", True)]

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField("vector", "array", "the embedding, of length 1", items=RecordField("", "number"))]

    def targets(self, data: Data) -> Arrays:
        raise DataError(f"{data.source}: embeddings have no targets, so they cannot be scored.")


class TextVectors(EmbeddingSignature, EmbeddingTask, TextTask):
    name = "text-vectors"
    reads = "a text, or a table with a column `text`"
    input_types = ("tokens",)
    length: int  # number of tokens the network reads

    @property
    def max_tokens(self) -> int:
        return self.length

    @property
    def prompts(self) -> dict[str, str]:
        """Return the text before the texts of each column."""
        return {self.column: self.pooled.prompt}

    @classmethod
    def published(cls, assets: CheckpointAssets) -> TextVectors:
        task = cls(assets.texts(), cls.Options())
        task.text, task.length, task.pooled = TextTokenizer.load(assets.tokenizer_folder), assets.length, assets.pooled
        return task

    def batches(self, data: Data, card: Card, settings: Settings | None = None) -> Batches:
        texts = [self.pooled.prompt + text for text in self.texts(data)]
        if cut := sum(len(ids) > self.length - 2 for ids in self.text.encode_exact(texts)):
            self.notes.append(
                f"{cut} of {len(texts)} texts are longer than the {self.length} tokens that the network reads, "
                "and are truncated"
            )
        return self.encode_texts(texts, self.length)

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return EmbeddingObjective(model, self.pooled)

    def state(self) -> dict[str, Any]:
        return {"length": self.length}

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.text.save(folder)


class ImageVectors(EmbeddingTask, ImageClassification):
    name = "picture-vectors"
    reads = "an image, a folder of images, or a table with a column `image` of paths"
    input_types = ("image",)  # type: ignore[assignment]  # the inferred type of the base class has its own length

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return EmbeddingObjective(model)
