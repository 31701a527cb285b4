"""Card: the description of an architecture as plain data for the CLI, the advisor, the docs and the tests.

This module does not import torch. A model file ends with one `CARD`; nothing else in the project refers to an
architecture by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from fieldguide.core.deprecation import rename_keys

if TYPE_CHECKING:
    from torch import nn

    from fieldguide.core.signature import Signature

    class Network(nn.Module):
        """The type of the networks that cards create. It exists for type checkers only."""

        config: Any  # an instance of `Card.config`
        signature: Signature  # set when it is loaded from a checkpoint


# Input type -> names of the batch tensors passed to `forward`, in order.
INPUT_TYPES: dict[str, tuple[str, ...]] = {
    "image": ("image",),  # B C H W float
    "tokens": ("tokens", "mask"),  # B T int64, B T bool: True for real tokens, False for padding
    "table": ("numbers", "categories"),  # B N float, B K int64 (0 = not seen in training)
    "vector": ("vector",),  # B F float: one feature vector per row
    "sequence": ("sequence",),  # B T D float
    "noise": ("noise",),  # B Z float
    "pair": ("source", "source_mask", "tokens", "mask"),  # two token sequences: the source and the target so far
    "series": ("series",),  # B T C float: the last T steps of C series
    "covariates": ("series", "past", "known"),  # B T C float, B T P float: other past measurements;
    # B T+H K float: covariates known for the past and the future
    "static-covariates": ("series", "past", "known", "static"),  # as for "covariates", and B S float: properties of the series
    "noisy": ("image", "time", "label"),  # B C H W float, B float: noise level, B int64: class (0 = unconditional); if the
    # config has a vocabulary, B T int64: caption tokens (0 = none)
    "noisy-target": (
        "target",
        "time",
        "image",
    ),  # B K H W float: noisy target, B float: noise level, B C H W float: the image that it belongs to
    "noisy-video": (
        "video",
        "time",
        "label",
    ),  # B F C H W float: F frames; the others as for "noisy". The noise level may also be B F, one for each frame: 0 is a known frame
    "noisy-latent": (
        "latent",
        "time",
        "text",
    ),  # B C H W float: what an autoencoder made of images, and channels to compare with, if
    # any; B float: noise level 0 .. 1000; B T D float: the states of a text encoder
    "noisy-latent-pooled": (
        "latent",
        "time",
        "text",
        "pooled",
    ),  # as for "noisy-latent", and B E float: one vector for the text
    "noisy-latent-video": ("latent", "time", "text"),  # B F C H W float: F frames of what an autoencoder made of videos, frames
    # first as in "noisy-video", also where public networks put the channels first; the others as for "noisy-latent"
    "noisy-latent-video-pooled": (
        "latent",
        "time",
        "text",
        "pooled",
    ),  # as for "noisy-latent-video", and B E float: one vector for the text
    "video": ("video",),  # B F C H W float: F frames
    "captioned": ("image", "tokens", "mask"),  # B C H W float and one text per image: B T int64, B T bool
    "image-text": ("image", "tokens", "mask"),  # as for "captioned", but the text so far, of which the next token is predicted
    "prompted-image": (
        "image",
        "points",
        "point_labels",
    ),  # B C H W float, B N P 2 float: P points, x and y in pixels, of each of
    # N prompts, B N P int64: 0 background, 1 object, 2 and 3 corners of a box, -1 no point, -2 padding
    "items": ("items", "mask"),  # B T int64: items of a user in order of time (0 = none), B T bool
    "speech-text": ("features", "tokens", "mask"),  # B T F float: log-mel features, and the text so far: B T int64, B T bool
    "speech": ("features", "lengths"),  # B T F float: log-mel features, B int64: number of real frames per row
    "waveform": ("waveform", "lengths"),  # B N float: samples of recordings, B int64: number of real samples per row
}

# A waveform that stands for a spectrogram of some frames has this number of samples for each: 10 ms at 16 kHz.
SAMPLES_PER_FRAME = 160

# Optional input -> shape and meaning. It follows the required inputs; `forward` uses None as its default.
OPTIONAL_INPUTS: dict[str, str] = {
    "segments": "B T int64: 0 for tokens of the first text of a row, 1 for those of the second",
    "profile": "B K int64: codes of the categories of the user, the first one the user (0 = unseen)",
    "profile_numbers": "B N float: numbers of the user",
    "grid": "B 2 (B I 2 for I images in a row) int64: rows and columns of patches of each image, if images of several sizes are padded",
    "text_mask": "B T bool: True for real tokens of the text; without it, all are attended to",
    "sizes": "B N float: sizes in pixels that images of a data set had: height and width, and what else the network knows",
    "image_states": "B I D float: the states of an image encoder for an image with which the video begins",
    "guidance": "B float: scale of classifier-free guidance whose result the network computes in one call",
    "times": "B T 2 int64: times in seconds of each item, and of the request for the next one",
}

# Output type -> shape and meaning of the model output.
OUTPUT_TYPES: dict[str, str] = {
    "label": "logits B ... classes; axes between B and classes are the members of an ensemble",
    "sequence": "B T D float",
    "vector": "B F float",
    "score": "B 1 float: how realistic the input is",
    "scores": "B 1 h w float: how realistic each of h x w overlapping patches of the input is",
    "tokens": "logits B T vocab of the next token at each position",
    "words": "logits B T vocab of the token at each position, for masked tokens. `model.features(...)` returns B T D, "
    "`model.forward_head(...)` maps ... D to logits, so the head can be applied to the masked positions only",
    "labels": "logits B T classes of every token",
    "replaced": "logits B T 1: each token as a replacement of the original",
    "span": "logits B T 2: each token as the first and as the last token of an answer",
    "mask": "logits B classes H W of every pixel",
    "image": "B C H W float",
    "boxes": "B A 4R+classes: for each of A points at the centers of grid cells (finest grid first, row by row), R logits "
    "each for the distance to the left, top, right and bottom side (0 to R - 1 strides), then one independent logit "
    "per class; `model.strides` are the cell sizes in pixels, `model.bins` the R distances",
    "poses": 'B A 4R+classes+3P: as for "boxes", then for each of P keypoints two numbers and a logit: the keypoint is twice the '
    "numbers, in strides, right of and below the corner of the cell, and is labeled with the probability of the logit",
    "prototypes": 'B A*(4R+classes+M)+M*S: as for "boxes", each point followed by M coefficients; then M prototypes at the S positions '
    "of a map with twice the sides of the finest grid, row by row. The mask logits of a point are the sum of the prototypes, "
    "weighted by its coefficients. `model.predict_parts(...)` returns both parts, B A 4R+classes+M and B M h w",
    "queries": "B Q 4+classes+1: for each of Q queries a box (center x, center y, width, height, as fractions of the image's "
    'sides), then logits of the classes and of "no object". `model.predict_layers(...)` returns the same for each of the L layers '
    "of the decoder, L B Q 4+classes+1",
    "scored-queries": 'B Q 4+classes: as for "queries", with one independent logit per class and none of "no object". '
    "`model.predict_all(...)` also returns the other layers of the decoder, the proposals of the encoder and decodes noisy objects",
    "mask-queries": 'B Q classes+1+S: for each of Q queries logits of the classes and of "no object", then mask logits of the S '
    "positions of a map with a quarter of the image's sides (rounded up), row by row. `model.predict_layers(...)` returns the same "
    "for the initial queries and each layer of the decoder",
    "prompted-masks": "B N K 1+S: for each of N prompts K masks: the predicted IoU of the mask with the object, then its logits at the S "
    "positions of a map with a quarter of the image's sides, row by row. The first mask is for prompts that leave no doubt about the "
    "object, the others are of different objects at the same place. `model.encode(...)` reads images, `model.decode(...)` answers "
    "prompts",
    "regions": "B P 4+1+C+4C with C = classes + 1: for each of P proposals its box (left, top, right, bottom in pixels; zeros if "
    "there are fewer), the logit of an object, logits of the background and the classes, and for each of these the offset of the "
    "box. `model.features`, `predict_anchors`, `propose`, `pool` and `classify` are its steps",
    "video": "B F C H W float: F frames",
    "embeddings": "B 2 E: an image and a text embedding; the products of all image with all text embeddings are logits, between "
    "which a softmax chooses",
    "sigmoid-embeddings": 'B 2 E+1: as for "embeddings", but each product is the logit that this image and this text belong '
    "together. The last element is the bias of the logits, for an image, and 1, for a text",
    "forecast": "B H C Q float: H future steps of C series, Q values each (a point, or quantiles)",
    "reconstruction": "as the first input: what a network rebuilds of it from a narrow code",
    "anomaly-map": "B H W float: how far the surroundings of each pixel are from those in normal images",
    "items": "logits B T items of the next item at each position; `model.score_next(...)` returns those after the latest item. "
    "Of networks that are trained, they equal `model.features(...)` B T D times `model.table()` items D",
    "masked-items": 'as for "items", with logits of the item at each position itself, for hidden items; in `items`, 0 is a hidden item',
    "towers": 'as for "items"; `model.encode_items(...)` returns the vectors of items N, N E, of which `model.table()` are all',
    "contexts": "B S 2 E float: for each of S frames the vector that is predicted from the other frames, and the quantized vector of "
    "the frame itself. `model.contrast(...)` hides frames and also returns the probabilities of the quantizer",
    "clusters": "logits B S clusters of each frame. `model.encode_hidden(...)` hides frames and returns states, which "
    "`model.clusters(...)` maps to logits",
    "ctc": "logits B S vocab of the symbol at each frame, 0 = blank; `model.frames(lengths)` of the S frames are real",
}

# Pre-training objective of an encoder-decoder on unlabeled text -> how the input is corrupted and what is
# predicted.
PRETRAINING_OBJECTIVES: dict[str, str] = {
    "spans": "spans are replaced by numbered sentinel tokens; the target is the sentinels with the removed spans (T5)",
    "infill": "spans, some of them empty, are replaced by a single mask token each; the target is the complete text (BART)",
}


# How a model is fitted without gradient descent -> what is fitted.
SOLVERS: dict[str, str] = {
    "linear": "`model.head` is fitted to `model.encode(...)` as a logistic or ridge regression",
    "none": "nothing: the model has no weights that depend on the data",
    "context": "training rows are stored in a pretrained network, which reads them together with each request",
    "memory": "features of patches of normal images are stored in a network, to which others are compared; it may be pretrained",
    "neighbors": "items that occur in the same histories are counted and stored with `model.set_neighbors`",
    "trees": "gradient-boosted trees are grown and stored with `model.set_trees`",
}


PRETRAINED_SOLVER = "context"  # the one that needs pretrained weights
NETWORK_SOLVERS = ("context", "memory")  # those that start from a network and its weights
WHOLE_ROWS_SOLVER = "neighbors"  # the one that reads whole rows, not parts of them that suit training by gradient descent
NUMBER_SCALES = ("normal", "standard")  # of the numbers of tables; see `Card.number_scale`


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A closed system, whose weights are not available; an entry of `models/closed.toml`.

    `names` holds the official name and other common spellings, `published` what is known and `source` where it
    was published. `stand_in` is the most similar model here, `why` the reason for it, and `tasks` the tasks
    that it can be trained for.
    """

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
        """Description in one paragraph: what is published, the source and the most similar model."""
        return (
            f"{self.title} is a closed system by {self.maker} ({self.year}) whose weights are not available. Published is "
            f"{self.published} Source: {self.source}. Most similar model here: {self.stand_in} ({self.why})."
        )


Scale = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of red, green and blue in 0 .. 1
IMAGENET: Scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: Scale = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # from CLIP's code
UNIT: Scale = ((0.0,) * 3, (1.0,) * 3)  # pixels / 255
HALF: Scale = ((0.5,) * 3, (0.5,) * 3)


# Old names of config fields -> current names. Old names are accepted with a warning.
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
    """A named size of an architecture: the config fields that differ from the defaults, and the exact parameter
    count.

    `params` must equal `sum(p.numel() for p in model.parameters())`; `source` is the publication of the size.
    """

    def __init__(self, *, params: int | None = None, source: str = "", **overrides: Any):
        self.params, self.source, self.overrides = params, source, overrides

    def __repr__(self) -> str:
        return f"Size(params={self.params}, {', '.join(f'{k}={v!r}' for k, v in self.overrides.items())})"


# Type annotation of a config field -> accepted Python types, and their description for error messages.
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (Integral, "an integer of at least 0"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
    "tuple": ((tuple, list), "a list of values, such as (2, 2)"),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """The description of one architecture.

    `model` is an `nn.Module` class that is created from one `config` instance, or by `build` if its constructor
    has another signature. `names` maps the common vocabulary (num_classes, channels, image, vocab_size, length,
    numbers, categories, features) to the names of this config's fields, for those that differ. `adapt` maps
    data facts in this vocabulary to config fields that follow from them, such as a smaller stem for small
    images.

    `weights` holds the tables of public weight names by origin, or functions from a config to such a table.
    `configs` holds the tables of public configuration keys by origin (see
    `fieldguide.models.mapping.config_rules`). `aliases` is for origins whose configuration contains only a
    model name: it maps the name to a size, or to a size and the fields that differ.

    `recipe` holds training settings for this architecture; they override those of the task (see
    `fieldguide.core.settings.Settings`). `parts` maps the names that the objective uses for additional models
    in training to architectures: {"critic": "dcgan-discriminator"}. `pretraining_objective` is the objective
    for unlabeled text (see `PRETRAINING_OBJECTIVES`).

    `scale` is the image normalization that published weights were trained with; it is used if no file with the
    weights specifies one. `endless` is True if the model accepts sequences longer than the config's `length`,
    which is then only the length in training.

    `solver` names how a model is fitted that is not trained by gradient descent (see `SOLVERS`). Such models are the baselines
    that networks are compared with.

    `number_scale` says how the numbers of tables are scaled: "normal" by their quantiles to a standard normal, "standard" linearly to
    mean 0 and standard deviation 1, for networks that normalize columns themselves.

    Raises `ValueError` for an unknown input type, output type, optional input or pre-training objective.
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
    solver: str = ""
    number_scale: str = "normal"

    def __post_init__(self) -> None:
        if self.solver and self.solver not in SOLVERS:
            raise ValueError(f"Card {self.name!r}: solver={self.solver!r} is not one of {sorted(SOLVERS)}.")
        if self.number_scale not in NUMBER_SCALES:
            raise ValueError(f"Card {self.name!r}: number_scale={self.number_scale!r} is not one of {NUMBER_SCALES}.")
        if self.pretraining_objective not in PRETRAINING_OBJECTIVES:
            raise ValueError(
                f"Card {self.name!r}: pretraining_objective={self.pretraining_objective!r} is not one of "
                f"{sorted(PRETRAINING_OBJECTIVES)}."
            )
        if self.input_type not in INPUT_TYPES:
            raise ValueError(f"Card {self.name!r}: input_type={self.input_type!r} is not one of {sorted(INPUT_TYPES)}.")
        if unknown := [given for given in self.output_types if given not in OUTPUT_TYPES]:
            raise ValueError(f"Card {self.name!r}: output_type={unknown[0]!r} is not one of {sorted(OUTPUT_TYPES)}.")
        if unknown := [name for name in self.optional_inputs if name not in OPTIONAL_INPUTS]:
            raise ValueError(f"Card {self.name!r}: optional_inputs={unknown[0]!r} is not one of {sorted(OPTIONAL_INPUTS)}.")
        if len(self.output_types) > 1 and not self.accepts("output_type"):
            raise ValueError(f"Card {self.name!r} has several output types, so its config needs a field `output_type`.")

    @property
    def family(self) -> str:
        """Name of the package that contains the model file."""
        return self.model.__module__.split(".")[-2]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch tensors that `forward` takes, in order."""
        return INPUT_TYPES[self.input_type]

    @property
    def output_types(self) -> tuple[str, ...]:
        """All supported output types; the first is the default."""
        return (self.output_type,) if isinstance(self.output_type, str) else tuple(self.output_type)

    @property
    def reads_whole_rows(self) -> bool:
        """Whether fitting reads each row whole, for example all items of a user."""
        return self.solver == WHOLE_ROWS_SOLVER

    @property
    def fits_network(self) -> bool:
        """Whether fitting starts from a network that may be pretrained, without training it."""
        return self.solver in NETWORK_SOLVERS

    @property
    def has_class_token(self) -> bool:
        """Whether token sequences begin with a class token and each text ends with a separator, as for BERT."""
        return "words" in self.output_types

    @property
    def tiny(self) -> str:
        """Name of the size used in tests."""
        return f"{self.name}-test"

    @property
    def default(self) -> str:
        """Name of the default size, the first in `sizes`."""
        return next(iter(self.sizes))

    @property
    def summary(self) -> str:
        """First line of the docstring of the model file."""
        return (sys.modules[self.model.__module__].__doc__ or self.name).strip().splitlines()[0]

    @property
    def new(self) -> str:
        """The paragraph `New here:` of the docstring of the model file, without the label."""
        text = sys.modules[self.model.__module__].__doc__ or ""
        return " ".join(text.partition("New here:")[2].split("\n\n")[0].partition("Shapes:")[0].split())

    def resolve_config(self, size: str | None = None, **overrides: Any) -> Any:
        """Return the config of a size, with overrides named in the common vocabulary or by the config's field names.

        Raises `TypeError` for an unknown field, a value of the wrong type and an unsupported output type.
        """
        values = dict(self.sizes[size or self.default].overrides)
        known = {f.name: str(f.type) for f in fields(self.config)}
        former = {old: new for old, new in FORMER_FIELDS.items() if old not in known and self.names.get(new, new) in known}
        overrides = rename_keys(overrides, former, "field")
        for key, value in overrides.items():
            name = self.names.get(key, key)
            if name not in known:
                raise TypeError(f"{self.name} has no field {key!r}. Its fields are {', '.join(sorted(known))}.")
            kind, words = KINDS.get(known[name].partition("[")[0], (object, ""))
            if not isinstance(value, kind) or (kind is Integral and isinstance(value, Integral) and value < 0):
                raise TypeError(f"{self.name}: {key}={value!r} must be {words}.")
            if name == "output_type" and value not in self.output_types:
                raise TypeError(
                    f"{self.name} does not support output_type={value!r}. Choose one of {', '.join(self.output_types)}."
                )
            values[name] = value
        return self.config(**values)

    def accepts(self, word: str) -> bool:
        """Return whether the config has a field for this name of the common vocabulary."""
        return self.names.get(word, word) in {f.name for f in fields(self.config)}

    def tables(self, config: Any) -> dict[str, Mapping[str, Any]]:
        """Return the tables of public weight names for a config, by origin."""
        return {origin: table(config) if callable(table) else table for origin, table in self.weights.items()}

    def make(self, config: Any) -> Any:
        """Create the model with newly initialized weights."""
        return self.build(config) if self.build else self.model(config)
