"""Boxes relative to other boxes, as two-stage detectors predict them (Girshick et al. 2013, arXiv:1311.2524, appendix C).

An offset is (x, y, width, height): the shift of the center as a fraction of the sides, and the logarithm of the ratio of the
sides. Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fieldguide.models.layers.boxes import to_centers, to_corners

# Factors on the offsets of the second stage, whose targets then have a deviation of about 1.
OFFSET_SCALES = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_SCALE = math.log(1000 / 16)  # of a box: larger offsets are clamped


def encode_offsets(boxes: Tensor, anchors: Tensor) -> Tensor:  # ... 4, ... 4 -> ... 4
    """Return the offsets that move anchors to boxes."""
    boxes, anchors = to_centers(boxes), to_centers(anchors)
    return torch.cat([(boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:], (boxes[..., 2:] / anchors[..., 2:]).log()], -1)


def decode_offsets(offsets: Tensor, anchors: Tensor) -> Tensor:  # ... 4, ... 4 -> ... 4
    """Return anchors moved by offsets, as (left, top, right, bottom)."""
    anchors = to_centers(anchors)
    center = anchors[..., :2] + offsets[..., :2] * anchors[..., 2:]
    return to_corners(torch.cat([center, anchors[..., 2:] * offsets[..., 2:].clamp(max=MAX_LOG_SCALE).exp()], -1))


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:  # ... 4 -> ... 4
    """Return boxes clipped to an image of (height, width)."""
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([*reversed(size)] * 2))
