"""unCLIP: a prior makes the embedding of an image of a text, a decoder a small image of it, and two networks enlarge it.

Ramesh et al. 2022, arXiv:2204.06125 (DALL-E 2), in the form of Karlo: the prior and the decoder are guided, the last step of the
enlargement has a network of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.key_mapping import translate
from fieldguide.checkpoints.load import inspect_folder
from fieldguide.checkpoints.names import CONFIG_FILE, PIPELINE_FILE
from fieldguide.checkpoints.pipeline_parts import SCHEDULER_FILE
from fieldguide.core import distributed
from fieldguide.core.errors import WeightsError
from fieldguide.core.structure import MAX_SEED, Limits
from fieldguide.core.validation import read_json
from fieldguide.data.loader import mix_seeds
from fieldguide.models.diffusion.unclip_decoder import PROJECTION_KEYS, TextProjection
from fieldguide.objectives.diffusion.scheduler_config import read_scheduler
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.latent_diffusion.diffusion_pipeline import build
from fieldguide.tasks.latent_diffusion.latent_sampling import denoise
from fieldguide.tasks.latent_diffusion.prompt_encoding import CLIP_TOKENS, TextEncoder, load_tokenizer

PIPELINE = "UnCLIPPipeline"  # of diffusers
NETWORKS = {  # part -> the card of its network
    "text_encoder": "clip-text",
    "prior": "unclip-prior",
    "decoder": "unclip-decoder",
    "super_res_first": "super-resolution-unet",
    "super_res_last": "super-resolution-unet",
}
SCHEDULERS = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")
OTHERS = ("tokenizer", "text_proj")
STAGES = ("prior", "decoder", "super_res")

MakeNoise = Callable[[str, Sequence[int]], Callable[[], Tensor]]  # stage and shape of an image -> source of noise, 1 x shape


@dataclass(frozen=True)
class UnCLIPOptions:
    count: Annotated[int, Limits(1, 1000)] = 1  # images of each prompt
    steps: Annotated[int, Limits(2, 1000)] = 25  # sampler steps of the decoder
    guidance: Annotated[float, Limits(0, 100)] = 8.0  # guidance scale of the decoder; 1 = none
    prior_steps: Annotated[int, Limits(2, 1000)] = 25  # sampler steps of the prior
    prior_guidance: Annotated[float, Limits(0, 100)] = 4.0  # guidance scale of the prior; 1 = none
    enlarge_steps: Annotated[int, Limits(2, 1000)] = 7  # sampler steps of the networks that enlarge
    seed: Annotated[int, Limits(0, MAX_SEED)] = 0  # seed of the noise


@dataclass
class UnCLIPPipeline:
    """Networks of a pipeline by the names of their parts, in evaluation mode, with the settings of the schedulers."""

    path: Path
    networks: Mapping[str, Any]
    projection: TextProjection
    encoder: TextEncoder
    schedulers: Mapping[str, Mapping[str, Any]]


def load_unclip(folder: Path) -> UnCLIPPipeline:
    """Load the parts of a folder of diffusers. Raises `WeightsError` if one is missing or another network."""
    device, networks = distributed.device(), dict[str, Any]()
    if missing := [name for name in (*NETWORKS, *SCHEDULERS, *OTHERS) if not (folder / name).is_dir()]:
        raise WeightsError(f"{folder} lacks the folder{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {PIPELINE}.")
    for part, card in NETWORKS.items():
        found = inspect_folder(folder / part, None)
        if found.card.name != card:
            raise WeightsError(f"{folder / part} is {found.card.name}, but {PIPELINE} needs {card} there.")
        networks[part] = build(found).to(device)
    config = read_json(folder / "text_proj" / CONFIG_FILE, WeightsError)
    names = "clip_embeddings_dim", "time_embed_dim", "cross_attention_dim", "clip_extra_context_tokens"
    projection = TextProjection(*(config[name] for name in names))
    projection.load_state_dict(translate(weights.read(folder / "text_proj"), PROJECTION_KEYS))
    schedulers = {name: read_json(folder / name / SCHEDULER_FILE, WeightsError) for name in SCHEDULERS}
    encoder = TextEncoder(networks["text_encoder"], *load_tokenizer(folder / "tokenizer"))
    return UnCLIPPipeline(folder, networks, projection.to(device).eval(), encoder, schedulers)


def is_unclip(folder: Path) -> bool:
    """Return whether a folder holds a pipeline of unCLIP."""
    path = folder / PIPELINE_FILE
    return path.is_file() and read_json(path, WeightsError).get("_class_name") == PIPELINE


@torch.no_grad()
def generate(
    pipeline: UnCLIPPipeline,
    prompt: str,
    options: UnCLIPOptions,
    *,
    number: int = 0,
    make_noise: MakeNoise | None = None,
    callback: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, int]:  # -> 3 H W in -1 .. 1, number of tokens left out
    """Return the image of a prompt, and 1 if it was truncated. Its noise depends on the seed and on `number`, or comes from
    `make_noise`.
    """
    nets, device = pipeline.networks, distributed.device()
    make_noise = make_noise or functools.partial(draw_noise, options.seed, number)
    length = min(pipeline.encoder.limit or CLIP_TOKENS, nets["text_encoder"].config.length)
    tokens, mask, truncated = pipeline.encoder.tokenize(["", prompt], length)
    text, pooled = nets["text_encoder"].encode(tokens, skip=0, normalize=True)

    def sample(stage: str, steps: int, shape: Sequence[int], network: Callable[..., Tensor]) -> Tensor:
        process, sampler = read_scheduler(pipeline.schedulers[f"{stage}_scheduler"], steps)
        return denoise(network, process, sampler, make_noise(stage, shape), {}, callback=callback)

    prior = nets["prior"]
    inputs = {"text": text, "pooled": pooled, "text_mask": mask}
    predict = functools.partial(guide, prior, options.prior_guidance, 0, inputs)
    embedding = sample("prior", options.prior_steps, (prior.config.channels, 1, 1), predict)[:, :, 0, 0]
    image = torch.cat([pipeline.projection.unconditional[None], prior.denormalize(embedding)])
    states, added = pipeline.projection(image, pooled, text)
    inputs = {"text": states, "pooled": added, "text_mask": F.pad(mask, (pipeline.projection.extra, 0), value=True)}
    decoder = nets["decoder"]
    c = decoder.config
    predict = functools.partial(guide, decoder.predict_all, options.guidance, c.channels * c.variance, inputs)
    small = sample("decoder", options.steps, (c.channels, c.image, c.image), predict).clamp(-1, 1)
    first, last = nets["super_res_first"], nets["super_res_last"]
    side, calls = first.config.image, []
    large = F.interpolate(small, (side, side), mode="bicubic", antialias=True)

    def enlarge(latent: Tensor, time: Tensor) -> Tensor:
        calls.append(time)
        return (last if len(calls) == options.enlarge_steps else first).predict_all(latent, time, large)

    made = sample("super_res", options.enlarge_steps, (first.config.channels, side, side), enlarge)
    return made[0].to(device).clamp(-1, 1), truncated


def guide(
    network: Callable[..., Tensor], scale: float, variances: int, inputs: Mapping[str, Tensor], latent: Tensor, time: Tensor
) -> Tensor:  # 1 C H W, 1 -> 1 C' H W
    """Return a prediction with classifier-free guidance. The inputs hold those of an empty prompt first; the last channels, `variances`
    of them, are not guided.
    """
    output = network(latent.expand(2, *latent.shape[1:]), time.expand(2), **inputs)
    without, with_prompt = output.chunk(2)
    guided = without + scale * (with_prompt - without)
    return torch.cat([guided[:, : guided.shape[1] - variances], with_prompt[:, guided.shape[1] - variances :]], 1)


def draw_noise(seed: int, number: int, stage: str, shape: Sequence[int]) -> Callable[[], Tensor]:
    """Return the source of noise of a stage."""
    return Noise(mix_seeds(seed, STAGES.index(stage)), [number], shape, torch.empty(0, device=distributed.device()))
