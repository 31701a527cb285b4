"""The ASGI application: its routes, and the errors of those that do not exist."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from fieldguide.serving import openai_api, v2_api
from fieldguide.serving.errors import RequestError
from fieldguide.serving.json_values import encode_json
from fieldguide.serving.metrics import Metrics
from fieldguide.serving.models import LoadedModel, ModelPool
from fieldguide.serving.openapi import build_openapi
from fieldguide.serving.predict_api import predict
from fieldguide.serving.security import Guard
from fieldguide.serving.settings import ServerSettings
from fieldguide.serving.state import ServerState

OWNER = "fieldguide"
PAGE_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PAGE_FILES = {path.name: path.read_bytes() for path in (Path(__file__).parent / "page").iterdir()}


def build_app(models: Sequence[LoadedModel], settings: ServerSettings) -> Starlette:
    """Return the application for loaded models."""
    metrics = Metrics()
    state = ServerState(ModelPool(models, settings), settings, metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        state.pool.start()
        yield
        state.stopping = True
        await run_in_threadpool(state.pool.stop)

    app = Starlette(
        routes=list_routes(),
        lifespan=lifespan,
        middleware=[Middleware(Guard, settings=settings, metrics=metrics)],
        exception_handlers={HTTPException: handle_http_error, RequestError: handle_request_error},  # type: ignore[dict-item]
    )
    app.state.server = state
    return app


def list_routes() -> list[Route]:
    """Return the routes."""
    return [
        Route("/v1/predict", predict, methods=["POST"]),
        Route("/v1/chat/completions", openai_api.chat, methods=["POST"]),
        Route("/v1/completions", openai_api.complete, methods=["POST"]),
        Route("/v1/embeddings", openai_api.embed, methods=["POST"]),
        Route("/v1/audio/transcriptions", openai_api.transcribe, methods=["POST"]),
        Route("/v1/audio/translations", openai_api.translate, methods=["POST"]),
        Route("/v1/images/generations", openai_api.draw, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", show_model),
        Route("/health/live", report_live),
        Route("/health/ready", report_ready),
        Route("/", show_page),
        Route("/page/{name}", show_page),
        Route("/metrics", show_metrics),
        Route("/v2", v2_api.describe_server),
        Route("/v2/", v2_api.describe_server),
        Route("/v2/health/live", report_live),
        Route("/v2/health/ready", report_ready),
        *(
            Route(f"/v2/models/{{name}}{version}{end}", function, methods=[method])
            for version in ("", "/versions/{version}")
            for end, function, method in (
                ("", v2_api.describe_model, "GET"),
                ("/ready", v2_api.report_model_ready, "GET"),
                ("/infer", v2_api.infer, "POST"),
            )
        ),
        Route("/openapi.json", show_openapi),
    ]


async def handle_request_error(http: HttpRequest, error: RequestError) -> Response:
    """Answer a request that cannot be answered."""
    return error.to_response(http.url.path)


async def handle_http_error(http: HttpRequest, error: HTTPException) -> Response:
    """Answer a path or a method that does not exist."""
    if error.status_code == 404:
        paths = ", ".join(route.path for route in list_routes() if "{" not in route.path)
        return RequestError(404, f"there is no {http.url.path[:80]}", remedy=f"There are {paths}.").to_response(http.url.path)
    text = f"{http.method} is not possible here" if error.status_code == 405 else str(error.detail)
    return RequestError(error.status_code, text, headers=error.headers).to_response(http.url.path)


def respond(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON response."""
    return Response(encode_json(value), status, media_type="application/json")


def get_state(http: HttpRequest) -> ServerState:
    """Return the state of the server."""
    return http.app.state.server


def describe_model(model: LoadedModel) -> dict[str, Any]:
    """Return what clients are told about a model, in the form of OpenAI with further keys."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "task": model.signature.task,
        "architecture": model.predictor.name,
        "parameters": sum(p.numel() for p in model.predictor.model.parameters()),
        "notes": model.notes,
    }


async def list_models(http: HttpRequest) -> Response:
    """List the models."""
    models = [describe_model(served.current) for served in get_state(http).pool.served.values()]
    return respond({"object": "list", "data": models})


async def show_model(http: HttpRequest) -> Response:
    """Describe a model, with its signature."""
    model = get_state(http).pool.get(http.path_params["name"]).current
    return respond({**describe_model(model), "signature": model.signature.to_json()})


async def report_live(http: HttpRequest) -> Response:
    """Say that the process runs."""
    return respond({"status": "live"})


async def report_ready(http: HttpRequest) -> Response:
    """Say whether the server takes requests."""
    state = get_state(http)
    alive = all(served.worker.thread.is_alive() for served in state.pool.served.values())
    if state.stopping or not alive:
        raise RequestError(503, "the server is stopping" if state.stopping else "a model has stopped", code="not_ready")
    return respond({"status": "ready"})


async def show_page(http: HttpRequest) -> Response:
    """Return the form, or one of its files."""
    name = http.path_params.get("name", "index.html")
    if name not in PAGE_FILES:
        raise RequestError(404, f"there is no file {name[:80]!r}")
    return Response(PAGE_FILES[name], media_type=PAGE_TYPES[name.rpartition(".")[2]])


async def show_metrics(http: HttpRequest) -> Response:
    """Return the counters for Prometheus."""
    state = get_state(http)
    return Response(state.metrics.to_text(state.pool), media_type="text/plain; version=0.0.4; charset=utf-8")


async def show_openapi(http: HttpRequest) -> Response:
    """Return the OpenAPI document of all models, or of one."""
    state = get_state(http)
    name = http.query_params.get("model")
    served = [state.pool.get(name)] if name is not None else list(state.pool.served.values())
    return respond(build_openapi([one.current for one in served], bool(state.settings.api_key)))
