"""Graphs of tasks: which steps of a task are part of the graph, and what the program around it needs for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fieldguide.exporting.anomalies import build_anomaly_detection
from fieldguide.exporting.audio import build_audio_classification, build_speech_recognition
from fieldguide.exporting.captioning import build_captioning
from fieldguide.exporting.cases import build_series_classification
from fieldguide.exporting.detection import build_detection
from fieldguide.exporting.forecasting import build_forecast
from fieldguide.exporting.generation import build_text_generation
from fieldguide.exporting.graph import ExportError, Graph
from fieldguide.exporting.image_generation import build_image_generation
from fieldguide.exporting.image_text import build_image_text
from fieldguide.exporting.image_to_image import build_image_to_image
from fieldguide.exporting.recommendation import build_recommendation
from fieldguide.exporting.segmentation import build_segmentation
from fieldguide.exporting.steps.images import Resize, choose_reading, describe_image_reading, describe_pixels
from fieldguide.exporting.supervised import finish
from fieldguide.exporting.tables import build_table
from fieldguide.exporting.text import (
    build_question_answering,
    build_reranking,
    build_text_classification,
    build_text_vectors,
    build_token_classification,
)
from fieldguide.exporting.translation import build_translation
from fieldguide.exporting.video_generation import build_video_generation

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor


def build_image_classification(predictor: TaskPredictor) -> Graph:
    """Return the graph of image classification: pixels of any size, resized and standardized in the graph."""
    task: Any = predictor.task
    values = {"column": task.column, **describe_image_reading(task.pictures, task.pictures.side)}
    inputs = (describe_pixels(task.pictures),)
    parts = (*choose_reading(task.pictures), "stacked", "classes", "images")
    return finish(predictor, Resize(task.pictures), inputs, parts=parts, values=values, requires=("pillow",))


BUILDERS: dict[str, Callable[[TaskPredictor], Graph]] = {
    "anomaly-detection": build_anomaly_detection,
    "tabular-classification": build_table,
    "tabular-regression": build_table,
    "click-prediction": build_table,
    "image-classification": build_image_classification,
    "image-generation": build_image_generation,
    "image-text": build_image_text,
    "image-to-text": build_captioning,
    "image-to-image": build_image_to_image,
    "audio-classification": build_audio_classification,
    "automatic-speech-recognition": build_speech_recognition,
    "image-segmentation": build_segmentation,
    "object-detection": build_detection,
    "keypoint-detection": build_detection,
    "text-generation": build_text_generation,
    "preference-tuning": build_text_generation,
    "text-classification": build_text_classification,
    "token-classification": build_token_classification,
    "question-answering": build_question_answering,
    "recommendation": build_recommendation,
    "reranking": build_reranking,
    "text-embedding": build_text_vectors,
    "text-vectors": build_text_vectors,
    "translation": build_translation,
    "summarization": build_translation,
    "time-series-classification": build_series_classification,
    "time-series-forecasting": build_forecast,
    "video-generation": build_video_generation,
}


REASONS = {  # why a task has no graph, and what to do
    "denoising": "run.py does not fill gaps in texts. Use --to huggingface, or fine-tune the run for translation or summarization.",
    "fill-mask": "run.py does not fill gaps in texts. Use --to huggingface, or fine-tune the run for classes, tags or embeddings.",
    "image-compression": "run.py does not turn images into latents and back. Use --to huggingface.",
    "image-text-to-text": "run.py does not read images among the tokens of a text. Use --to huggingface.",
    "instance-segmentation": "run.py does not draw a mask for each object. Train object detection for boxes, or image segmentation.",
    "panoptic-segmentation": "run.py does not join masks to segments. Train image segmentation for a class of each pixel.",
    "prompted-segmentation": "run.py takes no clicks and boxes on images. Train image segmentation for a class of each pixel.",
    "speech-pretraining": "its network predicts codes of hidden frames, not answers. Fine-tune the run, and export that.",
    "text-to-image": "its text encoders, network and decoder would be graphs of their own. Use --to huggingface.",
    "visual-question-answering": "run.py does not read a question with its image. There is no other format yet.",
    "zero-shot-forecasting": "its windows are cut for each request. Train a network for forecasting, and export that.",
}


def build_graph(predictor: TaskPredictor) -> Graph:
    """Return the graph of a run or pretrained task. Raises `ExportError` for a task without one."""
    name = predictor.signature.task
    if name not in BUILDERS:
        reason = REASONS.get(name, "run.py has no part for it.")
        raise ExportError(f"{name} cannot be exported to a graph yet: {reason}\nTasks that can: {', '.join(sorted(BUILDERS))}.")
    return BUILDERS[name](predictor)
