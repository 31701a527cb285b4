"""Speaker: a pretrained language model with its tokenizer, ready to go on from a text or to answer in a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import nn

from fieldguide.checkpoints.load import Checkpoint, filled, inspect_checkpoint
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.core.settings import asked_of
from fieldguide.data.preprocessing import Text
from fieldguide.data.preprocessing.chat_template import ChatTemplate
from fieldguide.data.preprocessing.sequence_markers import Frame, framed
from fieldguide.data.preprocessing.tokenizer_files import Words, ended, read
from fieldguide.models.generation import GenerationConfig, Greedy, Sourced, engine, streamed
from fieldguide.models.generation.engine import grouped
from fieldguide.models.generation.quantization import shrink
from fieldguide.models.generation.stop_strings import cut

Prompt = str | Sequence[Mapping[str, Any]]  # a text to go on from, or messages of role and content


class Speaker:
    """`network` gives the next token; `ends` are tokens that end an answer; `template` writes conversations; `frame`, of an
    encoder-decoder, is what stands around its sources and before its answers."""

    def __init__(
        self,
        network: nn.Module,
        text: Text,
        ends: Sequence[int],
        template: ChatTemplate | None = None,
        frame: Frame | None = None,
    ):
        self.network, self.text, self.ends, self.template = network.eval(), text, tuple(ends), template
        self.frame, self.manner = frame, GenerationConfig if frame is None else Greedy

    @classmethod
    def load(
        cls,
        source: str | Path | Checkpoint,
        eight: bool = False,
        source_language: str | None = None,
        target_language: str | None = None,
        **overrides: Any,
    ) -> Speaker:
        """From a folder of transformers with its tokenizer, a GGUF file, or hf:organisation/name; or what `described` said of
        one. With `eight`, its weights are held in eight bits. The languages are those of an encoder-decoder that knows
        several, as its tokenizer calls them. Raises `WeightsError` for a network that does not say what follows, and where
        the tokenizer is missing; `SettingsError` where languages must be named, or are and the network knows none."""
        found, source = (source, source.path) if isinstance(source, Checkpoint) else (inspect_checkpoint(source), source)
        if "tokens" not in found.card.output_types or found.card.input_type not in ("tokens", "pair"):
            raise WeightsError(
                f"{source} is {found.card.name}, which gives {' or '.join(found.card.output_types)}: to speak, a "
                "network must say which token follows"
            )
        if found.card.input_type == "tokens" and (source_language or target_language):
            raise SettingsError(
                f"{source} is {found.card.name}, which goes on from a text and has no languages to be named: "
                "leave out source and target."
            )
        network = filled(found.card, {**found.values, **overrides}, found.state, found.origin, str(source))
        folder = found.path if found.path.is_dir() else found.path.parent
        words = words_of(found)
        if words.tokenizer.get_vocab_size() > network.config.vocab_size:
            raise WeightsError(
                f"{source}: its tokenizer has {words.tokenizer.get_vocab_size():,} tokens, the network {network.config.vocab_size:,}"
            )
        text, frame, ends = Text(words.tokenizer), None, ends_of(words)
        if found.card.input_type == "pair":
            config = network.config
            frame = framed(
                text,
                SimpleNamespace(
                    tokenizer=str(folder),
                    begin=getattr(config, "begin", None),
                    source_language=source_language,
                    target_language=target_language,
                ),
                CALLED,
            )
            ends = sorted({getattr(config, "end", frame.end), *ended(folder)})
        network = shrink(network) if eight else network
        return cls(network, text, ends, template_of(words) if frame is None else None, frame)

    def tokens(self, prompt: Prompt) -> list[int]:
        """What the network reads. Raises `DataError` for messages where there is no chat template."""
        made = self.text.tokenizer
        made.encode_special_tokens = False  # what is spelt out in a prompt is meant
        if not isinstance(prompt, str):
            if self.template is None:
                raise DataError("this model has no chat template: give a text to go on from")
            # The template writes special tokens itself.
            return made.encode(self.template(prompt), add_special_tokens=False).ids or list(self.ends[:1])
        if self.frame is not None:
            return [*self.frame.before, *made.encode(prompt, add_special_tokens=False).ids, *self.frame.after]
        return made.encode(prompt).ids or list(self.ends[:1])

    def question(self, text: str, chat: bool | None = None) -> Prompt:
        """A text as a question in a conversation, where the model knows such or the user says so; else as it is."""
        return [{"role": "user", "content": text}] if chat or (chat is None and self.template is not None) else text

    def ready(self, rows: Sequence[Sequence[int]]) -> tuple[Any, Sequence[Sequence[int]]]:
        """What goes on, and from what: decoders from the prompts, others from the begin of answers, once they have read."""
        if self.frame is None:
            return self.network, rows
        source, mask = self.text.batch([np.array(row, dtype=np.int64) for row in rows])
        device = next(self.network.parameters()).device
        sourced = Sourced(self.network, torch.from_numpy(source).to(device), torch.from_numpy(mask).to(device))
        return sourced, [self.frame.said] * len(rows)

    def say(self, prompts: Sequence[Prompt], **how: Any) -> list[str]:
        """An answer to each prompt; prompts of any length together. `how` is said in the words of `Manner`."""
        rows, manner, said = [self.tokens(p) for p in prompts], self.manner(**how), {}
        for group in grouped([len(row) for row in rows]):
            network, begun = self.ready([rows[i] for i in group])
            found = engine(
                network,
                begun,
                manner,
                ends=self.ends,
                decode=self.text.decode,
                numbers=group,
                before=len(self.frame.said) - 1 if self.frame else 0,
            )
            said |= {i: cut(self.text.decode(row), manner.stops) for i, row in zip(group, found)}
        return [said[i] for i in range(len(rows))]

    def stream(self, prompt: Prompt, **how: Any) -> Iterator[str]:
        """The answer piece by piece. Raises `SettingsError` for beams, which know the answer when they are done."""
        manner = self.manner(**how)
        if manner.searched > 1:
            raise SettingsError("an answer that beams search for comes as a whole: leave out beams, or use `say`")
        network, begun = self.ready([self.tokens(prompt)])
        return streamed(network, begun[0], manner, ends=self.ends, decode=self.text.decode)


CALLED = ("source", "target")  # how a user names languages
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|endoftext|>", "</s>")  # that answers end with

HELD = ("float32", "int8")  # what weights may be while they answer


def settled(asked: Mapping[str, str], prompts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], bool | None]:
    """What a user asks of a language model: how it is loaded and how it answers, as arguments of `load` and `say`, and
    whether it is a conversation (None: as the model likes). Raises `SettingsError` for an unknown key, a value that cannot
    be, or nothing to go on from."""
    hints = get_type_hints(GenerationConfig)
    kinds = {
        **{f.name: hints[f.name] for f in fields(GenerationConfig)},
        "chat": bool,
        "weights": str,
        **dict.fromkeys(CALLED, str),
    }
    said = asked_of("a language model", asked, kinds)
    if not prompts:
        raise SettingsError("say what to go on from: fieldguide predict MODEL 'Once upon a time'")
    if said.get("weights", HELD[0]) not in HELD:
        raise SettingsError(f"weights={said['weights']!r} is none of {', '.join(HELD)}.")
    how = {f.name: said[f.name] for f in fields(GenerationConfig) if f.name in said}
    GenerationConfig(**how)  # refuses what is out of range before anything is loaded
    made = {"eight": said.get("weights") == "int8", **{f"{side}_language": said[side] for side in CALLED if side in said}}
    return made, how, said.get("chat")


def words_of(found: Checkpoint) -> Words:
    """The tokenizer of a pretrained network. Raises `WeightsError` where none lies beside it that can be read."""
    place = found.path if found.path.is_dir() or found.path.suffix == ".gguf" else found.path.parent
    try:
        return read(place)
    except DataError as error:
        raise WeightsError(f"a language model is not complete without its tokenizer. {error}") from None


def ends_of(words: Words) -> list[int]:
    """The tokens that end an answer: those that the files name, and those that models are known to end with."""
    return sorted({i for token in (*words.ends, *ENDS) if (i := words.tokenizer.token_to_id(token)) is not None})


def template_of(words: Words) -> ChatTemplate | None:
    return ChatTemplate(words.template, words.special) if words.template else None
