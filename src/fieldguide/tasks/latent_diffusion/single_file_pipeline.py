"""Pipelines in single files of CompVis, Stability AI and Black Forest Labs: Stable Diffusion 1 to 3.5, SDXL, and FLUX.1.

A file holds the tensors of all networks, but neither configurations nor a tokenizer. What the networks are follows from the width of the
text's states, for Stable Diffusion 3 and FLUX.1 from that of the network itself; the tokenizers are CLIP's and T5's, from a path.
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
PACKED, TOLD = "img_in.weight", "guidance_in.in_layer.weight"  # of FLUX.1, and of its networks that are told the guidance scale
T5 = "text_3"  # the part of a file that holds T5
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
    pads with the token 0 instead of the end token; `optional` the parts that a file may lack; `scheduler` the settings that replace those
    of `SCHEDULER`."""

    denoiser: str
    vae: str
    texts: Mapping[str, tuple[str, str]]
    pads: tuple[bool, ...]
    prediction: str = "epsilon"
    origin: str = COMPVIS  # of the denoiser's names
    optional: frozenset[str] = frozenset()
    scheduler: Mapping[str, Any] | None = None


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
    T5: ("t5-v1.1-xxl-encoder", HUGGINGFACE),
}


def describe_sd3(size: str) -> Layout:
    """Return the layout of a size of Stable Diffusion 3."""
    pads, optional = (False, True, True), frozenset({T5})
    return Layout(size, "sd3-vae", FLOW_TEXTS, pads, "velocity", OFFICIAL, optional, FLOW_SCHEDULER)


def describe_flux(size: str, **scheduler: Any) -> Layout:
    """Return the layout of a size of FLUX.1."""
    texts = {"text": ("clip-l14-text", HUGGINGFACE), T5: ("t5-v1.1-xxl-encoder", HUGGINGFACE)}
    settings = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
    return Layout(size, "flux-vae", texts, (False, True), "velocity", OFFICIAL, scheduler=settings)


FLOW_LAYOUTS = {  # of Stable Diffusion 3, by its width, and whether blocks have a second attention
    1536: {False: describe_sd3("sd3-medium"), True: describe_sd3("sd3.5-medium")},
    2432: {False: describe_sd3("sd3.5-large")},
}
FLUX_LAYOUTS = {  # by the width, and whether the network is told the guidance scale
    3072: {
        True: describe_flux("flux1-dev", shift=3.0, use_dynamic_shifting=True),
        False: describe_flux("flux1-schnell", shift=1.0),
    }
}


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
    if missing := layout.texts.keys() - parts.keys() - layout.optional:
        raise WeightsError(f"{path} lacks a text encoder ({', '.join(sorted(missing))}). Download the whole file.")
    denoiser = place(path, layout.denoiser, layout.origin, state)
    texts = tuple(
        place(path, size, origin, parts[part]) if part in parts else None for part, (size, origin) in layout.texts.items()
    )
    vae = place(path, layout.vae, COMPVIS, parts["vae"])
    if layout.scheduler is not None:
        if prediction_type is not None:
            raise SettingsError(f"prediction_type: not for rectified flows. {path} predicts the velocity. Leave it out.")
        return SingleFile(denoiser, vae, texts, layout, layout.scheduler)
    channels = denoiser.card.config(**denoiser.values).channels
    denoiser = replace(denoiser, values={**denoiser.values, "extra": state[FIRST].shape[1] - channels})
    return SingleFile(denoiser, vae, texts, layout, {**SCHEDULER, "prediction_type": prediction_type or layout.prediction})


def choose_layout(path: Path, state: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a denoiser. Raises `WeightsError` if it is not a known one."""
    for key, layouts, name, variant in (
        (PATCHES, FLOW_LAYOUTS, "Stable Diffusion 3", any(".attn2." in name for name in state)),
        (PACKED, FLUX_LAYOUTS, "FLUX.1", TOLD in state),
    ):
        if key not in state:
            continue
        found = layouts.get(len(state[key]), {}).get(variant)
        if found is None:
            raise WeightsError(
                f"{path} holds a network of {name} of width {len(state[key])}, which is unknown. Known are "
                f"{', '.join(map(str, layouts))}. Load it from a folder of diffusers."
            )
        return found
    width = next((x.shape[1] for name, x in state.items() if name.endswith(KEYS)), 0)
    if width not in LAYOUTS or FIRST not in state:
        raise WeightsError(
            f"{path} holds a network that attends to texts of width {width}. Single files are supported of Stable Diffusion 1 (768), 2 "
            "(1024), SDXL (2048), 3 and 3.5, and of FLUX.1; load other pipelines from a folder of diffusers."
        )
    return LAYOUTS[width]


def place(path: Path, size: str, origin: str, state: Mapping[str, Tensor]) -> Checkpoint:
    """Return the checkpoint of a part, of a known size."""
    card, name = find(size)
    return Checkpoint(path, card, origin, dict(card.sizes[name].overrides), state)
