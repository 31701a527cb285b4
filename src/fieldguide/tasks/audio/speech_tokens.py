"""The special tokens of Whisper's tokenizers (Radford et al. 2022, arXiv:2212.04356, section 2.3)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fieldguide.core.errors import WeightsError
from fieldguide.models.generation.transcription import SpeechTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LANGUAGE_PATTERN = re.compile(r"<\|([a-z]{2,3})\|>")
ENGLISH_END = 50_256  # the end of GPT-2's vocabulary, which English networks use; their tokenizers list languages all the same
NAMES = {  # of our fields -> the token's name, and former names
    "start": ("startoftranscript",),
    "end": ("endoftext",),
    "transcribe": ("transcribe",),
    "translate": ("translate",),
    "previous": ("startofprev",),
    "no_speech": ("nospeech", "nocaptions"),
    "no_times": ("notimestamps",),
}
# Symbols that are not spoken: the authors never predict tokens of these, alone or after a space.
SYMBOLS = [
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split(),
]
NOTES = "♩♪♫♬♭♮♯"  # several tokens each, whose first is not predicted either
TIMES = 1501  # tokens from 0.00 to 30.00 seconds


def read_speech_tokens(tokenizer: Tokenizer, where: Any) -> SpeechTokens:
    """Return the special tokens of Whisper's tokenizer. Raises `WeightsError` for another tokenizer."""
    found = {}
    for field, names in NAMES.items():
        ids = [i for name in names if (i := tokenizer.token_to_id(f"<|{name}|>")) is not None]
        if not ids:
            raise WeightsError(f"{where}: the tokenizer has no token <|{names[0]}|>, so it is not Whisper's.")
        found[field] = ids[0]
    known = tokenizer.get_vocab()
    codes = {m[1]: i for token, i in known.items() if (m := LANGUAGE_PATTERN.fullmatch(token)) and i > found["start"]}
    languages = dict(sorted(codes.items(), key=lambda item: item[1])) if found["end"] != ENGLISH_END else {}
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    silent = {encode(" -")[0], encode(" '")[0]}
    for symbol in (*SYMBOLS, *NOTES):
        for ids in (encode(symbol), encode(" " + symbol)):
            if len(ids) == 1 or symbol in NOTES:
                silent.add(ids[0])
    others = ("start", "transcribe", "translate", "previous", "no_speech")
    model = tokenizer.token_to_id("<|startoflm|>")
    silent |= {found[name] for name in others} | ({model} if model is not None else set())
    blank = encode(" ")[:1]
    return SpeechTokens(
        **found,
        time=found["no_times"] + 1,  # older tokenizers do not list the times
        languages=languages,
        suppressed=tuple(sorted(silent)),
        first_suppressed=(*blank, found["end"]),
    )
