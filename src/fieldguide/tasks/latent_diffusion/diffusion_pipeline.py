"""The networks of a pipeline that generates images or videos of texts, loaded from a folder of diffusers, and defaults of its family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fieldguide.checkpoints.config_mapping import identify_config
from fieldguide.checkpoints.load import Checkpoint, build_network, inspect_folder
from fieldguide.checkpoints.lora_files import DENOISER, FILE, find_lora, merge_updates, read_updates
from fieldguide.checkpoints.names import CONFIG_FILE, PIPELINE_FILE
from fieldguide.checkpoints.pipeline_parts import TEXT_ENCODERS, TOKENIZERS, PipelineFolder, find_denoiser, read_pipeline
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError, WeightsError, nearest
from fieldguide.core.validation import read_json
from fieldguide.data.preprocessing.tokenizer_files import find_tokenizer
from fieldguide.objectives.diffusion.noise_process import NoiseProcess
from fieldguide.objectives.diffusion.samplers import Sampler
from fieldguide.objectives.diffusion.scheduler_config import SAMPLERS, read_scheduler
from fieldguide.tasks.latent_diffusion import prompt_encoding
from fieldguide.tasks.latent_diffusion.prompt_encoding import Prompts, TextEncoder, load_tokenizer
from fieldguide.tasks.latent_diffusion.single_file_pipeline import T5, read_single_file

if TYPE_CHECKING:
    from fieldguide.core.card import Network

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Samplers that a request may choose -> schedulers of diffusers, which take over the settings of the pipeline's own.
CHOICES = {
    "dpm-solver": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "plms": "PNDMScheduler",
}
REPLACEMENT = "dpm-solver"  # for samplers that are not supported
RELATED = {"CogVideoXDPMScheduler": "CogVideoXDDIMScheduler"}  # of the same settings
Adapt = Callable[[str, Checkpoint], Checkpoint]  # name of a part and its checkpoint -> the checkpoint with a LoRA merged
EncodePrompts = Callable[[Sequence[TextEncoder | None], Sequence[str], Any], Prompts]


@dataclass(frozen=True)
class Family:
    """What the networks of a family have in common: how they read prompts, and the defaults of their authors' pipelines.

    `patch` is the number of latents along the side of a patch. With `distilled` guidance, the network is told the
    scale, and there is no negative prompt.
    """

    encode: EncodePrompts
    steps: int
    guidance: float
    patch: int = 1
    distilled: bool = False
    times: str | None = None  # of a flow, see `read_scheduler`
    frames_per_second: int = 0  # of videos; 0 for images
    size: tuple[int, int] | None = None  # default width and height in pixels; by default that of the network's latents


FAMILIES = {
    "stable-diffusion-unet": Family(prompt_encoding.encode_stable_diffusion, 50, 7.5),
    "sdxl-unet": Family(prompt_encoding.encode_sdxl, 50, 5.0),
    "pixart": Family(prompt_encoding.encode_pixart, 20, 4.5, 2),
    "sd3": Family(prompt_encoding.encode_sd3, 28, 7.0, 2, times="linspace"),
    "flux": Family(prompt_encoding.encode_flux, 28, 3.5, 2, distilled=True, times="trailing"),
}
VIDEO_FAMILIES = {
    "wan": Family(prompt_encoding.encode_wan, 50, 5.0, 2, frames_per_second=16, size=(832, 480)),
    "cogvideox": Family(prompt_encoding.encode_cogvideox, 50, 6.0, 2, frames_per_second=8),
}
SCHNELL_STEPS = 4  # of FLUX without guidance, which was distilled to few steps
LCM_STEPS = 4  # of latent consistency models


@dataclass
class DiffusionPipeline:
    """Networks of a pipeline, on a device, in evaluation mode."""

    card: Card
    family: Family
    config: Any  # of the network that denoises
    network: Any  # None where only the other networks are used
    vae: Any
    encoders: Sequence[TextEncoder | None]
    scheduler: Mapping[str, Any]
    settings: Mapping[str, Any]
    notes: list[str]
    path: Path

    @property
    def size(self) -> tuple[int, int]:
        """Default width and height, in pixels."""
        height = int(self.config.image) * self.stride
        return self.family.size or (int(getattr(self.config, "width", self.config.image)) * self.stride, height)

    @property
    def frames(self) -> int:
        """Default number of frames of videos."""
        return 1 + (int(self.config.frames) - 1) * int(self.vae.frame_stride)

    @property
    def stride(self) -> int:
        """Pixels per latent, along a side."""
        return int(self.vae.stride)

    @property
    def multiple(self) -> int:
        """What the sides of images must be multiples of, in pixels."""
        return self.stride * self.family.patch

    def build_sampler(self, steps: int, chosen: str | None) -> tuple[NoiseProcess, Sampler, str]:
        """Return the noise process, the sampler, and a note if it is not the pipeline's own. Raises `SettingsError` for a sampler
        that is unknown or not for this process.
        """
        config, note = dict(self.scheduler), ""
        own = str(config.get("_class_name"))
        if own in RELATED and chosen is None:
            config["_class_name"] = RELATED[own]
            note = f"the sampler {own} of {self.path} is not supported; {RELATED[own]} is used in its place"
        elif chosen is None and own not in SAMPLERS:
            chosen = REPLACEMENT
            note = f"the sampler {own} of {self.path} is not supported; {REPLACEMENT} is used in its place"
        if chosen is not None:
            if chosen not in CHOICES:
                raise SettingsError(
                    f"sampler={chosen!r} is unknown.{nearest(chosen, CHOICES)} Choose one of {', '.join(CHOICES)}."
                )
            if own.startswith("FlowMatch"):
                raise SettingsError(f"sampler={chosen!r} is not for rectified flows such as {self.card.name}. Leave it out.")
            config["_class_name"] = CHOICES[chosen]
            config.setdefault("skip_prk_steps", True)  # of PLMS
            config.setdefault("clip_sample", False)  # latents have no limit, but some schedulers clip them by default
        return *read_scheduler(config, steps, self.family.times), note


def load_pipeline(
    folder: Path, precision: str | None = None, lora: str | Path | None = None, lora_scale: float = 1.0
) -> DiffusionPipeline:
    """Load the parts of a pipeline, with a LoRA merged; by default the one in its folder, if there is one.

    Raises `WeightsError` for parts that are missing or unknown, and `SettingsError` for an unknown precision.
    """
    parts = read_pipeline(folder)
    adapt, note = read_adapter(folder, parts.parts.keys(), lora, lora_scale)
    found = inspect_folder(parts.denoiser, None)
    check_family(found.card, parts, FAMILIES | VIDEO_FAMILIES)
    check_settings(found, parts)
    dtype = choose_dtype(precision, found.card, distributed.device())
    with default_dtype(dtype):
        network = build(adapt(DENOISER, found)).to(distributed.device())
    frozen = load_frozen(parts, found.card, network.config, dtype, adapt)
    return replace(frozen, network=network, notes=[*frozen.notes, *filter(None, [note])])


def load_frozen(
    parts: PipelineFolder, card: Card, config: Any, dtype: torch.dtype, adapt: Adapt = lambda name, found: found
) -> DiffusionPipeline:
    """Load the autoencoder and the text encoders of a pipeline, whose network that denoises has this card and config."""
    device = distributed.device()
    with default_dtype(dtype):
        vae = build(inspect_folder(parts.parts["vae"], None)).to(device)
    with default_dtype(torch.bfloat16 if dtype == torch.float16 else dtype):  # T5 overflows in float16
        encoders = [load_encoder(parts, i, device, adapt) for i in range(len(TEXT_ENCODERS))]
    notes = ["the safety checker is left out: images are not filtered"] if "safety_checker" in parts.parts else []
    family = specialize((FAMILIES | VIDEO_FAMILIES)[card.name], config, parts.name)
    return DiffusionPipeline(card, family, config, None, vae, encoders, parts.scheduler, parts.settings, notes, parts.path)


def check_family(card: Card, parts: PipelineFolder, families: Collection[str] = FAMILIES.keys()) -> None:
    """Raise `WeightsError` if the network of a pipeline is not one of `families`, by default those that generate images of texts."""
    if card.name not in families:
        raise WeightsError(
            f"{parts.path / PIPELINE_FILE}: {parts.name} with the network {card.name} is not supported. Supported networks are "
            f"{', '.join(families)}."
        )


def check_settings(found: Checkpoint, parts: PipelineFolder) -> None:
    """Raise `WeightsError` for a pipeline of videos that needs more than a text and the latents of an image, or whose times differ
    between patches.
    """
    if found.card.name not in VIDEO_FAMILIES:
        return
    if found.values.get("extra") not in (None, 0, found.values.get("channels")):
        raise WeightsError(
            f"{parts.path / PIPELINE_FILE}: {parts.name} begins videos with a given image in a way that is not supported: only "
            "CogVideoX does so with the latents of the image alone. Use the pipeline of the same family for texts."
        )
    if wrong := [name for name in ("boundary_ratio", "expand_timesteps") if parts.settings.get(name)]:
        raise WeightsError(f"{parts.path / PIPELINE_FILE}: {wrong[0]}={parts.settings[wrong[0]]} is not supported.")


def is_video(folder: Path) -> bool:
    """Return whether a folder holds a pipeline whose network generates videos."""
    if not (folder / PIPELINE_FILE).is_file():
        return False
    try:
        found = identify_config(read_json(find_denoiser(folder) / CONFIG_FILE, WeightsError))
        return found is not None and found[0].name in VIDEO_FAMILIES
    except WeightsError:
        return False  # loading it says what is wrong


def load_single_file(
    path: Path,
    precision: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> DiffusionPipeline:
    """Load a single file of Stable Diffusion 1 to 3.5 or XL, or of FLUX.1, with its tokenizers, by default from the folder of the file.

    Raises `WeightsError` for other files, and if there is no tokenizer.
    """
    words = Path(tokenizer) if tokenizer else path.parent
    find_words(words, TOKENIZERS[0], is_t5=False)  # before a large file is read
    file = read_single_file(path, prediction_type)
    adapt, note = read_adapter(path, TEXT_ENCODERS[: len(file.texts)], lora, lora_scale)
    device = distributed.device()
    dtype = choose_dtype(precision, file.denoiser.card, device)
    with default_dtype(dtype):
        network, vae = build(adapt(DENOISER, file.denoiser)).to(device), build(file.vae).to(device)
    encoders: list[TextEncoder | None] = []
    with default_dtype(torch.bfloat16 if dtype == torch.float16 else dtype):
        for i, (part, found, pads_with_zero) in enumerate(zip(file.layout.texts, file.texts, file.layout.pads)):
            if found is None:
                encoders.append(None)
                continue
            name, place = TEXT_ENCODERS[i], find_words(words, TOKENIZERS[i], part == T5)
            text, limit = load_tokenizer(place)
            text.pad = 0 if pads_with_zero else text.end
            encoders.append(TextEncoder(build(adapt(name, found)).to(device), text, limit))
    card, family = file.denoiser.card, specialize(FAMILIES[file.denoiser.card.name], network.config, "")
    notes = [note] if note else []
    if None in encoders:
        notes.append(f"{path} lacks T5, which reads what is longer or finer than CLIP's texts; it is left out")
    return DiffusionPipeline(card, family, network.config, network, vae, encoders, file.scheduler, {}, notes, path)


def find_words(words: Path, name: str, is_t5: bool) -> Path:
    """Return the folder of a text encoder's tokenizer: a part of a pipeline's folder, or for CLIP the folder itself.

    Raises `WeightsError` if there is none.
    """
    for place in (words / name, *([] if is_t5 else [words / TOKENIZERS[0], words])):
        if place.is_dir() and find_tokenizer(place)[0] is not None:
            return place
    if not is_t5:
        raise WeightsError(
            f"no tokenizer found in {words}; a single file has none. Set tokenizer=PATH to CLIP's: all of these networks share that of "
            "openai/clip-vit-large-patch14."
        )
    raise WeightsError(
        f"no tokenizer of T5 found in {words / name}; a single file has none. Put that of google/t5-v1_1-xxl there, or set "
        "tokenizer=PATH to the folder of a pipeline."
    )


def read_adapter(folder: Path, names: Collection[str], lora: str | Path | None, scale: float) -> tuple[Adapt, str]:
    """Return what merges a LoRA into the checkpoints of parts, and a note about it. Raises `WeightsError` if it is not for them."""
    if lora is None and not (folder / FILE).is_file():
        return lambda name, found: found, ""
    path = find_lora(lora or folder)
    updates = read_updates(path, scale)
    if strange := updates.keys() - {DENOISER, *names}:
        raise WeightsError(f"{path} changes {', '.join(sorted(strange))}, which {folder} does not have.")
    merge = lambda name, found: merge_updates(found, updates[name], path) if name in updates else found
    return merge, f"the LoRA {path} is merged into {', '.join(sorted(updates))}"


def specialize(family: Family, config: Any, name: str) -> Family:
    """Return a family with what differs for some of its networks."""
    if family.encode is prompt_encoding.encode_pixart and "Sigma" in name:
        return replace(family, encode=partial(prompt_encoding.encode_pixart, sigma=True))
    if getattr(config, "guidance_dim", 0):
        return replace(family, steps=LCM_STEPS, distilled=True)
    if family.distilled and not config.guidance:
        return replace(family, steps=SCHNELL_STEPS)
    return family


def choose_dtype(precision: str | None, card: Card, device: torch.device) -> torch.dtype:
    """Return the precision of the networks: float32 on CPUs, else what the family was published in."""
    if precision is None:
        return torch.float32 if device.type == "cpu" else torch.float16 if "unet" in card.name else torch.bfloat16
    if precision not in PRECISIONS:
        raise SettingsError(f"precision={precision!r} is unknown. Choose one of {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in a precision inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(found: Checkpoint) -> Network:
    """Return the network of a checkpoint."""
    return build_network(found.card, found.values, found.state, found.origin, str(found.path))


def load_encoder(parts: PipelineFolder, number: int, device: torch.device, adapt: Adapt) -> TextEncoder | None:
    """Return a text encoder with its tokenizer, or None if the pipeline has none with this number."""
    name, words = TEXT_ENCODERS[number], TOKENIZERS[number]
    if name not in parts.parts:
        return None
    if words not in parts.parts:
        raise WeightsError(f"{parts.path / PIPELINE_FILE} lists {name}, but not its tokenizer {words}.")
    found = inspect_folder(parts.parts[name], None)
    if found.card.name not in ("clip-text", "t5-encoder", "umt5-encoder"):
        raise WeightsError(f"{found.path} is {found.card.name}, but {name} must be a text encoder of CLIP, T5 or UMT5.")
    network, (tokenizer, limit) = build(adapt(name, found)), load_tokenizer(parts.parts[words])
    if tokenizer.size > network.config.vocab_size:
        raise WeightsError(
            f"{parts.parts[words]} has {tokenizer.size:,} tokens, but {name} {network.config.vocab_size:,}. They belong to different "
            "pipelines."
        )
    return TextEncoder(network.to(device), tokenizer, limit)


def decode_latents(vae: Any, latents: Tensor, **options: int) -> Tensor:  # B ... C h w -> B ... 3 H W in -1 .. 1
    """Return the images or videos of latents; `options` are those of the autoencoder. What half precision cannot hold is computed again
    in float32.
    """
    dtype = next(vae.parameters()).dtype
    image = vae.decode(vae.denormalize(latents.to(dtype)), **options)
    if dtype != torch.float32 and not image.isfinite().all():
        vae.float()
        image = vae.decode(vae.denormalize(latents.float()), **options)
    return image.float().clamp(-1, 1)
