"""Image preprocessing of pretrained networks, as the files next to the weights describe it.

The formats of transformers, timm (`pretrained_cfg`) and open_clip (`preprocess_cfg`) are converted to the newer
keys of transformers: `size` (shortest_edge, or height and width), `crop_size`, `image_mean`, `image_std`,
`resample`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fieldguide.checkpoints.config_mapping import read
from fieldguide.core.card import Scale
from fieldguide.core.errors import WeightsError

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
# The preprocessor of transformers that prepares for a kind of network, where the file leaves that open.
OWN = {
    "vit": "vit",
    "swin": "vit",
    "deit": "deit",
    "convnext": "convnext",
    "convnextv2": "convnext",
    "resnet": "convnext",
    "efficientnet": "efficientnet",
}
SQUARE = ("vit", "deit", "efficientnet")  # for which one number as a size is both sides, not the shorter one
FILTER = {"vit": "bilinear"}  # where none is named; else bicubic
WIDE = 384  # pixels from which ConvNeXt's pictures are stretched, not cut
Said = dict[str, Any]


def timm(content: Said, file: Path) -> Said:
    """Return timm's evaluation preprocessing: the shorter side is scaled to the crop divided by `crop_pct`."""
    said = content.get("pretrained_cfg") or {}
    if "input_size" not in said:
        return {}
    side, share = said["input_size"][-1], said.get("crop_pct") or 0.875
    size = (
        {"height": int(side / share), "width": int(side / share)}
        if said.get("crop_mode") == "squash"
        else {"shortest_edge": int(side / share)}
    )
    return {
        "size": size,
        "crop_size": side,
        "resample": FILTERS.index(said.get("interpolation") or "bicubic"),
        "even": True,
        **{f"image_{key}": said[key] for key in ("mean", "std") if key in said},
    }


def open_clip(content: Said, file: Path) -> Said:
    if not (said := content.get("preprocess_cfg")):
        return {}
    if said.get("resize_mode", "shortest") not in ("shortest", "squash"):
        raise WeightsError(f"{file}: resize_mode={said['resize_mode']!r}; known are shortest and squash")
    return {
        "image_mean": said.get("mean"),
        "image_std": said.get("std"),
        "resample": FILTERS.index(said.get("interpolation", "bicubic").lower()),
        **({"size": {"height": None, "width": None}} if said.get("resize_mode") == "squash" else {}),
    }


def transformers(content: Said, file: Path) -> Said:
    """Return a preprocessor's values with its defaults filled in; of one for images and texts, those for images."""
    said = content if file.name.startswith("pre") else content.get("image_processor") or {}
    if not said:
        return {}
    name = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
    config = file.parent / "config.json"
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name).lower() or OWN.get(
        str(read(config).get("model_type")) if config.is_file() else "", ""
    )
    said = {**said, "resample": said.get("resample", FILTERS.index(FILTER.get(kind, "bicubic")))}
    size = said.get("size")
    if isinstance(size, int) and kind in SQUARE:
        said["size"] = {"height": size, "width": size}
    elif kind == "convnext" and size:
        edge = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
        said |= (
            {"size": {"height": edge, "width": edge}}
            if edge >= WIDE
            else {"size": {"shortest_edge": int(edge / (said.get("crop_pct") or 224 / 256))}, "crop_size": edge}
        )
    if kind == "efficientnet" and said.get("include_top", True) and "image_std" in said:
        said["image_std"] = [number**2 for number in said["image_std"]]  # it divides by the deviation twice
    if said.get("do_normalize") is False:
        said |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return said


# Files that say how pictures are prepared -> who reads them; the first that says it.
PREPARED: Mapping[str, Callable[[Said, Path], Said]] = {
    "preprocessor_config.json": transformers,
    "processor_config.json": transformers,
    "open_clip_config.json": open_clip,
    "config.json": timm,
}


def preparation(folder: Path) -> tuple[Path | None, Said]:
    """Return the name and content of the file next to the weights that describes the preprocessing.

    Raises `WeightsError` if it cannot be read.
    """
    there = ((folder / name, way) for name, way in PREPARED.items() if (folder / name).is_file())
    return next(((file, said) for file, way in there if (said := way(read(file), file))), (None, {}))


def number(size: Any, *keys: str) -> int | None:
    """Return a side length given as a number, or under one of these keys."""
    return size if isinstance(size, int) or not size else next((size[key] for key in keys if size.get(key)), None)


def side_of(folder: Path) -> int | None:
    """Return the side of the network's input images in pixels."""
    said = preparation(folder)[1]
    return number(said.get("crop_size"), "height") or number(said.get("size"), "shortest_edge", "height")


def shown(folder: Path, side: int, channels: int, scale: Scale) -> dict[str, str]:
    """Return the task options `pixels` and `resize` for input images of `side` pixels.

    They come from the files next to the weights, else from `scale`. Raises `WeightsError` if the files are for
    another side.
    """
    file, said = preparation(folder)
    size = said.get("size") or side
    short, both = number(size, "shortest_edge"), number({} if isinstance(size, int) else size, "height")
    edge, padded = short or both, said.get("do_pad") is True and "crop_size" not in said
    cut = None if said.get("do_center_crop") is False else number(said.get("crop_size"), "height") or (short and side)
    if edge and not padded and ((cut or both) != side or edge < side):
        raise WeightsError(
            f"{file} gives pictures of {cut or both or 'any'} pixels, cut out of {edge}; the network reads {side} a side"
        )
    fit = "pad" if padded else "crop" if short else "stretch"
    share = f" {side / edge}" if edge and edge != side and fit != "pad" else ""
    way = FILTERS[said.get("resample", FILTERS.index("bicubic"))]
    return {"pixels": pixels(said, scale, channels), "resize": f"{fit}{share} {way}{' even' if said.get('even') else ''}"}


def pixels(said: Mapping[str, Any], scale: Scale, channels: int) -> str:
    """Return mean and standard deviation of each channel as the task option `pixels` writes them."""
    values = [list(said.get(key) or own) for key, own in zip(("image_mean", "image_std"), scale)]
    one: Callable[[list[float]], list[float]] = lambda numbers: [sum(numbers) / len(numbers)]
    values = [own if len(own) == channels else one(own) if channels == 1 else own[:channels] for own in values]
    return "/".join(",".join(map(str, own)) for own in values)
