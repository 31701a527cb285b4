"""Speaker: a pretrained language model with its tokenizer, ready to go on from a text or to answer in a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fieldguide.data.prepare import Text
from fieldguide.errors import DataError, SettingsError, WeightsError, nearest
from fieldguide.generation import Sampling, beam_search, generate
from fieldguide.generation.chat import ChatTemplate
from fieldguide.generation.int8 import shrink
from fieldguide.generation.text import cut, pieces
from fieldguide.pretrained import Checkpoint, described, filled
from fieldguide.train.settings import from_text

Prompt = str | Sequence[Mapping[str, Any]]               # a text to go on from, or messages of role and content


class Speaker:
    """`network` gives the next token; `ends` are tokens that end an answer; `template` writes conversations."""

    def __init__(self, network: nn.Module, text: Text, ends: Sequence[int], template: ChatTemplate | None = None):
        self.network, self.text, self.ends, self.template = network.eval(), text, tuple(ends), template

    @classmethod
    def load(cls, source: str | Path | Checkpoint, eight: bool = False, **overrides: Any) -> Speaker:
        """From a folder of transformers with its tokenizer, a GGUF file, or hf:organisation/name; or what `described` said of
        one. With `eight`, its weights are held in eight bits. Raises `WeightsError` for a network that does not say what
        follows, and where the tokenizer is missing."""
        found, source = (source, source.path) if isinstance(source, Checkpoint) else (described(source), source)
        if "tokens" not in found.card.answers or found.card.takes != "tokens":
            raise WeightsError(f"{source} is {found.card.name}, which gives {' or '.join(found.card.answers)}: to speak, a "
                               "network must say which token follows")
        network = filled(found.card, {**found.values, **overrides}, found.state, found.origin, str(source))
        if found.path.suffix == ".gguf":
            from fieldguide.ggml import tokenizer
            made, special, template = tokenizer(found.path)
        else:
            made, special, template = beside(found.path if found.path.is_dir() else found.path.parent)
        if made.get_vocab_size() > network.config.vocab:
            raise WeightsError(f"{source}: its tokenizer has {made.get_vocab_size():,} tokens, the network "
                               f"{network.config.vocab:,}")
        ids = {name: made.token_to_id(token) for name, token in special.items()}
        ends = {i for i in (ids.get("eos_token"), *(made.token_to_id(t) for t in ENDS)) if i is not None}
        network = shrink(network) if eight else network
        return cls(network, Text(made), sorted(ends), ChatTemplate(template, special) if template else None)

    def tokens(self, prompt: Prompt) -> list[int]:
        """What the network reads. Raises `DataError` for messages where there is no chat template."""
        if isinstance(prompt, str):
            ids = self.text.tokenizer.encode(prompt).ids
        elif self.template is None:
            raise DataError("this model has no chat template: give a text to go on from")
        else:                                            # the template writes special tokens itself
            ids = self.text.tokenizer.encode(self.template(prompt), add_special_tokens=False).ids
        return ids or list(self.ends[:1])

    def question(self, text: str, chat: bool | None = None) -> Prompt:
        """A text as a question in a conversation, where the model knows such or the user says so; else as it is."""
        return [{"role": "user", "content": text}] if chat or (chat is None and self.template is not None) else text

    def say(self, prompts: Sequence[Prompt], *, tokens: int = 200, beams: int = 1, stop: Sequence[str] = (), seed: int = 0,
            sampling: Sampling | None = None) -> list[str]:
        """An answer to each prompt; prompts of any length together. `beams` above 1 searches for the likeliest answer."""
        read = [self.tokens(p) for p in prompts]
        if beams > 1:
            return [cut(self.text.decode(self.searched(row, tokens, beams)), stop) for row in read]
        said: list[list[int]] = [[] for _ in read]
        for step in generate(self.network, read, tokens, sampling=sampling or Sampling(), ends=self.ends, seed=seed):
            for row, token in zip(said, step.tolist()):
                if token >= 0 and token not in self.ends:
                    row.append(token)
        return [cut(self.text.decode(row), stop) for row in said]

    def stream(self, prompt: Prompt, *, tokens: int = 200, stop: Sequence[str] = (), seed: int = 0,
               sampling: Sampling | None = None) -> Iterator[str]:
        """The answer piece by piece."""
        steps = generate(self.network, [self.tokens(prompt)], tokens, sampling=sampling or Sampling(), ends=self.ends,
                         seed=seed)
        return pieces((int(step) for step in steps), self.text.decode, self.ends, stop)

    def searched(self, row: list[int], tokens: int, beams: int) -> list[int]:
        """The likeliest answer that ends, by beam search with the mean of log-probabilities."""
        if not self.ends:
            raise SettingsError("beams need a token that ends an answer, and this model's tokenizer names none")
        cache = self.network.new_cache(beams, len(row) + tokens + 1)
        rows = torch.tensor([row[:-1]] * beams, dtype=torch.int64)
        with torch.inference_mode():
            if rows.shape[1]:
                self.network.last(rows, None, cache)
        step = lambda token: self.network.last(token, None, cache)[:, None]
        found, _ = beam_search(step, cache, begin=row[-1], end=self.ends[0], beams=beams, most=tokens)
        return [int(i) for i in found[0, 0] if i >= 0]


ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|endoftext|>", "</s>")     # that answers end with

HELD = ("float32", "int8")     # what weights may be while they answer


def settled(asked: Mapping[str, str], prompts: Sequence[str]) -> tuple[dict[str, Any], bool | None]:
    """What a user asks of a language model, as arguments of `say`, and whether it is a conversation (None: as the model
    likes); `weights` is looked at by who loads it. Raises `SettingsError` for an unknown key, a value that cannot be, or
    nothing to go on from."""
    kinds = {**{f.name: int if f.name == "top_k" else float for f in fields(Sampling)}, "tokens": int, "beams": int,
             "seed": int, "stop": str, "chat": bool, "weights": str}
    for key in asked:
        if key not in kinds:
            raise SettingsError(f"a language model is not asked with {key!r}.{nearest(key, kinds)} It knows "
                                f"{', '.join(sorted(kinds))}.")
    if not prompts:
        raise SettingsError("say what to go on from: fieldguide predict MODEL 'Once upon a time'")
    said = {key: from_text(key, value, kinds[key]) for key, value in asked.items()}
    if said.get("weights", HELD[0]) not in HELD:
        raise SettingsError(f"weights={said['weights']!r} is none of {', '.join(HELD)}.")
    drawn = {f.name for f in fields(Sampling)}
    sampling = Sampling(**{"temperature": 0.8, "top_p": 0.95, **{k: v for k, v in said.items() if k in drawn}})
    return {"sampling": sampling, "tokens": said.get("tokens", 200), "beams": said.get("beams", 1), "seed": said.get("seed", 0),
            "stop": [said["stop"]] if said.get("stop") else []}, said.get("chat")


def beside(folder: Path) -> tuple[Any, dict[str, str], str | None]:
    """The tokenizer of a folder of transformers, its special tokens by name, and its chat template."""
    from tokenizers import Tokenizer
    if not (folder / "tokenizer.json").is_file():
        raise WeightsError(f"{folder} has no tokenizer.json: without it tokens cannot be read. Fast tokenizers of "
                           "transformers write one with save_pretrained.")
    said = json.loads((folder / "tokenizer_config.json").read_text()) if (folder / "tokenizer_config.json").is_file() else {}
    named = {key: value["content"] if isinstance(value, dict) else value for key, value in said.items()
             if key.endswith("_token") and value}
    template = said.get("chat_template")
    if isinstance(template, list):                       # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), template[0]["template"])
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
    return Tokenizer.from_file(str(folder / "tokenizer.json")), named, template


