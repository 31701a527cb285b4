"""Image preprocessing of pretrained networks, read from the files next to the weights.

The formats of transformers, timm (`pretrained_cfg`) and open_clip (`preprocess_cfg`) are converted to the newer
keys of transformers: `size` (shortest_edge, or height and width), `crop_size`, `image_mean`, `image_std`,
`resample`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fieldguide.checkpoints.config_mapping import read
from fieldguide.core.card import OPENAI, Scale
from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import get_checked, guard
from fieldguide.data.preprocessing.image_transform import ImageTransform, NativeTransform

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's constants
NATIVE = "qwen2vl"  # processor of images that keep their size
# model_type -> image processor of transformers, for files that do not name one.
DEFAULT_PROCESSORS = {
    "vit": "vit",
    "swin": "vit",
    "deit": "deit",
    "convnext": "convnext",
    "convnextv2": "convnext",
    "resnet": "convnext",
    "efficientnet": "efficientnet",
    "qwen2_5_vl": NATIVE,
}
SQUARE_PROCESSORS = ("vit", "deit", "efficientnet")  # processors whose `size`, if it is one number, means both sides
DEFAULT_FILTERS = {"vit": "bilinear"}  # resize filter if the file names none; the others use bicubic
PIXEL_LIMITS = {
    "min_pixels": "shortest_edge",
    "max_pixels": "longest_edge",
}  # key -> its name in newer files, where it is in `size`
MAX_SIDE_PIXELS = 10_000  # of resized images
MAX_TOTAL_PIXELS = 1 << 28  # limit of the limits of images that keep their size
SPEECH_RATE = 16_000  # samples per second, if the file names no rate
MIN_STD, MAX_COLOR = 1e-4, 1e4  # limits of means and standard deviations
MIN_STRETCHED_SIDE_PIXELS = 384  # from this size on, ConvNeXt's processor stretches instead of cropping
Values = dict[str, Any]


def convert_timm(content: Values, file: Path) -> Values:
    """Return timm's evaluation preprocessing: the shorter side is scaled to the crop divided by `crop_pct`."""
    values = content.get("pretrained_cfg") or {}
    if "input_size" not in values:
        return {}
    side, share = values["input_size"][-1], values.get("crop_pct") or 0.875
    size = (
        {"height": int(side / share), "width": int(side / share)}
        if values.get("crop_mode") == "squash"
        else {"shortest_edge": int(side / share)}
    )
    return {
        "size": size,
        "crop_size": side,
        "resample": FILTERS.index(values.get("interpolation") or "bicubic"),
        "even": True,
        **{f"image_{key}": values[key] for key in ("mean", "std") if key in values},
    }


def convert_open_clip(content: Values, file: Path) -> Values:
    if not (values := content.get("preprocess_cfg")):
        return {}
    if values.get("resize_mode", "shortest") not in ("shortest", "squash"):
        raise WeightsError(f"{file}: resize_mode={values['resize_mode']!r} is not supported; it must be shortest or squash.")
    return {
        "image_mean": values.get("mean"),
        "image_std": values.get("std"),
        "resample": FILTERS.index(values.get("interpolation", "bicubic").lower()),
        **({"size": {"height": None, "width": None}} if values.get("resize_mode") == "squash" else {}),
    }


def convert_transformers(content: Values, file: Path) -> Values:
    """Return the values of an image processor, or of the image part of a processor, with its defaults filled in."""
    values: Values = content if file.name.startswith("pre") else content.get("image_processor") or {}
    if not values:
        return {}
    name = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    config = file.parent / "config.json"
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name).lower() or DEFAULT_PROCESSORS.get(
        str(read(config).get("model_type")) if config.is_file() else "", ""
    )
    values = {**values, "resample": values.get("resample", FILTERS.index(DEFAULT_FILTERS.get(kind, "bicubic")))}
    size = values.get("size")
    if isinstance(size, int) and kind in SQUARE_PROCESSORS:
        values["size"] = {"height": size, "width": size}
    elif kind == "convnext" and size:
        edge = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
        values |= (
            {"size": {"height": edge, "width": edge}}
            if edge >= MIN_STRETCHED_SIDE_PIXELS
            else {"size": {"shortest_edge": int(edge / (values.get("crop_pct") or 224 / 256))}, "crop_size": edge}
        )
    if kind == NATIVE:
        limits = values.pop("size", None) or {}
        for ours, theirs in PIXEL_LIMITS.items():
            values[ours] = limits.get(theirs) if values.get(ours) is None else values[ours]
    if kind == "efficientnet" and values.get("include_top", True) and "image_std" in values:
        values["image_std"] = [number**2 for number in values["image_std"]]  # it divides by the deviation twice
    if values.get("do_normalize") is False:
        values |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return values


# File name -> function that converts it; the first file with preprocessing values is used.
CONVERTERS: Mapping[str, Callable[[Values, Path], Values]] = {
    "preprocessor_config.json": convert_transformers,
    "processor_config.json": convert_transformers,
    "open_clip_config.json": convert_open_clip,
    "config.json": convert_timm,
}


def read_preprocessor(folder: Path) -> tuple[Path | None, Values]:
    """Return the name and content of the file next to the weights that describes the preprocessing.

    Raises `WeightsError` if it cannot be read.
    """
    for name, convert in CONVERTERS.items():
        file = folder / name
        if file.is_file():
            with guard(file, WeightsError):
                if values := convert(read(file), file):
                    check_values(values, file)
                    return file, values
    return None, {}


def read_audio_options(folder: Path) -> dict[str, Any]:
    """Return the task options for recordings that a feature extractor of transformers describes; empty if there is none.

    Raises `WeightsError` for sampling rates that no recording has, and for features that are not supported.
    """
    values: Values = {}
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "feature_extractor")):
        file = folder / name
        if file.is_file():
            values = read(file) if part is None else read(file).get(part) or {}
            break
    kind = str(values.get("feature_extractor_type") or "")
    with guard(folder, WeightsError):
        rate = get_checked(values, "sampling_rate", int, folder, WeightsError, 1_000, 768_000) or SPEECH_RATE
        if kind == "ParakeetFeatureExtractor":
            return read_nemo_options(folder, values, rate)
        return {"rate": rate, "normalize": values.get("do_normalize") is not False}


def read_nemo_options(folder: Path, values: Values, rate: int) -> dict[str, Any]:
    """Return the task options for the features of FastConformer. Raises `WeightsError` for other features."""
    expected = {"n_fft": 512, "win_length": round(0.025 * rate), "preemphasis": 0.97}
    if wrong := [key for key, value in expected.items() if values.get(key, value) != value]:
        raise WeightsError(
            f"{folder}: {wrong[0]}={values[wrong[0]]!r} is not supported for log-mel features; it must be {expected[wrong[0]]}."
        )
    bands = get_checked(values, "feature_size", int, folder, WeightsError, 1, 4096) or 80
    hop = get_checked(values, "hop_length", int, folder, WeightsError, 1, rate) or 160
    return {"rate": rate, "bands": bands, "hop": hop / rate, "scale": "recording", "style": "nemo"}


def check_values(values: Values, file: Path) -> None:
    """Raise `WeightsError` for sizes, colors and filters that no preprocessing has."""
    for key in ("size", "crop_size"):
        size = values.get(key) or {}
        sides = {key: size} if not isinstance(size, dict) else {f"{key}.{name}": side for name, side in size.items()}
        for name in sides:
            get_checked(sides, name, int, file, WeightsError, 1, MAX_SIDE_PIXELS)
    get_checked(values, "resample", int, file, WeightsError, 0, len(FILTERS) - 1)
    for key, least in (("image_mean", -MAX_COLOR), ("image_std", MIN_STD)):
        for number in get_checked(values, key, list, file, WeightsError) or ():
            get_checked({key: number}, key, float, file, WeightsError, least, MAX_COLOR)


def get_side(size: Any, *keys: str) -> int | None:
    """Return `size` if it is a number, else its value under the first of these keys that it has."""
    return size if isinstance(size, int) or not size else next((size[key] for key in keys if size.get(key)), None)


def get_input_side(folder: Path) -> int | None:
    """Return the side of the network's input images in pixels."""
    values = read_preprocessor(folder)[1]
    return get_side(values.get("crop_size"), "height") or get_side(values.get("size"), "shortest_edge", "height")


def get_image_options(folder: Path, side: int, channels: int, scale: Scale) -> dict[str, str]:
    """Return the task options `pixels` and `resize` for input images of `side` pixels.

    They come from the files next to the weights, else from `scale`. Raises `WeightsError` if the files are for
    another side.
    """
    file, values = read_preprocessor(folder)
    with guard(file or folder, WeightsError):
        return build_image_options(file or folder, values, side, channels, scale)


def build_transform(folder: Path, side: int, channels: int, scale: Scale = OPENAI) -> ImageTransform:
    """Return the image preprocessing that the files next to the weights describe, by default with the given scale."""
    described = get_image_options(folder, side, channels, scale)
    return ImageTransform(side, channels).with_normalization(described["pixels"]).with_resize(described["resize"])


def build_native_transform(
    folder: Path, patch: int, merge: int, side: int, channels: int, scale: Scale, max_pixels: int | None = None
) -> NativeTransform:
    """Return the preprocessing of images that keep their size, from the files next to the weights, else the authors' defaults.

    `max_pixels` replaces that of the files. Raises `WeightsError` if they are for patches of another size.
    """
    file, values = read_preprocessor(folder)
    place = file or folder
    with guard(place, WeightsError):
        for key, own in (("patch_size", patch), ("merge_size", merge)):
            if values.get(key, own) != own:
                raise WeightsError(f"{place}: {key}={values[key]!r}, but the network has {own}.")
        usual = NativeTransform(side, channels, patch=patch, unit=patch * merge)
        limits = {key: values.get(key) or getattr(usual, key) for key in PIXEL_LIMITS}
        for key in limits:
            get_checked(limits, key, int, place, WeightsError, 1, MAX_TOTAL_PIXELS)
        most = max_pixels or limits["max_pixels"]
        chosen = replace(
            usual,
            min_pixels=min(limits["min_pixels"], most),
            max_pixels=most,
            filter=values.get("resample", FILTERS.index("bicubic")),
        )
        return cast(NativeTransform, chosen.with_normalization(format_pixels(values, scale, channels)))


def build_image_options(file: Path, values: Values, side: int, channels: int, scale: Scale) -> dict[str, str]:
    """Return what `get_image_options` returns for the values of a file."""
    size = values.get("size") or side
    short, both = get_side(size, "shortest_edge"), get_side({} if isinstance(size, int) else size, "height")
    edge, padded = short or both, values.get("do_pad") is True and "crop_size" not in values
    cut = None if values.get("do_center_crop") is False else get_side(values.get("crop_size"), "height") or (short and side)
    if edge and not padded and ((cut or both) != side or edge < side):
        raise WeightsError(
            f"{file} produces images of {cut or both or 'any'} pixels per side, cropped from {edge}, but the network reads "
            f"{side}. Pass the size that the file describes."
        )
    fit = "pad" if padded else "crop" if short else "stretch"
    share = f" {side / edge}" if edge and edge != side and fit != "pad" else ""
    way = FILTERS[values.get("resample", FILTERS.index("bicubic"))]
    return {
        "pixels": format_pixels(values, scale, channels),
        "resize": f"{fit}{share} {way}{' even' if values.get('even') else ''}",
    }


def format_pixels(config: Mapping[str, Any], scale: Scale, channels: int) -> str:
    """Return mean and standard deviation of each channel as text for the task option `pixels`."""
    values = [list(config.get(key) or own) for key, own in zip(("image_mean", "image_std"), scale)]
    one: Callable[[list[float]], list[float]] = lambda numbers: [sum(numbers) / len(numbers)]
    values = [own if len(own) == channels else one(own) if channels == 1 else own[:channels] for own in values]
    return "/".join(",".join(map(str, own)) for own in values)
