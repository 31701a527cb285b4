"""How much of a pipeline is computed at once, so that images fit into the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fieldguide.core.hardware import ram

if TYPE_CHECKING:
    from fieldguide.tasks.latent_diffusion.diffusion_pipeline import DiffusionPipeline

SHARE = 0.6  # of the free memory that images may use
MAX_IMAGES = 8  # images that are denoised at once
MAPS = 6  # feature maps of the decoder's largest level that are in memory at once
UNFUSED_DEVICES = ("mps",)  # where attention stores all of its scores
MIN_QUERIES = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Images denoised at once; side of the autoencoder's tiles in latents; queries of attention at a time. 0 stands for all."""

    images: int
    tile: int = 0
    queries: int = 0


def get_free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
        return min(int(found.split()[1]) * 1024, ram())
    except (OSError, StopIteration, ValueError):
        return ram() // 2


def plan_memory(pipeline: DiffusionPipeline, rows: int, columns: int, copies: int, free: int | None = None) -> MemoryPlan:
    """Return what is computed at once for latents of `rows` x `columns`, each in `copies` (2 with guidance)."""
    like = next(pipeline.network.parameters())
    free = int((get_free_memory(like.device) if free is None else free) * SHARE)
    vae, config = pipeline.vae.config, pipeline.config
    size = next(pipeline.vae.parameters()).element_size()
    pixels = rows * columns * pipeline.stride**2
    tile = 0
    widest = vae.dim * (vae.growth[1] if len(vae.growth) > 1 else vae.growth[0])
    scores = (rows * columns) ** 2 * 4  # of the attention in the middle of the autoencoder, one head
    if (MAPS * widest * pixels * size + scores) > free:
        tile = vae.image // pipeline.stride
    tokens = rows * columns // pipeline.family.patch**2
    heads = max(config.heads) if isinstance(config.heads, tuple) else config.heads
    needed = copies * heads * tokens**2 * like.element_size()  # scores of one layer
    queries = 0
    if like.device.type in UNFUSED_DEVICES and needed > free:
        queries = max(MIN_QUERIES, tokens * free // needed)
    dim = config.dim * (
        8 if isinstance(config.heads, tuple) else 24
    )  # widths of all maps that a U-Net keeps, of a Transformer's MLP
    each = copies * tokens * dim * like.element_size()
    return MemoryPlan(min(MAX_IMAGES, max(1, free // max(each, 1))), tile, queries)
