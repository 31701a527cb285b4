"""The task `image-text` with a pretrained network, its tokenizer and its image preprocessing in place of those fitted to data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldguide.checkpoints import run_folder
from fieldguide.checkpoints.load import Checkpoint, build_network
from fieldguide.checkpoints.preprocessor_config import build_transform
from fieldguide.core.errors import WeightsError
from fieldguide.data.dataset import Column
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.objectives.contrastive import IMAGE_TEXT_OBJECTIVES
from fieldguide.tasks.multimodal.image_text import ImageText

if TYPE_CHECKING:
    from fieldguide.core.card import Network


def build_task(text: TextTokenizer, transform: ImageTransform, end: int, length: int) -> ImageText:
    """Return the task `image-text` of a pretrained network with its own tokenizer and image preprocessing."""
    task = ImageText(
        [Column("image", "image"), Column("caption", "text", "target")],
        ImageText.Options(side=transform.side, channels=transform.channels, vocab_size=text.size, length=length, end=end),
    )
    task.text, task.pictures, task.classes, task.known = text, transform, [], []
    return task


def read_run_transform(folder: Path) -> ImageTransform | None:
    """Return the image preprocessing of a run; None if the folder is none."""
    if not (folder / "run.json").is_file():
        return None
    return ImageTransform.from_json(run_folder.read_preprocessing(folder)[0]["pictures"])


def load_image_text(found: Checkpoint, tokenizer: str | Path | None = None, **overrides: Any) -> tuple[Network, ImageText]:
    """Return the network of a checkpoint that embeds images and texts, and its task.

    `tokenizer` is the path of a tokenizer.json if there is none next to the weights; `overrides` replace fields of the config. Raises
    `WeightsError` for other networks, and if the tokenizer is missing or too large.
    """
    if not set(IMAGE_TEXT_OBJECTIVES) & set(found.card.output_types):
        raise WeightsError(
            f"{found.path} is {found.card.name}, whose output is {' or '.join(found.card.output_types)}; a network that embeds images "
            "and texts is needed, such as CLIP."
        )
    folder = found.path if found.path.is_dir() else found.path.parent
    file = Path(tokenizer) if tokenizer else found.find_tokenizer()[0] or folder / "tokenizer.json"
    if not file.exists():
        raise WeightsError(
            f"{file} does not exist, and texts cannot be encoded without a tokenizer. Put it next to the weights, or set tokenizer=PATH; "
            "all CLIP models share that of openai/clip-vit-base-patch32."
        )
    text = TextTokenizer.load(file)
    has_padding = "pad_token" in text.special and found.card.accepts("pad")  # a network that reads padding
    values = {**found.values, **({"pad": text.pad} if has_padding else {}), **overrides}
    network = build_network(found.card, values, found.state, found.origin, str(found.path))
    config = network.config
    if text.size > config.vocab_size:
        raise WeightsError(f"{file} has {text.size:,} tokens, but the network {config.vocab_size:,}.")
    transform = read_run_transform(folder) or build_transform(folder, config.image, config.channels, found.card.scale)
    return network, build_task(text, transform, config.end, config.length)
