"""Tokenizer files: loading the tokenizers of published checkpoints in any common format.

Supported are `tokenizer.json` of the tokenizers library; `vocab.txt` of BERT and related models (WordPiece); `vocab.json` with
`merges.txt` of GPT-2, RoBERTa, BART, DeBERTa and Qwen (byte-level BPE); SentencePiece files of T5, DeBERTa v2 and v3, ALBERT,
Pegasus, Llama and Gemma (see `sentencepiece`); the pair of SentencePiece files of Marian; and GGUF files. Special tokens and
the chat template come from the configuration files next to them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldguide.core import validation
from fieldguide.core.errors import DataError, FieldguideError
from fieldguide.core.validation import guard
from fieldguide.data.preprocessing import sentencepiece
from fieldguide.data.preprocessing.charsmap import check_charsmap

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_EXTRA_TOKENS = 10_000  # of T5; published models have 100
TRIAL_TEXT = "A text, 123."
TARGET_FILE = "target_tokenizer.json"  # written by `Text.save` if target texts have a tokenizer of their own
SETTINGS_FILE = "text.json"  # written next to tokenizer.json by `Text.save`
CHAT_TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"  # of processors in folders written before 2025


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer with its special tokens (bos_token, eos_token, pad_token, ... -> token), its chat template (Jinja), all
    tokens that end an answer, and a tokenizer of its own for target texts if there is one."""

    tokenizer: Tokenizer
    special: Mapping[str, str]
    template: str | None = None
    ends: tuple[str, ...] = ()
    target: Tokenizer | None = None


def read(place: Path) -> TokenizerFiles:
    """Load from a folder, a tokenizer.json or a GGUF file. Raises DataError if there is no valid tokenizer."""
    with guard(place):
        return read_files(place)


def read_files(place: Path) -> TokenizerFiles:
    """Return what `read` returns."""
    if place.suffix == ".gguf" and place.is_file():
        from fieldguide.data.preprocessing.gguf_tokenizer import read_tokenizer

        made, special, template = read_tokenizer(place)
        return TokenizerFiles(made, special, template, tuple(special[k] for k in ("eos_token",) if k in special))
    folder = place if place.is_dir() else place.parent
    config = read_config(folder)
    of = [(files, way) for files, way in FORMATS if place.is_dir() or place.name in files]
    if place.is_file() and not of:  # a tokenizer.json with another name
        made = load_tokenizer_json(place)
    else:
        way = next((way for files, way in of if all((folder / name).is_file() for name in files)), None)
        if way is None or not place.exists():
            raise DataError(
                f"{place}: no tokenizer found. Supported are tokenizer.json; vocab.txt; vocab.json with "
                "merges.txt; spiece.model, spm.model and tokenizer.model; source.spm with target.spm and vocab.json."
            )
        made = way(folder, config)
        if read_json(folder / "config.json").get("model_type") in LOWERCASE_MODELS and config.get("do_lower_case", True):
            set_lowercase(made)
    target = read_target(folder) if place.is_dir() else None
    if (folder / SETTINGS_FILE).is_file() and "special" in (ours := read_json(folder / SETTINGS_FILE)):
        return check_files(
            TokenizerFiles(made, ours["special"], ours.get("template"), tuple(ours.get("ends", ())), target), place
        )
    ends = [config.get("eos_token"), *(made.id_to_token(i) for i in read_eos_token_ids(folder))]
    named = tuple(dict.fromkeys(e for e in ends if e))
    return check_files(TokenizerFiles(made, special_tokens(config), read_chat_template(folder, config), named, target), place)


def read_target(folder: Path) -> Tokenizer | None:
    """Return the tokenizer for target texts, or None if it is the same as for sources."""
    if (folder / TARGET_FILE).is_file():
        return load_tokenizer_json(folder / TARGET_FILE)
    if all((folder / name).is_file() for name in MARIAN_FILES) and not (folder / "tokenizer.json").is_file():
        return build_marian(folder, read_config(folder), MARIAN_FILES[1])
    return None


def check_files(files: TokenizerFiles, place: Path) -> TokenizerFiles:
    """Return the tokenizer. Raises DataError if its special tokens or its template are no texts, or it cannot encode one."""
    if not all(isinstance(text, str) for text in (*files.special.values(), *files.ends, files.template or "")):
        raise DataError(f"{place}: the special tokens and the chat template must be texts.")
    files.tokenizer.encode(TRIAL_TEXT)
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Load a JSON object; return {} if the file does not exist. Raises DataError if it is damaged."""
    if not file.is_file():
        return {}
    return validation.read_json(file)


def token_text(token: Any) -> Any:
    """Return the text of a token that may be stored as a dictionary with its properties."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def read_config(folder: Path) -> dict[str, Any]:
    """Return the tokenizer configuration of a folder; tokenizer_config.json has priority over special_tokens_map.json."""
    both = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    return {key: token_text(value) for key, value in both.items()}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens in a tokenizer configuration."""
    return {key: token for key, token in config.items() if key.endswith("_token") and isinstance(token, str) and token}


def read_eos_token_ids(folder: Path) -> list[int]:
    """Return the ids of the tokens that end an answer, from the generation or model configuration."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i >= 0]
    return []


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template, the default one if there are several, or None."""
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        return validation.read_text(folder / CHAT_TEMPLATE_FILE)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template}
        template = named.get("default", next(iter(named.values()), None))
    if template is None and (folder / PROCESSOR_TEMPLATE_FILE).is_file():
        template = read_json(folder / PROCESSOR_TEMPLATE_FILE).get("chat_template")
    return template


# Tokenizer formats: each function builds a tokenizer from a folder and its configuration.


def load_tokenizer_json(file: Path) -> Tokenizer:
    """Load a file of the tokenizers library. Raises DataError if it is invalid."""
    from tokenizers import Tokenizer

    text = validation.read_text(file)
    with guard(f"{file} (tokenizers library)"):
        if '"Precompiled"' in text:
            check_maps(json.loads(text).get("normalizer"))
        return Tokenizer.from_str(text)


def set_lowercase(made: Tokenizer) -> None:
    """Make a tokenizer lower all letters, if it does not do so yet."""
    from tokenizers import normalizers

    if "Lowercase" not in str(made.normalizer):
        made.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([made.normalizer] if made.normalizer else [])])


def check_maps(normalizer: Any) -> None:
    """Raise ValueError if a character map in a normalizer, or in its parts, is damaged."""
    if isinstance(normalizer, dict):
        if isinstance(charsmap := normalizer.get("precompiled_charsmap"), str):
            check_charsmap(base64.b64decode(charsmap))
        for part in normalizer.values():
            check_maps(part)
    elif isinstance(normalizer, list):
        for part in normalizer:
            check_maps(part)


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """Return the tokenizer class (Bert, GPT2, ...) in a configuration, or ""."""
    return str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")


WORDPIECE_CLASSES = {
    "",
    "Bert",
    "DistilBert",
    "Electra",
    "MobileBert",
    "ConvBert",
    "SqueezeBert",
    "LayoutLM",
    "RetriBert",
    "Lxmert",
    "DPRContextEncoder",
    "DPRQuestionEncoder",
    "DPRReader",
    "MPNet",
    "TokenizersBackend",
    "PreTrained",
}
BERT_TOKENS = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
MPNET_TOKENS = {
    "unk_token": "[UNK]",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}


def build_wordpiece(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Build BERT's WordPiece tokenizer from vocab.txt (Devlin et al. 2019, arXiv:1810.04805; Wu et al. 2016).

    Raises DataError for other tokenizer classes and for a vocabulary without the unknown token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if (kind := tokenizer_class(config)) not in WORDPIECE_CLASSES or (folder / "bpe.codes").is_file():
        raise DataError(f"{folder / 'vocab.txt'} belongs to a {kind or 'BPE'} tokenizer; only WordPiece (BERT) is supported.")
    lines = validation.read_text(folder / "vocab.txt").split("\n")
    vocab = {token: i for i, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    set_default_tokens(config, MPNET_TOKENS if kind == "MPNet" else BERT_TOKENS)
    if config["unk_token"] not in vocab:
        raise DataError(f"{folder / 'vocab.txt'} lacks the token {config['unk_token']} for unknown words.")
    made = Tokenizer(models.WordPiece(vocab, unk_token=config["unk_token"], max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    add_tokens(made, folder, config)
    if kind == "MPNet":
        sep, cls = ((config[name], find_token(made, folder, config[name])) for name in ("sep_token", "cls_token"))
        made.post_processor = processors.RobertaProcessing(sep, cls, True, False)
        return made
    set_pair_template(made, config)
    return made


GPT2_TOKENS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
CLIP_TOKENS = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
CLIP_NAMES = ("<|startoftext|>", "<|endoftext|>")
# Words, with the endings of English as words of their own, digits and other signs, as CLIP's authors split texts.
CLIP_PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
# Tokenizer class -> special tokens used if the configuration does not define them.
BPE_CLASSES = {
    "GPT2": GPT2_TOKENS,
    "Roberta": ROBERTA_TOKENS,
    "Bart": ROBERTA_TOKENS,
    "Deberta": {**BERT_TOKENS, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "CLIP": CLIP_TOKENS,
    "Qwen2": {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_byte_level_bpe(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer of GPT-2 (Radford et al. 2019, section 2.2) and models that adopted it.

    Raises DataError if the files are invalid or the tokenizer class is not supported.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"{folder / 'vocab.json'} and merges.txt cannot be read: {error}") from error
    kind = tokenizer_class(config) or next(
        (
            kind
            for kind, needed in (
                ("CLIP", CLIP_NAMES),
                ("Roberta", ("<s>", "</s>")),
                ("Deberta", ("[CLS]", "[SEP]")),
                ("GPT2", ("<|endoftext|>",)),
            )
            if set(needed) <= set(vocab)
        ),
        "",
    )
    if kind not in BPE_CLASSES or (kind == "CLIP") != any(second.endswith("</w>") for _, second in merges[:1000]):
        raise DataError(
            f"{folder / 'vocab.json'} and merges.txt belong to a tokenizer of the class "
            f"{kind or '(not specified)'}; supported are {', '.join(BPE_CLASSES)}."
        )
    set_default_tokens(config, BPE_CLASSES[kind])
    if kind == "CLIP":
        return build_clip(folder, config, vocab, merges)
    made, prefix = Tokenizer(models.BPE(vocab, merges, fuse_unk=False)), bool(config.get("add_prefix_space"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    if kind == "Qwen2":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    add_tokens(made, folder, config)
    if kind == "Deberta":
        set_pair_template(made, config)
    elif BPE_CLASSES[kind] is ROBERTA_TOKENS:
        sep, cls = ((config[name], find_token(made, folder, config[name])) for name in ("sep_token", "cls_token"))
        made.post_processor = processors.RobertaProcessing(sep, cls, True, prefix)
    elif config.get("add_bos_token"):
        begin = config["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            f"{begin} $A", f"{begin} $A {begin} $B", [(begin, find_token(made, folder, begin))]
        )
    return made


def build_clip(folder: Path, config: dict[str, Any], vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Build the tokenizer of CLIP: lowercase byte-level BPE whose words end in "</w>", between a start and an end token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    unknown = config["unk_token"]
    made = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, end_of_word_suffix="</w>", fuse_unk=False))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)])
    add_tokens(made, folder, config)
    begin, end = ((config[name], find_token(made, folder, config[name])) for name in ("bos_token", "eos_token"))
    made.post_processor = processors.TemplateProcessing(f"{begin[0]} $A {end[0]}", special_tokens=[begin, end])
    return made


def set_default_tokens(config: dict[str, Any], default: Mapping[str, str]) -> None:
    """Fill in the default special tokens that the configuration does not define."""
    config.update({name: config.get(name) or token for name, token in default.items()})


def find_token(made: Tokenizer, folder: Path, token: str) -> int:
    """Return the id of a special token. Raises DataError if the tokenizer lacks it."""
    if (found := made.token_to_id(token)) is None:
        raise DataError(f"{folder}: the tokenizer lacks the token {token}, which is added around texts.")
    return found


def add_tokens(made: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Add special tokens and the tokens that were later added to the vocabulary, with their original ids.

    The mask token of RoBERTa and BART includes the whitespace before it, as in the published tokenizers. Raises
    DataError if an added token gets another id.
    """
    from tokenizers import AddedToken

    later: dict[str, tuple[int, dict[str, Any]]] = {
        token: (i, {}) for token, i in read_json(folder / "added_tokens.json").items()
    }
    later |= {
        token_text(entry): (int(i), entry if isinstance(entry, dict) else {})
        for i, entry in (config.get("added_tokens_decoder") or {}).items()
    }
    for token, (place, how) in sorted(later.items(), key=lambda item: item[1][0]):
        one = AddedToken(
            token,
            special=how.get("special", True),
            normalized=how.get("normalized", False),
            **{key: how.get(key, False) for key in ("lstrip", "rstrip", "single_word")},
        )
        (made.add_special_tokens if one.special else made.add_tokens)([one])
        if made.token_to_id(token) != place:
            raise DataError(
                f"{folder}: the added token {token} should have the id {place} but gets "
                f"{made.token_to_id(token)}. A file of the tokenizer is missing or belongs to another one."
            )
    byte_level = "ByteLevel" in str(made.decoder)
    named = dict.fromkeys(token for name, token in special_tokens(config).items() if token not in later)
    known_here = [token for token in named if made.token_to_id(token) is not None]
    made.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, lstrip=byte_level and token == config.get("mask_token"))
            for token in known_here
        ]
    )


def set_pair_template(made: Tokenizer, config: Mapping[str, Any]) -> None:
    """Set the template [CLS] A [SEP] B [SEP], with the second text in segment 1."""
    from tokenizers import processors

    cls, sep = config["cls_token"], config["sep_token"]
    if made.token_to_id(cls) is not None and made.token_to_id(sep) is not None:
        made.post_processor = processors.TemplateProcessing(
            f"{cls}:0 $A:0 {sep}:0",
            f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            [(cls, made.token_to_id(cls)), (sep, made.token_to_id(sep))],
        )


# SentencePiece tokenizer class -> special tokens used if the configuration does not define them.
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SENTENCEPIECE_CLASSES = {
    "T5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "DebertaV2": {**BERT_TOKENS, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "Albert": {**BERT_TOKENS, "unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "Pegasus": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask_2>"},
    "Siglip": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    "Llama": LLAMA_TOKENS,
    "CodeLlama": LLAMA_TOKENS,
    "Gemma": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}
FIRST_PIECES = {
    "T5": ("<pad>", "</s>", "<unk>"),
    "DebertaV2": ("[PAD]", "[CLS]", "[SEP]"),
    "Albert": ("<pad>", "<unk>", "[CLS]"),
    "Llama": ("<unk>", "<s>", "</s>"),
    "Gemma": ("<pad>", "<eos>", "<bos>"),
}  # tokenizer class -> first pieces, which identify the class if the configuration does not
T5_LIKE_CLASSES = {
    "pegasus": "Pegasus",
    "siglip": "Siglip",
}  # model type -> tokenizer class whose pieces begin like those of T5
LOWERCASE_MODELS = (
    "siglip",
    "siglip2",
)  # model types trained on lowercase texts, which some of their tokenizer files leave out
PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""  # that SigLIP removes: the ASCII characters of string.punctuation


def build_sentencepiece(folder: Path, config: dict[str, Any], name: str) -> Tokenizer:
    """Build a SentencePiece tokenizer, with the extra tokens of T5 (sentinels), DeBERTa ([MASK]) and Pegasus (those of its
    pre-training), and the normalization of ALBERT.

    Raises DataError if the tokenizer class is not supported.
    """
    from tokenizers import AddedToken, Regex, normalizers, processors

    found = sentencepiece.parse_file(folder / name)
    first_pieces = tuple(piece for piece, _, _ in found.pieces[:3])
    if not tokenizer_class(config) and (model := read_json(folder / "config.json").get("model_type")) in T5_LIKE_CLASSES:
        config["tokenizer_class"] = T5_LIKE_CLASSES[model]
    kind = tokenizer_class(config) or next((kind for kind, first in FIRST_PIECES.items() if first == first_pieces), "")
    if kind not in SENTENCEPIECE_CLASSES:
        raise DataError(
            f"{folder / name} belongs to a tokenizer of the class {kind or '(not specified)'}; "
            f"supported are {', '.join(SENTENCEPIECE_CLASSES)}."
        )
    set_default_tokens(config, SENTENCEPIECE_CLASSES[kind])
    if kind == "Pegasus":
        found = insert_pretraining_pieces(found, config)
    made = sentencepiece.build_tokenizer(folder / name, found)
    if kind == "T5":
        extra = validation.get_checked(
            config, "extra_ids", int, folder / "tokenizer_config.json", least=0, most=MAX_EXTRA_TOKENS
        )
        count = 100 if extra is None else extra
        made.add_special_tokens([AddedToken(f"<extra_id_{i}>", normalized=False) for i in reversed(range(count))])
    if kind == "DebertaV2":
        made.add_special_tokens([AddedToken(config["mask_token"], normalized=False)])
    add_tokens(made, folder, config)
    steps: list[normalizers.Normalizer]
    if kind == "Albert":
        steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not config.get("keep_accents"):
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
        steps += [normalizers.Lowercase()] if config.get("do_lower_case", True) else []
        made.normalizer = normalizers.Sequence([*steps, made.normalizer])
    if kind == "Siglip":
        steps = [normalizers.Lowercase()] if config.get("do_lower_case", True) else []
        steps += [normalizers.Replace(Regex(PUNCTUATION), ""), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        made.normalizer = normalizers.Sequence([*steps, made.normalizer])
    if kind in ("DebertaV2", "Albert"):
        set_pair_template(made, config)
        return made
    ends_only = kind in ("T5", "Pegasus", "Siglip")
    before = [config["bos_token"]] if not ends_only and config.get("add_bos_token", True) else []
    after = [config["eos_token"]] if ends_only or config.get("add_eos_token") else []
    around_one, around_two = ([*before, f"${name}", *after] for name in "AB")
    made.post_processor = processors.TemplateProcessing(
        around_one,
        [*around_one, *around_two],
        [(token, find_token(made, folder, token)) for token in dict.fromkeys((*before, *after))],
    )
    return made


def insert_pretraining_pieces(
    found: sentencepiece.SentencePieceModel, config: Mapping[str, Any]
) -> sentencepiece.SentencePieceModel:
    """Return the pieces of Pegasus with those of its pre-training after the first two, as its vocabulary has them."""
    offset = validation.get_checked(config, "offset", int, Path("tokenizer_config.json"), least=2, most=MAX_EXTRA_TOKENS)
    offset = 103 if offset is None else offset
    if not offset:
        return found
    masks = [config.get("mask_token_sent", "<mask_1>"), config["mask_token"]]
    extra = [*(mask for mask in masks if mask), *(f"<unk_{i}>" for i in range(2, offset))]
    pieces = [*found.pieces[:2], *((token, 0.0, sentencepiece.CONTROL) for token in extra), *found.pieces[2:]]
    return replace(found, pieces=pieces)


MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
MARIAN_TOKENS = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
HIDDEN = "\x00"  # before pieces that texts of this side do not have


def build_marian(folder: Path, config: dict[str, Any], name: str = MARIAN_FILES[0]) -> Tokenizer:
    """Build the tokenizer of one side of Marian: pieces of a SentencePiece file with the ids of vocab.json.

    The vocabulary holds the pieces of both languages. A character that the file does not know is looked up in it (transformers
    looks up a run of such characters as a whole); longer pieces of the other language are only decoded. Raises DataError for a
    vocabulary with gaps or without the special tokens.
    """
    from tokenizers import AddedToken, decoders, normalizers, processors

    set_default_tokens(config, MARIAN_TOKENS)
    if config.get("separate_vocabs"):
        raise DataError(f"{folder}: separate vocabularies for source and target (separate_vocabs) are not supported.")
    vocab, found = read_json(folder / MARIAN_FILES[2]), sentencepiece.parse_file(folder / name)
    if not all(type(i) is int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise DataError(f"{folder / MARIAN_FILES[2]}: the ids of the tokens must be 0 to {len(vocab) - 1}, each once.")
    if missing := [config[key] for key in MARIAN_TOKENS if config[key] not in vocab]:
        raise DataError(f"{folder / MARIAN_FILES[2]} lacks the token {missing[0]}.")
    own = {piece: (score, kind) for piece, score, kind in found.pieces}
    least = min(score for score, _ in own.values()) - 100.0  # chosen only where no other piece fits
    pieces = []
    for token in sorted(vocab, key=lambda token: vocab[token]):
        score, kind = own.get(token, (least, 1))
        if token in (config["eos_token"], config["pad_token"]):
            kind = sentencepiece.CONTROL
        elif token.startswith(">>") and token.endswith("<<"):  # >>fra<< in a text names the target language
            kind = sentencepiece.WHOLE
        elif token == config["unk_token"]:
            kind = sentencepiece.UNKNOWN
        elif token not in own and len(token) > 1:
            token, score = HIDDEN + token, least
        pieces.append((token, score, kind))
    made = sentencepiece.build_tokenizer(folder / name, replace(found, pieces=pieces))
    made.normalizer = normalizers.Sequence([normalizers.Replace(HIDDEN, " "), made.normalizer])
    made.decoder = decoders.Sequence([decoders.Replace(HIDDEN, ""), made.decoder])
    made.add_special_tokens([AddedToken(config[key], normalized=False) for key in MARIAN_TOKENS])
    end = config["eos_token"]
    made.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A $B {end}", [(end, find_token(made, folder, end))])
    return made


# Required files -> function that builds a tokenizer from them, in order of priority.
FORMATS: tuple[tuple[Iterable[str], Callable[[Path, dict[str, Any]], Tokenizer]], ...] = (
    (("tokenizer.json",), lambda folder, config: load_tokenizer_json(folder / "tokenizer.json")),
    (("vocab.txt",), build_wordpiece),
    (("vocab.json", "merges.txt"), build_byte_level_bpe),
    (MARIAN_FILES, build_marian),
    *(
        ((name,), lambda folder, config, name=name: build_sentencepiece(folder, config, name))
        for name in ("spiece.model", "spm.model", "tokenizer.model")
    ),
)


def find_tokenizer(place: Path) -> tuple[Path | None, str]:
    """Return (`place`, "") if it holds a valid tokenizer, else (None, reason); the reason is "" if there are no files."""
    try:
        read(place)
    except FieldguideError as error:
        there = place.is_file() or any((place / name).is_file() for files, _ in FORMATS for name in files)
        return None, str(error) if there else ""
    return place, ""
