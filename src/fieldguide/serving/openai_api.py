"""The API of OpenAI: chat, completions, embeddings, transcriptions and images, as its clients call it."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from fieldguide.core.errors import FieldguideError
from fieldguide.serving.errors import RequestError, describe_failure
from fieldguide.serving.json_values import convert_value, encode_json, read_json
from fieldguide.serving.language import LanguageModel, Prompt, build_prompt
from fieldguide.serving.media_files import TYPES, RequestFolder
from fieldguide.serving.models import LoadedModel, Request, ServedModel
from fieldguide.serving.openai_types import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
    ImageRequest,
    check_fields,
)
from fieldguide.serving.row_types import to_cells
from fieldguide.serving.state import ServerState
from fieldguide.serving.subtitles import FORMATS, format_transcript
from fieldguide.serving.waiting import answer_request, read_in_thread, wait_for_answer
from fieldguide.serving.worker import Job

EVENT_STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def read_request(http: HttpRequest, kind: Any) -> Any:
    """Return the body of a request as a type."""
    values = read_json(await http.body(), dict[str, Any])
    check_fields(values, kind)
    return convert_value(values, kind)


def get_server(http: HttpRequest) -> ServerState:
    """Return the state of the server."""
    return http.app.state.server


# Text


class TextAnswers:
    """The answers to the prompts of a request, each a text that is generated in a slot.

    `events` receives (index, piece, reason) as texts grow; the reason is "" until a text has ended.
    """

    def __init__(self, served: ServedModel, model: LoadedModel, prompts: Sequence[Prompt]):
        assert model.language is not None
        self.served, self.model = served, model
        self.rows = [prompt.make_row(model.language, i) for i, prompt in enumerate(prompts)]
        self.reasons = [""] * len(self.rows)
        self.job = Job(None, rows=len(self.rows), texts=self.rows, engine=model.engine)
        self.job.deadline = time.monotonic() + served.settings.timeout
        self.events: asyncio.Queue[tuple[int, str, str | BaseException]] = asyncio.Queue()

    def submit(self, stream: bool) -> None:
        """Queue the texts. Raises `RequestError` if too many wait."""
        loop = asyncio.get_running_loop()

        def tell(index: int, piece: str, reason: str | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.events.put_nowait, (index, piece, reason))

        for i, row in enumerate(self.rows):
            if stream:
                row.on_piece = lambda piece, i=i: tell(i, piece, "")  # type: ignore[misc]
            row.on_end = lambda reason, i=i: self.end(i, reason, tell if stream else None)  # type: ignore[misc]
            row.is_cancelled = lambda: self.job.abandoned
        self.served.worker.submit(self.job)

    def end(self, index: int, reason: str | BaseException, tell: Callable[..., None] | None) -> None:
        """Note the end of a text; the last one ends the job. Called by the worker."""
        if tell is not None:
            tell(index, "", reason)
        if self.job.future.done():
            return
        if isinstance(reason, BaseException):
            self.job.future.set_exception(reason)
            return
        self.reasons[index] = reason
        if all(self.reasons):
            self.job.future.set_result(None)

    @property
    def usage(self) -> dict[str, int]:
        """The tokens that were read and written."""
        prompts = sum({id(row.prompt): len(row.prompt) for row in self.rows}.values())  # read once for all of its answers
        return make_usage(prompts, sum(row.steps for row in self.rows))


def make_usage(prompt: int, completion: int = 0) -> dict[str, int]:
    """Return the numbers of tokens as OpenAI names them."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def make_prompts(
    language: LanguageModel, tokens: Sequence[list[int]], request: Generation, default: int | None, asked: int | None, most: int
) -> list[Prompt]:
    """Return each prompt `n` times, with the config of its answers. Raises `RequestError` for a prompt that is too long."""
    prompts = []
    for ids in tokens:
        room = language.length - len(ids)
        if room < 1:
            raise RequestError(
                400,
                f"the prompt has {len(ids):,} tokens, but the model reads {language.length:,} in all, with the answer",
                place="messages",
                remedy="Shorten it.",
                code="context_length_exceeded",
            )
        wanted = asked if asked is not None else default if default is not None else room
        try:
            prompt = build_prompt(language, ids, request.to_options(min(wanted, room, most)), most)
        except FieldguideError as error:
            raise describe_failure(error) from None
        prompts += [prompt] * (request.n or 1)
    return prompts


def check_choices(count: int, state: ServerState) -> None:
    """Raise `RequestError` for too many answers."""
    most = state.settings.max_choices
    if count > most:
        raise RequestError(
            400, f"the request asks for {count:,} answers", place="n", remedy=f"At most {most}.", code="invalid_value"
        )


async def chat(http: HttpRequest) -> Response:
    """Answer a conversation."""
    state, request = get_server(http), await read_request(http, ChatRequest)
    served = state.pool.get(request.model)
    model = served.current
    language = model.language
    if language is None or not language.chats:
        remedy = "Call /v1/completions." if language is not None else "Call /v1/predict."
        raise RequestError(400, f"{served.name} does not chat", place="model", remedy=remedy, code="wrong_model")
    check_choices(request.n or 1, state)
    messages = [message.to_dict() for message in request.messages]
    if sum(len(message["content"]) for message in messages) > state.settings.max_text_characters:
        raise model.text_error()
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens

    def read() -> list[Prompt]:
        try:
            tokens = language.encode_messages(messages)
        except FieldguideError as error:
            raise RequestError(400, str(error), place="messages", code="invalid_value") from None
        return make_prompts(language, [tokens], request, None, asked, state.settings.max_new_tokens)

    answers = TextAnswers(served, model, await read_in_thread(read))
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}
    if request.stream:
        answers.submit(stream=True)
        chunks = stream_chunks(answers, head | {"object": "chat.completion.chunk"}, request.wants_usage, chat_piece, chat_start)
        return StreamingResponse(guard_stream(chunks, answers, state), media_type="text/event-stream", headers=EVENT_STREAM)
    answers.submit(stream=False)
    await wait_for_answer(answers.job, http, served.settings.timeout, state.metrics)
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": row.decoder.text, "refusal": None},
            "finish_reason": reason,
            "logprobs": None,
        }
        for i, (row, reason) in enumerate(zip(answers.rows, answers.reasons))
    ]
    return respond(head | {"object": "chat.completion", "choices": choices, "usage": answers.usage})


async def complete(http: HttpRequest) -> Response:
    """Continue texts; a model that maps a text to another one answers with that."""
    state, request = get_server(http), await read_request(http, CompletionRequest)
    served = state.pool.get(request.model)
    model, language = served.current, served.current.language
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    check_choices(request.n or 1, state)
    if sum(map(len, texts)) > state.settings.max_text_characters:
        raise model.text_error()
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
        "object": "text_completion",
    }
    if language is None:
        return await map_texts(http, state, served, model, request, texts, head)
    if not language.completes:
        remedy = "Call /v1/chat/completions."
        raise RequestError(400, f"{served.name} answers conversations", place="model", remedy=remedy, code="wrong_model")

    def read() -> list[Prompt]:
        try:
            tokens = [language.encode_text(text) for text in texts]
        except FieldguideError as error:
            raise RequestError(400, str(error), place="prompt", code="invalid_value") from None
        most = state.settings.max_new_tokens
        return make_prompts(language, tokens, request, DEFAULT_COMPLETION_TOKENS, request.max_tokens, most)

    answers = TextAnswers(served, model, await read_in_thread(read))
    answers.submit(stream=bool(request.stream))
    if request.stream:
        chunks = stream_chunks(answers, head, request.wants_usage, text_piece, None)
        return StreamingResponse(guard_stream(chunks, answers, state), media_type="text/event-stream", headers=EVENT_STREAM)
    await wait_for_answer(answers.job, http, served.settings.timeout, state.metrics)
    choices = [text_piece(i, row.decoder.text, reason) for i, (row, reason) in enumerate(zip(answers.rows, answers.reasons))]
    return respond(head | {"choices": choices, "usage": answers.usage})


async def map_texts(
    http: HttpRequest,
    state: ServerState,
    served: ServedModel,
    model: LoadedModel,
    request: CompletionRequest,
    texts: Sequence[str],
    head: Mapping[str, Any],
) -> Response:
    """Answer with the texts that a model makes of texts, such as translations."""
    fields = [field for field in model.reader.fields if field.required]
    if (
        len(fields) != 1
        or fields[0].kind != "text"
        or not any(f.name == "text" for f in model.signature.record)
        or request.stream
    ):
        problem = f"{served.name} does not stream" if request.stream else f"{served.name} does not write texts"
        raise RequestError(400, problem, place="model", remedy="Call /v1/predict.", code="wrong_model")
    known = {option.name for option in model.signature.options}
    asked = {
        "max_new_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    options = {name: value for name, value in asked.items() if value is not None}
    if unknown := options.keys() - known:
        raise RequestError(400, f"{served.name} has no option {min(unknown)}", place=min(unknown), code="unsupported_parameter")
    rows = list(texts) if model.signature.row_form == "value" else [{fields[0].name: text} for text in texts]
    ready = await read_in_thread(lambda: model.read_rows(convert_value(rows, list[model.reader.kind], "prompt"), options))  # type: ignore[name-defined]
    answer = await answer_request(served, ready, http, state.metrics)
    choices = [text_piece(i, str(record.get("text", "")), "stop") for i, record in enumerate(answer.records)]
    return respond({**head, "choices": choices, "usage": make_usage(0)})


def chat_start(index: int) -> dict[str, Any]:
    """Return the first piece of an answer in a conversation."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}


def chat_piece(index: int, piece: str, reason: str) -> dict[str, Any]:
    """Return a piece of an answer in a conversation."""
    return {"index": index, "delta": {"content": piece} if piece else {}, "finish_reason": reason or None, "logprobs": None}


def text_piece(index: int, piece: str, reason: str) -> dict[str, Any]:
    """Return a piece of a text, or all of it."""
    return {"index": index, "text": piece, "finish_reason": reason or None, "logprobs": None}


async def stream_chunks(
    answers: TextAnswers,
    head: Mapping[str, Any],
    wants_usage: bool,
    make: Callable[[int, str, str], dict[str, Any]],
    start: Callable[[int], dict[str, Any]] | None,
) -> AsyncIterator[bytes]:
    """Yield the events of a stream."""
    extra = {"usage": None} if wants_usage else {}
    if start is not None:
        for i in range(len(answers.rows)):
            yield to_event({**head, **extra, "choices": [start(i)]})
    left, seconds = len(answers.rows), answers.served.settings.timeout
    while left:
        try:  # a long answer is fine as long as it goes on
            index, piece, reason = await asyncio.wait_for(answers.events.get(), seconds)
        except TimeoutError:
            reason = RequestError(504, "the answer took too long", remedy="Ask for fewer tokens.", code="timeout")
        if isinstance(reason, BaseException):
            failure = (
                reason if isinstance(reason, RequestError) else RequestError(500, "the model failed", code="model_failure")
            )
            yield to_event(failure.to_json())
            return
        yield to_event({**head, **extra, "choices": [make(index, piece, reason)]})
        left -= bool(reason)
    if wants_usage:
        yield to_event({**head, "choices": [], "usage": answers.usage})
    yield b"data: [DONE]\n\n"


async def guard_stream(chunks: AsyncIterator[bytes], answers: TextAnswers, state: ServerState) -> AsyncIterator[bytes]:
    """Yield the events of a stream; if the client leaves, its texts leave the slots at the next step."""
    finished = False
    try:
        async for chunk in chunks:
            yield chunk
        finished = True
    finally:
        if not finished:
            state.metrics.disconnects += 1
        answers.job.abandon()


def to_event(value: Any) -> bytes:
    """Return a value as an event of a stream."""
    return b"data: " + encode_json(value) + b"\n\n"


def respond(value: Any) -> Response:
    """Return a value as a JSON response."""
    return Response(encode_json(value), media_type="application/json")


# Embeddings


async def embed(http: HttpRequest) -> Response:
    """Return a vector for each text, by default in base64 for the client of OpenAI, else as numbers."""
    state, request = get_server(http), await read_request(http, EmbeddingRequest)
    served = state.pool.get(request.model)
    model = served.current
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not model.embeds:
        raise RequestError(400, f"{served.name} does not embed texts", place="model", code="wrong_model")
    model.check_count(len(texts))
    if sum(map(len, texts)) > state.settings.max_text_characters:
        raise model.text_error()

    def compute(jobs: Sequence[Job]) -> list[Any]:
        joined = [text for job in jobs for text in job.payload]
        try:
            vectors = model.predictor.embed(joined)
        except FieldguideError as error:
            failure = RequestError(400, str(error), place="model", code="wrong_model")
            return [failure] * len(jobs)
        ends = np.cumsum([len(job.payload) for job in jobs])
        return np.split(vectors, ends[:-1])

    job = Job(compute, texts, ("embed", id(model)), len(texts), deadline=time.monotonic() + served.settings.timeout)
    served.worker.submit(job)
    vectors: np.ndarray = await wait_for_answer(job, http, served.settings.timeout, state.metrics)
    if request.dimensions not in (None, vectors.shape[1]):
        text = f"the vectors of {served.name} have {vectors.shape[1]:,} dimensions"
        raise RequestError(400, text, place="dimensions", remedy="Leave it out.", code="unsupported_parameter")
    data = [
        {"object": "embedding", "index": i, "embedding": encode_vector(vector, request.encoding_format == "base64")}
        for i, vector in enumerate(vectors)
    ]
    tokens = count_tokens(model, texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return respond({"object": "list", "data": data, "model": served.name, "usage": usage})


def encode_vector(vector: np.ndarray, as_base64: bool) -> str | list[float]:
    """Return a vector as numbers, or as base64 of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.astype(float).tolist()


def count_tokens(model: LoadedModel, texts: Sequence[str]) -> int:
    """Return the tokens of texts, without special ones; 0 if the model does not have a tokenizer."""
    tokenizer = getattr(getattr(model.predictor, "task", None), "text", None)
    return sum(map(len, tokenizer.encode_exact(list(texts)))) if tokenizer is not None else 0


# Recordings


async def transcribe(http: HttpRequest) -> Response:
    """Write down a recording."""
    return await hear(http, "transcribe")


async def translate(http: HttpRequest) -> Response:
    """Write down a recording in English."""
    return await hear(http, "translate")


async def hear(http: HttpRequest, task: str) -> Response:
    """Answer an uploaded recording with its text, as JSON, plain text or subtitles."""
    try:
        async with http.form(max_files=1, max_fields=20) as form:
            return await hear_form(http, form, task)
    except (MultiPartException, HTTPException) as problem:
        text = getattr(problem, "message", getattr(problem, "detail", ""))
        raise RequestError(400, f"the form cannot be read: {text}", code="malformed_form") from None


async def hear_form(http: HttpRequest, form: FormData, task: str) -> Response:
    """Answer the recording in a form."""
    state, upload = get_server(http), form.get("file")
    if not isinstance(upload, UploadFile):
        raise RequestError(
            400, "there is no file", place="file", remedy="Upload the recording as the part `file`.", code="no_file"
        )
    texts = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    served = state.pool.get(texts.pop("model", None))
    model = served.current
    field = next((f for f in model.reader.media if f.kind == "audio"), None)
    if field is None or not any(f.name == "text" for f in model.signature.record):
        raise RequestError(400, f"{served.name} does not write down recordings", place="model", code="wrong_model")
    form_at = texts.pop("response_format", "json")
    if form_at not in FORMATS:
        text = f"response_format={form_at[:40]!r} is not one of {', '.join(FORMATS)}"
        raise RequestError(400, text, place="response_format", code="invalid_value")
    options = read_hearing_options(model, texts, task)
    content, kind = await upload.read(), (upload.content_type or "").partition(";")[0].lower()
    if kind in ("", "application/octet-stream", "audio/x-wav"):
        kind = TYPES.get(f".{(upload.filename or '').rpartition('.')[2].lower()}", kind)

    def read() -> Request:
        folder = RequestFolder(state.settings)
        try:
            path = folder.store_media(field, content, kind, "file")
            return Request(model, options, folder, {field.name: to_cells(None, [path])})
        except BaseException:
            folder.remove()
            raise

    answer = await answer_request(served, await read_in_thread(read), http, state.metrics)
    body = format_transcript(answer.records[0], form_at, task)
    return respond(body) if isinstance(body, dict) else Response(body, media_type="text/plain; charset=utf-8")


def read_hearing_options(model: LoadedModel, texts: Mapping[str, str], task: str) -> dict[str, Any]:
    """Return the options of a transcription. Raises `RequestError` for those that the model does not have."""
    known = {option.name for option in model.signature.options}
    options: dict[str, Any] = {}
    if task == "translate":
        if "task" not in known:
            raise RequestError(400, f"{model.name} does not translate", place="model", code="wrong_model")
        options["task"] = task
    for name, value in texts.items():
        if name in ("stream", "timestamp_granularities[]", "include[]", "chunking_strategy") and value in (
            "false",
            "segment",
            "auto",
        ):
            continue
        if name not in ("language", "prompt", "temperature") or name not in known:
            if name == "temperature" and value in ("0", "0.0"):
                continue
            problem = f"{model.name} has no option {name[:40]!r}"
            raise RequestError(400, problem, place=name[:40], remedy="Leave it out.", code="unsupported_parameter")
        if name == "temperature":
            options[name] = read_number(value, name)
        elif value:
            options[name] = value
    return options


def read_number(text: str, place: str) -> float:
    """Return a number in a form."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise RequestError(400, f"{place}={text[:40]!r} is not a number from 0 to 1", place=place, code="invalid_value")
    return value


# Images


async def draw(http: HttpRequest) -> Response:
    """Generate images of a class or a caption."""
    state, request = get_server(http), await read_request(http, ImageRequest)
    served = state.pool.get(request.model)
    model = served.current
    if not model.image_field:
        raise RequestError(400, f"{served.name} does not generate images", place="model", code="wrong_model")
    check_choices(request.n or 1, state)
    options: dict[str, Any] = {
        "count": request.n or 1,
        "seed": secrets.randbelow(1 << 31) if request.seed is None else request.seed,
    }
    options |= {name: v for name in ("steps", "guidance", "negative") if (v := getattr(request, name)) is not None}
    options |= read_size(request.size)
    options = convert_options(model, options)
    rows = convert_value([request.prompt], list[model.reader.kind], "prompt")  # type: ignore[name-defined]
    ready = await read_in_thread(model.read_rows, rows, options)
    answer = await answer_request(served, ready, http, state.metrics)
    images = [str(record[model.image_field]).partition(",")[2] for record in answer.records]
    if request.size not in (None, "auto") and images:
        check_size(request.size or "", base64.b64decode(images[0]))
    return respond({"created": int(time.time()), "data": [{"b64_json": image} for image in images]})


def read_size(size: str | None) -> dict[str, int]:
    """Return width and height of a size such as "512x768". Raises `RequestError` for other texts."""
    if size in (None, "auto"):
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size or "")
    if found is None:
        raise RequestError(400, f"{size!r} is no size", place="size", remedy='Send "WIDTHxHEIGHT", such as "512x512".')
    return {"width": int(found[1]), "height": int(found[2])}


def convert_options(model: LoadedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a model has, checked against its signature; those of the server alone are left out."""
    from fieldguide.serving.row_types import list_options

    known = {option.name for option in model.signature.options}
    return list_options(convert_value({name: v for name, v in options.items() if name in known}, model.option_type, "options"))


def check_size(size: str, content: bytes) -> None:
    """Raise `RequestError` if the images have another size than was asked for: some models make images of one size."""
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(content)) as image:
        own = f"{image.width}x{image.height}"
    if size != own:
        raise RequestError(
            400, f"the model makes images of {own}", place="size", remedy="Leave it out.", code="unsupported_parameter"
        )
