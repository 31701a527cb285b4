"""Viewer: a pretrained language model that sees, with its tokenizer and its publisher's way to prepare pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from fieldguide.checkpoints import config_mapping
from fieldguide.checkpoints.load import Checkpoint, filled, inspect_checkpoint
from fieldguide.core import distributed
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.core.settings import asked_of
from fieldguide.data.preprocessing import Pictures, Text
from fieldguide.data.preprocessing.chat_template import ChatTemplate
from fieldguide.data.preprocessing.tokenizer_files import Words
from fieldguide.inference.predictor import listed, records
from fieldguide.inference.text_generation import ends_of, template_of, words_of
from fieldguide.inference.zero_shot import prepared, published
from fieldguide.models.generation import Greedy, engine
from fieldguide.models.generation.stop_strings import cut

TEMPLATE = "chat_template.json"  # of a processor, in folders of before 2025
BATCH = 4  # pictures at once: each is many tokens


class Viewer:
    """`answer(pictures, prompt)` says something to the same prompt of each picture. `picture` is the token in whose place a
    picture stands, as prompts spell it."""

    def __init__(self, network: nn.Module, words: Words, pictures: Pictures, template: ChatTemplate | None = None):
        self.network, self.text, self.template = network.to(distributed.device()).eval(), Text(words.tokenizer), template
        self.begin, self.picture = words.special.get("bos_token"), words.tokenizer.id_to_token(network.config.picture)
        self.ends = ends_of(words)
        self.task = published(self.text, pictures, self.text.end, network.config.length)

    @classmethod
    def load(cls, source: str | Path | Checkpoint, **overrides: Any) -> Viewer:
        """From a folder of transformers with its tokenizer, or hf:organisation/name; or what `described` said of one. Raises
        `WeightsError` for a network that does not answer to pictures, and for a tokenizer that is missing or another's."""
        found = source if isinstance(source, Checkpoint) else inspect_checkpoint(source)
        if found.card.input_type != "captioned" or "tokens" not in found.card.output_types:
            raise WeightsError(
                f"{found.path} is {found.card.name}, which takes {found.card.input_type} and gives "
                f"{' or '.join(found.card.output_types)}: to speak of pictures, a network must take them with tokens "
                "and say which token follows"
            )
        network = filled(found.card, {**found.values, **overrides}, found.state, found.origin, str(found.path))
        folder, c = found.path if found.path.is_dir() else found.path.parent, network.config
        words = words_of(found)
        made = words.tokenizer
        if words.template is None and (folder / TEMPLATE).is_file():
            words = replace(words, template=config_mapping.read(folder / TEMPLATE).get("chat_template"))
        if made.get_vocab_size() > c.vocab_size or made.id_to_token(c.picture) is None:
            raise WeightsError(
                f"{folder}: its tokenizer has {made.get_vocab_size():,} tokens, the network {c.vocab_size:,}, of "
                f"which {c.picture:,} stands for pictures: it is that of another network"
            )
        return cls(network, words, prepared(folder, c.image, c.channels, found.card.scale), template_of(words))

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
            raise SettingsError(
                f"prompt={prompt!r} names {text.count(self.picture)} pictures by {self.picture}: it is asked of one at a time"
            )
        begun = bool(self.begin) and text.startswith(self.begin)  # by a template that writes special tokens itself
        return self.network.spelt(self.text.tokenizer.encode(text, add_special_tokens=not begun).ids)

    def answer(self, inputs: Any, prompt: str, **how: Any) -> list[dict[str, Any]]:
        """One record for each picture: where it is, and what is said of it. `how` is said in the words of `Manner`; by default
        each token is the likeliest.

        `inputs` is a path or a list of them; folders hold many pictures. One of many that cannot be read has a record of
        nothing but `input` and `error`. An answer ends where the network's length does. Raises `SettingsError` for a prompt
        that leaves no room for one.
        """
        row, manner, found, length = self.tokens(prompt), Greedy(**how), [], self.network.config.length
        if len(row) >= length:
            raise SettingsError(
                f"the prompt has {len(row):,} tokens with those of the picture, and the network reads "
                f"{length:,}, of prompt and answer together: ask less."
            )
        manner = replace(manner, tokens=min(manner.tokens, length - len(row)))
        data = self.task.read(listed(inputs))
        paths, device = data.rows[self.task.column].to_list(), distributed.device()
        pictures = self.task.pictures
        for first in range(0, len(paths), BATCH):
            image = pictures.apply(pictures.load(paths[first : first + BATCH]).to(device))
            said = engine(
                self.network.seeing(image),
                [row] * len(image),
                manner,
                ends=self.ends,
                decode=self.text.decode,
                numbers=range(first, first + len(image)),
            )
            found += [{"text": cut(self.text.decode(tokens), manner.stops).strip()} for tokens in said]
        return records(data, found)


def settled(asked: Mapping[str, str]) -> dict[str, Any]:
    """What a user says on the command line, as arguments of `answer`. Raises `SettingsError` for an unknown key, a value
    that cannot be, or no prompt."""
    hints = get_type_hints(Greedy)
    said = asked_of("a language model that sees", asked, {"prompt": str, **{f.name: hints[f.name] for f in fields(Greedy)}})
    if not said.get("prompt"):
        raise SettingsError('say what to ask of the pictures: --set prompt="What is this?"')
    return said
