"""Matrices that checkpoints store as small numbers with a scale for each block.

FP8 (DeepSeek-V3): `NAME.weight` in 8-bit floats, and `NAME.weight_scale_inv` with a factor for each block of 128 x 128.
MXFP4 (gpt-oss; Open Compute Project, Microscaling Formats, version 1.0): `NAME_blocks` with 32 numbers in 16 bytes, the first of two
in the lower half of a byte, and `NAME_scales` with the exponent of each block. The stored rows are the columns of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fieldguide.checkpoints.key_mapping import format_shape
from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import AGAIN

FP8_SCALES, FP4_BLOCKS, FP4_SCALES = "_scale_inv", "_blocks", "_scales"  # ends of names
FP8_BLOCK = 128  # rows and columns
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by three bits; the fourth is the sign
EXPONENT_BIAS = 127


def dequantize_blocks(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with matrices in blocks as float32, and without their scales.

    Raises `WeightsError` for blocks without scales, and for scales of another shape.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.dtype in FP8_TYPES:
            found[name] = dequantize_fp8(tensor, find_scales(state, name + FP8_SCALES, where), f"{where}: {name}")
        elif tensor.dtype == torch.uint8 and name.endswith(FP4_BLOCKS):
            base = name.removesuffix(FP4_BLOCKS)
            found[base] = dequantize_mxfp4(tensor, find_scales(state, base + FP4_SCALES, where), f"{where}: {name}")
        elif not is_scale(name, state):
            found[name] = tensor
    return found


def is_scale(name: str, state: dict[str, Tensor]) -> bool:
    """Return whether a tensor holds the scales of another one."""
    if name.endswith(FP8_SCALES):
        scaled = state.get(name.removesuffix(FP8_SCALES))
        return scaled is not None and scaled.dtype in FP8_TYPES
    return name.endswith(FP4_SCALES) and name.removesuffix(FP4_SCALES) + FP4_BLOCKS in state


def find_scales(state: dict[str, Tensor], name: str, where: str) -> Tensor:
    """Return the scales of a tensor. Raises `WeightsError` if they are missing."""
    if name not in state:
        raise WeightsError(f"{where}: {name}, the scales of a quantized tensor, is missing. {AGAIN}")
    return state[name]


def dequantize_fp8(tensor: Tensor, scales: Tensor, where: str) -> Tensor:  # R C, R/128 C/128 -> R C
    """Return a matrix of 8-bit floats, multiplied by the scales of its blocks."""
    if tensor.ndim != 2 or scales.shape != tuple(-(-length // FP8_BLOCK) for length in tensor.shape):
        raise WeightsError(
            f"{where} ({format_shape(tensor)}) has scales of the shape {format_shape(scales)}, but one is needed for each "
            f"block of {FP8_BLOCK} x {FP8_BLOCK}. Convert the checkpoint to bfloat16."
        )
    rows, columns = tensor.shape
    factors = scales.float().repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return tensor.float() * factors


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, where: str) -> Tensor:  # ... R G 16, ... R G -> ... G*32 R
    """Return matrices of 4-bit floats, multiplied by the powers of two of their blocks."""
    if blocks.shape[:-1] != scales.shape or scales.dtype != torch.uint8 or blocks.ndim < 3:
        raise WeightsError(
            f"{where} ({format_shape(blocks)}) has scales of the shape {format_shape(scales)}, but one byte is needed for "
            f"each block. {AGAIN}"
        )
    numbers = torch.tensor([*FP4_NUMBERS, *(-number for number in FP4_NUMBERS)])
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # ... R G 32
    exponents = scales.int() - EXPONENT_BIAS
    return torch.ldexp(numbers[pairs.int()], exponents[..., None]).flatten(-2).mT.contiguous()
