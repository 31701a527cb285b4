"""Signatures of predictors: of runs and pretrained tasks, and of language and vision-language models without a task.

`Signature` itself is in `core/signature.py`, so that what reads `signature.json` needs no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fieldguide.core.network_tensors import describe_network
from fieldguide.core.option_docs import describe_options
from fieldguide.core.signature import AudioFormat, InputField, Limits, OptionSpec, RecordField, Signature, Step
from fieldguide.data.media import audio, images
from fieldguide.data.preprocessing.whisper_features import FFT, HOP, RATE
from fieldguide.tasks.signature_parts import (
    AUDIO_TYPES,
    IMAGE_TYPES,
    describe_image_format,
    describe_tokenization,
    list_generation_steps,
    list_image_steps,
    set_image,
    set_vocabulary,
)
from fieldguide.tasks.text.signature import GENERATED, TOKEN_TENSORS

if TYPE_CHECKING:
    from fieldguide.inference.image_to_text import ImageToText
    from fieldguide.inference.predictor import TaskPredictor
    from fieldguide.inference.text_generation import TextGenerator
    from fieldguide.inference.transcription import Transcriber
    from fieldguide.inference.zero_shot import ZeroShotClassifier

MAX_PROMPTS = 64  # rows of a request
CHAT = OptionSpec("chat", "boolean", nullable=True, about="use the chat template; by default if there is one")
PROMPT = OptionSpec("prompt", "string", required=True, about="the question about each image")


def describe_task_predictor(predictor: TaskPredictor, config: Any) -> Signature:
    """Return the signature of a run, or of a pretrained network with a task."""
    return predictor.task.build_signature(predictor.card, config, predictor.model)


def describe_zero_shot(predictor: ZeroShotClassifier) -> Signature:
    """Return the signature of a zero-shot classifier, which needs the names of the classes."""
    known = describe_task_predictor(predictor, predictor.model.config)
    options = tuple(replace(o, required=True) if o.name == "classes" else o for o in known.options)
    return replace(known, options=options)


def describe_text_generator(predictor: TextGenerator) -> Signature:
    """Return the signature of a language model, or of an encoder-decoder."""
    assert predictor.card is not None  # `load` sets it
    known, markers = describe_network(predictor.card, predictor.network.config, predictor.network), predictor.markers
    published = predictor.published.options
    options = [replace(o, default=published.get(o.name, o.default)) for o in describe_options(predictor.config_type)]
    about = "a text to continue"
    kind: Any = "text"
    steps = []
    if predictor.template is not None:
        about, kind = "a message, or a conversation", "messages"
        steps.append(Step("render_chat", "the conversation as one text, by the chat template", False))
    steps.append(describe_tokenization(predictor.text, None))
    loop = known.loop and replace(known.loop, eos_tokens=tuple(predictor.end_tokens), pad_token=predictor.text.pad)
    if markers is not None:
        about = "a source text"
        around = {"before": list(markers.before), "after": list(markers.after)}
        steps.append(Step("add_markers", "special tokens around the source", False, around))
        loop = loop and replace(loop, start_tokens=tuple(markers.target_start))
    return replace(
        known,
        task="text-generation" if markers is None else "text-to-text",
        row_form="value",
        inputs=(InputField("prompt", kind, about=about, format={"text": True} if kind == "messages" else {}),),
        preprocessing=tuple(steps),
        tensors=tuple(set_vocabulary(known.tensors, TOKEN_TENSORS, predictor.text)),
        postprocessing=tuple(list_generation_steps()),
        record=(GENERATED,),
        options=(*options, CHAT),
        loop=loop,
        limits=Limits(rows=MAX_PROMPTS, tokens=loop.max_length if loop else None),
    )


def describe_image_to_text(predictor: ImageToText) -> Signature:
    """Return the signature of a vision-language model, which answers the same prompt for each image."""
    assert predictor.card is not None  # `load` sets it
    config, transform = predictor.network.config, predictor.task.pictures
    known = describe_network(predictor.card, config, predictor.network)
    image = describe_image_format(transform)
    steps = list_image_steps(transform)
    if predictor.template is not None:
        steps.append(Step("render_chat", "the prompt as a user message, by the chat template", False))
    steps += [
        describe_tokenization(predictor.text, None),
        Step("expand_image_token", "one token for each patch of the image", False, {"token": config.picture}),
    ]
    tensors = set_vocabulary(set_image(known.tensors, "image", transform), TOKEN_TENSORS, predictor.text)
    loop = known.loop and replace(known.loop, eos_tokens=tuple(predictor.end_tokens), pad_token=predictor.text.pad)
    return replace(
        known,
        task="image-to-text",
        inputs=(InputField(predictor.task.column, "image", media_types=IMAGE_TYPES, image=image),),
        preprocessing=tuple(steps),
        tensors=tuple(tensors),
        postprocessing=tuple(list_generation_steps()),
        record=(RecordField("text", "string", "the answer"),),
        options=(PROMPT, *describe_options(predictor.config_type)),
        loop=loop,
        limits=Limits(rows=MAX_PROMPTS, tokens=config.length, pixels=images.MAX_PIXELS),
    )


def describe_transcriber(predictor: Transcriber) -> Signature:
    """Return the signature of a network that writes down recordings."""
    assert predictor.card is not None  # `load` sets it
    config, tokens = predictor.network.config, predictor.tokens
    known = describe_network(predictor.card, config, predictor.network)
    mel = {"rate": RATE, "bands": config.features, "fft": FFT, "hop": HOP, "scale": "slaney"}
    steps = (
        Step("decode_audio", "decode the file, mean of its channels, -1 to 1", False),
        Step("resample", f"resample to {RATE:,} Hz (polyphase)", False, {"rate": RATE}),
        Step("whisper_log_mel", "log-mel spectrogram of the authors, over the recording and 30 s of silence", True, mel),
        Step("window", "30 s from the end of the last phrase, padded with zeros", False, {"frames": 2 * config.source_length}),
    )
    loop = known.loop and replace(known.loop, start_tokens=(tokens.start,), eos_tokens=(tokens.end,))
    segment = (
        RecordField("start", "number", "seconds from the beginning", low=0),
        RecordField("end", "number", "seconds from the beginning", low=0),
        RecordField("text", "string"),
        RecordField("mean_log_probability", "number", "of the tokens of the window", high=0),
        RecordField("no_speech", "number", "probability that the window is silent", low=0, high=1),
        RecordField("compression", "number", "bytes of the window's text for each compressed byte", low=0),
        RecordField("temperature", "number", "at which the window was decoded", low=0),
    )
    return replace(
        known,
        task="automatic-speech-recognition",
        inputs=(InputField("audio", "audio", media_types=AUDIO_TYPES, audio=AudioFormat(RATE, None)),),
        preprocessing=steps,
        postprocessing=(
            Step("decode", "tokens to text, window by window, again at a higher temperature if it fails the checks", False),
            Step("cut", "phrases by their times", False),
        ),
        record=(
            RecordField("text", "string", "the transcript"),
            RecordField("language", "string", "code of the language"),
            RecordField("segments", "array", "the phrases", items=RecordField("", "object", fields=segment)),
        ),
        options=tuple(describe_options(predictor.config_type)),
        loop=loop,
        limits=Limits(rows=MAX_PROMPTS, tokens=config.length, samples=audio.MAX_SAMPLES),
    )
