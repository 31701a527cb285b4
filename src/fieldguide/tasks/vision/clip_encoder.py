"""CLIP as the frozen encoder of images and captions, between which a prior generates (see `objectives.diffusion.unclip`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fieldguide.core.distributed import device
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.core.validation import guard
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.models import registry
from fieldguide.models.layers.padding import select_position
from fieldguide.objectives import Diffusion, UnCLIP
from fieldguide.tasks.multimodal.image_text import ImageText
from fieldguide.tasks.multimodal.pretrained import build_task, load_image_text
from fieldguide.tasks.vision.reference_networks import BATCH_SIZE, convert, find_checkpoint

FILE = "clip.safetensors"
PRIOR = "unclip-prior-mini"  # size of the network that generates embeddings
STATE = {
    "architecture": str,
    "config": dict[str, Any],
    "pictures": ImageTransform.STATE,
    "mean": list[float],
    "std": list[float],
}


class ClipEncoder(nn.Module):
    """A network of images and texts with its preprocessing.

    `mean` and `std` are those of the embeddings of training images, one value for each element. Raises `SettingsError` for a network
    without states of tokens.
    """

    def __init__(self, network: Any, architecture: str, task: ImageText):
        super().__init__()
        if not hasattr(getattr(network, "text", None), "encode"):
            raise SettingsError(f"task.unclip: {architecture} has no states of tokens that a prior can read. Name a CLIP.")
        self.network, self.architecture, self.task = network.requires_grad_(False).eval(), architecture, task
        self.mean, self.std = [0.0] * network.config.embed, [1.0] * network.config.embed

    @classmethod
    def load(cls, source: str) -> Self:
        """Load a run or checkpoint; see `find_checkpoint`. Raises `WeightsError` for networks of other kinds."""
        found = find_checkpoint(source, "task.unclip")
        network, task = load_image_text(found)
        return cls(network.to(device()), found.card.name, task)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return int(self.network.config.embed)

    @property
    def text(self) -> TextTokenizer:
        return self.task.text

    @property
    def limit(self) -> int:
        """Number of tokens that the network reads at most."""
        return int(self.network.config.length)

    @property
    def further_networks(self) -> Mapping[str, str]:
        """The prior, which is trained beside the network that generates images."""
        return {"prior": PRIOR}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, with the end token."""
        return [len(ids) for ids in self.task.encode_all(list(texts))]

    def model_dims(self, length: int) -> dict[str, Any]:
        """Return the fields of the networks' configs that depend on embeddings."""
        return {"embedding": self.width, "length": length}

    def choose_objective(self, parts: Mapping[str, Any]) -> Callable[..., Diffusion]:
        """Return the objective that trains the prior, too, which standardizes embeddings by their mean and deviation."""
        prior = parts["prior"]
        prior.clip_mean.copy_(torch.tensor(self.mean))
        prior.clip_std.copy_(torch.tensor(self.std))
        return functools.partial(UnCLIP, prior=prior, encoder=self)

    def tokenize(self, texts: Sequence[str], length: int) -> np.ndarray:  # -> N length int64, 0 beyond the end
        """Return the tokens of texts with their end token; texts that are longer are truncated."""
        out = np.zeros((len(texts), length), dtype=np.int64)
        for row, ids in zip(out, self.task.encode_all(list(texts))):
            kept = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
            row[: len(kept)] = kept
        return out

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:  # B C S S in -1 .. 1 -> B E
        """Return the embeddings of images, of length 1."""
        found: Tensor = self.network.encode_image(convert(images, self.task.pictures))
        return found

    def encode_texts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B T -> B T E, B E, B T
        """Return the states of texts, projected as their embeddings are, the embeddings, and which tokens are not padding.

        Elements of both have a size of about 1.
        """
        text, at = self.network.text, torch.arange(tokens.shape[1], device=tokens.device)
        states = text.proj(text.encode(tokens))
        last = text.last(tokens, None)
        pooled = nn.functional.normalize(select_position(states, last), dim=-1)
        return states, pooled * self.width**0.5, at <= last[:, None]

    def fit(self, images: Tensor) -> None:  # N C S S in -1 .. 1
        """Set mean and standard deviation of the embeddings to those of these images."""
        found = torch.cat([self.encode_images(part.to(device())).float().cpu() for part in images.split(BATCH_SIZE)])
        self.mean, self.std = found.mean(0).tolist(), found.std(0).clamp(min=1e-6).tolist()

    def state(self) -> dict[str, Any]:
        """Return all but weights and tokenizer, as JSON values."""
        config, pictures = asdict(self.network.config), self.task.pictures.to_json()
        known = {"architecture": self.architecture, "config": config, "pictures": pictures, "mean": self.mean, "std": self.std}
        return {"encoder": known}

    def save(self, folder: Path) -> None:
        """Write the weights and the tokenizer to a folder."""
        self.text.save(folder)
        (folder / FILE).write_bytes(save({name: x.contiguous() for name, x in self.network.state_dict().items()}))

    @classmethod
    def restore(cls, folder: Path, saved: dict[str, Any], text: TextTokenizer) -> Self:
        """Return what `save` and `state` wrote. Raises `RunError` if the file is missing or damaged."""
        card = registry.card(saved["architecture"])
        with guard(folder / FILE, RunError):
            network = card.make(card.config(**saved["config"]))
            network.load_state_dict(load_file(folder / FILE))
        config, pictures = network.config, ImageTransform.from_json(saved["pictures"])
        found = cls(network.to(device()), card.name, build_task(text, pictures, config.end, config.length))
        found.mean, found.std = saved["mean"], saved["std"]
        return found
