"""Encode videos for run.py."""

import json
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

CONFIG = json.loads(Path(__file__).with_name("export.json").read_text(encoding="utf-8"))


def encode_sample(x):
    """Return frames F C H W as an animation, small ones enlarged."""
    levels = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    frames = [Image.fromarray(one if one.shape[2] > 1 else one[..., 0]).convert("RGB") for one in levels]
    size = [side * max(1, CONFIG["least"] // frames[0].height) for side in frames[0].size]
    first, *others = (frame.resize(size, Image.Resampling.NEAREST) for frame in frames)
    options = {"save_all": True, "append_images": others, "duration": CONFIG["milliseconds"], "loop": 0, "lossless": True}
    first.save(file := BytesIO(), "WEBP", **options)
    return {"video": "data:image/webp;base64," + b64encode(file.getvalue()).decode()}
