"""GGUF files for llama.cpp: language models whose architecture has a table of GGUF names, with BPE tokenizers of bytes or of
SentencePiece.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import to_public_config
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.data.preprocessing import TextTokenizer, sentencepiece
from fieldguide.data.preprocessing.gguf_tokenizer import CONTROL, SPLIT_PATTERNS, read_tokenizer
from fieldguide.exporting.graph import ExportError
from fieldguide.exporting.precision import Precision

FILE_TYPES = {"float32": 0, "float16": 1, "int8": 7}  # `general.file_type`: all F32, mostly F16, mostly Q8_0
SPLITS = ("gpt-2", "smollm", *SPLIT_PATTERNS)  # kinds of pre-tokenizers that are tried
PREFIXES = ("no space", "a space")  # that SentencePiece may put before a text, and that are tried
BLOCK = 32  # values that share a scale in Q8_0
NORMAL = 1  # type of tokens
SIGNS = (
    "| |  |\n|\t|\n\n |'s|'LL|...|1|23|4567|3.14|don't|naïve|Straße|中文字|日本|नमस्ते|😀|!?"  # parts of texts that are compared
)
PROBES = 1000  # texts whose tokens are compared


def write_gguf(
    network: Any,
    card: Card,
    text: TextTokenizer,
    path: Path,
    precision: Precision,
    *,
    template: str | None = None,
    begin: int | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Write a language model to one file, and compare what is read from it: tokens of `PROBES` texts, and outputs.

    Args:
        template: the chat template.
        begin: the token that begins every text.
        ends: tokens that end an answer; the format has one of them.

    Raises `ExportError` for an architecture or a tokenizer that the format does not have.
    """
    if "gguf" not in card.configs:
        from fieldguide.models.registry import cards

        known = ", ".join(name for name, other in cards().items() if "gguf" in other.configs)
        raise ExportError(f"{card.name} has no form in GGUF files. Architectures that have: {known}.")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SettingsError("export to GGUF needs a package: pip install 'fieldguide[gguf]'") from None
    failed = ""
    kinds = SPLITS if is_byte_level(text) else PREFIXES
    for kind in kinds:
        write_file(network, card, text, path, precision, kind, template, begin, ends)
        if not (failed := compare_tokens(text, path, begin)):
            return
    path.unlink()
    known = f"byte-level BPE of the kinds {', '.join(SPLITS)}" if kinds is SPLITS else "SentencePiece without normalization"
    raise ExportError(
        f"the tokenizer is none that llama.cpp knows: {known}. For example, it splits {failed!r:.60} differently. Use --to huggingface."
    )


def write_file(
    network: Any,
    card: Card,
    text: TextTokenizer,
    path: Path,
    precision: Precision,
    kind: str,
    template: str | None,
    begin: int | None,
    ends: Sequence[int],
) -> None:
    """Write weights, metadata and a tokenizer of a kind, one of `SPLITS` or `PREFIXES`."""
    import gguf

    metadata = to_public_config(card, card.configs["gguf"], network.config)
    writer = gguf.GGUFWriter(str(path), metadata["general"]["architecture"])
    for key, value in flatten(metadata):
        if key != "general.architecture":  # the writer has added it
            add_value(writer, key, value)
    writer.add_file_type(FILE_TYPES[precision])
    add_tokenizer(writer, text, network.config.vocab_size, kind, begin, ends)
    if template:
        writer.add_chat_template(template)
    state = weights.translate(network.state_dict(), weights.get_tables(network)["gguf"], reverse=True)
    if network.head.weight is network.embed.weight:
        state.pop("output.weight", None)
    if scaling := getattr(network.config, "rope_scaling", None):
        if isinstance(scaling[0], str):
            raise ExportError(
                f"rotary positions with {scaling[0]} scaling cannot be written to GGUF yet. Export to safetensors."
            )
        state["rope_freqs.weight"] = compute_rope_factors(network)
        writer.add_uint32(f"{metadata['general']['architecture']}.rope.scaling.original_context_length", int(scaling[-1]))
    for name, tensor in state.items():
        add_tensor(writer, name, tensor.detach().float().cpu().contiguous().numpy(), precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compute_rope_factors(network: Any) -> torch.Tensor:
    """Return what rotary frequencies are divided by, because positions are scaled."""
    plain = copy.copy(network)
    plain.config = dataclasses.replace(network.config, rope_scaling=())
    cpu = torch.device("cpu")
    return plain.inverse_frequencies(cpu) / network.inverse_frequencies(cpu)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries with dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))


def add_tensor(writer: Any, name: str, values: np.ndarray, precision: Precision) -> None:
    """Add a tensor; vectors stay in float32, and matrices whose rows have no whole blocks are not quantized."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if values.ndim < 2 or precision == "float32":
        writer.add_tensor(name, values)
    elif precision == "int8" and values.shape[-1] % BLOCK == 0:
        writer.add_tensor(name, gguf.quants.quantize(values, kinds.Q8_0), raw_dtype=kinds.Q8_0)
    else:
        writer.add_tensor(name, values.astype(np.float16))


def is_byte_level(text: TextTokenizer) -> bool:
    """Return whether a BPE tokenizer merges bytes; False if it merges characters and falls back to bytes, as SentencePiece's.

    Raises `ExportError` for other tokenizers.
    """
    saved = json.loads(text.tokenizer.to_str())
    decoder = json.dumps(saved["decoder"])
    if saved["model"]["type"] != "BPE" or not ("ByteLevel" in decoder or saved["model"].get("byte_fallback")):
        raise ExportError(
            f"the tokenizer is {saved['model']['type']}{' without bytes' if saved['model']['type'] == 'BPE' else ''}; GGUF files get "
            "byte-level BPE or SentencePiece's BPE with byte fallback. Use --to huggingface."
        )
    return "ByteLevel" in decoder


def add_tokenizer(writer: Any, text: TextTokenizer, size: int, kind: str, begin: int | None, ends: Sequence[int]) -> None:
    """Add the vocabulary, merges or scores, and special tokens."""
    model, added = json.loads(text.tokenizer.to_str())["model"], text.tokenizer.get_added_tokens_decoder()
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens = [text.tokenizer.id_to_token(i) for i in range(text.size)]
    whole = sentencepiece.WHOLE if kind in PREFIXES else CONTROL
    types = [(CONTROL if added[i].special else whole) if i in added else NORMAL for i in range(text.size)]
    tokens += [f"[unused{i}]" for i in range(len(tokens), size)]
    types += [sentencepiece.UNUSED] * (size - len(types))
    if kind in PREFIXES:
        rank = {first + second: -float(place) for place, (first, second) in reversed(list(enumerate(merges)))}
        unknown = model["unk_token"]
        types = [
            sentencepiece.UNKNOWN if token == unknown else sentencepiece.BYTE if is_byte(str(token)) else one
            for token, one in zip(tokens, types)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([rank.get(token, -float(len(merges))) for token in tokens])
        writer.add_add_space_prefix(kind == PREFIXES[1])
        if unknown is not None:
            writer.add_unk_token_id(tokens.index(unknown))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_eos_token_id(int(ends[0] if ends else text.end))
    writer.add_pad_token_id(int(text.pad))
    if begin is not None:
        writer.add_bos_token_id(int(begin))
    writer.add_add_bos_token(begin is not None)


def is_byte(token: str) -> bool:
    """Return whether a token of SentencePiece is a byte: <0x00> to <0xFF>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def compare_tokens(text: TextTokenizer, path: Path, begin: int | None) -> str:
    """Return a text whose tokens differ when the tokenizer is read from the file, or ""."""
    written, _, _ = read_tokenizer(path)
    first = [] if begin is None else [begin]
    for probe, ids in zip(probes := make_probes(text), text.encode_exact(probes)):
        if written.encode(probe).ids != [*first, *ids]:
            return probe
    return ""


def make_probes(text: TextTokenizer) -> list[str]:
    """Return texts of all sorts: words, numbers, spaces, signs, other scripts, and runs of tokens of the vocabulary."""
    rng = np.random.default_rng(0)
    signs = SIGNS.split("|")
    special = text.tokenizer.get_added_tokens_decoder()
    ordinary = [i for i in range(text.size) if i not in special]
    probes = []
    for number in range(PROBES):
        if number % 2:
            probes.append("".join(signs[i] + " " * int(rng.integers(2)) for i in rng.integers(0, len(signs), 8)))
        else:
            probes.append(text.decode(rng.choice(ordinary, 12)))
    return probes


def compare_outputs(network: Any, loaded: Any, tolerance: float) -> float:
    """Return the mean difference of log-probabilities on random tokens. Raises `ExportError` if it exceeds `tolerance`."""
    tokens = torch.randint(0, network.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (copy.copy(model).eval()(tokens).float().log_softmax(-1) for model in (network, loaded))
    difference = float((one - other).abs().mean())
    if not difference <= tolerance:
        raise ExportError(f"the written file gives other outputs: log-probabilities differ by {difference:.3g} on average.")
    return difference
