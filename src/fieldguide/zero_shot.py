"""ZeroShot: a network of pictures and texts, such as a published CLIP, that tells classes by their names alone.

It is the task `image-text` with preparation as its publisher had it, in the place of one learnt from data; so what can be
asked of a run can be asked of it, in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from fieldguide import configurations
from fieldguide.card import Card
from fieldguide.data import images, read
from fieldguide.data.dataset import Column, Data
from fieldguide.data.prepare import Labels, Pictures, Text
from fieldguide.errors import DataError, SettingsError, WeightsError
from fieldguide.objectives import Contrastive
from fieldguide.pretrained import Checkpoint, described, filled
from fieldguide.run import listed, open_run, records
from fieldguide.tasks.image_text import ImageText
from fieldguide.train import distributed
from fieldguide.train.evaluate import collect

TEMPLATES = ("a photo of a {}.",)        # of CLIP's paper, section 3.1.4
SCALE = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}     # its code's
PREPARED = ("preprocessor_config.json", "open_clip_config.json")     # say how pictures are prepared
START = "<|startoftext|>"
BATCH = 64


@dataclass(frozen=True)
class Resized(Pictures):
    """Pictures as published networks were shown them: the shorter side scaled with Pillow's filter, the middle cut out."""

    edge: int = 224                      # pixels of the shorter side, before the cut
    filter: int = Image.Resampling.BICUBIC

    def load(self, paths: Sequence[str | Path]) -> Tensor:
        """Files as uint8, N C S S. Raises DataError naming those that cannot be read."""
        return images.load(paths, self.side, self.channels, resize=self.cut)

    def cut(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.fit == "stretch":
            return image.resize((self.side, self.side), self.filter)
        short, long = sorted(image.size)
        longer = int(self.edge * long / short)
        image = image.resize((self.edge, longer) if width <= height else (longer, self.edge), self.filter)
        left, top = ((length - self.side) // 2 for length in image.size)
        return image.crop((left, top, left + self.side, top + self.side))


class Published(ImageText):
    """The task of a network whose tokenizer puts its own tokens around a text, and whose pictures are prepared as told."""

    def __init__(self, text: Text, pictures: Pictures, end: int, length: int):
        columns = [Column("image", "image"), Column("caption", "text", "target")]
        super().__init__(columns, self.Options(side=pictures.side, channels=pictures.channels, vocab=text.size, length=length))
        self.text, self.pictures, self.end, self.classes, self.known = text, pictures, end, [], []
        self.start = text.tokenizer.token_to_id(START)

    def tokens(self, texts: list[str]) -> list[np.ndarray]:
        """Each text between the tokens that begin and end it, cut to the network's length."""
        rows = []
        for encoding in self.text.tokenizer.encode_batch(texts):
            ids = encoding.ids[:-1] if encoding.ids[-1:] == [self.end] else encoding.ids
            if self.start is not None and ids[:1] != [self.start]:
                ids = [self.start, *ids]
            rows.append(np.array([*ids[:self.options.length - 1], self.end], dtype=np.int64))
        return rows


class ZeroShot:
    """`predict(pictures, classes)` says how probable each class is, `evaluate(folder)` how often the right one is chosen."""

    def __init__(self, network: nn.Module, card: Card, task: ImageText, templates: Sequence[str] = TEMPLATES):
        self.card, self.task, self.templates = card, task, tuple(templates)
        self.objective = Contrastive(network, card.inputs).to(distributed.device()).eval()

    @classmethod
    def load(cls, source: str | Path | Checkpoint, *, tokenizer: str | Path | None = None, name: str | None = None,
             **overrides: Any) -> ZeroShot:
        """From a folder of transformers or open_clip, a file of OpenAI, hf:organisation/name, or a run of the task image-text.

        `tokenizer` names a tokenizer.json where none lies beside the weights; `name` the size where a file could be several.
        Raises `WeightsError` for other networks, and where the tokenizer is missing or too large.
        """
        if not isinstance(source, Checkpoint) and (Path(source) / "run.json").is_file():
            run = open_run(source)
            if not isinstance(run.task, ImageText):
                raise WeightsError(f"{source} is a run of {run.task.name}: classes by name alone are told by image-text")
            return cls(run.model, run.card, run.task, [run.task.options.template])
        found = source if isinstance(source, Checkpoint) else described(source, name)
        if "embeddings" not in found.card.answers:
            raise WeightsError(f"{found.path} is {found.card.name}, which gives {' or '.join(found.card.answers)}: to tell "
                               "classes by name, a network must give vectors of pictures and of texts")
        network = filled(found.card, {**found.values, **overrides}, found.state, found.origin, str(found.path))
        folder = found.path if found.path.is_dir() else found.path.parent
        file = Path(tokenizer) if tokenizer else folder / "tokenizer.json"
        if not file.is_file():
            raise WeightsError(f"{file} is not there: without a tokenizer names of classes cannot be read. Say "
                               "tokenizer=PATH; that of every CLIP is in the folder openai/clip-vit-base-patch32.")
        text, c = Text.load(file), network.config
        if text.size > c.vocab:
            raise WeightsError(f"{file} has {text.size:,} tokens, the network {c.vocab:,}")
        return cls(network, found.card, Published(text, prepared(folder, c.image, c.channels), c.end, c.length))

    def asked(self, classes: Sequence[str], templates: Sequence[str]) -> None:
        if not classes:
            raise SettingsError("say which classes there are, such as classes=\"cat,dog\"")
        self.task.classes = list(classes)
        self.task.asking = self.task.Asking(templates="|".join(templates or self.templates))

    def respond(self, data: Data) -> dict[str, np.ndarray]:
        return collect(self.objective, self.task.questions(data, self.card), ask=self.task.ask(self.objective), batch=BATCH,
                       device=distributed.device())

    def predict(self, inputs: Any, classes: Sequence[str], templates: Sequence[str] = ()) -> list[dict[str, Any]]:
        """One record for each picture: where it is, the likeliest class, and how probable each is.

        `inputs` is a path or a list of them; folders hold many pictures. Each class is said as the templates say it, and its
        vectors averaged. One picture of many that cannot be read has a record of nothing but `input` and `error`.
        """
        self.asked(classes, templates)
        data = self.task.read(listed(inputs))
        return records(data, self.task.answers(self.respond(data)))

    def evaluate(self, source: Any, classes: Mapping[str, str] | None = None,
                 templates: Sequence[str] = ()) -> dict[str, Any]:
        """How many pictures of a folder with a folder for each class, or of a table with a column of classes, are told
        rightly: {"rows", "scores", "intervals", "note"}. `classes` says what a class is called in a text, where that is
        another thing than its name with blanks for underscores."""
        data = read(source)
        if data.target is None or data.target.kind not in ("category", "boolean") or len(data.features("image")) != 1:
            raise DataError(f"{data.source}: to be scored, pictures must lie in a folder for each class, or in a table with a "
                            "column of classes.")
        labels = Labels.learn(data.rows[data.target.name])
        if strange := set(classes or ()) - set(labels.names):
            raise DataError(f"{data.source} has no class {', '.join(sorted(strange))}; it has {', '.join(labels.names)}.")
        self.asked([(classes or {}).get(name, name.replace("_", " ")) for name in labels.names], templates)
        images = data.rows.rename({data.features("image")[0].name: self.task.column})
        out = self.respond(Data(data.source, images.select(self.task.column), self.task.columns, data.manifest))
        truth = {"class": labels.apply(data.rows[data.target.name])}
        return {"rows": len(data), "scores": self.task.score(out, truth), "intervals": self.task.intervals(out, truth),
                "note": f"{len(labels.names)} classes by name alone"}


def prepared(folder: Path, side: int, channels: int) -> Pictures:
    """How pictures are to be prepared, as the files beside the weights say it; else as OpenAI's code does."""
    file = next((folder / name for name in PREPARED if (folder / name).is_file()), None)
    said = configurations.read(file) if file else {}
    if "preprocess_cfg" in said:                         # open_clip's words
        own = said["preprocess_cfg"]
        if own.get("resize_mode", "shortest") not in ("shortest", "squash"):
            raise WeightsError(f"{file}: resize_mode={own['resize_mode']!r}; known are shortest and squash")
        said = {"image_mean": own.get("mean"), "image_std": own.get("std"),
                "resample": Image.Resampling[own.get("interpolation", "bicubic").upper()],
                "size": {"height": side, "width": side} if own.get("resize_mode") == "squash" else side}
    size = said.get("size") or side
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    cut = said.get("crop_size") or side
    cut = cut if isinstance(cut, int) else cut.get("height")
    if edge and (cut != side or edge < side or said.get("do_center_crop") is False):
        raise WeightsError(f"{file} gives pictures of {cut} pixels, cut out of {edge}; the network reads {side} a side")
    mean, std = (tuple(said.get(key) or value)[:channels] for key, value in SCALE.items())
    return Resized(side, channels, mean, std, "crop" if edge else "stretch", edge or side,
                   Image.Resampling(said.get("resample", Image.Resampling.BICUBIC)))


def settled(asked: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a user says on the command line: arguments of `load`, and those of `predict`. Raises `SettingsError`."""
    known = ("classes", "name", "templates", "tokenizer")
    if strange := [key for key in asked if key not in known]:
        raise SettingsError(f"a network of pictures and texts is not asked with {strange[0]!r}. It knows {', '.join(known)}.")
    parts = lambda key, between: [part.strip() for part in asked.get(key, "").split(between) if part.strip()]
    return ({key: asked[key] for key in ("name", "tokenizer") if key in asked},
            {"classes": parts("classes", ","), "templates": parts("templates", "|")})
