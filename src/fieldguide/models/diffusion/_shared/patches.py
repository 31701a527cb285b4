"""Patches of latents: check their sides, and put them together again."""

from __future__ import annotations

from torch import Tensor

from fieldguide.core.errors import DataError


def count_patches(latent: Tensor, patch: int) -> tuple[int, int]:  # B C H W -> rows, columns
    """Return the number of rows and columns of patches. Raises `DataError` for sides that are not multiples of `patch`."""
    height, width = latent.shape[2:]
    if height % patch or width % patch:
        raise DataError(f"latents of {width} x {height} cannot be split into patches: the sides must be multiples of {patch}")
    return height // patch, width // patch


def join_patches(x: Tensor, rows: int, columns: int, patch: int) -> Tensor:  # B N P*P*C -> B C H W
    """Return the image of patches whose values are ordered by row, column and channel."""
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))  # B rows columns P P C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
