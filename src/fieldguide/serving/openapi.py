"""The OpenAPI document of a server, made from the signatures of its models: the columns of a table are its schema."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from fieldguide.core.version import __version__
from fieldguide.serving.models import LoadedModel
from fieldguide.serving.openai_types import NEUTRAL, ChatRequest, CompletionRequest, EmbeddingRequest, ImageRequest

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string", "description": "The problem and the remedy."},
                "type": {"type": "string", "enum": ["invalid_request_error", "server_error"]},
                "code": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "Where in the request the problem is."},
                "remedy": {"type": ["string", "null"]},
            },
        }
    },
}
DATA_URL = r"^data:[a-z0-9.+-]+/[a-z0-9.+-]+;base64,"
FILE_KINDS = ("image", "audio", "video", "mask")


def build_openapi(models: Sequence[LoadedModel], needs_key: bool) -> dict[str, Any]:
    """Return the document for some models."""
    schemas: dict[str, Any] = {"Error": ERROR}
    requests, answers = [], []
    for model in models:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", model.name)
        s = model.signature
        row = s.input_schema()
        for field in s.inputs:
            if field.kind in FILE_KINDS and field.name in row["properties"]:
                row["properties"][field.name] |= {"pattern": DATA_URL, "contentEncoding": "base64"}
        schemas[f"{name}.Row"] = row
        schemas[f"{name}.Options"] = s.options_schema()
        schemas[f"{name}.Record"] = s.output_schema()
        item: dict[str, Any] = {"$ref": f"#/components/schemas/{name}.Row"}
        if s.row_form == "value" and len(s.inputs) == 1:
            item = {"anyOf": [row["properties"][s.inputs[0].name], item]}
        takes_none = s.row_form == "value" and not any(f.required for f in s.inputs)
        needs_options = any(option.required for option in s.options)
        request = {
            "title": f"Request of {model.name}",
            "type": "object",
            "required": [
                *([] if len(models) == 1 else ["model"]),
                *([] if takes_none else ["rows"]),
                *(["options"] if needs_options else []),
            ],
            "properties": {
                "model": {"enum": [model.name, *([None] if len(models) == 1 else [])]},
                "rows": {"type": "array", "minItems": 0 if takes_none else 1, "maxItems": model.max_rows, "items": item},
                "options": {"$ref": f"#/components/schemas/{name}.Options"},
            },
            "additionalProperties": False,
        }
        schemas[f"{name}.Request"], schemas[f"{name}.Answer"] = request, describe_answer(model.name, name)
        requests.append({"$ref": f"#/components/schemas/{name}.Request"})
        answers.append({"$ref": f"#/components/schemas/{name}.Answer"})
    any_request = requests[0] if len(requests) == 1 else {"anyOf": requests}
    any_answer = answers[0] if len(answers) == 1 else {"anyOf": answers}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": ", ".join(model.name for model in models),
            "version": __version__,
            "description": "\n".join(
                f"{m.name}: {m.signature.task or m.signature.architecture}, {m.predictor.name}" for m in models
            ),
        },
        "paths": {
            "/v1/predict": {
                "post": {
                    "operationId": "predict",
                    "summary": "Predict for rows: the records of `fieldguide predict --json`.",
                    "requestBody": {"required": True, "content": {"application/json": {"schema": any_request}}},
                    "responses": describe_responses(any_answer),
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "models",
                    "summary": "List the models.",
                    "responses": describe_responses(
                        {
                            "type": "object",
                            "required": ["object", "data"],
                            "properties": {
                                "object": {"const": "list"},
                                "data": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "required": ["id", "object", "created", "owned_by"],
                                        "properties": {"id": {"type": "string"}, "task": {"type": "string"}},
                                    },
                                },
                            },
                        }
                    ),
                }
            },
            **{
                f"/health/{name}": {
                    "get": {
                        "operationId": name,
                        "summary": about,
                        "security": [],
                        "responses": describe_responses({"type": "object", "required": ["status"]}),
                    }
                }
                for name, about in (("live", "The process runs."), ("ready", "The server takes requests."))
            },
        },
        "components": {"schemas": schemas},
    }
    add_openai_paths(document, models)
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def describe_answer(model: str, name: str) -> dict[str, Any]:
    """Return the schema of the answer of a model."""
    return {
        "title": f"Answer of {model}",
        "type": "object",
        "required": ["model", "predictions", "notes", "problems"],
        "properties": {
            "model": {"const": model},
            "predictions": {"type": "array", "items": {"$ref": f"#/components/schemas/{name}.Record"}},
            "notes": {"type": "array", "items": {"type": "string"}, "description": "What was truncated, guessed or ignored."},
            "problems": {
                "type": "array",
                "items": {"type": "object"},
                "description": "Cells that do not fit the training data.",
            },
        },
        "additionalProperties": False,
    }


def describe_responses(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the responses of an operation: its answer, or an error."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "The answer.", "content": {"application/json": {"schema": schema}}},
        "default": {"description": "What is wrong, where, and what to do.", "content": error},
    }


def add_openai_paths(document: dict[str, Any], models: Sequence[LoadedModel]) -> None:
    """Add the paths of the API of OpenAI that the models answer."""
    can: dict[str, tuple[type[Struct], list[str]]] = {
        "/v1/chat/completions": (ChatRequest, [m.name for m in models if m.language and m.language.chats]),
        "/v1/completions": (CompletionRequest, [m.name for m in models if m.language and m.language.completes]),
        "/v1/embeddings": (EmbeddingRequest, [m.name for m in models if m.embeds]),
        "/v1/images/generations": (ImageRequest, [m.name for m in models if m.image_field]),
    }
    kinds = [kind for kind, names in can.values() if names]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    document["components"]["schemas"] |= schemas
    for path, (kind, names) in can.items():
        if not names:
            continue
        schema = schemas[kind.__name__]
        schema["properties"] = {
            n: value for n, value in schema["properties"].items() if n not in NEUTRAL or n == "response_format"
        }
        schema["additionalProperties"] = False
        known = [*names, *([None] if len(models) == 1 else [])]
        schema["properties"]["model"] = {"enum": known}
        if len(models) > 1:
            schema["required"] = [*schema.get("required", []), "model"]
        if "n" in schema["properties"]:
            schema["properties"]["n"] = {"type": ["integer", "null"], "minimum": 1, "maximum": models[0].settings.max_choices}
        if kind is ChatRequest:
            del schema["properties"]["response_format"]
        schema["properties"].pop("dimensions", None)  # only the model's own is possible
        if kind is ImageRequest:
            if not any(option.name == "width" for m in models for option in m.signature.options):
                schema["properties"].pop("size")  # each makes images of one size
            prompts = [m.reader.fields[0] for m in models if m.image_field]
            if all(field.closed for field in prompts):
                schema["properties"]["prompt"] = {"enum": sorted({value for field in prompts for value in field.values})}
        responses = describe_responses({"type": "object"})
        if "stream" in schema["properties"]:
            responses["200"]["content"]["text/event-stream"] = {}
        reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
        document["paths"][path] = {
            "post": {
                "operationId": path.strip("/").replace("/", "-"),
                "summary": f"As the API of OpenAI; for {', '.join(names)}.",
                "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
                "responses": responses,
            }
        }
