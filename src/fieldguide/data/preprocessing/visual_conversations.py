"""Conversations about images: token ids with image tokens, and which of them the assistant produces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.data.conversation_images import IMAGE_MARK
from fieldguide.data.preprocessing.conversations import Conversations, Turns, find_covered_tokens
from fieldguide.data.preprocessing.tokenizer import TextTokenizer

# Of LLaVA-1.5 (Vicuna), for checkpoints without a template; {image} is the image token and {end} the end token.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '{image}\n' }}{% else %}{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + '{end}' }}{% endgeneration %}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class EncodedRow:
    """A conversation: token ids with one image token per patch, and which of them are trained; both int64 or bool, N."""

    tokens: np.ndarray
    trained: np.ndarray


class VisualConversations(Conversations):
    """Encoder of conversations with images. `picture` is the image token."""

    def __init__(self, text: TextTokenizer, picture: int):
        self.picture = picture
        image = text.tokenizer.id_to_token(picture)
        if image is None:
            raise DataError(f"the tokenizer has no token {picture:,}, the image token of the network. Use its own tokenizer.")
        self.image = image
        if text.template is None:
            end = text.tokenizer.id_to_token(text.end) or ""
            text.template = DEFAULT_TEMPLATE.replace("{image}", image).replace("{end}", end)
        super().__init__(text, write_parts)
        self.ends = tuple(dict.fromkeys((*text.ends, *([] if self.closing is None else [self.closing]))))

    def encode(self, rows: Sequence[Turns], patches: Sequence[list[int]], place: Callable[[int], str]) -> list[EncodedRow]:
        """Return the tokens of conversations, each of whose images has a number of patches.

        Where the template writes no end token after the last answer, the row ends with one. Raises `DataError` with the place of a row
        that the template rejects, or whose image it leaves out.
        """
        rendered = self.render(rows, place)
        found = []
        for row, ((text, spans), (ids, covered)) in enumerate(
            zip(rendered, self.text.encode_rendered([text for text, _ in rendered]))
        ):
            trained = np.ones(len(ids), dtype=bool) if spans is None else find_covered_tokens(covered, spans)
            if rows[row] and rows[row][-1][0] == "assistant":
                last = int(np.flatnonzero(trained)[-1]) if trained.any() else len(ids) - 1
                if not np.isin(ids[last:], self.ends).any():  # what follows the answer, such as a space, would never be learned
                    ids, trained = np.append(ids[: last + 1], self.text.end), np.append(trained[: last + 1], True)
            prefix = self.find_prefix(text)
            ids, trained = np.concatenate([prefix, ids]), np.concatenate([np.zeros(len(prefix), dtype=bool), trained])
            found.append(self.expand(ids, trained, patches[row], place, row))
        return found

    def encode_prompts(
        self, rows: Sequence[Turns], patches: Sequence[list[int]], place: Callable[[int], str]
    ) -> list[np.ndarray]:
        """Return the tokens of conversations up to the start of the assistant's next turn."""
        found = []
        for row, turns in enumerate(rows):
            try:
                text = self.template(self.write(turns))
            except DataError as error:
                raise DataError(f"{place(row)}: {error}") from None
            ids = np.concatenate([self.find_prefix(text), self.text.encode_rendered([text])[0][0]])
            found.append(self.expand(ids, np.ones(len(ids), dtype=bool), patches[row], place, row).tokens)
        return found

    def find_prefix(self, text: str) -> np.ndarray:
        """Return the tokens that the tokenizer puts before a text, unless the template wrote them."""
        begin = self.text.special.get("bos_token")
        return np.array([] if begin and text.startswith(begin) else self.text.prefix_ids(), dtype=np.int64)

    def expand(
        self, ids: np.ndarray, trained: np.ndarray, patches: list[int], place: Callable[[int], str], row: int
    ) -> EncodedRow:
        """Return a row with the image token of each image repeated once per patch."""
        is_image = ids == self.picture
        if is_image.sum() != len(patches):
            known = {0: "no image", 1: "one image"}.get(len(patches), f"{len(patches)} images")
            raise DataError(
                f"{place(row)}: the rendered conversation has {self.image} {int(is_image.sum())} times, but {known}. Remove {self.image} "
                "from the texts, or check the chat template; a request has at most as many images as the training data."
            )
        times = np.ones(len(ids), dtype=np.int64)
        times[is_image] = patches
        return EncodedRow(np.repeat(ids, times), np.repeat(trained & ~is_image, times))


def write_parts(turns: Turns) -> list[dict[str, object]]:
    """Return the turns as messages whose content is a list of parts, with images in the place of marks."""
    messages: list[dict[str, object]] = []
    for role, content in turns:
        parts: list[dict[str, str]] = []
        pieces = content.split(IMAGE_MARK) if role == "user" else [content]
        for i, piece in enumerate(pieces):
            if i:
                parts.append({"type": "image"})
            piece = piece.strip("\n") if len(pieces) > 1 else piece
            if piece or len(pieces) == 1:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": role, "content": parts})
    return messages
