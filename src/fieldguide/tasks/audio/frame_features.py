"""What the frames of recordings are clustered by: MFCCs, or the outputs of a block of an earlier network (Hsu et al. 2021,
arXiv:2106.07447, section II.D)."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import RunError, SettingsError, WeightsWarning
from fieldguide.core.validation import guard
from fieldguide.data.preprocessing.frame_clusters import compute_mfcc, locate_mfcc
from fieldguide.data.preprocessing.waveform import Waveform
from fieldguide.models import registry

FILE = "frame_features.safetensors"


@dataclass
class FrameFeatures:
    """Features of the frames of a recording: the middle of frame t is at sample `first + t * step`.

    `network` is the earlier network, shortened to the block whose outputs are used; None for MFCCs.
    """

    wave: Waveform
    first: float
    step: float
    network: Any = None
    architecture: str = ""

    STATE: ClassVar = {"architecture": str, "config": dict[str, Any]}

    @classmethod
    def choose(cls, source: str | None, layer: int | None, rate: int, normalize: bool) -> Self:
        """Return MFCCs, or the outputs of block `layer` (from 1; by default the middle one) of the run or checkpoint `source`.

        Raises `SettingsError` for a network that does not read samples, or has no such block.
        """
        wave = Waveform(rate, normalize)
        if source is None:
            if layer is not None:
                raise SettingsError("task.layer is the block of a network: name the network with task.features_from.")
            return cls(wave, *locate_mfcc(rate))
        checkpoint = inspect_checkpoint(source, None, lambda text: None, download=False)
        card = checkpoint.card
        if not hasattr(card.model, "list_states"):
            raise SettingsError(
                f"task.features_from={source}: {card.name} has no frames. Name a Wav2Vec 2.0 or HuBERT network."
            )
        known = checkpoint.preprocessing_defaults()
        if known.get("rate", rate) != rate:
            raise SettingsError(
                f"task.features_from={source}: the network reads {known['rate']:,} Hz, but task.rate={rate:,}. Set "
                f"task.rate={known['rate']}."
            )
        values = {**checkpoint.values, "output_type": "vector"}
        depth = card.config(**values).depth
        layer = layer or max(1, depth // 2)
        if layer > depth:
            raise SettingsError(f"task.layer={layer}: the network has {depth} blocks.")
        network = card.make(card.config(**values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WeightsWarning)  # about the head, which is left out
            weights.load(network, checkpoint.state, checkpoint.origin, head="skip")
        return cls.shorten(network, layer, wave, card.name)

    @classmethod
    def shorten(cls, network: Any, layer: int, wave: Waveform, architecture: str) -> Self:
        """Return the features of a block, without the blocks after it."""
        network.blocks, network.config = network.blocks[:layer], replace(network.config, depth=layer)
        network.requires_grad_(False).eval()
        return cls(wave, network.field / 2, float(network.stride), network, architecture)

    @torch.no_grad()
    def __call__(self, wave: np.ndarray) -> np.ndarray:  # N int16 -> T C
        if self.network is None:
            return compute_mfcc(wave, self.wave.rate)
        samples = torch.from_numpy(wave.astype(np.float32) / 32768.0)[None]
        samples, lengths = self.wave.apply(samples, torch.tensor([samples.shape[1]]))
        return self.network.list_states(samples, lengths)[-1][0].numpy()

    def to_json(self) -> dict[str, Any]:
        """Return all but the weights, as JSON values."""
        return {"architecture": self.architecture, "config": {} if self.network is None else asdict(self.network.config)}

    def save(self, folder: Path) -> None:
        """Write the weights of the network to a folder, if there is one."""
        from safetensors.torch import save

        if self.network is not None:
            (folder / FILE).write_bytes(save({name: x.contiguous() for name, x in self.network.state_dict().items()}))

    @classmethod
    def load(cls, folder: Path, saved: dict[str, Any], rate: int, normalize: bool) -> Self:
        """Return what `save` and `to_json` wrote. Raises `RunError` if the file is missing or damaged."""
        from safetensors.torch import load_file

        wave = Waveform(rate, normalize)
        if not saved["architecture"]:
            return cls(wave, *locate_mfcc(rate))
        card = registry.card(saved["architecture"])
        with guard(folder / FILE, RunError):
            config = card.config(**{key: tuple(x) if isinstance(x, list) else x for key, x in saved["config"].items()})
            network = card.make(config)
            network.load_state_dict(load_file(folder / FILE))
        return cls.shorten(network, config.depth, wave, card.name)
