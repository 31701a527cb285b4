"""The generation options of a user, and the functions that all models use to generate text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.core.structure import MAX_SEED, Limits
from fieldguide.models.generation.beam_search import beam_search
from fieldguide.models.generation.encoder_decoder import EncoderDecoderState
from fieldguide.models.generation.sampling import GenerativeModel, Sampling, generate, left_pad
from fieldguide.models.generation.stop_strings import decode_stream, truncate_at_stop
from fieldguide.models.generation.token_rules import TokenRules

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
BATCH_PROMPTS = 32  # prompts per batch
MAX_NEW_TOKENS = 1 << 30  # tokens that a request may ask for
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class GenerationConfig:
    """Options of text generation.

    Sampling options (`SAMPLING_OPTIONS`) and beam search exclude each other. If neither is set, `defaults` apply.
    Raises `SettingsError` if both are set, and for values out of range.
    """

    max_new_tokens: Annotated[int, Limits(1, MAX_NEW_TOKENS)] = 200  # maximum number of generated tokens
    num_beams: Annotated[int | None, Limits(1, 1000)] = None  # number of beams; 1 = no beam search
    length_penalty: float = 1.0  # exponent of the length in beam search: 0 = no penalty, 1 = mean log-probability
    temperature: Annotated[float | None, Limits(0, 1_000_000)] = None  # 0 = greedy: always the most likely token
    top_k: Annotated[int | None, Limits(0, MAX_NEW_TOKENS)] = None  # keep only the k most likely tokens; 0 = off
    top_p: Annotated[float | None, Limits(1e-9, 1)] = None  # keep the most likely tokens with this total probability; 1 = off
    min_p: Annotated[float | None, Limits(0, 1)] = None  # keep tokens with this fraction of the highest probability; 0 = off
    repetition_penalty: Annotated[float, Limits(1e-6, 1_000_000)] = (
        1.0  # above 1: tokens that occurred before become less likely
    )
    no_repeat_ngram_size: Annotated[int, Limits(0, MAX_NEW_TOKENS)] = 0  # no sequence of this many tokens occurs twice; 0 = off
    min_new_tokens: Annotated[int, Limits(0, MAX_NEW_TOKENS)] = 0  # minimum number of generated tokens
    early_stopping: bool = False  # beam search ends as soon as num_beams outputs have ended
    stop_strings: str = ""  # stop string, not part of the output; several as JSON: ["one", "two"]
    seed: Annotated[int, Limits(-MAX_SEED, MAX_SEED)] = 0  # seed of sampling

    defaults: ClassVar[Mapping[str, float]] = {"num_beams": 1, "temperature": 0.8, "top_p": 0.95}

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("min_new_tokens", 0), ("no_repeat_ngram_size", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise SettingsError(f"{name}={value} must be at least {least}.")
        if (self.num_beams or 1) > 1 and self.is_sampling:
            raise SettingsError(
                f"num_beams={self.num_beams} is a deterministic search and cannot be combined with sampling: leave out "
                f"{', '.join(self.sampling_overrides)}, or set num_beams=1."
            )
        _ = self.sampling  # validates the ranges

    @property
    def sampling_overrides(self) -> dict[str, float]:
        """Sampling options that are set."""
        return {name: value for name in SAMPLING_OPTIONS if (value := getattr(self, name)) is not None}

    @property
    def is_sampling(self) -> bool:
        """Whether the options that are set require sampling."""
        return bool(self.sampling_overrides) and self.temperature != 0

    @property
    def effective_beams(self) -> int:
        """Number of beams; 1 = no beam search."""
        return self.num_beams or (1 if self.sampling_overrides else int(self.defaults["num_beams"]))

    @property
    def sampling(self) -> Sampling:
        """Sampling parameters, with defaults for those that are not set."""
        defaults = {name: value for name, value in self.defaults.items() if name in SAMPLING_OPTIONS}
        if self.is_sampling and not defaults.get("temperature"):  # sampling needs a temperature above 0
            defaults["temperature"] = 1.0
        values: dict[str, Any] = {**defaults, **self.sampling_overrides}
        return Sampling(**values, repetition=self.repetition_penalty)

    def token_rules(self, eos_token_ids: Sequence[int], published: TokenRules | None = None) -> TokenRules:
        """Return the constraints on tokens: those of a publisher, with the options over them."""
        return replace(
            published or TokenRules(),
            eos_token_ids=tuple(eos_token_ids),
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            min_new_tokens=self.min_new_tokens,
        )

    @property
    def stop_list(self) -> list[str]:
        """Stop strings as a list."""
        if not self.stop_strings.startswith("["):
            return [self.stop_strings] if self.stop_strings else []
        try:
            found = json.loads(self.stop_strings)
        except ValueError:
            return [self.stop_strings]
        return found if found and all(isinstance(text, str) and text for text in found) else [self.stop_strings]


@dataclass(frozen=True)
class BeamSearch(GenerationConfig):
    """Options with beam search (four beams) as the default, for outputs that depend on a source, such as translations."""

    defaults: ClassVar[Mapping[str, float]] = {"num_beams": 4, "temperature": 0.0}


@dataclass(frozen=True)
class Greedy(GenerationConfig):
    """Options with greedy decoding as the default."""

    defaults: ClassVar[Mapping[str, float]] = {"num_beams": 1, "temperature": 0.0}


def generate_batch(
    model: GenerativeModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    eos_token_ids: Sequence[int],
    decode: Decode | None = None,
    row_ids: Sequence[int] | None = None,
    max_lengths: Tensor | None = None,
    prefix_length: int = 0,
    rules: TokenRules | None = None,
) -> list[list[int]]:
    """Return the generated token IDs of each prompt, without the end token.

    `model` has `new_cache`, `last` and `config.length` (`EncoderDecoderState` provides them for an encoder-decoder).
    `row_ids` identify the prompts and select their random numbers. `max_lengths` (B int64) limits each output and
    replaces `config.max_new_tokens`. `decode` is needed for stop strings: generation ends when every output contains
    one (`truncate_at_stop` removes it). `prefix_length` tokens of each prompt count as part of the output when beam
    search compares lengths. `rules` are constraints of the publisher (`GenerationConfig.token_rules` adds the options).
    """
    rules = config.token_rules(eos_token_ids, rules)
    if config.effective_beams > 1:
        return search_beams(
            model,
            prompts,
            config,
            eos_token_ids=eos_token_ids,
            max_lengths=max_lengths,
            prefix_length=prefix_length,
            rules=rules,
        )
    max_new_tokens = clamp_to_context(model, prompts, config.max_new_tokens if max_lengths is None else int(max_lengths.max()))
    max_length = [max_new_tokens] * len(prompts) if max_lengths is None else max_lengths.tolist()
    stops = config.stop_list if decode else []
    rows: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(rows)
    for step in generate(
        model,
        prompts,
        max_new_tokens,
        sampling=config.sampling,
        eos_token_ids=eos_token_ids,
        seed=config.seed,
        row_ids=row_ids,
        rules=rules,
    ):
        for i, token in enumerate(step.tolist()):
            if done[i]:
                continue
            ended = token < 0 or token in eos_token_ids
            if not ended:
                rows[i].append(token)
            text = decode(rows[i]) if decode and stops else ""
            done[i] = ended or len(rows[i]) >= max_length[i] or len(truncate_at_stop(text, stops)) < len(text)
        if all(done):
            break
    return rows


def search_beams(
    model: GenerativeModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    eos_token_ids: Sequence[int],
    max_lengths: Tensor | None = None,
    prefix_length: int = 0,
    rules: TokenRules | None = None,
) -> list[list[int]]:
    """Return the best output of each prompt found by beam search; the prompts are read once, in one batch.

    Raises `SettingsError` without end tokens, for an empty prompt, and for a prompt that leaves no room in the
    context.
    """
    if not eos_token_ids:
        raise SettingsError("Beam search needs an end token, and the tokenizer of this model has none. Set num_beams=1.")
    if not all(len(p) for p in prompts):
        raise SettingsError("A prompt is empty. Pass at least one token.")
    beams, device, longest = config.effective_beams, next(model.parameters()).device, model.config.length
    rows, mask = left_pad(prompts, device)
    max_new_tokens = min(config.max_new_tokens if max_lengths is None else int(max_lengths.max()), longest - rows.shape[1] + 1)
    if max_new_tokens < 1:
        raise SettingsError(
            f"A prompt of {rows.shape[1]} tokens leaves beam search no room in the model's length={longest}. "
            "Shorten it, or set num_beams=1, which drops the oldest tokens instead."
        )
    with torch.inference_mode():
        cache = model.new_cache(len(rows), min(longest, rows.shape[1] + max_new_tokens))
        if rows.shape[1] > 1:
            model.last(rows[:, :-1], None if mask.all() else mask[:, :-1], cache)
        cache.widen(beams)
        seen = torch.where(mask, rows, -1).repeat_interleave(beams, 0)

        def adjust(logp: Tensor, generated: Tensor) -> Tensor:  # BK V, BK T (-1 after the tokens so far) -> BK V
            step = int((generated >= 0).sum(1).max())
            history = torch.cat([seen, generated[:, :step]], 1)
            logp = config.sampling.penalize_repetition(logp, history)
            return rules.apply(logp, history, step, step == max_new_tokens - 1) if rules and rules.is_active else logp

        is_adjusted = config.repetition_penalty != 1 or (rules is not None and rules.is_active)
        found, _ = beam_search(
            lambda token: model.last(token, None, cache)[:, None],
            cache,
            begin=seen[:, -1],
            eos_token_ids=eos_token_ids,
            num_beams=beams,
            max_new_tokens=max_new_tokens,
            length_penalty=config.length_penalty,
            prefix_length=prefix_length,
            adjust=adjust if is_adjusted else None,
            early_stopping=config.early_stopping,
            max_lengths=None if max_lengths is None else max_lengths.to(device),
        )
    return [[i for i in row if i >= 0] for row in found[:, 0].tolist()]


def stream_text(
    model: GenerativeModel,
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    eos_token_ids: Sequence[int],
    decode: Decode,
    rules: TokenRules | None = None,
) -> Iterator[str]:
    """Yield the output for one prompt piece by piece; without beam search."""
    steps = generate(
        model,
        [prompt],
        clamp_to_context(model, [prompt], config.max_new_tokens),
        sampling=config.sampling,
        eos_token_ids=eos_token_ids,
        seed=config.seed,
        rules=config.token_rules(eos_token_ids, rules),
    )
    return decode_stream((int(step) for step in steps), decode, eos_token_ids, config.stop_list)


def clamp_to_context(model: GenerativeModel, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """Return `tokens`, or as many as fit into the context of an encoder-decoder.

    Decoders drop their oldest tokens instead, so they have no such limit.
    """
    if not isinstance(model, EncoderDecoderState):
        return tokens
    return min(tokens, model.config.length - max(map(len, prompts)) + 1)


def group_by_length(lengths: Sequence[int], batch_size: int = BATCH_PROMPTS) -> list[list[int]]:
    """Return batches of prompt indices, at most `batch_size` each, with prompts of similar length together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
