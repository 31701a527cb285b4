"""The generation options that are published with a model: `generation_config.json`, or the same keys in `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fieldguide.checkpoints import config_mapping
from fieldguide.checkpoints.names import CONFIG_FILE
from fieldguide.core.errors import WeightsError
from fieldguide.core.validation import AGAIN, get_checked, guard
from fieldguide.models.generation import SAMPLING_OPTIONS, GenerationConfig, TokenRules

FILE = "generation_config.json"
# Keys of transformers that change the output and are not supported -> values without an effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_decoder_ids": (),
    "guidance_scale": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
MAX_TOKENS, MAX_BEAMS = 1 << 30, 1_000
LIMITS = {  # key -> type, minimum, maximum
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "max_length", "min_length"), (int, 0, MAX_TOKENS)),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size"), (int, 0, MAX_TOKENS)),
    "num_beams": (int, 0, MAX_BEAMS),
    "temperature": (float, 0, 1e6),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-6, 1e6),
    "length_penalty": (float, -1e3, 1e3),
    "do_sample": (bool, 0, 1),
}
DEFAULT_TOP_K = 50  # of transformers, if a file asks for sampling without naming top_k


@dataclass(frozen=True)
class PublishedGeneration:
    """Published options by our names, token rules, lengths in transformers' sense (including the prompt), and notes."""

    options: Mapping[str, Any] = field(default_factory=dict)
    rules: TokenRules = field(default_factory=TokenRules)
    min_length: int = 0
    max_length: int = 0
    notes: tuple[str, ...] = ()

    def apply(self, kind: type[GenerationConfig], requested: Mapping[str, Any], prefix: int) -> GenerationConfig:
        """Return the config with the requested options over the published ones.

        `prefix` is the number of tokens before the first generated one, which published lengths include. A request for
        beam search replaces published sampling options, and the other way around.
        """
        options = dict(self.options)
        if self.max_length:
            options.setdefault("max_new_tokens", max(1, self.max_length - prefix))
        if self.min_length:
            options.setdefault("min_new_tokens", max(0, self.min_length - prefix))
        if (requested.get("num_beams") or 1) > 1:
            options = {key: value for key, value in options.items() if key not in SAMPLING_OPTIONS}
        elif any(requested.get(key) is not None for key in SAMPLING_OPTIONS):
            options.pop("num_beams", None)
        options |= requested
        if "min_new_tokens" not in requested and options.get("min_new_tokens", 0) > options.get(
            "max_new_tokens", kind.max_new_tokens
        ):
            options["min_new_tokens"] = options["max_new_tokens"]
        return kind(**options)


def read_generation_config(folder: Path, *, is_encoder_decoder: bool) -> PublishedGeneration:
    """Return what a folder publishes about generation; `notes` name options that are not supported."""
    path = folder / FILE
    raw = config_mapping.read(path) if path.is_file() else {}
    if not raw and (folder / CONFIG_FILE).is_file():  # before 2023 the same keys were part of the configuration
        raw = config_mapping.read(folder / CONFIG_FILE)
        if not is_encoder_decoder:
            raw = {}
        path = folder / CONFIG_FILE
    with guard(path, WeightsError):
        return parse_generation_config(raw, path, is_encoder_decoder=is_encoder_decoder)


def parse_generation_config(raw: Mapping[str, Any], path: Path, *, is_encoder_decoder: bool) -> PublishedGeneration:
    """Return what the keys of a file publish. Raises `WeightsError` for values of other types or out of range."""
    for key, (kind, least, most) in LIMITS.items():
        get_checked(raw, key, kind, path, WeightsError, least, most)
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        check_tokens(get_checked(raw, key, list, path, WeightsError), key, path)
    options: dict[str, Any] = {}
    beams = raw.get("num_beams") or 1
    if raw.get("do_sample"):
        options |= {"temperature": raw.get("temperature"), "top_p": raw.get("top_p"), "min_p": raw.get("min_p")}
        options = {key: value for key, value in options.items() if value is not None}
        options.setdefault("temperature", 1.0)
        options.setdefault("top_p", 1.0)
        options["top_k"] = DEFAULT_TOP_K if raw.get("top_k") is None else raw["top_k"]
    elif raw.get("do_sample") is False or beams > 1:
        options["temperature"] = 0.0
    if beams > 1 and not raw.get("do_sample"):
        options |= {"num_beams": beams, "early_stopping": raw.get("early_stopping") is True}
        options.pop("temperature")
    for key, neutral in (("repetition_penalty", 1.0), ("length_penalty", 1.0), ("no_repeat_ngram_size", 0)):
        if raw.get(key) not in (None, neutral):
            options[key] = raw[key]
    for key in ("max_new_tokens", "min_new_tokens"):
        if raw.get(key):
            options[key] = raw[key]
    if stops := raw.get("stop_strings"):
        if not all(isinstance(stop, str) for stop in ([stops] if isinstance(stops, str) else stops)):
            raise WeightsError(f"{path}: stop_strings must hold texts. {AGAIN}")
        options["stop_strings"] = stops if isinstance(stops, str) else json.dumps(stops)
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        check_tokens(raw.get(key), key, path)
    words = get_checked(raw, "bad_words_ids", list, path, WeightsError) or []
    for ids in words:
        check_tokens(ids if isinstance(ids, list) and ids else "", "bad_words_ids", path)
    rules = TokenRules(
        forced_first_token=first_id(raw.get("forced_bos_token_id")) if is_encoder_decoder else None,
        forced_last_token=first_id(raw.get("forced_eos_token_id")),
        suppress_tokens=(*(raw.get("suppress_tokens") or ()), *(ids[0] for ids in words if len(ids) == 1)),
        begin_suppress_tokens=tuple(raw.get("begin_suppress_tokens") or ()),
    )
    lacking = [key for key, neutral in UNSUPPORTED.items() if raw.get(key) not in (None, False, [], {}, *neutral)]
    if any(len(ids) > 1 for ids in words):
        lacking.append("bad_words_ids of several tokens")
    if beams > 1 and raw.get("do_sample"):
        lacking.append("num_beams with do_sample")
    notes = (
        [f"{path.name} sets {', '.join(lacking)}, which is not supported: answers may differ from the publisher's"]
        if lacking
        else []
    )
    lengths = {key: int(raw.get(key) or 0) for key in ("min_length", "max_length")}
    return PublishedGeneration(options, rules, notes=tuple(notes), **lengths)


def check_tokens(value: Any, key: str, path: Path) -> None:
    """Raise `WeightsError` if a value is neither None nor ids of tokens: an integer, or a list of integers."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and abs(i) <= MAX_TOKENS for i in ids):
        raise WeightsError(f"{path}: {key} must hold ids of tokens. {AGAIN}")


def first_id(value: int | Sequence[int] | None) -> int | None:
    """Return a token id, or the first of several."""
    return value if value is None or isinstance(value, int) else next(iter(value), None)


def without_forced_first(rules: TokenRules, target_start: Sequence[int]) -> TokenRules:
    """Return the rules without a forced first token if the start of the target already contains it."""
    return replace(rules, forced_first_token=None) if len(target_start) > 1 else rules
