"""Folders of diffusers' pipelines: `model_index.json` and a folder for each part."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldguide.checkpoints.names import CONFIG_FILE, PIPELINE_FILE
from fieldguide.checkpoints.shard_index import read_shard_names
from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import read_json

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
REQUIRED = ("scheduler", "vae")
# Parts that images do not depend on: the filter of images that are not safe for work, and encoders of images for adapters.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
KNOWN = (*DENOISERS, *TEXT_ENCODERS, *TOKENIZERS, *REQUIRED, *UNUSED)
SCHEDULER_FILE = "scheduler_config.json"
TOKENIZER_SUFFIXES = (".json", ".txt", ".model")
# Patterns of the names of weights, in order of preference; the files of all patterns of a form belong together.
WEIGHT_FORMS = (
    (r"{}\.safetensors",),
    (r"{}-\d+-of-\d+\.safetensors", r"{}\.safetensors\.index\.json"),
    (r"{}\.fp16\.safetensors",),
    (r"{}\.fp16-\d+-of-\d+\.safetensors", r"{}(\.fp16\.safetensors\.index|\.safetensors\.index\.fp16)\.json"),
    (r"(pytorch_model|diffusion_pytorch_model)\.bin",),
)


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline on disk: the folders of its parts by name, without those that are absent, and its other settings."""

    path: Path
    name: str  # class of diffusers
    parts: Mapping[str, Path]
    settings: Mapping[str, Any]

    @property
    def denoiser(self) -> Path:
        """The folder of the network that removes noise. Raises `WeightsError` if there is none."""
        found = next((self.parts[name] for name in DENOISERS if name in self.parts), None)
        if found is None:
            raise WeightsError(
                f"{self.path / PIPELINE_FILE} lists neither {' nor '.join(DENOISERS)}. It is not a pipeline of images."
            )
        return found

    @property
    def scheduler(self) -> dict[str, Any]:
        """The settings of the scheduler."""
        return read_json(self.parts["scheduler"] / SCHEDULER_FILE, WeightsError)


def read_pipeline(folder: Path) -> PipelineFolder:
    """Return the parts of a pipeline. Raises `WeightsError` if a part is missing, or of a kind that is not supported."""
    index = read_json(folder / PIPELINE_FILE, WeightsError)
    listed = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    parts = {name: folder / name for name, value in listed.items() if len(value) == 2 and value[1] is not None}
    if unknown := [name for name in parts if name not in KNOWN]:
        raise WeightsError(
            f"{folder / PIPELINE_FILE} lists the part {unknown[0]!r} of {index.get('_class_name')}, which is not supported. Supported "
            f"are pipelines of {', '.join(name for name in KNOWN if name not in UNUSED)}."
        )
    if unlisted := [name for name in REQUIRED if name not in parts]:
        raise WeightsError(f"{folder / PIPELINE_FILE} lists no {unlisted[0]}, which every pipeline needs.")
    used = {name: path for name, path in parts.items() if name not in UNUSED}
    if missing := [name for name, path in used.items() if not path.is_dir()]:
        raise WeightsError(
            f"{folder} lacks the folder{'s' if len(missing) > 1 else ''} {', '.join(missing)}, which {PIPELINE_FILE} lists. Download "
            "the missing parts, or set a text encoder and its tokenizer to [null, null] there to go without."
        )
    settings = {name: value for name, value in index.items() if name not in listed and not name.startswith("_")}
    return PipelineFolder(folder, str(index.get("_class_name", "")), parts, settings)


def copy_frozen_parts(folder: Path, target: Path) -> None:
    """Copy a pipeline to another folder without the weights of the network that removes noise."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in choose_pipeline_files(paths):
        is_weights = name.startswith(tuple(f"{part}/" for part in DENOISERS)) and not name.endswith(CONFIG_FILE)
        if not is_weights:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def read_side(folder: Path, latent_side: int) -> int:
    """Return the pixels per side of images whose latents have this side, by the levels of the autoencoder of a pipeline."""
    config = read_json(folder / "vae" / CONFIG_FILE, WeightsError)
    return latent_side * 2 ** (len(config.get("block_out_channels", [1])) - 1)


def choose_pipeline_files(paths: Iterable[str]) -> set[str]:
    """Return the files of a pipeline's repository to download, without unused parts and without other forms of the same weights.

    Of each network these are safetensors in the precision of training, else in half precision, else files of torch.save; whole files
    rather than shards.
    """
    paths = list(paths)
    found = {PIPELINE_FILE}
    for part in (*DENOISERS, *TEXT_ENCODERS, "vae"):
        inside = {path.removeprefix(f"{part}/"): path for path in paths if path.startswith(f"{part}/") and path.count("/") == 1}
        found |= {path for name, path in inside.items() if name == CONFIG_FILE}
        stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
        forms = [
            [name for name in inside if any(re.fullmatch(pattern.format(stem), name) for pattern in patterns)]
            for patterns in WEIGHT_FORMS
        ]
        found |= {inside[name] for name in next(filter(None, forms), [])}
    found |= {f"scheduler/{SCHEDULER_FILE}"} & set(paths)
    folders = tuple(f"{name}/" for name in TOKENIZERS)
    return found | {path for path in paths if path.startswith(folders) and path.endswith(TOKENIZER_SUFFIXES)}


def has_all_parts(folder: Path) -> bool:
    """Return whether a folder holds the weights of all parts of its pipeline."""
    paths = [path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()]
    chosen = choose_pipeline_files(paths)
    listed = read_json(folder / PIPELINE_FILE, WeightsError)
    for part in (*DENOISERS, *TEXT_ENCODERS, "vae"):
        value = listed.get(part)
        if not isinstance(value, list) or value[1:] in ([], [None]):
            continue
        inside = {path for path in chosen if path.startswith(f"{part}/") and not path.endswith(CONFIG_FILE)}
        shards = {f"{part}/{name}" for path in inside if path.endswith(".json") for name in read_shard_names(folder / path)}
        if not inside or not shards <= inside:
            return False
    return True


def find_denoiser(folder: Path) -> Path:
    """Return the folder of a pipeline's network that removes noise."""
    return read_pipeline(folder).denoiser
