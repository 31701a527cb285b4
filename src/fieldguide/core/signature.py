"""The signature of a model: how it is called, as plain data.

It says which raw inputs a row has, which tensors they become and by which steps, what the network returns, and what a prediction
looks like. Whatever presents or runs a model without knowing its task is made from it: the graph inputs of an export, the schema
of a server, a form, an example batch. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fieldguide.core.errors import RunError
from fieldguide.core.plain_data import construct, to_json
from fieldguide.core.structure import check_value

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # version of the JSON form; a reader rejects later ones
MAX_LISTED_VALUES = 1000  # categories or classes that are listed; `count` says how many there are

FieldKind = Literal[
    "number",
    "category",
    "boolean",
    "date",
    "text",
    "identifier",
    "list",
    "messages",
    "image",
    "audio",
    "video",
    "boxes",
    "mask",
    "constant",
]
RecordUnit = Literal["row", "step", "user", "sample", "series", "pair"]  # what a prediction record describes
DType = Literal["float32", "float64", "int64", "uint8", "bool"]
JsonType = Literal["number", "integer", "string", "boolean", "object", "map", "array"]


@dataclass(frozen=True)
class ImageFormat:
    """The size of images after preprocessing, in pixels, and what brings images of other sizes to it.

    With fit="crop" the center is cut out, "pad" adds a border, "stretch" changes the aspect ratio, "shrink" only makes images
    smaller whose longer side exceeds `width`, and "area" only those with more than `width` x `height` pixels.
    """

    width: int
    height: int
    channels: int  # 1 gray, 3 color
    fit: Literal["crop", "pad", "stretch", "shrink", "area"] = "crop"
    frames: int | None = None  # of a video


@dataclass(frozen=True)
class AudioFormat:
    """The sample rate in Hz to which recordings are converted, and the longest one that training had, in seconds."""

    sample_rate: int
    trained_seconds: float | None = None


@dataclass(frozen=True)
class SeriesFormat:
    """How many past steps are read and how many are forecast. Series have one row for each step, at a fixed frequency."""

    history: int
    horizon: int
    frequency: str  # "an hour"
    season: int = 1  # steps


@dataclass(frozen=True)
class InputField:
    """A raw input: a column of a row. The name "*" stands for any number of further columns.

    Values of `values` are those seen in training, `count` their number; others are allowed and count as unknown, unless `closed`.
    `low` and `high` are the range seen in training. `format` describes how text is read as a date or a number.
    """

    name: str
    kind: FieldKind
    required: bool = True
    nullable: bool = False  # null marks a missing value
    was_missing: bool = False  # training had missing values
    about: str = ""
    role: str = "feature"
    values: tuple[str, ...] = ()
    count: int = 0
    closed: bool = False
    low: float | str | None = None
    high: float | str | None = None
    format: dict[str, Any] = dataclasses.field(default_factory=dict)
    media_types: tuple[str, ...] = ()
    image: ImageFormat | None = None
    audio: AudioFormat | None = None


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor: fixed if it has a `size`, else dynamic from `least` to `most` in steps of `multiple`.

    Dynamic axes with the same name have the same size in all tensors of a batch.
    """

    name: str
    size: int | None = None
    least: int = 1
    most: int | None = None  # None: no limit
    multiple: int = 1

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.name}={self.size:,}"
        return self.name if self.most is None else f"{self.name}<={self.most:,}"


@dataclass(frozen=True)
class TokenRule:
    """A token that each row has exactly `count` times, at the end or together after the first token."""

    token: int
    count: int = 1
    at: Literal["end", "inside"] = "end"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor: its type, axes and values.

    Values are from `low` to `high`; `codes` are the numbers of codes 0, 1, ... of each index of the last axis instead. With `mean`
    and `std`, one for each channel, it is the image (pixels / 255 - mean) / std. An integer tensor with `counts` holds the number
    of real entries of an axis, a boolean one marks them (True).

    `use` is "forward" for an argument of the network, in the order listed, "request" for one that only the steps around it take.
    """

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    about: str = ""
    use: Literal["forward", "request"] = "forward"
    required: bool = True
    low: float | None = None
    high: float | None = None
    codes: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    counts: str = ""
    tokens: tuple[TokenRule, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.axes))}]"


@dataclass(frozen=True)
class Step:
    """A step before or after the network. With `in_graph`, it can be part of an exported graph, else it stays outside.

    `settings` are its parameters. `state` is the key of `preprocess/task.json` that holds fitted values too large to repeat here.
    """

    name: str
    about: str
    in_graph: bool
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: str = ""


@dataclass(frozen=True)
class RecordField:
    """A value of a prediction record. An object has `fields`, an array and a map (text -> value) have `items`.

    `values` are the texts, or the keys of a map, that can occur; `count` is their number. A string with `media_types` is a file.
    """

    name: str
    type: JsonType
    about: str = ""
    required: bool = True
    nullable: bool = False
    values: tuple[str, ...] = ()
    count: int = 0
    low: float | None = None
    high: float | None = None
    size: int | None = None  # of an array
    fields: tuple[RecordField, ...] = ()
    items: RecordField | None = None
    media_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionSpec:
    """A prediction option. `default` is null if it is chosen otherwise, as `about` says; then null may also be passed."""

    name: str
    type: Literal["integer", "number", "string", "boolean"]
    default: int | float | str | bool | None = None
    nullable: bool = False
    required: bool = False
    about: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str | float, ...] = ()


@dataclass(frozen=True)
class CacheFormat:
    """The key/value cache of a decoder: for each layer, keys and values of the axes batch, heads, tokens, dim."""

    layers: int
    heads: int
    dim: int


@dataclass(frozen=True)
class Loop:
    """How the network is called several times for one prediction.

    autoregressive   a prefill with the prompt, then one call per token with a cache, until one of `eos_tokens`
    encoder-decoder  the source is encoded once; decoding starts with `start_tokens` and goes on like autoregressive
    diffusion        noise of the axes `latent` is denoised in as many calls as the option `steps` says (twice with guidance)
    """

    kind: Literal["autoregressive", "encoder-decoder", "diffusion"]
    start_tokens: tuple[int, ...] = ()
    eos_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    max_length: int | None = None  # tokens of prompt and answer together; of the target for an encoder-decoder
    cache: CacheFormat | None = None
    latent: tuple[Axis, ...] = ()
    timesteps: int = 0
    schedule: str = ""
    predicts: str = ""  # eps, v, x or velocity
    guidance: bool = False


@dataclass(frozen=True)
class Limits:
    """The largest inputs. What exceeds `tokens` is truncated and noted, or an error; larger files are rejected."""

    rows: int | None = None  # of a request
    tokens: int | None = None
    pixels: int | None = None  # of an image file
    samples: int | None = None  # of an audio file
    frames: int | None = None  # of a video file


@dataclass(frozen=True)
class Signature:
    """How a model is called. `task` is empty for a network without preprocessing, which has no raw inputs and no record.

    `row_form` says what a request holds: "table" for rows as objects, "value" for the value of the only input field alone.
    `record_for` says what one prediction record describes. `method` is the method of the network that is called.
    """

    architecture: str
    task: str = ""
    format: int = FORMAT
    method: str = "forward"
    row_form: Literal["table", "value"] = "table"
    record_for: RecordUnit = "row"
    inputs: tuple[InputField, ...] = ()
    series: SeriesFormat | None = None
    preprocessing: tuple[Step, ...] = ()
    tensors: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    postprocessing: tuple[Step, ...] = ()
    record: tuple[RecordField, ...] = ()
    options: tuple[OptionSpec, ...] = ()
    loop: Loop | None = None
    limits: Limits = Limits()

    @property
    def forward_tensors(self) -> tuple[TensorSpec, ...]:
        """The arguments of the network, in order."""
        return tuple(tensor for tensor in self.tensors if tensor.use == "forward")

    @property
    def dynamic_axes(self) -> dict[str, Axis]:
        """The dynamic axes of the network's arguments, by name."""
        return {axis.name: axis for tensor in self.forward_tensors for axis in tensor.axes if axis.size is None}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary, without fields that have their default."""
        return {"format": self.format, **to_json(self)}

    @classmethod
    def from_json(cls, value: Any, place: object = "signature.json") -> Signature:
        """Return the signature that `to_json` returned. Raises `RunError`, which names the place, for anything else."""
        later = value.get("format") if isinstance(value, Mapping) else None
        if type(later) is int and later > FORMAT:
            raise RunError(f"{place} has format {later}, but this version reads up to {FORMAT}. Update fieldguide.")
        try:
            check_value(value, cls, "signature")
        except ValueError as problem:
            raise RunError(f"{place} is damaged: {problem}. Write it again with `fieldguide show RUN --json`.") from None
        return construct(cls, value)

    def input_schema(self) -> dict[str, Any]:
        """Return the JSON Schema (2020-12) of one row of a request."""
        from fieldguide.core.signature_schema import build_input_schema

        return build_input_schema(self)

    def output_schema(self) -> dict[str, Any]:
        """Return the JSON Schema (2020-12) of one prediction record, as `predict --json` writes it."""
        from fieldguide.core.signature_schema import build_output_schema

        return build_output_schema(self)

    def options_schema(self) -> dict[str, Any]:
        """Return the JSON Schema (2020-12) of the prediction options of a request."""
        from fieldguide.core.signature_schema import build_options_schema

        return build_options_schema(self)

    def example_batch(
        self, batch: int = 2, sizes: Mapping[str, int] | None = None, *, device: str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Return random tensors that the network accepts, by name, in the order of its arguments.

        `sizes` are those of dynamic axes. Raises `SettingsError` for an axis that does not exist or a size out of its range.
        """
        from fieldguide.core.example_batch import build_example_batch

        return build_example_batch(self, batch, sizes or {}, device, seed)


def list_values(values: Sequence[str]) -> dict[str, Any]:
    """Return the fields `values` and `count` for possible values, at most `MAX_LISTED_VALUES` of them."""
    return {"values": tuple(values[:MAX_LISTED_VALUES]), "count": len(values)}
