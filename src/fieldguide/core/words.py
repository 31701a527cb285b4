r"""The definition of a word for user text: letters, digits and underscores with their combining marks, composed (NFC).

Python's `\w` leaves out combining marks: it splits Hindi words at vowel signs and decomposed letters at their accents.
"""

from __future__ import annotations

import unicodedata

import regex

# \w of `regex` (UTS 18) holds letters, marks, decimal digits, connectors and joiners; other numbers (½) are added.
# A word begins with one of them but a mark or joiner: emoji contain variation selectors and joiners, which are no words.
WORD = regex.compile(r"[\p{L}\p{N}\p{Pc}][\w\p{N}]*")
WORD_OR_PUNCTUATION = regex.compile(r"[\p{L}\p{N}\p{Pc}][\w\p{N}]*|[^\w\p{N}\s]")


def compose(text: str) -> str:
    """Return the text with composed characters (Unicode normalization form C)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def find_words(text: str) -> list[str]:
    """Return the words of a text, composed."""
    return WORD.findall(compose(text))


def find_tokens(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, composed."""
    return WORD_OR_PUNCTUATION.findall(compose(text))
