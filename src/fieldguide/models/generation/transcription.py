"""Decoding of Whisper (Radford et al. 2022, arXiv:2212.04356, section 4.5): rules for times, fallbacks, windows of 30 seconds.

It follows the authors' code with greedy decoding. Tokens are ids; texts come from a function that the caller passes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from fieldguide.core.structure import MAX_SEED, Limits

Decode = Callable[[Sequence[int]], str]
SECONDS_PER_TIME = 0.02  # of a time token
FRAMES_PER_TIME = 2  # frames of features in that time
MAX_FIRST_TIME = 50  # a window begins at 1 s at the latest
RESET_TEMPERATURE = 0.5  # above it, a text is no longer context for the next window
FALLBACKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # temperatures, one after the other until a window passes the checks


@dataclass(frozen=True)
class SpeechTokens:
    """The special tokens of a tokenizer. Times are the ids from `time` on: 0.00, 0.02, ... 30.00 seconds.

    `languages` is empty for networks that know one language and no translation; their sequence begins with `start` alone.
    """

    start: int
    end: int
    transcribe: int
    translate: int
    previous: int
    no_speech: int
    no_times: int
    time: int
    languages: Mapping[str, int] = field(default_factory=dict)
    suppressed: tuple[int, ...] = ()  # never predicted
    first_suppressed: tuple[int, ...] = ()  # not predicted first: a blank, the end

    def build_sequence(self, language: str, task: str, times: bool) -> list[int]:
        """Return the tokens before the text."""
        sequence = [self.start]
        if self.languages:
            sequence += [self.languages[language], self.translate if task == "translate" else self.transcribe]
        return sequence if times else [*sequence, self.no_times]


@dataclass(frozen=True)
class TranscriptionConfig:
    """The options of a transcription; the defaults are those of the authors.

    A window is decoded again at the next higher temperature if its text repeats itself, which compresses well, or is improbable. It is
    skipped if it is probably silence and its text is improbable.
    """

    language: str | None = None  # code of the language, such as de; None: detected from the first 30 seconds
    task: str = "transcribe"  # or translate: to English
    times: bool = True  # predict the times of phrases
    temperature: Annotated[float | None, Limits(0, 10)] = None  # 0 = most probable token; None: 0, then higher if needed
    best_of: Annotated[int, Limits(1, 100)] = 5  # samples at a temperature above 0, of which the most probable is kept
    max_compression: float = 2.4  # ratio of bytes to compressed bytes above which a text repeats itself
    min_log_probability: float = -1.0  # mean of the tokens below which a text is improbable
    max_silence: Annotated[float, Limits(0, 1)] = 0.6  # probability of no speech above which a window may be skipped
    use_context: bool = True  # give the text of the window before to the network
    prompt: str = ""  # context of the first window, such as names
    seed: Annotated[int, Limits(-MAX_SEED, MAX_SEED)] = 0  # seed of sampling


@dataclass(frozen=True)
class Window:
    """The result for one window."""

    tokens: list[int]  # with times, without the end
    text: str
    mean_log_probability: float
    no_speech: float
    temperature: float

    @property
    def compression(self) -> float:
        """Return the ratio of the text's bytes to those of its compressed form."""
        content = self.text.encode()
        return len(content) / len(zlib.compress(content))


@dataclass(frozen=True)
class Segment:
    """A phrase with its times in seconds, and the numbers of its window."""

    start: float
    end: float
    text: str
    tokens: list[int]
    window: Window


def restrict_times(logits: Tensor, rows: Sequence[Sequence[int]], tokens: SpeechTokens) -> Tensor:  # B vocab -> B vocab
    """Apply the rules of times to the logits of the next token: they come in pairs, do not decrease, and begin the text."""
    logits, time, end = logits.clone(), tokens.time, tokens.end
    logits[:, tokens.no_times] = -torch.inf
    for row, known in zip(logits, rows):
        last = len(known) > 0 and known[-1] >= time
        before = len(known) < 2 or known[-2] >= time
        if last and before:
            row[time:] = -torch.inf  # a pair is complete: text follows
        elif last:
            row[:end] = -torch.inf  # a phrase has ended: its second time, or the end of all, follows
        if seen := [token for token in known if token >= time]:
            row[time : seen[-1] if last and not before else seen[-1] + 1] = -torch.inf
        if not known:
            row[:time] = -torch.inf
            row[time + MAX_FIRST_TIME + 1 :] = -torch.inf
        likely = row.float().log_softmax(-1)
        if likely[time:].logsumexp(-1) > likely[:time].max():  # all times together against the best text
            row[:time] = -torch.inf
    return logits


@torch.inference_mode()
def detect_language(network: Any, cross: Any, tokens: SpeechTokens) -> tuple[str, float]:
    """Return the most probable language of an encoded window, and its probability."""
    cache = network.new_cache(1, 1)
    cache.cross = cross
    logits = network(None, torch.tensor([[tokens.start]], device=network.embed.weight.device), None, cache)[0, -1]
    names = list(tokens.languages)
    p = logits[torch.tensor([tokens.languages[name] for name in names], device=logits.device)].float().softmax(-1)
    best = int(p.argmax())
    return names[best], float(p[best])


@torch.inference_mode()
def decode_window(
    network: Any,
    cross: Any,
    tokens: SpeechTokens,
    sequence: Sequence[int],
    context: Sequence[int],
    temperature: float,
    config: TranscriptionConfig,
    decode: Decode,
) -> Window:
    """Decode an encoded window after a context, at one temperature."""
    length = network.config.length
    prompt = [*([tokens.previous, *context[-(length // 2 - 1) :]] if context else []), *sequence]
    count, device = config.best_of if temperature > 0 else 1, network.embed.weight.device
    cache = network.new_cache(count, length)
    cache.cross = cross
    rows: list[list[int]] = [[] for _ in range(count)]
    sums, done, no_speech = [0.0] * count, [False] * count, 0.0
    generator = torch.Generator().manual_seed(config.seed)
    current = torch.tensor([prompt] * count, device=device)
    for step in range(min(length // 2, length - len(prompt))):
        logits = network(None, current, None, cache)
        if step == 0:
            at = prompt.index(tokens.start)
            no_speech = float(logits[0, at].float().softmax(-1)[tokens.no_speech])
        last = logits[:, -1].float()
        last[:, list(tokens.suppressed)] = -torch.inf
        if step == 0:
            last[:, list(tokens.first_suppressed)] = -torch.inf
        if config.times:
            last = restrict_times(last, rows, tokens)
        likely = last.log_softmax(-1)
        if temperature > 0:
            chosen = torch.multinomial((last / temperature).softmax(-1).cpu(), 1, generator=generator)[:, 0].tolist()
        else:
            chosen = last.argmax(-1).tolist()
        for row, token in enumerate(chosen):
            if not done[row]:
                sums[row] += float(likely[row, token])
                done[row] = token == tokens.end
                rows[row] += [] if done[row] else [token]
        if all(done):
            break
        current = torch.tensor(chosen, device=device)[:, None]
    scores = [
        total / max(len(row), 1) for total, row in zip(sums, rows)
    ]  # the authors rank samples by the mean without the end
    best = max(range(count), key=lambda row: scores[row])
    text = decode([token for token in rows[best] if token < tokens.end]).strip()
    return Window(rows[best], text, sums[best] / (len(rows[best]) + 1), no_speech, temperature)


def decode_with_fallback(
    network: Any,
    cross: Any,
    tokens: SpeechTokens,
    sequence: Sequence[int],
    context: Sequence[int],
    config: TranscriptionConfig,
    decode: Decode,
) -> Window:
    """Decode a window at one temperature after the other until the text neither repeats itself nor is improbable."""
    temperatures = FALLBACKS if config.temperature is None else (config.temperature,)
    for temperature in temperatures:
        window = decode_window(network, cross, tokens, sequence, context, temperature, config, decode)
        repeats = window.compression > config.max_compression
        improbable = window.mean_log_probability < config.min_log_probability
        silent = window.no_speech > config.max_silence and improbable
        if silent or not (repeats or improbable):
            break
    return window


def cut_segments(window: Window, offset: float, frames: int, tokens: SpeechTokens, decode: Decode) -> tuple[list[Segment], int]:
    """Return the phrases of a window that begins at `offset` seconds, and the number of frames after which the next begins."""
    ids, time = window.tokens, tokens.time
    is_time = [token >= time for token in ids]
    ends_alone = is_time[-2:] == [False, True]
    cuts = [i for i in range(1, len(ids)) if is_time[i - 1] and is_time[i]]
    make = lambda start, end, part: Segment(
        start, end, decode([token for token in part if token < tokens.end]).strip(), list(part), window
    )
    if not cuts:
        seconds = frames * SECONDS_PER_TIME / FRAMES_PER_TIME
        times = [token for token in ids if token >= time]
        if times and times[-1] != time:
            seconds = (times[-1] - time) * SECONDS_PER_TIME
        return [make(offset, offset + seconds, ids)], frames
    if ends_alone:
        cuts.append(len(ids))
    segments, first = [], 0
    for cut in cuts:
        part = ids[first:cut]
        start, end = (offset + (token - time) * SECONDS_PER_TIME for token in (part[0], part[-1]))
        segments.append(make(start, end, part))
        first = cut
    return segments, frames if ends_alone else (ids[first - 1] - time) * FRAMES_PER_TIME


def transcribe(
    network: Any,
    features: Tensor,
    frames: int,
    tokens: SpeechTokens,
    config: TranscriptionConfig,
    decode: Decode,
    encode: Callable[[str], list[int]],
    pad: Callable[[Tensor], Tensor],
) -> tuple[str, list[Segment]]:  # 1 T F
    """Return the language of a recording and its phrases.

    `features` are those of the recording, `frames` long, and of silence after it. `pad` makes a window of a part of them.
    """
    size = 2 * network.config.source_length
    encode_part = lambda part: network.encode_source(part, None)
    language = config.language or ""
    if tokens.languages and not language:
        with torch.inference_mode():
            language = detect_language(network, encode_part(pad(features[:, :size])), tokens)[0]
    sequence = tokens.build_sequence(language or "en", config.task, config.times)
    known = encode(" " + config.prompt.strip()) if config.prompt.strip() else []
    reset, at = 0, 0
    found: list[Segment] = []
    while at < frames:
        part = min(size, frames - at)
        with torch.inference_mode():
            cross = encode_part(pad(features[:, at : at + part]))
        window = decode_with_fallback(network, cross, tokens, sequence, known[reset:], config, decode)
        if window.no_speech > config.max_silence and window.mean_log_probability <= config.min_log_probability:
            at += part
            continue
        offset = at * SECONDS_PER_TIME / FRAMES_PER_TIME
        segments, step = cut_segments(window, offset, part, tokens, decode)
        kept = [segment for segment in segments if segment.text and segment.start != segment.end]
        found += kept
        known += [token for segment in kept for token in segment.tokens]
        if not config.use_context or window.temperature > RESET_TEMPERATURE:
            reset = len(known)
        at += max(step, 1)
    return language or "en", found
