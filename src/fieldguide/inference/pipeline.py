"""`pipeline`: a predictor for any source, chosen by what the source is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldguide.checkpoints.names import PIPELINE_FILE
from fieldguide.core.errors import SettingsError, WeightsError, nearest
from fieldguide.core.options import parse_options
from fieldguide.core.run_record import read_record
from fieldguide.core.validation import guard
from fieldguide.inference.source_kind import check_model_source, detect_kind

if TYPE_CHECKING:
    from fieldguide.inference.predictor import Predictor


def pipeline(source: str | Path, **load_options: Any) -> Predictor:
    """Return a predictor for a run folder or a pretrained checkpoint.

    `source` is a run folder, a folder of transformers, open_clip or timm, a `.gguf` file, a file of weights, or
    `hf:organization/name`. All predictors have `predict`, `evaluate`, `stream` and `embed`.

    `load_options` depend on the source: `name` (the size, if a file could be several), `weights` ("int8" for language
    models), `source` and `target` (languages), `tokenizer` (for CLIP), `output_type` ("vector" for embeddings) and `columns`.

    Raises `RunError` or `WeightsError` if the source cannot be read, and `SettingsError` for unknown options.
    """
    predictor, rest = open_source(source, load_options)
    if rest:
        known = sorted(getattr(type(predictor), "LOAD_OPTIONS", {}))
        raise SettingsError(
            f"{', '.join(rest)}: not a load option of {source}.{nearest(next(iter(rest)), known)} It has: "
            f"{', '.join(known) or 'none'}. Prediction options are arguments of predict()."
        )
    return predictor


def open_source(source: str | Path, options: Mapping[str, Any]) -> tuple[Predictor, dict[str, Any]]:
    """Return the predictor of a source, loaded with those of `options` that are load options, and the other options."""
    check_model_source(source)
    if detect_kind(source) == "run":
        read_record(Path(source))  # report a wrong path before torch is imported
        from fieldguide.inference.run import open_run

        return open_run(source), dict(options)
    from fieldguide.checkpoints.load import inspect_checkpoint, locate_source

    options, place = dict(options), locate_source(source)
    if (place / PIPELINE_FILE).is_file() or holds_pipeline(place):
        from fieldguide.inference.text_to_image import TextToImage
        from fieldguide.inference.text_to_video import TextToVideo
        from fieldguide.inference.unclip import UnCLIP
        from fieldguide.tasks.latent_diffusion.diffusion_pipeline import is_video
        from fieldguide.tasks.latent_diffusion.unclip import is_unclip

        loader: Any = UnCLIP if is_unclip(place) else TextToVideo if is_video(place) else TextToImage
        owner = "text-to-video" if loader is TextToVideo else "text-to-image"
        chosen = {key: options.pop(key) for key in loader.LOAD_OPTIONS if key in options}
        with guard(source, WeightsError):
            return loader.load(
                place,
                **parse_options(loader.LOAD_OPTIONS, chosen, owner=owner),
            ), options
    checkpoint = inspect_checkpoint(place, options.pop("name", None))
    kind = predictor_type(checkpoint.card)
    chosen = {key: options.pop(key) for key in kind.LOAD_OPTIONS if key in options}
    load_options = parse_options(kind.LOAD_OPTIONS, chosen, owner=checkpoint.card.name)
    with guard(source, WeightsError):
        return kind.load(checkpoint, **load_options), options


def holds_pipeline(path: Path) -> bool:
    """Return whether a file holds all networks of a text-to-image pipeline."""
    if not path.is_file() or path.suffix not in (".safetensors", ".ckpt"):
        return False
    from fieldguide.tasks.latent_diffusion.single_file_pipeline import is_single_file

    return is_single_file(path)


def predictor_type(card: Any) -> Any:
    """Return the predictor class for a pretrained network, by its inputs and outputs."""
    if "tokens" in card.output_types:
        if card.input_type == "captioned":
            from fieldguide.inference.image_to_text import ImageToText

            return ImageToText
        if card.input_type == "speech-text":
            from fieldguide.inference.transcription import Transcriber

            return Transcriber
        if card.input_type == "image-text":
            from fieldguide.inference.pretrained_task import PretrainedTask

            return PretrainedTask
        from fieldguide.inference.text_generation import TextGenerator

        return TextGenerator
    if any(kind.endswith("embeddings") for kind in card.output_types):
        from fieldguide.inference.zero_shot import ZeroShotClassifier

        return ZeroShotClassifier
    from fieldguide.inference.pretrained_task import PretrainedTask

    return PretrainedTask
