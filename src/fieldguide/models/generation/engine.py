"""Answers: how a user wants them written, and the one way in which all networks write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fieldguide.core.errors import SettingsError
from fieldguide.models.generation.beam_search import beam_search
from fieldguide.models.generation.encoder_decoder import Sourced
from fieldguide.models.generation.sampling import Sampling, generate, left_padded
from fieldguide.models.generation.stop_strings import cut, pieces

CHANCE = ("temperature", "top_k", "top_p", "min_p")
TOGETHER = 32  # prompts that are answered in one batch
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are written. What leaves something to chance (`CHANCE`) and a search among beams exclude each other;
    where a user says neither, `usual` decides. Raises `SettingsError` for both, and for values out of range."""

    max_new_tokens: int = 200  # at most, of an answer
    num_beams: int | None = None  # answers that a search keeps; 1 = none is searched for
    length_penalty: float = 1.0  # of length, in a search: 0 = none, 1 = the mean log-probability decides
    temperature: float | None = None  # 0 = always the likeliest token
    top_k: int | None = None  # only so many of the likeliest; 0 = off
    top_p: float | None = None  # only the likeliest that have this probability together; 1 = off
    min_p: float | None = None  # only those of this part of the likeliest one's probability; 0 = off
    repetition_penalty: float = 1.0  # above 1: tokens that were there become less likely
    stop: str = ""  # the answer ends before this text; several as JSON: ["one", "two"]
    seed: int = 0

    usual: ClassVar[Mapping[str, float]] = {"num_beams": 1, "temperature": 0.8, "top_p": 0.95}

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"{name}={value} must be at least 1.")
        if (self.num_beams or 1) > 1 and self.by_chance:
            raise SettingsError(
                f"num_beams={self.num_beams} is a deterministic search and cannot be combined with sampling: leave out "
                f"{', '.join(self.said)}, or set num_beams=1."
            )
        _ = self.sampling  # refuses what is out of range

    @property
    def said(self) -> dict[str, float]:
        return {name: value for name in CHANCE if (value := getattr(self, name)) is not None}

    @property
    def by_chance(self) -> bool:
        """Whether the user says so."""
        return bool(self.said) and self.temperature != 0

    @property
    def searched(self) -> int:
        """Beams of the search; 1 = there is none."""
        return self.num_beams or (1 if self.said else int(self.usual["num_beams"]))

    @property
    def sampling(self) -> Sampling:
        usual = {name: value for name, value in self.usual.items() if name in CHANCE}
        if self.by_chance and not usual.get("temperature"):  # what is drawn must have a chance
            usual["temperature"] = 1.0
        return Sampling(**{**usual, **self.said}, repetition=self.repetition_penalty)

    @property
    def stops(self) -> list[str]:
        """Texts that answers end before."""
        if not self.stop.startswith("["):
            return [self.stop] if self.stop else []
        try:
            found = json.loads(self.stop)
        except ValueError:
            return [self.stop]
        return found if found and all(isinstance(text, str) and text for text in found) else [self.stop]


@dataclass(frozen=True)
class Faithful(GenerationConfig):
    """Of what answers a source: the likeliest, as far as four beams find it."""

    usual: ClassVar[Mapping[str, float]] = {"num_beams": 4, "temperature": 0.0}


@dataclass(frozen=True)
class Greedy(GenerationConfig):
    """Always the likeliest token, where nothing else is said: of what answers as it is asked."""

    usual: ClassVar[Mapping[str, float]] = {"num_beams": 1, "temperature": 0.0}


def answers(
    network: Any,
    prompts: Sequence[Sequence[int]],
    how: GenerationConfig,
    *,
    ends: Sequence[int],
    decode: Decode | None = None,
    numbers: Sequence[int] | None = None,
    limits: Tensor | None = None,
    before: int = 0,
) -> list[list[int]]:
    """What a network says after each prompt, in tokens without the one that ends it.

    `network` has `new_cache`, `last` and `config.length` (`Sourced` makes such of an encoder-decoder). `numbers` are the
    prompts' own, by which chance comes to them. `limits` (B int64) bounds answers one by one, in the place of `how.tokens`.
    `decode`, for stop strings: where all answers have come to one, no more is written (`cut` takes it off). `before` tokens
    of all prompts count as part of the answer when a search compares lengths.
    """
    if how.searched > 1:
        return searched(network, prompts, how, ends=ends, limits=limits, before=before)
    most = room(network, prompts, how.max_new_tokens if limits is None else int(limits.max()))
    bounds = [most] * len(prompts) if limits is None else limits.tolist()
    stops = how.stops if decode else []
    rows: list[list[int]] = [[] for _ in prompts]
    over = [False] * len(rows)
    for step in generate(network, prompts, most, sampling=how.sampling, ends=ends, seed=how.seed, numbers=numbers):
        for i, token in enumerate(step.tolist()):
            if over[i]:
                continue
            ended = token < 0 or token in ends
            if not ended:
                rows[i].append(token)
            text = decode(rows[i]) if stops else ""
            over[i] = ended or len(rows[i]) >= bounds[i] or len(cut(text, stops)) < len(text)
        if all(over):
            break
    return rows


def searched(
    network: Any,
    prompts: Sequence[Sequence[int]],
    how: GenerationConfig,
    *,
    ends: Sequence[int],
    limits: Tensor | None = None,
    before: int = 0,
) -> list[list[int]]:
    """The best answer to each prompt that beams find: prompts are read once, together, then their beams go on."""
    if not ends:
        raise SettingsError("beams need a token that ends an answer, and this model's tokenizer names none")
    if not all(len(p) for p in prompts):
        raise SettingsError("there is nothing to go on from: a prompt is empty.")
    beams, device, longest = how.searched, next(network.parameters()).device, network.config.length
    rows, mask = left_padded(prompts, device)
    most = min(how.max_new_tokens if limits is None else int(limits.max()), longest - rows.shape[1] + 1)
    if most < 1:
        raise SettingsError(
            f"a prompt of {rows.shape[1]} tokens leaves beams no room in the network's length={longest}: "
            "shorten it, or say beams=1, with which what is oldest is forgotten."
        )
    with torch.inference_mode():
        cache = network.new_cache(len(rows), min(longest, rows.shape[1] + most))
        if rows.shape[1] > 1:
            network.last(rows[:, :-1], None if mask.all() else mask[:, :-1], cache)
        cache.widen(beams)
        seen = torch.where(mask, rows, -1).repeat_interleave(beams, 0)
        adjust = None if how.repetition_penalty == 1 else lambda logp, said: how.sampling.punished(logp, torch.cat([seen, said], 1))
        found, _ = beam_search(
            lambda token: network.last(token, None, cache)[:, None],
            cache,
            begin=seen[:, -1],
            ends=ends,
            beams=beams,
            most=most,
            penalty=how.length_penalty,
            before=before,
            adjust=adjust,
            limits=None if limits is None else limits.to(device),
        )
    return [[i for i in row if i >= 0] for row in found[:, 0].tolist()]


def streamed(
    network: Any, prompt: Sequence[int], how: GenerationConfig, *, ends: Sequence[int], decode: Decode
) -> Iterator[str]:
    """The answer to one prompt piece by piece; not searched for."""
    steps = generate(network, [prompt], room(network, [prompt], how.max_new_tokens), sampling=how.sampling, ends=ends, seed=how.seed)
    return pieces((int(step) for step in steps), decode, ends, how.stops)


def room(network: Any, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """So many tokens, or as many as there is room for: decoders forget what is oldest, an answer to a source is whole."""
    if not isinstance(network, Sourced):
        return tokens
    return min(tokens, network.config.length - max(map(len, prompts)) + 1)


def grouped(lengths: Sequence[int], most: int = TOGETHER) -> list[list[int]]:
    """Places of prompts, those of similar length together, at most so many."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[first : first + most] for first in range(0, len(order), most)]
