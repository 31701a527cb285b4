"""The Open Inference Protocol, version 2, over HTTP, with the extension of binary tensors that Triton's clients use.

Each input of a model is a tensor with one element for each row, and so is each value of its records. Numbers are FP64 or INT64; texts,
files and nested values (as JSON) are BYTES. Prediction options are parameters of the request.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from msgspec import Struct, field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fieldguide.core.signature import InputField, RecordField
from fieldguide.core.version import __version__
from fieldguide.serving.errors import RequestError
from fieldguide.serving.json_values import convert_value, encode_json, read_json
from fieldguide.serving.media_files import content_to_url
from fieldguide.serving.models import LoadedModel, Request, ServedModel
from fieldguide.serving.row_types import MEDIA_KINDS, list_options
from fieldguide.serving.state import ServerState
from fieldguide.serving.waiting import answer_request, read_in_thread

HEADER = "Inference-Header-Content-Length"
DTYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
OWN_PARAMETERS = ("binary_data_output", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end")
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]


class InputTensor(Struct):
    """A tensor of a request. Its data is in `data`, or follows the JSON as `binary_data_size` bytes."""

    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, Any] = field(default_factory=dict)
    data: list[Any] | None = None


class OutputTensor(Struct):
    """A requested output."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


class InferRequest(Struct):
    """The JSON part of a request."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: list[OutputTensor] = field(default_factory=list)


def get_served(http: HttpRequest) -> ServedModel:
    """Return the model in the path. Its versions are those of its runs: "1" is the present one."""
    version = http.path_params.get("version", "1")
    if version != "1":
        raise RequestError(
            404, f"there is no version {version[:40]!r}", remedy="Only version 1 is served.", code="model_not_found"
        )
    state: ServerState = http.app.state.server
    return state.pool.get(http.path_params["name"])


def respond(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON response."""
    return Response(encode_json(value), status, media_type="application/json")


async def describe_server(http: HttpRequest) -> Response:
    """Return the name, the version and the extensions of the server."""
    return respond({"name": "fieldguide", "version": __version__, "extensions": ["binary_tensor_data"]})


async def describe_model(http: HttpRequest) -> Response:
    """Return the inputs and outputs of a model as tensors."""
    served = get_served(http)
    signature = served.current.signature
    inputs = [{"name": f.name, "datatype": find_input_type(f), "shape": [-1]} for f in signature.inputs if f.name != "*"]
    outputs = [{"name": f.name, "datatype": find_output_type(f), "shape": [-1]} for f in signature.record]
    return respond(
        {"name": served.name, "versions": ["1"], "platform": "fieldguide_torch", "inputs": inputs, "outputs": outputs}
    )


async def report_model_ready(http: HttpRequest) -> Response:
    """Say whether a model takes requests."""
    served = get_served(http)
    if not served.worker.thread.is_alive() or served.worker.stopping:
        raise RequestError(503, f"{served.name} has stopped", code="not_ready")
    return respond({"name": served.name, "ready": True})


def find_input_type(known: InputField) -> str:
    """Return the type of the tensor of an input."""
    return "FP64" if known.kind == "number" else "BYTES"


def find_output_type(known: RecordField) -> str:
    """Return the type of the tensor of a value of records."""
    return {"number": "FP64", "integer": "INT64", "boolean": "BOOL"}.get(known.type, "BYTES") if not known.nullable else "BYTES"


async def infer(http: HttpRequest) -> Response:
    """Predict for the rows in tensors."""
    state, served = http.app.state.server, get_served(http)
    model = served.current
    request, binary = split_body(await http.body(), http.headers.get(HEADER))
    ready = await read_in_thread(read_tensors, model, request, binary)
    answer = await answer_request(served, ready, http, state.metrics)
    wanted = {output.name: output for output in request.outputs}
    known = [f for f in model.signature.record if not wanted or f.name in wanted]
    if unknown := wanted.keys() - {f.name for f in known}:
        raise RequestError(422, f"{served.name} has no output {min(unknown)[:80]!r}", place="outputs", code="invalid_value")
    all_binary = bool(request.parameters.get("binary_data_output"))
    outputs, tail = [], b""
    for one in known:
        values = [record.get(one.name) for record in answer.records]
        asked = wanted[one.name].parameters.get("binary_data", all_binary) if one.name in wanted else all_binary
        described, content = write_tensor(one, values, bool(asked))
        outputs.append(described)
        tail += content
    body: dict[str, Any] = {"model_name": served.name, "model_version": "1", "outputs": outputs}
    body |= {"id": request.id} if request.id else {}
    body |= {"parameters": {"notes": encode_json(answer.notes).decode()}} if answer.notes else {}
    text = encode_json(body)
    if not tail and not all_binary and not any("binary_data_size" in o.get("parameters", {}) for o in outputs):
        return Response(text, media_type="application/json")
    return Response(text + tail, headers={HEADER: str(len(text))}, media_type="application/octet-stream")


def split_body(body: bytes, length: str | None) -> tuple[InferRequest, memoryview]:
    """Return the JSON part of a body and the binary part after it."""
    size = len(body)
    if length is not None:
        if not length.isdigit() or int(length) > len(body):
            raise RequestError(
                400, f"{HEADER}={length[:40]!r} is not the length of the JSON part", place=HEADER, code="malformed_body"
            )
        size = int(length)
    return read_json(body[:size], InferRequest), memoryview(body)[size:]


def read_tensors(model: LoadedModel, request: InferRequest, binary: memoryview) -> Request:
    """Return the request that tensors hold."""
    known = {f.name: f for f in model.reader.fields}
    columns: dict[str, list[Any]] = {}
    for tensor in request.inputs:
        place = f"inputs.{tensor.name[:80]}"
        if tensor.name not in known or tensor.name in columns:
            problem = f"{model.name} has no input {tensor.name[:80]!r}, or it is given twice"
            raise RequestError(422, problem, place=place, code="invalid_value")
        values, binary = read_values(tensor, binary, place)
        columns[tensor.name] = [to_cell(value, known[tensor.name], f"{place}[{i}]") for i, value in enumerate(values)]
    counts = {len(values) for values in columns.values()}
    if len(counts) > 1:
        problem = f"the tensors have {sorted(counts)} elements: one is needed for each row"
        raise RequestError(422, problem, place="inputs", code="invalid_value")
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    options = {name: value for name, value in request.parameters.items() if name not in OWN_PARAMETERS}
    options = list_options(convert_value(options, model.option_type, "parameters"))
    model.check_count(len(rows))
    return model.read_rows(convert_value(rows, list[model.reader.kind], "inputs"), options)  # type: ignore[name-defined]


def read_values(tensor: InputTensor, binary: memoryview, place: str) -> tuple[list[Any], memoryview]:
    """Return the elements of a tensor, and what follows of the binary part."""
    count = 1
    for size in tensor.shape:
        if size < 0:
            raise RequestError(422, f"the shape {tensor.shape} is negative", place=place, code="invalid_value")
        count *= size
    length = tensor.parameters.get("binary_data_size")
    if length is None:
        values = flatten(tensor.data or [])
    else:
        if type(length) is not int or not 0 <= length <= len(binary):
            raise RequestError(400, f"binary_data_size={length!r} is not in the body", place=place, code="malformed_body")
        content, binary = binary[:length], binary[length:]
        values = read_bytes(content, place) if tensor.datatype == "BYTES" else read_numbers(content, tensor.datatype, place)
    if len(values) != count:
        problem = f"the shape {tensor.shape} has {count:,} elements, but there are {len(values):,}"
        raise RequestError(422, problem, place=place, code="invalid_value")
    return values, binary


def flatten(values: Sequence[Any]) -> list[Any]:
    """Return nested lists as one list."""
    found: list[Any] = []
    stack = list(reversed(values))
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(reversed(value))
        else:
            found.append(value)
    return found


def read_bytes(content: memoryview, place: str) -> list[bytes]:
    """Return elements that are preceded by their length, 4 bytes little-endian."""
    found, at = [], 0
    while at < len(content):
        size = struct.unpack_from("<I", content, at)[0] if at + 4 <= len(content) else -1
        if size < 0 or at + 4 + size > len(content):
            raise RequestError(400, "the elements of BYTES are cut off", place=place, code="malformed_body")
        found.append(bytes(content[at + 4 : at + 4 + size]))
        at += 4 + size
    return found


def read_numbers(content: memoryview, datatype: str, place: str) -> list[Any]:
    """Return the numbers in the binary part."""
    kind = np.dtype(DTYPES[datatype])
    if len(content) % kind.itemsize:
        raise RequestError(400, f"{len(content):,} bytes are no whole number of {datatype}", place=place, code="malformed_body")
    numbers = np.frombuffer(content, kind)
    if numbers.dtype.kind == "f" and np.isinf(numbers).any():
        raise RequestError(422, "a number is not finite", place=place, code="invalid_value")
    return [None if value != value else value for value in numbers.tolist()]  # NaN marks a missing value


def to_cell(value: Any, known: InputField, place: str) -> Any:
    """Return an element of a tensor as a value of an input."""
    if known.kind in MEDIA_KINDS and isinstance(value, bytes | str):
        content = value if isinstance(value, bytes) else value.encode("latin-1", "replace")
        return content.decode("latin-1") if content.startswith(b"data:") else content_to_url(content, known, place)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise RequestError(400, "a text is not UTF-8", place=place, code="malformed_body") from None
    if isinstance(value, str) and known.kind in ("list", "messages"):
        return read_json(value.encode(), Any, place)
    return value


def write_tensor(known: RecordField, values: Sequence[Any], as_binary: bool) -> tuple[dict[str, Any], bytes]:
    """Return the description of an output with its data, and the bytes that follow the JSON instead."""
    datatype = find_output_type(known)
    described: dict[str, Any] = {"name": known.name, "datatype": datatype, "shape": [len(values)]}
    if datatype == "BYTES":
        texts = [value if isinstance(value, str) else encode_json(value).decode() for value in values]
        content = b"".join(struct.pack("<I", len(t)) + t for t in (text.encode() for text in texts)) if as_binary else b""
        data: list[Any] = texts
    else:
        lacking = float("nan") if datatype == "FP64" else 0
        data = [lacking if value is None else value for value in values]
        content = np.array(data, dtype=DTYPES[datatype]).tobytes() if as_binary else b""
    if as_binary:
        return described | {"parameters": {"binary_data_size": len(content)}}, content
    return described | {"data": data}, b""
