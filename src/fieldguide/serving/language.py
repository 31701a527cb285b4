"""Language models as the server sees them: prompts to tokens, options to a config, tokens to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fieldguide.core.errors import SettingsError
from fieldguide.core.options import PREDICT_ALIASES, rename_aliases
from fieldguide.inference.predictor import Predictor, TaskPredictor
from fieldguide.inference.text_generation import TextGenerator
from fieldguide.models.generation import GenerationConfig, TokenRules
from fieldguide.models.generation.slots import SlotRow
from fieldguide.models.generation.stop_strings import StreamDecoder

Messages = Sequence[Mapping[str, str]]


class LanguageModel:
    """A decoder with its tokenizer.

    `chats` says whether it answers conversations, `completes` whether it continues texts. `length` is the number of tokens that it
    reads.
    """

    chats: bool
    completes: bool
    length: int
    end_tokens: Sequence[int]
    decode: Callable[[list[int]], str]
    rules: TokenRules | None = None

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text to continue."""
        raise NotImplementedError

    def encode_messages(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation, up to the start of the answer."""
        raise NotImplementedError

    def build_config(self, options: Mapping[str, Any], prefix: int) -> GenerationConfig:
        """Return the config of a request whose prompt has `prefix` tokens. Raises `SettingsError`."""
        raise NotImplementedError


class PublishedLanguageModel(LanguageModel):
    """A pretrained decoder."""

    completes = True

    def __init__(self, predictor: TextGenerator):
        self.predictor, self.chats, self.length = predictor, predictor.template is not None, predictor.network.config.length
        self.end_tokens, self.decode, self.rules = predictor.end_tokens, predictor.text.decode, predictor.published.rules

    def encode_text(self, text: str) -> list[int]:
        return self.predictor.tokens(text)

    def encode_messages(self, messages: Messages) -> list[int]:
        return self.predictor.tokens([dict(message) for message in messages])

    def build_config(self, options: Mapping[str, Any], prefix: int) -> GenerationConfig:
        _, parsed = self.predictor.parse(None, options)
        return self.predictor.build_config(rename_aliases(parsed, PREDICT_ALIASES), prefix)


class TrainedLanguageModel(LanguageModel):
    """A run whose task continues prompts: it has `prompt`, `ends`, `chat` and a tokenizer."""

    def __init__(self, predictor: Any):
        self.task = predictor.task
        self.chats, self.completes, self.length = self.task.chat, not self.task.chat, predictor.model.config.length
        self.end_tokens, self.decode = self.task.ends, self.task.text.decode

    def encode_text(self, text: str) -> list[int]:
        return self.task.prompt([("", text)])

    def encode_messages(self, messages: Messages) -> list[int]:
        return self.task.prompt([(message["role"], message["content"]) for message in messages])

    def build_config(self, options: Mapping[str, Any], prefix: int) -> GenerationConfig:
        return self.task.parse_predict_options(dict(options))


def find_language_model(predictor: Predictor) -> LanguageModel | None:
    """Return the language model of a predictor, or None if its answers are not the continuation of a prompt."""
    loop = predictor.signature.loop
    if loop is None or loop.kind != "autoregressive" or not hasattr(predictor.model, "new_cache"):
        return None
    if isinstance(predictor, TextGenerator):
        return PublishedLanguageModel(predictor)
    if isinstance(predictor, TaskPredictor) and hasattr(predictor.task, "prompt"):
        return TrainedLanguageModel(predictor)
    return None


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens, with the config of its answer."""

    tokens: list[int]
    config: GenerationConfig

    def make_row(self, model: LanguageModel, row_id: int) -> SlotRow:
        """Return the row of a slot engine for an answer."""
        config = self.config
        return SlotRow(
            prompt=self.tokens,
            sampling=config.sampling,
            decoder=StreamDecoder(model.decode, config.stop_list),
            eos_token_ids=model.end_tokens,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            row_id=row_id,
            rules=config.token_rules(model.end_tokens, model.rules),
        )


def build_prompt(model: LanguageModel, tokens: list[int], options: Mapping[str, Any], most: int) -> Prompt:
    """Return a prompt with its config, whose answer has at most `most` tokens. Raises `SettingsError`."""
    config = model.build_config(options, len(tokens))
    if config.max_new_tokens > most:
        raise SettingsError(f"max_new_tokens={config.max_new_tokens:,} must be at most {most:,} here.")
    return Prompt(tokens, config)
