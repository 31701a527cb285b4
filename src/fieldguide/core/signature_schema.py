"""JSON Schemas (2020-12) of the rows, records and options of a signature.

Keys that begin with "x-" are annotations for forms and documentation; validators ignore them.
"""

from __future__ import annotations

from typing import Any

from fieldguide.core.signature import InputField, OptionSpec, RecordField, Signature

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
        "required": ["role", "content"],
    },
}
# Kind of an input -> JSON types of its values. A file is a path, a URL or a data URL, as the reader of the request supports.
TYPES: dict[str, tuple[str, ...]] = {
    "number": ("number",),
    "category": ("string",),
    "boolean": ("boolean", "string", "integer"),
    "identifier": ("string", "integer"),
    "date": ("string",),
    "text": ("string",),
    "image": ("string",),
    "audio": ("string",),
    "video": ("string",),
    "mask": ("string",),
    "boxes": ("array",),
    "list": ("array",),
    "constant": ("string", "number", "boolean"),
}


def build_input_schema(signature: Signature) -> dict[str, Any]:
    """Return the schema of one row. Unknown fields are not allowed."""
    named = [field for field in signature.inputs if field.name != "*"]
    others = next((field for field in signature.inputs if field.name == "*"), None)
    return {
        "$schema": DIALECT,
        "title": f"Row of {signature.task or signature.architecture}",
        "type": "object",
        "properties": {field.name: describe_input(field) for field in named},
        "required": [field.name for field in named if field.required],
        "additionalProperties": False if others is None else describe_input(others),
    }


def describe_input(field: InputField) -> dict[str, Any]:
    """Return the schema of a value of an input."""
    if field.kind == "messages":
        schema: dict[str, Any] = {"anyOf": [{"type": "string"}, MESSAGES]} if field.format.get("text") else dict(MESSAGES)
    else:
        types = list(TYPES[field.kind])
        if field.kind == "category" and field.values and all(is_number(value) for value in field.values):
            types.append("number")
        if field.kind == "category" and {value.lower() for value in field.values} & {"true", "false"}:
            types.append("boolean")
        if field.kind == "date" and isinstance(field.low, int | float):
            types.append("number")
        types += ["null"] * field.nullable
        schema = {"type": types if len(types) > 1 else types[0]}
        if field.kind == "list":
            schema["items"] = {"type": "string"}
    if field.closed and field.count == len(field.values):
        schema["enum"] = [*field.values, *([None] if field.nullable else [])]
    elif field.values:
        schema |= {"examples": list(field.values[:3]), "x-values": list(field.values), "x-count": field.count}
    if field.low is not None:
        schema["x-range"] = [field.low, field.high]
    for key, value in (
        ("description", field.about),
        ("x-kind", field.kind),
        ("x-format", field.format),
        ("x-media-types", list(field.media_types)),
    ):
        if value:
            schema[key] = value
    return schema


def is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def build_output_schema(signature: Signature) -> dict[str, Any]:
    """Return the schema of one prediction record: `input` and the prediction, or `input` and `error`."""
    place = {"input": {"description": "The input, or the place it was read from.", "type": ["string", "array", "object"]}}
    record = describe_object(signature.record)
    record["properties"] = place | record["properties"]
    record["required"] = ["input", *record["required"]]
    error = {
        "type": "object",
        "properties": {**place, "error": {"type": "string", "description": "Why the input could not be read."}},
        "required": ["input", "error"],
        "additionalProperties": False,
    }
    title = f"Prediction of {signature.task or signature.architecture}"
    return {"$schema": DIALECT, "title": title, "anyOf": [record, error]}


def describe_object(fields: tuple[RecordField, ...]) -> dict[str, Any]:
    """Return the schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": {field.name: describe_value(field) for field in fields},
        "required": [field.name for field in fields if field.required],
        "additionalProperties": False,
    }


def describe_value(field: RecordField) -> dict[str, Any]:
    """Return the schema of a value of a record."""
    complete = bool(field.values) and field.count == len(field.values)
    if field.type == "object":
        schema = describe_object(field.fields)
    elif field.type == "map":
        schema = {"type": "object", "additionalProperties": describe_value(field.items) if field.items else True}
        if complete:
            schema["propertyNames"] = {"enum": list(field.values)}
    elif field.type == "array":
        schema = {"type": "array", "items": describe_value(field.items) if field.items else True}
        if field.size is not None:
            schema |= {"minItems": field.size, "maxItems": field.size}
    else:
        schema = {"type": field.type} | ({"enum": list(field.values)} if complete else {})
    schema |= describe_range(field.low, field.high)
    if field.nullable:
        schema = {"anyOf": [schema, {"type": "null"}]}
    if field.about:
        schema["description"] = field.about
    if field.media_types:
        schema["x-media-types"] = list(field.media_types)
    return schema


def build_options_schema(signature: Signature) -> dict[str, Any]:
    """Return the schema of the prediction options. Unknown options are not allowed."""
    return {
        "$schema": DIALECT,
        "title": f"Options of {signature.task or signature.architecture}",
        "type": "object",
        "properties": {option.name: describe_option(option) for option in signature.options},
        "required": [option.name for option in signature.options if option.required],
        "additionalProperties": False,
    }


def describe_option(option: OptionSpec) -> dict[str, Any]:
    """Return the schema of a prediction option."""
    schema: dict[str, Any] = {"type": [option.type, "null"] if option.nullable else option.type}
    if option.choices:
        schema["enum"] = [*option.choices, *([None] if option.nullable else [])]
    if not option.required:
        schema["default"] = option.default
    schema |= describe_range(option.low, option.high)
    return {**schema, "description": option.about} if option.about else schema


def describe_range(low: float | None, high: float | None) -> dict[str, float]:
    """Return the keywords of the smallest and the largest number."""
    return ({} if low is None else {"minimum": low}) | ({} if high is None else {"maximum": high})
