"""POST /v1/predict: rows as JSON, files as multipart/form-data, tables as CSV."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw, Struct
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fieldguide.core.signature import InputField
from fieldguide.serving.errors import RequestError
from fieldguide.serving.json_values import encode_json, read_json
from fieldguide.serving.media_files import DATA_URL, TYPES, detect_media_type
from fieldguide.serving.models import LoadedModel, ModelPool, Request, ServedModel
from fieldguide.serving.row_types import list_options
from fieldguide.serving.state import ServerState
from fieldguide.serving.waiting import answer_request, read_in_thread

LIGHT_BYTES = 16 << 10  # of a body that is read without another thread
MAX_FIELD_BYTES = 1 << 20  # of a part that is no file


class Envelope(Struct, forbid_unknown_fields=True):
    """The body of a request. Rows and options are decoded when the model, and with it their type, is known."""

    rows: Raw = Raw(b"[]")
    model: str | None = None
    options: Raw = Raw(b"{}")


async def predict(http: HttpRequest) -> Response:
    """Answer a request with the records of its rows."""
    state: ServerState = http.app.state.server
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        served, request = await read_json_request(http, state.pool)
    elif kind == "multipart/form-data":
        served, request = await read_form(http, state.pool)
    elif kind == "text/csv":
        served = state.pool.get(http.query_params.get("model"))
        request = await read_csv(http, served.current)
    else:
        raise RequestError(
            415, f"{kind!r} is not read", place="Content-Type", remedy="Send application/json, multipart/form-data or text/csv."
        )
    answer = await answer_request(served, request, http, state.metrics)
    body = {
        "model": served.name,
        "predictions": answer.records,
        "notes": answer.notes,
        "problems": answer.problems,
    }
    return Response(encode_json(body), media_type="application/json")


async def read_json_request(http: HttpRequest, pool: ModelPool) -> tuple[ServedModel, Request]:
    """Return the model and the rows of a JSON body."""
    body = await http.body()
    envelope: Envelope = read_json(body, Envelope)
    served = pool.get(envelope.model)
    model = served.current
    heavy = len(body) > LIGHT_BYTES or model.language is not None or bool(model.reader.media)
    return served, await read_in_thread(decode_rows, model, envelope, heavy=heavy)


def decode_rows(model: LoadedModel, envelope: Envelope) -> Request:
    """Return the request of a body."""
    options = read_options(model, envelope.options)
    rows = read_json(envelope.rows, list[model.reader.kind], "rows")  # type: ignore[name-defined]  # a type made at run time
    return model.read_rows(rows, options)


def read_options(model: LoadedModel, text: bytes | Raw) -> dict[str, Any]:
    """Return the options of a request, checked against the signature."""
    options = list_options(read_json(text, model.option_type, "options"))
    for option in model.signature.options:
        value = options.get(option.name)
        if option.choices and value is not None and value not in option.choices:
            known = ", ".join(map(str, option.choices))
            place = f"options.{option.name}"
            raise RequestError(422, f"{place}={value} is not one of {known}", place=place, code="invalid_value")
    return options


async def read_csv(http: HttpRequest, model: LoadedModel) -> Request:
    """Return the request of a CSV body. Options are a JSON object in the query."""
    options = read_options(model, http.query_params.get("options", "{}").encode())
    content = await http.body()
    if not content.strip():
        raise RequestError(422, "the CSV is empty", remedy="Send a header and rows.", code="no_rows")
    return await read_in_thread(model.read_csv, content, options)


async def read_form(http: HttpRequest, pool: ModelPool) -> tuple[ServedModel, Request]:
    """Return the model and the rows of uploaded files.

    A part is named after an input of the model; `file` is its only input that is a file. The parts of a name are the rows in order;
    a part that is sent once belongs to all rows. `model` and `options` (JSON) are parts, too.
    """
    most = max(1000, 2 * pool.settings.max_rows)
    try:
        await http.form(max_files=most, max_fields=most, max_part_size=MAX_FIELD_BYTES)
    except (MultiPartException, HTTPException) as problem:
        text = getattr(problem, "message", getattr(problem, "detail", ""))
        raise RequestError(400, f"the form cannot be read: {text}", code="malformed_form") from None
    async with http.form() as form:
        parts: dict[str, list[Any]] = {}
        for name, value in form.multi_items():
            parts.setdefault(name, []).append(value)
        model_name = take_text(parts, "model")
        served = pool.get(model_name)
        model = served.current
        options = read_options(model, (take_text(parts, "options") or "{}").encode())
        contents = {
            name: [(await v.read(), v) if isinstance(v, UploadFile) else v for v in values] for name, values in parts.items()
        }
        return served, await read_in_thread(join_parts, model, contents, options)


def take_text(parts: dict[str, list[Any]], name: str) -> str | None:
    """Remove a part that is a text, and return it."""
    values = parts.pop(name, [None])
    if len(values) != 1 or isinstance(values[0], UploadFile):
        raise RequestError(422, f"the part {name!r} must be one text", place=name, code="invalid_value")
    return values[0]


def join_parts(model: LoadedModel, parts: Mapping[str, list[Any]], options: dict[str, Any]) -> Request:
    """Return the request of the parts of a form."""
    fields = {field.name: field for field in model.reader.fields}
    media = model.reader.media
    columns: dict[str, list[Any]] = {}
    names: list[str] = []
    for name, values in parts.items():
        field = fields.get(name) or (media[0] if name == "file" and len(media) == 1 else None)
        if field is None:
            known = ", ".join(fields)
            raise RequestError(
                422, f"the model has no input {name[:80]!r}", place=name, remedy=f"Inputs: {known}.", code="invalid_value"
            )
        if field in media:
            names = names if names and len(values) == 1 else [name_upload(value, field, i) for i, value in enumerate(values)]
            columns[field.name] = [upload_to_url(value, field, f"{name}[{i}]") for i, value in enumerate(values)]
        else:
            columns[field.name] = [to_cell(value, field) for value in values]
    count = max((len(values) for values in columns.values()), default=0)
    if odd := [name for name, values in columns.items() if len(values) not in (1, count)]:
        text = f"the form has {len(columns[odd[0]])} parts {odd[0]!r}, but {count} of another name"
        raise RequestError(422, text, place=odd[0], remedy="Send one, or one for each row.", code="invalid_value")
    columns = {name: values * count if len(values) == 1 else values for name, values in columns.items()}
    rows = [{name: values[i] for name, values in columns.items()} for i in range(count)]
    model.check_count(count)
    return model.read_rows(convert_rows(model, rows), options, names if len(names) == count else ())


def convert_rows(model: LoadedModel, rows: list[dict[str, Any]]) -> list[Any]:
    """Return rows as the type of the model's rows."""
    from fieldguide.serving.json_values import convert_value

    return convert_value(rows, list[model.reader.kind], "rows")  # type: ignore[name-defined]


def name_upload(value: Any, field: InputField, index: int) -> str:
    """Return the name that records show for an uploaded file."""
    name = os.path.basename((value[1].filename or "").replace("\\", "/")) if isinstance(value, tuple) else ""
    return name[:200] or f"{field.name}[{index}]"


def upload_to_url(value: Any, field: InputField, place: str) -> str:
    """Return an uploaded file as a data URL, which is the form that rows have."""
    import base64

    if isinstance(value, str):
        return value  # a data URL, or an error later
    content, upload = value
    kind = (upload.content_type or "").partition(";")[0].strip().lower()
    if kind in ("", "application/octet-stream"):  # not every client knows the types of files
        kind = TYPES.get(os.path.splitext(upload.filename or "")[1].lower()) or detect_media_type(content)
    if not DATA_URL.match(f"data:{kind};base64,"):
        raise RequestError(415, "the file has no media type", place=place, remedy=f"Send {', '.join(field.media_types)}.")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def to_cell(value: Any, field: InputField) -> Any:
    """Return the text of a form as a value of an input: a number, a list in JSON, or the text itself."""
    text = value[0].decode("utf-8", "replace") if isinstance(value, tuple) else value
    if text == "" and field.nullable:
        return None
    if field.kind in ("number", "list", "messages"):
        try:
            return msgspec.json.decode(text.encode())
        except (msgspec.DecodeError, RecursionError):
            return text  # of another type, which is reported with its place
    return text
