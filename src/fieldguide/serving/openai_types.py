"""Requests of the API of OpenAI, decoded strictly. Fields that would change an answer and are not supported are rejected."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from fieldguide.core.structure import MAX_SEED
from fieldguide.serving.errors import RequestError

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI documents
MAX_STOPS = 16
IGNORED = (  # fields that change no answer here
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "reasoning_effort", "verbosity"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # field -> values without an effect
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
FilledText = Annotated[str, Meta(min_length=1)]
Stop = FilledText | Annotated[list[FilledText], Meta(max_length=MAX_STOPS)]
Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=-MAX_SEED, le=MAX_SEED)]
MAX_PROMPTS = 64


class Generation(Struct, kw_only=True):
    """What requests for text have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    n: Count | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the last piece of a stream holds the number of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def to_options(self, max_new_tokens: int) -> dict[str, Any]:
        """Return the request as prediction options of a language model."""
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": 1}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if options.get("top_p") == 0:  # the most likely token alone
            options |= {"temperature": 0.0}
            del options["top_p"]
        options["seed"] = secrets.randbelow(MAX_SEED) if self.seed is None else self.seed
        if self.stops:
            options["stop_strings"] = json.dumps(self.stops)
        return options


class TextPart(Struct):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Struct):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def to_dict(self) -> dict[str, str]:
        """Return the message with its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None


class CompletionRequest(Generation, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_PROMPTS)]
    echo: Any = None
    best_of: Any = None
    suffix: Any = None


class EmbeddingRequest(Struct, kw_only=True):
    """POST /v1/embeddings."""

    input: FilledText | Annotated[list[FilledText], Meta(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class ImageRequest(Struct, kw_only=True):
    """POST /v1/images/generations."""

    prompt: str
    model: str | None = None
    n: Count | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Meta(ge=0, le=100)] | None = None
    negative: str | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None


def check_fields(values: dict[str, Any], kind: type[Struct]) -> None:
    """Raise `RequestError` for a field that is unknown, or not supported and set to a value with an effect."""
    for name, value in values.items():
        if name in IGNORED:
            continue
        if name not in kind.__struct_fields__:
            raise RequestError(
                400,
                f"the field {name[:80]!r} is unknown here",
                place=name[:80],
                remedy="Leave it out.",
                code="unknown_parameter",
            )
        if issubclass(kind, Generation) and name in NEUTRAL and value not in (None, *NEUTRAL[name]):
            raise RequestError(
                400, f"{name} is not supported", place=name, remedy="Leave it out.", code="unsupported_parameter"
            )
