"""PatchCore: the distance of image patches to those of normal images (Roth et al. 2021, arXiv:2106.08265).

New here: a memory of patch features of normal images, reduced to those that cover the others best (a core set), and the distance
to the nearest of them as the anomaly score of a place. Nothing is trained. The paper takes the features from the middle layers of
a network trained on ImageNet (section 3.1); so does this network if it has a `backbone`. Without one, the features are the pixels
of each patch, as in nonparametric texture models, so that no weights are needed. Both are projected on their principal components.

The distances are smoothed by a Gaussian as in the paper. Its weight for rare neighbors (equation 7) is left out.

Initialization: orthonormal components and a random memory; `fit` of `training/patch_memory.py` replaces them.
Shapes: B batch, C channels, H W height and width, P patch, F numbers of a patch, D components, M stored patches, h w grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError

STRIDES = (8, 16)  # in pixels, of the levels of a backbone that are used: the second and third of a ResNet, as in the paper
CHUNK = 4_000_000  # distances that are in memory together


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    patch: int = 9  # P, odd: pixels per side of a patch, if there is no backbone
    stride: int = 2  # pixels between patches, if there is no backbone
    dims: int = 60  # D; at most F
    memory: int = 2000  # M
    backbone: str = ""  # architecture that the features are from; empty for pixels
    values: tuple[Any, ...] = ()  # fields of the backbone's config: (name, value), ...


class PatchCore(nn.Module):
    """Images of any size -> the distance of each place from normal ones."""

    heads: ClassVar[tuple[str, ...]] = ("mean", "basis", "memory")  # what a checkpoint of a backbone lacks

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.patch % 2 == 0:
            raise SettingsError(f"patchcore: patch={c.patch} must be odd, so that patches have a center.")
        self.backbone = build_backbone(c) if c.backbone else None
        self.levels = choose_levels(self.backbone.levels) if self.backbone is not None else {}
        numbers = sum(dim for dim, _ in self.levels.values()) or c.channels * c.patch**2  # F
        dims = min(c.dims, numbers)
        self.step = min((stride for _, stride in self.levels.values()), default=c.stride)  # pixels between places
        self.mean = nn.Parameter(torch.empty(numbers))
        self.basis = nn.Parameter(torch.empty(numbers, dims))
        self.memory = nn.Parameter(torch.empty(c.memory, dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.orthogonal_(self.basis)
        nn.init.normal_(self.memory)

    def train(self, mode: bool = True) -> PatchCore:
        """Keep the backbone in evaluation mode: its statistics are those of its own training."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def describe(self, image: Tensor) -> Tensor:  # B C H W -> B F h w
        """Return the features of each patch before they are projected."""
        if self.backbone is None:
            edge, stride = self.config.patch // 2, self.config.stride
            patches = F.unfold(F.pad(image, (edge,) * 4, mode="replicate"), self.config.patch, stride=stride)  # B F hw
            return patches.unflatten(2, tuple((size - 1) // stride + 1 for size in image.shape[2:]))
        maps = self.backbone.features(image)
        # Each place is joined with its neighbors (section 3.1, with patches of 3 x 3).
        near = [F.avg_pool2d(maps[name], 3, 1, 1, count_include_pad=False) for name in self.levels]
        size = max(map_.shape[2:] for map_ in near)
        return torch.cat([F.interpolate(map_, size, mode="bilinear") for map_ in near], 1)

    def project(self, features: Tensor) -> Tensor:  # ... F -> ... D
        return (features - self.mean) @ self.basis

    def measure(self, x: Tensor) -> Tensor:  # N D -> N
        """Return the distance to the nearest stored patch."""
        squared = x.square().sum(1, keepdim=True) - 2 * x @ self.memory.T + self.memory.square().sum(1)
        return squared.amin(1).clamp(min=1e-12).sqrt()

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B H W
        features = self.describe(image)
        x = self.project(features.movedim(1, -1))  # B h w D
        rows = x.flatten(0, 2)
        parts = rows.split(max(1, CHUNK // len(self.memory))) if not torch.compiler.is_compiling() else (rows,)
        distance = torch.cat([self.measure(part) for part in parts]).view(x.shape[:3])
        full = F.interpolate(distance[:, None], image.shape[2:], mode="bilinear")
        return smooth(full, self.step)[:, 0]


def smooth(maps: Tensor, sigma: float) -> Tensor:  # B 1 H W -> B 1 H W
    """Return the maps after a Gaussian filter with a standard deviation in pixels; values at the edges are repeated."""
    radius = round(3 * sigma)
    place = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    weight = torch.exp(-(place**2) / (2 * sigma**2))
    weight = weight / weight.sum()
    maps = F.conv2d(F.pad(maps, (radius,) * 4, mode="replicate"), weight.view(1, 1, 1, -1))
    return F.conv2d(maps, weight.view(1, 1, -1, 1))


def build_backbone(config: Config) -> Any:
    """Return the network that the features are from. Raises `SettingsError` if it has no feature maps."""
    from fieldguide.models import registry

    card = registry.card(config.backbone)
    pairs: Sequence[Any] = config.values
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in pairs}
    network = card.make(card.config(**values))
    if not hasattr(network, "levels"):
        raise SettingsError(f"patchcore: {card.name} has no feature maps (levels), so it cannot be a backbone.")
    return network.requires_grad_(False).eval()


def choose_levels(levels: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the levels of a backbone that describe patches: (channels, stride) by name."""
    chosen = {name: level for name, level in levels.items() if level[1] in STRIDES}
    return chosen or dict(list(levels.items())[-2:])


CARD = Card(
    name="patchcore",
    model=PatchCore,
    config=Config,
    paper="arXiv:2106.08265",
    year=2021,
    input_type="image",
    output_type="anomaly-map",
    solver="memory",
    sizes={
        "patchcore": Size(params=134_823, source="243 means, 60 components of 243 numbers, 2,000 patches of 60 numbers"),
        "patchcore-test": Size(patch=3, dims=4, memory=7),
    },
)
