"""Viewer: a pretrained language model that sees, with its tokenizer and its publisher's way to prepare pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fieldguide import configurations
from fieldguide.data.prepare import Pictures, Text
from fieldguide.errors import SettingsError, WeightsError, nearest
from fieldguide.generation import Sampling, generate
from fieldguide.generation.chat import ChatTemplate
from fieldguide.generation.text import cut
from fieldguide.pretrained import Checkpoint, described, filled
from fieldguide.run import listed, records
from fieldguide.speaker import ENDS, beside
from fieldguide.train import distributed
from fieldguide.train.settings import from_text
from fieldguide.zero_shot import prepared, published

TEMPLATE = "chat_template.json"          # of a processor, in folders of before 2025
BATCH = 4                                # pictures at once: each is many tokens


class Viewer:
    """`answer(pictures, prompt)` says something to the same prompt of each picture. `picture` is the token in whose place a
    picture stands, as prompts spell it."""

    def __init__(self, network: nn.Module, text: Text, pictures: Pictures, special: Mapping[str, str],
                 template: ChatTemplate | None = None):
        self.network, self.text, self.template = network.to(distributed.device()).eval(), text, template
        self.begin, self.picture = special.get("bos_token"), text.tokenizer.id_to_token(network.config.picture)
        ids = (text.tokenizer.token_to_id(token) for token in (special.get("eos_token"), *ENDS) if token)
        self.ends = sorted({i for i in ids if i is not None})
        self.task = published(text, pictures, text.end, network.config.length)

    @classmethod
    def load(cls, source: str | Path | Checkpoint, **overrides: Any) -> Viewer:
        """From a folder of transformers with its tokenizer, or hf:organisation/name; or what `described` said of one. Raises
        `WeightsError` for a network that does not answer to pictures, and for a tokenizer that is missing or another's."""
        found = source if isinstance(source, Checkpoint) else described(source)
        if found.card.takes != "captioned" or "tokens" not in found.card.answers:
            raise WeightsError(f"{found.path} is {found.card.name}, which takes {found.card.takes} and gives "
                               f"{' or '.join(found.card.answers)}: to speak of pictures, a network must take them with tokens "
                               "and say which token follows")
        network = filled(found.card, {**found.values, **overrides}, found.state, found.origin, str(found.path))
        folder, c = found.path if found.path.is_dir() else found.path.parent, network.config
        made, special, template = beside(folder)
        if template is None and (folder / TEMPLATE).is_file():
            template = configurations.read(folder / TEMPLATE).get("chat_template")
        if made.get_vocab_size() > c.vocab or made.id_to_token(c.picture) is None:
            raise WeightsError(f"{folder}: its tokenizer has {made.get_vocab_size():,} tokens, the network {c.vocab:,}, of "
                               f"which {c.picture:,} stands for pictures: it is that of another network")
        return cls(network, Text(made), prepared(folder, c.image, c.channels, found.card.scale), special,
                   ChatTemplate(template, special) if template else None)

    def spelt(self, prompt: str) -> str:
        """What the network reads: a prompt that names the picture, as it is; else a question in a conversation where the model
        knows such, or the picture and the prompt below it."""
        if self.picture in prompt:
            return prompt
        if self.template is None:
            return f"{self.picture}\n{prompt}"
        return self.template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}])

    def tokens(self, prompt: str) -> list[int]:
        """The tokens of a prompt, that of the picture once for each patch. Raises `SettingsError` for several pictures."""
        text = self.spelt(prompt)
        if text.count(self.picture) != 1:
            raise SettingsError(f"prompt={prompt!r} names {text.count(self.picture)} pictures by {self.picture}: it is asked "
                                "of one at a time")
        begun = bool(self.begin) and text.startswith(self.begin)             # by a template that writes special tokens itself
        return self.network.spelt(self.text.tokenizer.encode(text, add_special_tokens=not begun).ids)

    def answer(self, inputs: Any, prompt: str, *, tokens: int = 200, stop: Sequence[str] = (), seed: int = 0,
               sampling: Sampling | None = None) -> list[dict[str, Any]]:
        """One record for each picture: where it is, and what is said of it; without `sampling` always the likeliest token.

        `inputs` is a path or a list of them; folders hold many pictures. One of many that cannot be read has a record of
        nothing but `input` and `error`. An answer ends where the network's length does. Raises `SettingsError` for a prompt
        that leaves no room for one.
        """
        row, found, length = self.tokens(prompt), [], self.network.config.length
        if len(row) >= length:
            raise SettingsError(f"the prompt has {len(row):,} tokens with those of the picture, and the network reads "
                                f"{length:,}, of prompt and answer together: ask less.")
        data = self.task.read(listed(inputs))
        paths, device = data.rows[self.task.column].to_list(), distributed.device()
        pictures = self.task.pictures
        for first in range(0, len(paths), BATCH):
            image = pictures.apply(pictures.load(paths[first:first + BATCH]).to(device))
            said: list[list[int]] = [[] for _ in image]
            for step in generate(self.network.seeing(image), [row] * len(said), min(tokens, length - len(row)), ends=self.ends,
                                 seed=seed + first, sampling=sampling or Sampling(temperature=0)):
                for answer, token in zip(said, step.tolist()):
                    if token >= 0 and token not in self.ends:
                        answer.append(token)
            found += [{"text": cut(self.text.decode(answer), stop).strip()} for answer in said]
        return records(data, found)


def settled(asked: Mapping[str, str]) -> dict[str, Any]:
    """What a user says on the command line, as arguments of `answer`. Raises `SettingsError` for an unknown key, a value
    that cannot be, or no prompt."""
    drawn = {f.name: int if f.name == "top_k" else float for f in fields(Sampling)}
    kinds = {**drawn, "prompt": str, "tokens": int, "seed": int, "stop": str}
    for key in asked:
        if key not in kinds:
            raise SettingsError(f"a language model that sees is not asked with {key!r}.{nearest(key, kinds)} It knows "
                                f"{', '.join(sorted(kinds))}.")
    said = {key: from_text(key, value, kinds[key]) for key, value in asked.items()}
    if not said.get("prompt"):
        raise SettingsError('say what to ask of the pictures: --set prompt="What is this?"')
    sampling = {key: said.pop(key) for key in drawn if key in said}
    stop = said.pop("stop", "")
    return {**said, "stop": [stop] if stop else [], "sampling": Sampling(**sampling) if sampling else None}
