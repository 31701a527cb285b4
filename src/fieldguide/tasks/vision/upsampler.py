"""Networks that enlarge generated images, one after another, as the two upsamplers of DALL-E 2 (arXiv:2204.06125, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fieldguide.checkpoints.run_folder import build_config, is_run, read_network
from fieldguide.core.card import Card
from fieldguide.core.distributed import device
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.core.validation import guard
from fieldguide.models import registry
from fieldguide.tasks.base import Task
from fieldguide.tasks.vision.image_to_image import ImageToImage
from fieldguide.tasks.vision.reference_networks import convert

FILE = "upsampler.safetensors"
STATE = list[dict[str, Any]]  # architecture and config of each


class Upsampler:
    """A network of super-resolution, with the task that it was trained for."""

    def __init__(self, network: nn.Module, card: Card, task: ImageToImage):
        self.network, self.card, self.task = network.requires_grad_(False).eval(), card, task
        self.objective: Any = task.objective(self.network, card, Settings())
        task.judge = None  # of its own test, which is not saved again

    @classmethod
    def load(cls, source: str) -> Self:
        """Load a run. Raises `SettingsError` for a folder that is no run of super-resolution."""
        folder = Path(source)
        task = Task.load(folder / "preprocess") if is_run(folder) else None
        if not isinstance(task, ImageToImage) or not task.options.degrade.endswith("x"):
            raise SettingsError(
                f"task.upsamplers: {source} is no run that enlarges images. Train one: fieldguide fit IMAGES --task image-to-image "
                "--set task.degrade=2x"
            )
        card, config, state = read_network(folder)
        network = card.make(config)
        network.load_state_dict(state)
        return cls(network.to(device()), card, task)

    @property
    def input_side(self) -> int:
        """Side of the images that it enlarges."""
        return round(self.task.pictures.side / self.task.zoom)

    @torch.no_grad()
    def enlarge(self, images: Tensor, numbers: Sequence[int]) -> Tensor:  # B C s s in -1 .. 1 -> B K S S in -1 .. 1
        """Return larger images, whose noise depends on their numbers."""
        step = self.task.for_request(self.task.PredictOptions()).predict_step(self.objective)
        made: Tensor = step({"image": convert(images, self.task.pictures), "row": torch.tensor(numbers)})["made"]
        return made.clamp(-1, 1)

    def to_json(self) -> dict[str, Any]:
        """Return architecture and config as JSON values."""
        return {"architecture": self.card.name, "config": asdict(self.network.config)}  # type: ignore[call-overload]  # a config is a dataclass

    def save(self, folder: Path) -> None:
        """Write the weights and the task to a folder."""
        self.task.save(folder)
        (folder / FILE).write_bytes(save({name: x.contiguous() for name, x in self.network.state_dict().items()}))

    @classmethod
    def restore(cls, folder: Path, saved: dict[str, Any]) -> Self:
        """Return what `save` and `to_json` wrote. Raises `RunError` if the file is missing or damaged."""
        with guard(folder / FILE, RunError):
            card = registry.card(saved["architecture"])
            network = card.make(build_config(card, saved["config"]))
            network.load_state_dict(load_file(folder / FILE))
        task = Task.load(folder)
        assert isinstance(task, ImageToImage)  # `load` accepts no other
        return cls(network.to(device()), card, task)


class Upsamplers:
    """Upsamplers in the order in which images pass through them; none leaves images as they are."""

    def __init__(self, members: Sequence[Upsampler] = ()):
        self.members = list(members)

    @classmethod
    def load(cls, sources: str | None, side: int) -> Self:
        """Load runs whose paths are separated by commas, for images of this side. Raises `SettingsError` if sides do not fit."""
        members = [Upsampler.load(source.strip()) for source in (sources or "").split(",") if source.strip()]
        for member in members:
            if member.input_side != side:
                raise SettingsError(
                    f"task.upsamplers: {member.card.name} enlarges images of {member.input_side} x {member.input_side} pixels, but gets "
                    f"{side} x {side}. Set task.side={member.input_side} here, or train it with --set "
                    f"task.side={round(side * member.task.zoom)}."
                )
            side = member.task.target_pictures.side
        return cls(members)

    def enlarge(self, images: Tensor, numbers: Sequence[int]) -> Tensor:  # B C s s -> B K S S
        """Return images that all members have enlarged."""
        for member in self.members:
            images = member.enlarge(images, numbers)
        return images

    def to_json(self) -> list[dict[str, Any]]:
        return [member.to_json() for member in self.members]

    def save(self, folder: Path) -> None:
        """Write each member to a folder of its own."""
        for i, member in enumerate(self.members):
            member.save(folder / f"upsampler-{i}")

    @classmethod
    def restore(cls, folder: Path, saved: Sequence[dict[str, Any]]) -> Self:
        return cls([Upsampler.restore(folder / f"upsampler-{i}", each) for i, each in enumerate(saved)])
