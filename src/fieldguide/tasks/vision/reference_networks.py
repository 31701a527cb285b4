"""Pretrained networks that generated images are scored with: the features of a classifier, and CLIP for captions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.checkpoints import run_folder
from fieldguide.checkpoints.load import Checkpoint, build_network, inspect_checkpoint
from fieldguide.checkpoints.preprocessor_config import get_input_side
from fieldguide.core.distributed import device
from fieldguide.core.errors import SettingsError, WeightsWarning
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.models import registry
from fieldguide.tasks.multimodal.image_text import ImageText
from fieldguide.tasks.multimodal.pretrained import load_image_text

BATCH_SIZE = 32
DEFAULT_SIDE_PIXELS = 224  # if neither the network nor the files specify the size
HEAD = "head"


def find_checkpoint(source: str, option: str) -> Checkpoint:
    """Return the checkpoint at `source`: a path, `hf:organization/name` that was downloaded before, or `SIZE=PATH` if its tensors fit
    several networks."""
    name, mark, path = source.partition("=")
    if mark and not any(name in card.sizes for card in registry.cards().values()):
        raise SettingsError(f"{option}={source}: {name!r} is no size of a network. `fieldguide models` lists them.")
    return inspect_checkpoint(path if mark else source, name if mark else None, lambda text: None, download=False)


def convert(images: Tensor, transform: ImageTransform) -> Tensor:  # N C S S in -1 .. 1 -> N C' S' S'
    """Return images as a network reads them: rounded to the 8 bits of files, resized, in its colors, and normalized."""
    x = ((images + 1) * 127.5).round().clamp(0, 255) / 255
    side = (transform.side, transform.side)
    x = F.interpolate(x, side, mode="bilinear", antialias=True) if x.shape[2:] != side else x
    if x.shape[1] != transform.channels:
        x = x.mean(1, keepdim=True) if transform.channels == 1 else x[:, :1].expand(-1, transform.channels, -1, -1)
    return normalize(x, transform)


def normalize(x: Tensor, transform: ImageTransform) -> Tensor:  # N C S S in 0 .. 1 -> N C S S
    mean, std = (torch.tensor(values).to(x).view(1, -1, 1, 1) for values in (transform.mean, transform.std))
    return (x - mean) / std


class FeatureNetwork:
    """The inputs of the head of a pretrained image classifier, as features of images."""

    def __init__(self, network: nn.Module, transform: ImageTransform, source: str):
        self.network, self.transform, self.source = network.requires_grad_(False), transform, source

    @classmethod
    def load(cls, source: str) -> Self:
        """Load a classifier; see `find_checkpoint`. Raises `SettingsError` for networks of other kinds."""
        found = find_checkpoint(source, "task.features")
        card, folder = found.card, found.path if found.path.is_dir() else found.path.parent
        if card.input_type != "image" or "label" not in card.output_types:
            raise SettingsError(f"task.features={source}: {card.name} is no image classifier.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WeightsWarning)  # about the head, which is left out
            network: Any = build_network(card, found.values, found.state, found.origin, str(found.path), head="skip")
        if isinstance(getattr(network, HEAD, None), nn.Linear):
            network.head = nn.Identity()
        side = getattr(getattr(network, "config", None), "image", None) or get_input_side(folder) or DEFAULT_SIDE_PIXELS
        if (folder / "run.json").is_file():
            side = run_folder.read_preprocessing(folder)[0].get("pictures", {}).get("side", side)
        transform = ImageTransform(side, found.channels).with_normalization(found.preprocessing_defaults()["pixels"])
        return cls(network.to(device()), transform, source)

    @torch.inference_mode()
    def extract(self, images: Tensor) -> np.ndarray:  # N C S S in -1 .. 1 -> N D float64
        """Return the features of images. Raises `SettingsError` for a network without a linear head."""
        if not isinstance(getattr(self.network, HEAD, None), nn.Identity):
            raise SettingsError(
                f"task.features={self.source}: the network has no linear head, whose inputs would be the features."
            )
        parts = [self.network(convert(part.to(device()), self.transform)) for part in images.split(BATCH_SIZE)]
        return torch.cat(parts).double().cpu().numpy()

    def compute_maps(self, images: Tensor) -> list[Tensor]:  # N C S S in -1 .. 1 -> N D h w
        """Return the feature maps of images as they are, with gradients. Raises `SettingsError` for a network without maps, and for
        color images if it reads gray ones."""
        network: Any = self.network
        if not getattr(network, "levels", None):
            raise SettingsError(f"task.features={self.source}: the network has no feature maps. Name another image classifier.")
        if images.shape[1] not in (1, self.transform.channels):
            raise SettingsError(
                f"task.features={self.source} reads {self.transform.channels} channels, but the images have {images.shape[1]}."
            )
        x = images.expand(-1, self.transform.channels, -1, -1)
        maps: dict[str, Tensor] = network.to(images.device).features(normalize((x + 1) / 2, self.transform))
        return list(maps.values())


class CaptionScorer:
    """The CLIP score: 100 max(cos(E_I, E_C), 0) of the embeddings of an image and its caption (Hessel et al. 2021,
    arXiv:2104.08718, equation 1, with the weight 100 of torchmetrics in place of 2.5)."""

    def __init__(self, network: Any, task: ImageText):
        self.network, self.task = network, task

    @classmethod
    def load(cls, source: str) -> Self:
        """Load a network of images and texts; see `find_checkpoint`. Raises `WeightsError` for others."""
        network, task = load_image_text(find_checkpoint(source, "task.clip"))
        return cls(network.to(device()), task)

    @torch.inference_mode()
    def score(self, images: Tensor, captions: Sequence[str]) -> np.ndarray:  # N C S S in -1 .. 1 -> N
        """Return the score of each image for its caption."""
        found = []
        for start in range(0, len(images), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            text = self.task.pad(self.task.tokens(list(captions[part]))[0])
            said = self.network.encode_text(text["tokens"].to(device()), text["mask"].to(device()))
            seen = self.network.encode_image(convert(images[part].to(device()), self.task.pictures))
            found.append(100 * (seen * said).sum(1).clamp(min=0))
        return torch.cat(found).cpu().numpy()
