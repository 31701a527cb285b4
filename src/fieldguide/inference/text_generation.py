"""Text generation with a pretrained language model or encoder-decoder and its tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fieldguide.checkpoints.generation_config import PublishedGeneration, read_generation_config, without_forced_first
from fieldguide.checkpoints.load import Checkpoint, build_network, inspect_checkpoint
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.core.options import PREDICT_ALIASES, parse_options, parse_value, rename_aliases
from fieldguide.core.signature import Signature
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.chat_template import ChatTemplate
from fieldguide.data.preprocessing.sequence_markers import SequenceMarkers, resolve_markers
from fieldguide.data.preprocessing.tokenizer import LOCK
from fieldguide.data.preprocessing.tokenizer_files import TokenizerFiles, read, read_eos_token_ids
from fieldguide.inference.predictor import Predictions, Predictor, as_list
from fieldguide.inference.signature import describe_text_generator
from fieldguide.models.generation import EncoderDecoderState, GenerationConfig, Greedy, generate_batch, stream_text
from fieldguide.models.generation.engine import group_by_length
from fieldguide.models.generation.quantization import quantize_int8
from fieldguide.models.generation.stop_strings import truncate_at_stop

if TYPE_CHECKING:
    from fieldguide.core.card import Network

Prompt = str | Sequence[Mapping[str, Any]]  # a text to continue, or messages with role and content
# Tokens with which known models end an answer, in addition to those in their files.
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|endoftext|>", "</s>")
WEIGHT_TYPES = ("float32", "int8")
LANGUAGES = ("source", "target")  # load options of multilingual encoder-decoders


class TextGenerator(Predictor):
    """A language model that continues texts and answers in conversations, or an encoder-decoder that maps text to text.

    `end_tokens` end an answer. `template` formats conversations. `markers` are the special tokens around the sources and
    before the answers of an encoder-decoder.
    """

    generates_text = True
    LOAD_OPTIONS: ClassVar = {"weights": str, "source": str, "target": str}

    def __init__(
        self,
        network: Network,
        text: TextTokenizer,
        end_tokens: Sequence[int],
        template: ChatTemplate | None = None,
        markers: SequenceMarkers | None = None,
        card: Card | None = None,
        published: PublishedGeneration | None = None,
    ):
        self.published = published or PublishedGeneration()
        self.network, self.text, self.end_tokens, self.template = network.eval(), text, tuple(end_tokens), template
        self.markers, self.card = markers, card
        self.config_type = GenerationConfig if markers is None else Greedy

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Checkpoint,
        weights: str = WEIGHT_TYPES[0],
        source: str | None = None,
        target: str | None = None,
        **overrides: Any,
    ) -> TextGenerator:
        """Load a folder of transformers with its tokenizer, a GGUF file, or hf:organization/name.

        `weights="int8"` quantizes the linear layers. `source` and `target` are the languages of a multilingual
        encoder-decoder, as its tokenizer names them. Raises `WeightsError` if the network does not generate text or its
        tokenizer is missing, and `SettingsError` for languages that are missing, unknown or not supported.
        """
        if weights not in WEIGHT_TYPES:
            raise SettingsError(f"weights={weights!r} is not one of {', '.join(WEIGHT_TYPES)}.")
        found = checkpoint if isinstance(checkpoint, Checkpoint) else inspect_checkpoint(checkpoint)
        card, path = found.card, found.path
        if "tokens" not in card.output_types or card.input_type not in ("tokens", "pair"):
            raise WeightsError(
                f"{path} is {card.name}, whose output is {' or '.join(card.output_types)}; text generation needs a network "
                "that predicts the next token."
            )
        if card.input_type == "tokens" and (source or target):
            raise SettingsError(f"{path} is {card.name}, a decoder without languages: leave out source and target.")
        network = build_network(card, {**found.values, **overrides}, found.state, found.origin, str(path))
        files = read_tokenizer(found)
        size, vocab_size = files.tokenizer.get_vocab_size(), network.config.vocab_size
        if size > vocab_size:
            raise WeightsError(f"{path}: the tokenizer has {size:,} tokens, but the network {vocab_size:,}.")
        text, markers, end_tokens = TextTokenizer(files.tokenizer), None, find_end_tokens(files)
        if card.input_type == "pair":
            config, folder = network.config, path if path.is_dir() else path.parent
            options = SimpleNamespace(
                tokenizer=str(folder),
                begin=getattr(config, "begin", None),
                source_language=source,
                target_language=target,
            )
            markers = resolve_markers(text, options, LANGUAGES)
            end_tokens = sorted({getattr(config, "end", markers.end), *read_eos_token_ids(folder)})
        if weights == "int8":
            quantize_int8(network)
        folder = path if path.is_dir() else path.parent
        published = PublishedGeneration()
        if path.suffix != ".gguf":
            published = read_generation_config(folder, is_encoder_decoder=markers is not None)
        if markers is not None:
            published = replace(published, rules=without_forced_first(published.rules, markers.target_start))
        template = build_chat_template(files) if markers is None else None
        return cls(network, text, end_tokens, template, markers, card, published)

    @property
    def model(self) -> Network:
        return self.network

    @functools.cached_property
    def signature(self) -> Signature:
        return describe_text_generator(self)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the token ids that the network reads. Raises `DataError` for messages if there is no chat template."""
        tokenizer = self.text.tokenizer
        with LOCK:
            tokenizer.encode_special_tokens = False  # special tokens written out in a prompt are meant as such
            if not isinstance(prompt, str):
                if self.template is None:
                    raise DataError("this model has no chat template: pass a text to continue instead of messages.")
                # The template writes special tokens itself.
                return tokenizer.encode(self.template(prompt), add_special_tokens=False).ids or list(self.end_tokens[:1])
            if self.markers is not None:
                ids = tokenizer.encode(prompt, add_special_tokens=False).ids
                return [*self.markers.before, *ids, *self.markers.after]
            return tokenizer.encode(prompt).ids or list(self.end_tokens[:1])

    def to_prompt(self, text: str, chat: bool | None = None) -> Prompt:
        """Return a text as a user message if `chat` is true, or None and the model has a chat template; else unchanged."""
        return [{"role": "user", "content": text}] if chat or (chat is None and self.template is not None) else text

    def prepare(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Sequence[Sequence[int]]]:
        """Return what generates and the tokens it starts from: for an encoder-decoder, after encoding the sources."""
        if self.markers is None:
            return self.network, rows
        source, mask = self.text.batch([np.array(row, dtype=np.int64) for row in rows])
        device = next(self.network.parameters()).device
        state = EncoderDecoderState(self.network, torch.from_numpy(source).to(device), torch.from_numpy(mask).to(device))
        return state, [self.markers.target_start] * len(rows)

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[str]:
        """Return the answer to each prompt; prompts of any length share batches. `options` are those of `GenerationConfig`."""
        options = rename_aliases(options, PREDICT_ALIASES)
        answers_by_row: dict[int, str] = {}
        rows = [self.tokens(prompt) for prompt in prompts]
        for group in group_by_length([len(row) for row in rows]):
            network, starts = self.prepare([rows[i] for i in group])
            config = self.build_config(options, max(map(len, starts)))
            generated = generate_batch(
                network,
                starts,
                config,
                eos_token_ids=self.end_tokens,
                decode=self.text.decode,
                row_ids=group,
                prefix_length=len(self.markers.target_start) - 1 if self.markers else 0,
                rules=self.published.rules,
            )
            answers_by_row |= {i: truncate_at_stop(self.text.decode(row), config.stop_list) for i, row in zip(group, generated)}
        return [answers_by_row[i] for i in range(len(rows))]

    def build_config(self, options: Mapping[str, Any], prefix: int) -> GenerationConfig:
        """Return the options of a request over those that were published with the model.

        `prefix` is the number of tokens before the first generated one.
        """
        return self.published.apply(self.config_type, options, prefix)

    def predict(self, inputs: Any = (), *, chat: Any = None, **options: Any) -> Predictions:
        """Return `input` and `text` for each prompt. `chat` forces or prevents the chat template."""
        prompts = as_list(inputs)
        if not prompts:
            raise SettingsError("no prompt: fieldguide predict MODEL 'Once upon a time'")
        chat, options = self.parse(chat, options)
        texts = self.generate([self.to_prompt(p, chat) if isinstance(p, str) else p for p in prompts], **options)
        return Predictions([{"input": prompt, "text": text} for prompt, text in zip(prompts, texts)], self.published.notes)

    def stream(self, source: Any, *, chat: Any = None, **options: Any) -> Iterator[str] | None:
        """Return the answer to one prompt piece by piece; None for beam search, whose answer is known only at its end."""
        chat, options = self.parse(chat, options)
        if self.build_config(options, 0).effective_beams > 1:
            return None
        network, starts = self.prepare([self.tokens(self.to_prompt(source, chat) if isinstance(source, str) else source)])
        return stream_text(
            network,
            starts[0],
            self.build_config(options, len(starts[0])),
            eos_token_ids=self.end_tokens,
            decode=self.text.decode,
            rules=self.published.rules,
        )

    def parse(self, chat: Any, options: Mapping[str, Any]) -> tuple[bool | None, dict[str, Any]]:
        """Return prediction options with their types. Raises `SettingsError` for unknown keys and values out of range."""
        parsed = parse_options(self.config_type, options, owner="a language model", aliases=PREDICT_ALIASES)
        self.config_type(**parsed)
        return None if chat is None else parse_value("chat", chat, bool), parsed


def read_tokenizer(checkpoint: Checkpoint) -> TokenizerFiles:
    """Return the tokenizer files of a checkpoint. Raises `WeightsError` if none can be read."""
    path = checkpoint.path
    try:
        return read(path if path.is_dir() or path.suffix == ".gguf" else path.parent)
    except DataError as error:
        raise WeightsError(f"this model needs its tokenizer. {error}") from None


def find_end_tokens(files: TokenizerFiles) -> list[int]:
    """Return the ids of the tokens that end an answer: those that the files name, and those of known models."""
    return sorted({i for token in (*files.ends, *END_TOKENS) if (i := files.tokenizer.token_to_id(token)) is not None})


def build_chat_template(files: TokenizerFiles) -> ChatTemplate | None:
    """Return the chat template of the tokenizer files, if there is one."""
    return ChatTemplate(files.template, files.special) if files.template else None
