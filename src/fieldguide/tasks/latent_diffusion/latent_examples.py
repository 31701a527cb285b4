"""Examples of latent diffusion: the latents of images and the states of captions, computed once by frozen networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fieldguide.core.hardware import ram
from fieldguide.data.preprocessing import ImageTransform
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import DiffusionPipeline
from fieldguide.tasks.latent_diffusion.generation import encode_prompt

MAX_CACHE_FRACTION_OF_RAM = 0.3  # of the latents and states of texts that are kept
IMAGES_AT_ONCE = 4  # that the autoencoder encodes

Entry = dict[str, Tensor]  # tensors of an image or a caption, by their names in a batch


class LatentExamples:
    """Encodes images and captions with the networks of a pipeline, and keeps what fits into the memory.

    Args:
        pipeline: the autoencoder and the text encoders.
        pictures: the transform of images to pixels of -1 .. 1.
    """

    def __init__(self, pipeline: DiffusionPipeline, pictures: ImageTransform):
        self.pipeline, self.pictures = pipeline, pictures
        self.latents: dict[str, Entry] = {}  # by path
        self.texts: dict[str, Entry] = {}  # by caption
        self.truncated: set[str] = set()  # captions that are longer than what the text encoders read
        self.kept_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more is kept."""
        return self.kept_bytes > MAX_CACHE_FRACTION_OF_RAM * ram()

    def encode_all(self, paths: Sequence[str], captions: Sequence[str]) -> None:
        """Encode images and captions in advance, as many as are kept."""
        for first in range(0, len(paths), IMAGES_AT_ONCE):
            if self.is_full:
                return
            self.make(paths[first : first + IMAGES_AT_ONCE], captions[first : first + IMAGES_AT_ONCE])

    def make(self, paths: Sequence[str], captions: Sequence[str]) -> dict[str, Tensor]:
        """Return a batch: `mean` and `deviation` of the normalized latents (B C h w), and what the network takes of the captions."""
        images = self.look_up(self.latents, paths, self.encode_images)
        texts = self.look_up(self.texts, captions, self.encode_texts)
        rows = [image | text for image, text in zip(images, texts)]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: x.float() if x.is_floating_point() else x for name, x in stacked.items()}

    def look_up(self, kept: dict[str, Entry], keys: Sequence[str], encode: Callable[[list[str]], list[Entry]]) -> list[Entry]:
        """Return the entries of keys, after those that are not kept were encoded."""
        missing = [key for key in dict.fromkeys(keys) if key not in kept]
        found = dict(zip(missing, encode(missing))) if missing else {}
        if not self.is_full:
            kept |= found
            self.kept_bytes += sum(x.nbytes for entry in found.values() for x in entry.values())
        return [kept[key] if key in kept else found[key] for key in keys]

    @torch.no_grad()
    def encode_images(self, paths: list[str]) -> list[Entry]:
        """Return mean and standard deviation of the latents of each image."""
        vae: Any = self.pipeline.vae
        like = next(vae.parameters())
        entries = []
        for first in range(0, len(paths), IMAGES_AT_ONCE):
            pixels = self.pictures.apply(self.pictures.load(paths[first : first + IMAGES_AT_ONCE]))
            mean, logvar = (x.float().cpu() for x in vae.encode(pixels.to(like)))
            deviation = (0.5 * logvar).exp() * vae.config.scaling
            entries += [{"mean": m, "deviation": d} for m, d in zip(vae.normalize(mean), deviation)]
        return entries

    @torch.no_grad()
    def encode_texts(self, captions: list[str]) -> list[Entry]:
        """Return the inputs of the network for each caption, and note which ones are truncated."""
        entries, side = [], self.pictures.side
        for caption in captions:
            inputs, found = encode_prompt(self.pipeline, caption, side, side, self.pipeline.family.guidance)
            if found.truncated:
                self.truncated.add(caption)
            entries.append({name: x[0].cpu() for name, x in inputs.items()})
        return entries
