"""Loading of pretrained networks from any supported source, and saving in the format of other libraries.

`load` identifies architecture and size by the configuration next to the weights, or by names and shapes of the
tensors. `save` writes a folder that transformers reads. The key tables are in the model files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fieldguide.checkpoints import adapter, config_mapping, run_folder, sentence_transformers, weights
from fieldguide.checkpoints.config_check import check_network
from fieldguide.checkpoints.config_mapping import (
    TIMM,
    TYPE_KEYS,
    IdentifiedConfig,
    identify_config,
    resolve_timm_name,
    to_config_fields,
    to_public_config,
)
from fieldguide.checkpoints.identify import (
    FREE_FIELDS,
    choose_variant,
    has_head,
    infer_fields,
    lacks_head,
    recognize,
)
from fieldguide.checkpoints.names import CONFIG_FILE, CONFIG_FILES, HUB_PREFIX, PIPELINE_FILE
from fieldguide.checkpoints.pipeline_parts import find_denoiser, read_side
from fieldguide.checkpoints.preprocessor_config import (
    build_native_transform,
    format_pixels,
    get_image_options,
    read_audio_options,
    read_preprocessor,
)
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError, WeightsError, nearest
from fieldguide.core.files import make_folder, write_atomically
from fieldguide.core.network_tensors import describe_network
from fieldguide.core.validation import guard
from fieldguide.data.preprocessing import ImageTransform, tokenizer_files
from fieldguide.data.preprocessing.image_transform import NativeTransform, ResizeTransform
from fieldguide.data.preprocessing.symbol_files import has_symbols
from fieldguide.models.initialization import SkipInitialization, make_on_meta
from fieldguide.models.registry import card_of, cards, find

if TYPE_CHECKING:
    from fieldguide.core.card import Network

WEIGHT_FILES = {"model_type": "model.safetensors", "_class_name": "diffusion_pytorch_model.safetensors"}  # written next to it
SHARD_PATTERN = "consolidated.*.pth"  # files of Meta's checkpoints, one per machine
AUDIO_OPTIONS = ("rate", "bands", "hop", "scale", "lower", "normalize", "style")  # of a run, that another fit takes over
# Output type of an image-text network -> text for a class name: section 3.1.4 of the CLIP paper, and the prompt of SigLIP's authors.
CLASS_TEMPLATES = {"embeddings": "a photo of a {}.", "sigmoid-embeddings": "This is a photo of {}."}
EMBEDDING_OPTIONS = ("pooling", "query_prompt", "passage_prompt")  # the same for texts that become vectors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its card and origin, the config that its files imply, and its tensors."""

    path: Path
    card: Card
    origin: str | None
    values: Mapping[str, Any]
    state: Mapping[str, Tensor]

    @property
    def size(self) -> str:
        """Name of its size, or of its architecture if no size matches."""
        if self.path and (self.path / "run.json").is_file():
            return config_mapping.read(self.path / "run.json")["model"]["size"]
        card, free = self.card, {"output_type", *(self.card.names.get(word, word) for word in FREE_FIELDS)}
        mine = asdict(card.config(**self.values))
        best, most = card.name, -1
        for size, known in card.sizes.items():
            apart = {k for k, v in asdict(card.config(**known.overrides)).items() if v != mine[k]}
            if not apart - free and len(mine) - len(apart) > most:  # the closest size that differs only in free fields
                best, most = size, len(mine) - len(apart)
        return best

    def build_config(self, needs: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
        """Return its config with another head, and for images of another size.

        Raises `SettingsError` for a tokenizer with more tokens than the checkpoint has, and for impossible
        values.
        """
        card, kept = (
            self.card,
            {k: v for k, v in needs.items() if k in ("num_classes", "clusters", "image") and self.card.accepts(k)},
        )
        if card.solver:  # the tensors do not depend on the columns of a table
            kept |= {k: needs[k] for k in ("numbers", "categories") if k in needs and card.accepts(k)}
        if card.endless and "forecast" in card.output_types:  # nor on the length of the past and of the forecast
            kept |= {k: needs[k] for k in ("length", "horizon", "values", "quantiles") if k in needs and card.accepts(k)}
        if len(card.output_types) > 1:
            kept["output_type"] = next(
                given for given in needs.get("output_type", card.output_types) if given in card.output_types
            )
            if kept["output_type"] == "label" and self.values.get("output_type") == "vector" and card.accepts("mean"):
                kept["mean"] = True  # its embedding was trained as the mean over the tokens
        if card.input_type == "image" and needs.get("channels", self.channels) != self.channels:
            raise SettingsError(
                f"{self.path} reads images with {self.channels} channels, but task.channels is {needs['channels']}. "
                "Leave out task.channels."
            )
        if kept.get("output_type", card.output_types[0]) == "ctc" and "vocab_size" in needs:
            kept["vocab_size"] = needs["vocab_size"]  # the output layer belongs to the symbols
        elif needs.get("vocab_size", 0) > self.values.get("vocab_size", getattr(card.config(**self.values), "vocab_size", 0)):
            raise SettingsError(
                f"the tokenizer has {needs['vocab_size']:,} tokens, more than the vocabulary of {self.path}. Pass the "
                "tokenizer that it was trained with (--set task.tokenizer=PATH)."
            )
        try:
            return card.config(**{card.names.get(k, k): v for k, v in {**self.values, **kept, **changes}.items()})
        except TypeError as error:
            raise SettingsError(f"{card.name}: {error}") from None

    @property
    def channels(self) -> int:
        """Number of channels of its input images."""
        return getattr(self.card.config(**self.values), self.card.names.get("channels", "channels"), 3)

    def find_tokenizer(self) -> tuple[Path | None, str]:
        """Return the path of its tokenizer, or None and the reason why it cannot be read (empty if there is none)."""
        folder = self.path if self.path.is_dir() else self.path.parent
        if (folder / "run.json").is_file():
            folder = folder / "preprocess"
        return tokenizer_files.find_tokenizer(self.path if self.path.suffix == ".gguf" else folder)

    def preprocessing_defaults(self) -> dict[str, Any]:
        """Return the task options that reproduce the checkpoint's own preprocessing."""
        with guard(self.path, WeightsError):
            return self.read_preprocessing_defaults()

    def read_preprocessing_defaults(self) -> dict[str, Any]:
        """Return what `preprocessing_defaults` returns."""
        folder = self.path if self.path.is_dir() else self.path.parent
        offered: dict[str, Any] = {}
        if "tokens" in self.card.inputs and (words := self.find_tokenizer()[0]):
            offered["tokenizer"] = str(words)
        if "vector" in self.card.output_types and "tokens" in self.card.inputs:
            if (folder / "run.json").is_file():
                known = run_folder.read_preprocessing(folder)[1]
                offered |= {name: known[name] for name in EMBEDDING_OPTIONS if known.get(name) is not None}
            else:
                offered |= sentence_transformers.read_task_options(folder)
        if self.card.accepts("begin"):
            offered["begin"] = self.card.config(**self.values).begin
        if self.card.input_type == "image":
            offered["pixels"] = format_pixels(read_preprocessor(folder)[1], self.card.scale, self.channels)
            if (folder / "run.json").is_file():
                state, options = run_folder.read_preprocessing(folder)
                if "pixels" in options and "pictures" not in state:  # a task that does not fit a normalization
                    offered["pixels"] = options["pixels"]
                if "pictures" in state:
                    transform = ImageTransform.from_json(state["pictures"])
                    offered["pixels"] = format_pixels({}, (transform.mean, transform.std), self.channels)
                if "canvas" in state:
                    offered["pixels"] = format_pixels({}, (state["canvas"]["mean"], state["canvas"]["std"]), self.channels)
            offered["channels"] = self.channels
        if self.card.input_type in ("noisy-latent", "noisy-latent-pooled") and (folder.parent / PIPELINE_FILE).is_file():
            offered["pipeline"] = str(folder.parent)
            offered["side"] = read_side(folder.parent, self.card.config(**self.values).image)
        if self.card.input_type == "speech-text":
            offered["bands"] = self.card.config(**self.values).features
        if self.card.input_type in ("speech", "waveform"):
            offered |= self.get_audio_defaults(folder)
        if self.card.input_type in ("captioned", "image-text"):
            offered |= self.get_image_text_defaults(folder)
        return offered

    def get_audio_defaults(self, folder: Path) -> dict[str, Any]:
        """Return the task options for recordings: rate, features and, for a network with CTC, its symbols."""
        offered: dict[str, Any] = {}
        if (folder / "run.json").is_file():
            known = run_folder.read_preprocessing(folder)[1]
            offered = {key: known[key] for key in AUDIO_OPTIONS if known.get(key) is not None}
        elif self.card.input_type == "waveform" or has_symbols(folder):
            offered = read_audio_options(folder)
        gives = self.values.get("output_type", self.card.output_types[0])
        if gives == "ctc" and has_symbols(folder):
            offered["symbols"] = str(folder)
        return offered

    def get_image_text_defaults(self, folder: Path) -> dict[str, Any]:
        """Return the task options for a network of images and texts, including image size and text length."""
        card, config = self.card, self.card.config(**self.values)
        if "tokens" in card.output_types and card.accepts("picture"):
            return self.get_image_token_defaults(folder, config)
        side, length = (getattr(config, card.names.get(word, word)) for word in ("image", "length"))
        offered = {"side": side, "channels": self.channels, "length": length}
        if card.accepts("end"):
            offered["end"] = config.end
        if not (folder / "run.json").is_file():
            templates = [CLASS_TEMPLATES[kind] for kind in card.output_types if kind in CLASS_TEMPLATES]
            return (
                offered
                | get_image_options(folder, side, self.channels, card.scale)
                | ({"template": templates[0]} if templates else {})
            )
        state, options = run_folder.read_preprocessing(folder)
        transform = ImageTransform.from_json(state["pictures"])
        offered["pixels"] = "/".join(",".join(map(str, values)) for values in (transform.mean, transform.std))
        resize, template = getattr(transform, "method", None), options.get("template")
        return offered | ({"resize": resize} if resize else {}) | ({"template": template} if template else {})

    def get_image_token_defaults(self, folder: Path, config: Any) -> dict[str, Any]:
        """Return the task options for a decoder with image tokens: image size, patches, and the image token."""
        offered = {name: getattr(config, name) for name in ("channels", "patch", "length", "picture")}
        offered |= {"side": config.image, "merge": getattr(config, "merge", 1)}
        state = run_folder.read_preprocessing(folder)[0] if (folder / "run.json").is_file() else {}
        if state:
            transform = ImageTransform.from_json(state["pictures"])
        elif "grid" in self.card.optional_inputs:
            transform = build_native_transform(
                folder, config.patch, config.merge, config.image, config.channels, self.card.scale
            )
        else:
            return offered | get_image_options(folder, config.image, config.channels, self.card.scale)
        offered["pixels"] = format_pixels({}, (transform.mean, transform.std), self.channels)
        names = ("min_pixels", "max_pixels") if isinstance(transform, NativeTransform) else ()
        resize = {"resize": transform.method} if isinstance(transform, ResizeTransform) else {}
        return offered | {name: getattr(transform, name) for name in names} | resize


def inspect_checkpoint(
    source: str | Path, name: str | None = None, callback: Callable[[str], None] | None = None, download: bool = True
) -> Checkpoint:
    """Return what a checkpoint holds. `callback` receives the progress of a download.

    `download` must be False for a name that comes from a file and not from the user: then `hf:...` is found among earlier
    downloads only. Raises `WeightsError` if the checkpoint cannot be identified.
    """
    path = locate_source(source, callback, download)
    if path.is_dir() and adapter.is_adapter(path):
        return inspect_adapter(path, name, callback)
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist. For a model of the Hugging Face Hub use hf:organization/name; for a "
            "network with random weights use fieldguide.create."
        )
    return inspect_folder(path, name)


def locate_source(source: str | Path, callback: Callable[[str], None] | None = None, download: bool = True) -> Path:
    """Return the path of a source, after the download of a model of the hub (see `inspect_checkpoint`)."""
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        from fieldguide.checkpoints import hub

        model = source.removeprefix(HUB_PREFIX)
        with distributed.main_process_first():  # one process of a machine downloads, the others find the files in the cache
            return hub.download_model(model, callback or hub.print_stderr) if download else hub.find_model(model)
    return Path(source)


def inspect_folder(path: Path, name: str | None) -> Checkpoint:
    """Return what a folder or file on this machine holds; an adapter in the folder is left out."""
    with guard(path, WeightsError):
        return _inspect_folder(path, name)


def _inspect_folder(path: Path, name: str | None) -> Checkpoint:
    if run_folder.is_run(path):
        card, config, state = run_folder.read_network(path)
        return Checkpoint(path, card, weights.OURS, asdict(config), state)
    if (path / PIPELINE_FILE).is_file():  # of its networks, the one that denoises
        return _inspect_folder(find_denoiser(path), name)
    folder = path if path.is_dir() else path.parent
    config_path = next((folder / name for name in CONFIG_FILES if (folder / name).is_file()), None)
    if path.suffix == ".gguf":  # contains its own configuration
        config_path = path
    public_config = config_mapping.read(config_path) if config_path and name is None else {}
    if config_path is None and name is None and path.is_file() and (public_config := weights.read_config(path)):
        config_path = path
    known = identify_config(public_config) if public_config else None
    if path.is_dir() and len(parts := sorted(path.glob(SHARD_PATTERN))) > 1:
        return join_shards(
            path, parts, known, to_config_fields(known[0], known[2], public_config, config_path) if known else {}
        )
    if path.suffix == ".gguf" and not known:
        supported = sorted(card.name for card in cards().values() if "gguf" in card.configs)
        raise WeightsError(
            f"{path} holds the architecture {public_config.get('general', {}).get('architecture')!r}, or a variant of it, that is "
            f"not supported as GGUF. Supported are {', '.join(supported)}; other models load from folders of transformers."
        )
    state = weights.read(path)
    origin: str | None
    if known:
        card, origin, table = known
        values = to_config_fields(card, table, public_config, config_path)
        check_network(card, card.config(**values), state, config_path)
        origin = choose_variant(card, origin, values, state)
        values |= infer_vocab_size(card, values, state)
        if card.accepts("tie_embeddings"):  # whether the file has a head is more reliable than its configuration
            tied = not has_head(card, values, state, origin)
            if tied and public_config.get("tie_word_embeddings") is False:
                raise WeightsError(
                    f"{path} lacks the output layer (lm_head.weight), and {CONFIG_FILE} says that it is not tied to the embedding. "
                    "Download the missing file, or correct tie_word_embeddings if it is tied."
                )
            values["tie_embeddings"] = tied
        return Checkpoint(path, card, origin, values, state)
    changes: Mapping[str, Any] = {}
    if name is not None:
        card, size = find(name)
        origin = None
    elif "architecture" in public_config and "pretrained_cfg" in public_config:
        card, size, changes = resolve_timm_name(public_config, config_path)
        origin = TIMM if TIMM in card.weights else None
    else:
        try:
            card, size, origin, changes = recognize(state, str(path))
        except WeightsError as error:
            if "model_type" not in public_config:
                raise
            raise WeightsError(
                f"{config_path} describes {' or '.join(public_config.get('architectures') or ['a network'])} "
                f"(model_type={public_config['model_type']!r}), which is not supported. {error}"
            ) from None
    values = {**card.sizes[size].overrides, **changes}
    if lacks_head(card, values, state):
        values["output_type"] = "vector"
    return Checkpoint(path, card, origin, {**values, **infer_fields(card, values, state)}, state)


def inspect_adapter(folder: Path, name: str | None, callback: Callable[[str], None] | None) -> Checkpoint:
    """Return the base model of a LoRA adapter with the adapter merged.

    The base model is in the same folder, at the place that the adapter names, or among earlier downloads.
    """
    base: str | Path = folder
    if not adapter.has_base(folder):
        named = adapter.read_base(folder)
        # A relative path is usually meant from the adapter; a folder of that name in the working directory may be another.
        local = next((p for p in (folder / named, folder.parent / named, Path(named)) if p.exists()), None)
        base = local or f"{HUB_PREFIX}{named}"
    try:
        found = inspect_checkpoint(base, name, callback, download=False) if base != folder else inspect_folder(folder, name)
    except WeightsError as error:
        raise WeightsError(f"{folder} is a LoRA adapter of another model: {error}") from error
    if callback:
        callback(f"merged the LoRA adapter of {folder} into {found.path}")
    return replace(found, path=found.path, state=adapter.merge(found.state, folder))


def load(source: str | Path, *, name: str | None = None, head: Literal["load", "skip"] = "load", **overrides: Any) -> nn.Module:
    """Load a pretrained network, in evaluation mode.

    `source` is a folder of transformers, diffusers (of a pipeline, its denoiser is loaded) or a fieldguide run; a file of
    timm, torchvision, llama.cpp or the authors; or `hf:organization/name`, which is downloaded first. `name` is the size
    if it cannot be identified. `overrides` replace fields of the implied config, such as `output_type="vector"` or another
    `image`. `head="skip"` leaves a head that the file lacks, or has for other classes, randomly initialized
    (see `fieldguide.checkpoints.weights.load`). The network's `signature` describes its tensors.

    Raises `WeightsError` that lists the closest models if none matches.
    """
    found = inspect_checkpoint(source, name)
    return build_network(found.card, {**found.values, **overrides}, found.state, found.origin, str(source), head)


def build_network(
    card: Card,
    values: Mapping[str, Any],
    state: Mapping[str, Tensor],
    origin: str | None,
    where: str,
    head: Literal["load", "skip"] = "load",
) -> Network:
    """Create a network of a card with the given fields and fill it with tensors, in evaluation mode."""
    try:
        config = card.config(**{card.names.get(k, k): v for k, v in values.items()})
    except TypeError as error:
        raise SettingsError(f"{card.name}: {error}") from None
    check_network(card, config, state, where)
    with SkipInitialization() if head == "load" else nullcontext():
        model: Network = card.make(config)
    try:
        weights.load(model, state, origin, head)
    except WeightsError as error:
        raise WeightsError(str(error).replace("the checkpoint", where, 1)) from None
    model.signature = describe_network(card, config, model)
    return model.eval()


def infer_vocab_size(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the vocabulary size read from the tensors if the configuration lacks it, else nothing."""
    field = card.names.get("vocab_size", "vocab_size")
    if not card.accepts("vocab_size") or field in values:
        return {}
    return {key: value for key, value in infer_fields(card, values, state).items() if key == field}


def join_shards(path: Path, parts: list[Path], known: IdentifiedConfig | None, values: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint whose tensors are sharded across files, each concatenated along the axis that was split."""
    if known is None:
        raise WeightsError(
            f"{path} holds {len(parts)} parts of a network, but no configuration. Add {' or '.join(CONFIG_FILES)}."
        )
    card, origin, _ = known
    files = [weights.read(part) for part in parts]
    values = {**values, **infer_vocab_size(card, values, files[0])}
    check_network(card, card.config(**values), {f"{i}.{k}": t for i, file in enumerate(files) for k, t in file.items()}, path)
    model = make_on_meta(card, card.config(**values))
    written = weights.translate(model.state_dict(), card.tables(model.config)[origin], reverse=True)
    wanted = {name: t.shape for name, t in written.items()}
    if strange := {name for file in files for name in file} - {name for file in files[:1] for name in file}:
        raise WeightsError(f"{parts[0]} lacks {', '.join(sorted(strange)[:3])}, which other parts have. Download it again.")
    state = {}
    for name, first in files[0].items():
        shape = wanted.get(name, first.shape)
        axis = next((i for i, (part, whole) in enumerate(zip(first.shape, shape)) if part * len(parts) == whole), None)
        state[name] = first if axis is None or first.shape == shape else torch.cat([file[name] for file in files], axis)
    return Checkpoint(path, card, origin, values, state)


def save(model: nn.Module, path: str | Path, format: str = weights.OURS) -> Path:
    """Save a network under our names or those of an origin ("torchvision", "hf").

    Writes one file if `path` ends in .safetensors, else a folder that the origin's library reads, with its
    configuration. Raises `WeightsError` for an unknown format, or an origin whose configuration is not
    supported for this network.
    """
    format = "huggingface" if format == "hf" else format
    card = card_of(model)
    if format == "huggingface" and card and format not in card.weights and "diffusers" in card.weights:
        format = "diffusers"  # diffusers also saves in Hugging Face folders
    if Path(path).suffix == ".safetensors":
        return weights.save(model, path, format)
    return export(model, path, format)


def export(model: nn.Module, folder: str | Path, origin: str) -> Path:
    """Write config.json and model.safetensors in the format of an origin."""
    card = card_of(model)
    known = {name: table for name, table in (card.configs if card else {}).items() if any(key in table for key in TYPE_KEYS)}
    if origin not in known:
        raise WeightsError(
            f"{type(model).__name__} cannot be saved in the format {origin!r}.{nearest(origin, known)} "
            f"Supported formats: {', '.join(known) or 'none'}."
        )
    assert card is not None  # it has a table of this origin
    folder, public_config = Path(folder), to_public_config(card, known[origin], model.config)
    make_folder(folder)
    bare = f"{origin}-base"  # names in files without a head, where they differ
    names = bare if getattr(model.config, "output_type", "") == "vector" and bare in card.weights else origin
    weights.save(model, folder / next(WEIGHT_FILES[key] for key in TYPE_KEYS if key in public_config), names)
    write_atomically(folder / CONFIG_FILE, (json.dumps(public_config, indent=2) + "\n").encode())
    return folder
