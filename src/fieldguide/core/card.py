"""Card: what a model is, as plain data that the CLI, advisor, docs and tests read. Imports no torch.

A model file ends with one `CARD`. Nothing else in the project knows an architecture by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from fieldguide.core.deprecation import rename_keys

# What a network takes -> the names of the batch tensors handed to `forward`, in order.
INPUT_TYPES: dict[str, tuple[str, ...]] = {
    "image": ("image",),  # B C H W float
    "tokens": ("tokens", "mask"),  # B T int64, B T bool: True where a token is real, not padding
    "table": ("numbers", "categories"),  # B N float, B K int64 (0 = unseen)
    "vector": ("vector",),  # B F float: one flat row of numbers
    "sequence": ("sequence",),  # B T D float
    "noise": ("noise",),  # B Z float
    "pair": ("source", "source_mask", "tokens", "mask"),  # two rows of tokens: what is read, what is said so far
    "series": ("series",),  # B T C float: C series side by side, T steps of the past
    "covariates": ("series", "past", "known"),  # B T C and beside it B T P float: what else was measured;
    # B T+H K float: what is known ahead, of past and future
    "noisy": ("image", "time", "label"),  # B C H W float, B float: noise level, B int64 (0 = no condition), or where the
    # config has a vocab B T int64: tokens of a caption (0 = none)
    "noisy-video": ("video", "time", "label"),  # B F C H W float: F frames; the others as for "noisy"
    "captioned": ("image", "tokens", "mask"),  # B C H W float, and a text for each: B T int64, B T bool
    "items": ("items", "mask"),  # B T int64: what a user met, in order of time (0 = none), B T bool
    "speech": ("features", "lengths"),  # B T F float: log-mel, B int64: real frames of each row
}

# What it may take after that, or do without: `forward` has None for it.
OPTIONAL_INPUTS: dict[str, str] = {
    "segments": "B T int64: 0 for tokens of a first text, 1 for those of a second in the same row",
}

# Output type -> shape and meaning of the model output.
OUTPUT_TYPES: dict[str, str] = {
    "label": "logits B ... classes; axes between B and classes are the members of an ensemble",
    "sequence": "B T D float",
    "vector": "B F float",
    "score": "B 1 float: how realistic the input is",
    "tokens": "logits B T vocab of the next token at each position",
    "words": "logits B T vocab of the token at each position, for masked tokens. `model.features(...)` returns B T D, "
    "`model.forward_head(...)` maps ... D to logits, so the head can be applied to the masked positions only",
    "labels": "logits B T classes of every token",
    "span": "logits B T 2: each token as the first and as the last token of an answer",
    "mask": "logits B classes H W of every pixel",
    "image": "B C H W float",
    "boxes": "B A 4R+classes: for each of A points at the centers of grid cells (finest grid first, row by row), R logits "
    "each for the distance to the left, top, right and bottom side (0 to R - 1 strides), then one independent logit "
    "per class; `model.strides` are the cell sizes in pixels, `model.bins` the R distances",
    "video": "B F C H W float: F frames",
    "embeddings": "B 2 E: an image and a text embedding; the products of all image with all text embeddings are logits",
    "forecast": "B H C Q float: H future steps of C series, Q values each (a point, or quantiles)",
    "items": "logits B T items of the next item at each position; equals `model.features(...)` B T D times `model.table()` items D",
    "ctc": "logits B S vocab of the symbol at each frame, 0 = blank; `model.frames(lengths)` of the S frames are real",
}

# How a network that reads one row and writes another learns from texts alone: what is done to a text before it reads it.
PRETRAINING_OBJECTIVES: dict[str, str] = {
    "spans": "spans are cut out, a numbered token in the place of each; it writes what they were (T5)",
    "infill": "spans are cut out, the same token in the place of each, and in other places where nothing was; it writes the "
    "whole text (BART)",
}


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A system that nobody outside has, as `models/closed.toml` says it: what is published of it, where, and what comes
    nearest here. `names`: its own, then what else people type; `tasks`: those of the stand-in."""

    names: tuple[str, ...]
    title: str
    maker: str
    year: int
    published: str
    source: str
    stand_in: str
    why: str
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def text(self) -> str:
        """All of it, in three sentences."""
        return (
            f"{self.title} is a closed system of {self.maker} ({self.year}): there is nothing to create or load. Published "
            f"is {self.published} Source: {self.source}. Nearest here: {self.stand_in} ({self.why})."
        )


Scale = tuple[tuple[float, ...], tuple[float, ...]]  # of red, green and blue from 0 to 1: mean, deviation
IMAGENET: Scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: Scale = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # of CLIP's code
HALF: Scale = ((0.5,) * 3, (0.5,) * 3)


# Former names of config fields -> their names; accepted with a warning.
FORMER_FIELDS = {
    "classes": "num_classes",
    "vocab": "vocab_size",
    "tied": "tie_embeddings",
    "gives": "output_type",
    "base": "rope_theta",
    "groups": "kv_heads",
    "stretch": "rope_scaling",
}


class Size:
    """A named size: the config fields that differ from the default, and its exact parameter count.

    `params` is what `sum(p.numel() for p in model.parameters())` must give; `source` says who published it.
    """

    def __init__(self, *, params: int | None = None, source: str = "", **overrides: Any):
        self.params, self.source, self.overrides = params, source, overrides

    def __repr__(self) -> str:
        return f"Size(params={self.params}, {', '.join(f'{k}={v!r}' for k, v in self.overrides.items())})"


# The annotation of a config's field -> what its values are, in Python and in words.
KINDS = {
    "int": (Integral, "a whole number from 0 up"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a word"),
    "tuple": ((tuple, list), "a list of values, such as (2, 2)"),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """One architecture.

    `model` is an `nn.Module` class built from one `config` instance (`build` where a class keeps another
    signature). `names` maps the project's vocabulary (classes, channels, image, vocab, length, numbers,
    categories, features) to this config's own field names where they differ. `weights` holds the tables of
    public parameter names, by origin, or functions from a config to such a table; `configs` those of public
    configuration keys, by origin (see `fieldguide.models.mapping.config_rules`); `aliases`, for origins whose configurations say only a
    name, what is meant by each: a size, or a size and what differs from it. `recipe` holds training settings that suit the
    architecture and are laid over the task's (see `fieldguide.core.settings.Settings`). `adapt` turns what the data
    needs (the same vocabulary) into config fields that follow from it: a smaller stem for small pictures. `parts`
    names further networks that training needs beside this one, by what the objective calls them:
    {"critic": "dcgan-discriminator"}. `denoises` says how an encoder-decoder learns from texts alone (see `DENOISES`).
    `scale` is that of the pictures that published weights have learnt with, where no file beside them says it.
    `endless`: rows longer than the config's `length` can be read, as it says only what was learnt from.
    """

    name: str
    model: type
    config: type
    paper: str
    year: int
    input_type: str
    output_type: str | tuple[str, ...]
    sizes: Mapping[str, Size]
    names: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, str | tuple[str, Mapping[str, Any]]]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    build: Callable[[Any], Any] | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    optional_inputs: tuple[str, ...] = ()
    pretraining_objective: str = "spans"
    scale: Scale = IMAGENET
    endless: bool = False

    def __post_init__(self) -> None:
        if self.pretraining_objective not in PRETRAINING_OBJECTIVES:
            raise ValueError(
                f"card {self.name!r}: denoises={self.pretraining_objective!r} is none of {sorted(PRETRAINING_OBJECTIVES)}"
            )
        if self.input_type not in INPUT_TYPES:
            raise ValueError(f"card {self.name!r}: takes={self.input_type!r} is none of {sorted(INPUT_TYPES)}")
        if strange := [given for given in self.output_types if given not in OUTPUT_TYPES]:
            raise ValueError(f"card {self.name!r}: output_type={strange[0]!r} is none of {sorted(OUTPUT_TYPES)}")
        if strange := [name for name in self.optional_inputs if name not in OPTIONAL_INPUTS]:
            raise ValueError(f"card {self.name!r}: also={strange[0]!r} is none of {sorted(OPTIONAL_INPUTS)}")
        if len(self.output_types) > 1 and not self.accepts("output_type"):
            raise ValueError(f"card {self.name!r} gives several things, so its config must have a field `gives`")

    @property
    def family(self) -> str:
        """The folder that the model file lies in."""
        return self.model.__module__.split(".")[-2]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch tensors that `forward` takes, in order."""
        return INPUT_TYPES[self.input_type]

    @property
    def output_types(self) -> tuple[str, ...]:
        """All that it can give, one at a time; the first is what its bare name gives."""
        return (self.output_type,) if isinstance(self.output_type, str) else tuple(self.output_type)

    @property
    def framed(self) -> bool:
        """Whether rows of tokens begin with a class token and each text in them ends with a separator, as BERT's do."""
        return "words" in self.output_types

    @property
    def tiny(self) -> str:
        """The size that tests use."""
        return f"{self.name}-test"

    @property
    def default(self) -> str:
        """The size meant by the architecture's bare name: the first listed."""
        return next(iter(self.sizes))

    @property
    def summary(self) -> str:
        """First line of the model file's docstring."""
        return (sys.modules[self.model.__module__].__doc__ or self.name).strip().splitlines()[0]

    @property
    def new(self) -> str:
        """What the docstring says after `New here:`."""
        text = sys.modules[self.model.__module__].__doc__ or ""
        return " ".join(text.partition("New here:")[2].split("\n\n")[0].partition("Shapes:")[0].split())

    def settle(self, size: str | None = None, **overrides: Any) -> Any:
        """The config of a size with the project's vocabulary or the config's own names laid over it.

        Raises `TypeError` naming the unknown field and those that exist, or the value that is of the wrong kind.
        """
        values = dict(self.sizes[size or self.default].overrides)
        known = {f.name: str(f.type) for f in fields(self.config)}
        former = {old: new for old, new in FORMER_FIELDS.items() if old not in known and self.names.get(new, new) in known}
        overrides = rename_keys(overrides, former, "field")
        for key, value in overrides.items():
            name = self.names.get(key, key)
            if name not in known:
                raise TypeError(f"{self.name} has no field {key!r}; it has {', '.join(sorted(known))}")
            kind, words = KINDS.get(known[name].partition("[")[0], (object, ""))
            if not isinstance(value, kind) or (kind is Integral and value < 0):
                raise TypeError(f"{self.name}: {key}={value!r} is not {words}")
            if name == "output_type" and value not in self.output_types:
                raise TypeError(f"{self.name} cannot give {value!r}; it gives {', '.join(self.output_types)}")
            values[name] = value
        return self.config(**values)

    def accepts(self, word: str) -> bool:
        """Whether the config has a field for this word of the project's vocabulary."""
        return self.names.get(word, word) in {f.name for f in fields(self.config)}

    def tables(self, config: Any) -> dict[str, Mapping[str, Any]]:
        """The tables of public parameter names that hold for a config, by origin."""
        return {origin: table(config) if callable(table) else table for origin, table in self.weights.items()}

    def make(self, config: Any) -> Any:
        """A network with freshly initialised weights."""
        return self.build(config) if self.build else self.model(config)
