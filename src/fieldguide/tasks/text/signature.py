"""Signatures of the text tasks: token ids, loops, and records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fieldguide.core.card import Card
from fieldguide.core.signature import Axis, Limits, Loop, RecordField, Step, TensorSpec, list_values
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.sequence_markers import SequenceMarkers
from fieldguide.objectives.embedding import Pooling
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import (
    describe_tokenization,
    limit_axis,
    list_generation_steps,
    probability,
    request_tensor,
    set_vocabulary,
)

TOKEN_TENSORS = ("tokens", "source")
GENERATED = RecordField("text", "string", "the generated text")


class TextSignature(SignatureBuilder):
    """The signature of a task that reads token ids."""

    text: TextTokenizer
    options: Any
    min_tokens: ClassVar[int] = 1  # of a row, with special tokens

    @property
    def max_tokens(self) -> int | None:
        """Return the number of tokens that a row may have."""
        return getattr(self.options, "length", None)

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        return [describe_tokenization(self.text, self.max_tokens), self.describe_padding()]

    def describe_padding(self) -> Step:
        """Return the step that makes a batch of rows."""
        return Step("pad", "pad rows to the longest; the mask marks real tokens", False, {"token": self.text.pad})

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        for name in TOKEN_TENSORS:
            tensors = limit_axis(tensors, name, self.max_tokens, self.min_tokens)
        found = set_vocabulary(tensors, TOKEN_TENSORS, self.text)
        return [spec for spec in found if spec.required or spec.name != "segments"]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), tokens=self.max_tokens)


class EmbeddingSignature(TextSignature):
    """The signature of a task that turns a text into a vector of length 1."""

    method = "features"
    pooled: Pooling

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        """Return the vectors of the tokens, which the pooling joins."""
        axes = lambda spec: (spec.axes[0], Axis("tokens", most=self.max_tokens), *spec.axes[1:])
        return [replace(spec, axes=axes(spec), about="vectors of the tokens") for spec in outputs]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        settings = {"modes": list(self.pooled.modes), "skip": self.pooled.skip}
        steps = [Step("pool", "join the vectors of the real tokens", True, settings)]
        if self.pooled.head is not None:
            steps.append(Step("project", "the layers after the pooling", True))
        return [*steps, Step("normalize", "divide by the length of the vector", True)]

    def describe_record(self) -> Sequence[RecordField]:
        return [RecordField("vector", "array", "the embedding, of length 1", items=RecordField("", "number"))]


class PairSignature(TextSignature):
    """The signature of a task that reads a text, or two texts that the network may tell apart by `segments`."""

    @property
    def second(self) -> str | None:
        raise NotImplementedError

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        about = "split the texts into token ids, join them with the special tokens of the tokenizer, truncate the longer"
        if not self.second:
            about = "split the text into token ids, truncate it"
        return [describe_tokenization(self.text, self.max_tokens, about), self.describe_padding()]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        used = [replace(s, required=True) if s.name == "segments" and self.second else s for s in tensors]
        return super().describe_tensors(used)

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        if not self.second or "segments" in card.optional_inputs:
            return []
        return [describe_segments(self.max_tokens)]


def describe_segments(most: int | None) -> TensorSpec:
    """Return the tensor of segments for networks that do not take it."""
    return request_tensor("segments", "int64", Axis("tokens", most=most), about="0 first text, 1 second", low=0, high=1)


class TokenClassificationSignature(TextSignature):
    """The signature of token classification: a tag for each word."""

    tags: list[str]
    min_tokens: ClassVar[int] = 2

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        about = "split each word into token ids, between the special tokens; words beyond the limit get no tag"
        return [describe_tokenization(self.text, self.max_tokens, about), self.describe_padding()]

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        about = "position of the first token of each word; -1 beyond the last"
        return [request_tensor("words", "int64", Axis("words"), about=about, low=-1)]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [
            Step("gather", "logits at the first token of each word", True),
            Step("softmax", "probabilities of the tags", True),
            Step("argmax", "the most probable tag", True),
            Step("join_entities", "entities from the B- and I- tags of consecutive words", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        kinds = sorted({tag.partition("-")[2] or tag for tag in self.tags if tag != "O"})
        known = dict.fromkeys([*self.tags, *([] if "O" in self.tags else [""])])  # words beyond the limit have no tag
        entity = (
            RecordField("text", "string", "its words"),
            RecordField("type", "string", "its type", **list_values(kinds)),
            RecordField("first", "integer", "index of the first word", low=0),
            RecordField("last", "integer", "index of the last word", low=0),
            probability(about="the lowest of its words"),
        )
        return [
            RecordField("tokens", "array", "the words", items=RecordField("", "string")),
            RecordField("tags", "array", "a tag for each word", items=RecordField("", "string", **list_values(list(known)))),
            RecordField("entities", "array", "the entities", items=RecordField("", "object", fields=entity)),
        ]


class FillMaskSignature(TextSignature):
    """The signature of fill-mask: words for the gaps of a text."""

    min_tokens: ClassVar[int] = 3

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        mark = Step(
            "mark_gaps", "<mask>, [MASK], ___ and <extra_id_0> become the mask token", False, {"token": self.text.mask_token}
        )
        return [mark, *super().describe_preprocessing(card)]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [
            Step("softmax", "probabilities of the tokens at each position", True),
            Step("top_k", "the most probable tokens (option top)", True),
            Step("decode", "token ids to text", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        word = RecordField("", "object", fields=(RecordField("word", "string", "a token as text"), probability()))
        guesses = RecordField("", "array", "most probable first", items=word)
        return [
            RecordField("text", "string", "the text with its gaps filled"),
            RecordField("words", "array", "predictions for each gap", items=guesses),
        ]


class TextGenerationSignature(TextSignature):
    """The signature of text generation: a prompt or a conversation is continued."""

    chat: bool
    max_request_rows: ClassVar[int] = 64

    @property
    def ends(self) -> tuple[int, ...]:
        raise NotImplementedError

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        chat = [Step("render_chat", "the conversation as one text, by the chat template", False)] if self.chat else []
        return [*chat, describe_tokenization(self.text, None), Step("pad", "pad prompts on the left", False)]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return set_vocabulary(tensors, TOKEN_TENSORS, self.text)

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        about = "token ids of the prompts; -1 is padding on the left"
        return [
            request_tensor("prompt", "int64", Axis("prompt_tokens"), about=about, low=-1, high=self.text.size - 1),
            request_tensor("row", "int64", about="number of the row, which seeds its sampling", low=0),
        ]

    def describe_loop(self, loop: Loop | None) -> Loop | None:
        return loop and replace(loop, eos_tokens=self.ends, pad_token=self.text.pad)

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return list_generation_steps()

    def describe_record(self) -> Sequence[RecordField]:
        return [GENERATED]

    def describe_limits(self) -> Limits:
        return Limits(rows=self.max_request_rows)  # of longer prompts the end is read


class EncoderDecoderSignature(TextSignature):
    """The signature of translation and summarization: a source becomes a target."""

    frame: SequenceMarkers
    max_request_rows: ClassVar[int] = 256

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        prefix = getattr(self.options, "prefix", "")
        steps = [Step("add_prefix", "a text before each source", False, {"prefix": prefix})] if prefix else []
        around = {"before": list(self.frame.before), "after": list(self.frame.after)}
        return [
            *steps,
            describe_tokenization(self.text, self.max_tokens),
            Step("add_markers", "special tokens around the source", False, around),
            self.describe_padding(),
        ]

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        return [request_tensor("row", "int64", about="number of the row, which seeds its sampling", low=0)]

    def describe_loop(self, loop: Loop | None) -> Loop | None:
        start, ends = tuple(self.frame.target_start), (self.frame.end,)
        return loop and replace(
            loop, start_tokens=start, eos_tokens=ends, pad_token=self.text.pad, max_length=self.max_tokens or loop.max_length
        )

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return list_generation_steps()

    def describe_record(self) -> Sequence[RecordField]:
        return [GENERATED]


class DenoisingSignature(EncoderDecoderSignature):
    """The signature of denoising: the gaps of a text are filled."""

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        return [request_tensor("gaps", "int64", about="number of gaps of the row", low=0)]

    def describe_record(self) -> Sequence[RecordField]:
        about = "the filling of each gap, if the model predicts gaps one by one"
        gaps = RecordField("gaps", "array", about, required=False, items=RecordField("", "string"))
        return [RecordField("text", "string", "the text with its gaps filled"), gaps]


class QuestionAnsweringSignature(TextSignature):
    """The signature of extractive question answering. A row becomes as many network rows as its context has windows."""

    threshold: float
    silent: bool
    whole: bool
    min_tokens: ClassVar[int] = 4

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        settings = {"max_tokens": self.max_tokens, "stride": self.options.stride}
        return [
            describe_tokenization(self.text, None, "split question and context into token ids"),
            Step("cut_windows", "question and a piece of the context in each window", False, settings),
            self.describe_padding(),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return super().describe_tensors([replace(s, required=True) if s.name == "segments" else s for s in tensors])

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        tokens = Axis("tokens", most=self.max_tokens)
        segments = [] if "segments" in card.optional_inputs else [describe_segments(self.max_tokens)]
        spans = "first character and end of each token in the context"
        return [
            *segments,
            request_tensor("answerable", "bool", tokens, about="True for tokens of the context"),
            request_tensor("window", "int64", about="number of the request row of each window", low=0),
            request_tensor("characters", "int64", tokens, Axis("ends", 2), about=spans, low=0),
        ]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        limit = {"longest": self.options.longest}
        steps = [
            Step("softmax", "probabilities of the first and the last token", True),
            Step("best_span", "the most probable span over all windows of a question", False, limit),
        ]
        if self.silent:
            settings = {"threshold": self.threshold}
            steps.append(Step("threshold", "no answer unless the span is better by a margin", True, settings))
        return [*steps, Step("cut_answer", "the characters of the span", False, {"whole_words": self.whole})]

    def describe_record(self) -> Sequence[RecordField]:
        place = "index in the context; null without an answer"
        return [
            RecordField("answer", "string", "the answer; empty if there is none"),
            RecordField("start", "integer", f"first character: {place}", nullable=True, low=0),
            RecordField("end", "integer", f"end: {place}", nullable=True, low=0),
            RecordField("probability", "number", "of the answer, or of no answer", low=0),
        ]
