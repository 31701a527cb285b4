"""Pipelines in single files of CompVis and Stability AI: Stable Diffusion 1 to 3.5, and SDXL.

A file holds the tensors of all networks, but neither configurations nor a tokenizer. What the networks are follows from the width of the
text's states, for Stable Diffusion 3 from that of the network itself; the tokenizers are CLIP's and T5's, from a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import Checkpoint
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.diffusion._shared.single_file import split_single_file
from fieldguide.models.registry import find

SUFFIXES = (".safetensors", ".ckpt")
COMPVIS, OPENAI, HUGGINGFACE, OFFICIAL = "compvis", "openai", "huggingface", "official"  # origins of tensors
PATCHES = "x_embedder.proj.weight"  # of Stable Diffusion 3
FIRST, KEYS = "input_blocks.0.0.weight", "attn2.to_k.weight"  # the first convolution, and what attends to the text
PREDICTION_TYPES = {"epsilon", "v_prediction"}
SCHEDULER = {  # with which these networks were trained; the sampler is DDIM, as in the authors' scripts
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the networks of a version. `texts` are size and origin of each text encoder by its part; `pads` whether its tokenizer
    pads with the token 0 instead of the end token."""

    denoiser: str
    vae: str
    texts: Mapping[str, tuple[str, str]]
    pads: tuple[bool, ...]
    prediction: str = "epsilon"
    origin: str = COMPVIS  # of the denoiser's names


LAYOUTS = {  # by the width of the text's states
    768: Layout("sd1-unet", "sd-vae", {"text": ("clip-l14-text", HUGGINGFACE)}, (False,)),
    1024: Layout("sd2-unet", "sd-vae", {"text": ("clip-h14-text-23", OPENAI)}, (True,), "v_prediction"),
    2048: Layout(
        "sdxl-base-unet",
        "sdxl-vae",
        {"text": ("clip-l14-text", HUGGINGFACE), "text_2": ("clip-g14-text", OPENAI)},
        (False, True),
    ),
}


FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLOW_TEXTS = {
    "text": ("clip-l14-text-projected", HUGGINGFACE),
    "text_2": ("clip-g14-text", HUGGINGFACE),
    "text_3": ("t5-v1.1-xxl-encoder", HUGGINGFACE),
}
FLOW_LAYOUTS = {  # of Stable Diffusion 3, by its width
    1536: {  # whether blocks have a second attention -> layout
        False: Layout("sd3-medium", "sd3-vae", FLOW_TEXTS, (False, True, True), "velocity", OFFICIAL),
        True: Layout("sd3.5-medium", "sd3-vae", FLOW_TEXTS, (False, True, True), "velocity", OFFICIAL),
    },
    2432: {False: Layout("sd3.5-large", "sd3-vae", FLOW_TEXTS, (False, True, True), "velocity", OFFICIAL)},
}
OPTIONAL_TEXTS = {"text_3"}


@dataclass(frozen=True)
class SingleFile:
    """The networks in a file, and the settings that the file lacks."""

    denoiser: Checkpoint
    vae: Checkpoint
    texts: tuple[Checkpoint | None, ...]
    layout: Layout
    scheduler: Mapping[str, Any]


def is_single_file(path: Path) -> bool:
    """Return whether a file holds a denoiser, an autoencoder and a text encoder."""
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    try:
        state = weights.read_shapes(path) if path.suffix == ".safetensors" else weights.read(path)
    except WeightsError:
        return False  # reading it as a network says what is wrong
    return {"denoiser", "vae", "text"} <= split_single_file(state).keys()


def read_single_file(path: Path, prediction_type: str | None = None) -> SingleFile:
    """Return the networks of a file. `prediction_type` is what the network predicts: "epsilon" or "v_prediction"; by default the
    latter for Stable Diffusion 2.

    Raises `WeightsError` for other networks.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise SettingsError(f"prediction_type={prediction_type!r} is unknown. Choose {' or '.join(sorted(PREDICTION_TYPES))}.")
    parts = split_single_file(weights.read(path))
    state = parts["denoiser"]
    layout = choose_layout(path, state)
    if missing := layout.texts.keys() - parts.keys() - OPTIONAL_TEXTS:
        raise WeightsError(f"{path} lacks a text encoder ({', '.join(sorted(missing))}). Download the whole file.")
    denoiser = place(path, layout.denoiser, layout.origin, state)
    texts = tuple(
        place(path, size, origin, parts[part]) if part in parts else None for part, (size, origin) in layout.texts.items()
    )
    vae = place(path, layout.vae, COMPVIS, parts["vae"])
    if layout.origin == OFFICIAL:
        if prediction_type is not None:
            raise SettingsError(f"prediction_type: not for rectified flows. {path} predicts the velocity. Leave it out.")
        return SingleFile(denoiser, vae, texts, layout, FLOW_SCHEDULER)
    channels = denoiser.card.config(**denoiser.values).channels
    denoiser = replace(denoiser, values={**denoiser.values, "extra": state[FIRST].shape[1] - channels})
    return SingleFile(denoiser, vae, texts, layout, {**SCHEDULER, "prediction_type": prediction_type or layout.prediction})


def choose_layout(path: Path, state: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a denoiser. Raises `WeightsError` if it is not a known one."""
    if PATCHES in state:
        width = len(state[PATCHES])
        found = FLOW_LAYOUTS.get(width, {}).get(any(".attn2." in name for name in state))
        if found is None:
            raise WeightsError(
                f"{path} holds a network of Stable Diffusion 3 of width {width}, which is unknown. Known are "
                f"{', '.join(map(str, FLOW_LAYOUTS))}. Load it from a folder of diffusers."
            )
        return found
    width = next((x.shape[1] for name, x in state.items() if name.endswith(KEYS)), 0)
    if width not in LAYOUTS or FIRST not in state:
        raise WeightsError(
            f"{path} holds a network that attends to texts of width {width}. Single files are supported of Stable Diffusion 1 (768), 2 "
            "(1024), SDXL (2048), 3 and 3.5; load other pipelines from a folder of diffusers."
        )
    return LAYOUTS[width]


def place(path: Path, size: str, origin: str, state: Mapping[str, Tensor]) -> Checkpoint:
    """Return the checkpoint of a part, of a known size."""
    card, name = find(size)
    return Checkpoint(path, card, origin, dict(card.sizes[name].overrides), state)
