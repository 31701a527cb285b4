"""Who may call the server: hosts, origins and the API key, and how large requests may be. Checked before anything is read."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fieldguide.serving.errors import RequestError
from fieldguide.serving.metrics import Metrics
from fieldguide.serving.settings import ServerSettings

LOG = logging.getLogger("fieldguide.serving")
OPEN_PATHS = (
    "/",
    "/health/live",
    "/health/ready",
    "/v2/health/live",
    "/v2/health/ready",
)  # without a key; and the page's files
OPEN_FOLDER = "/page/"
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware that rejects requests of others, limits bodies, turns errors into JSON and counts responses."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, begun = time.perf_counter(), 500, False
        read, limit = 0, self.settings.max_body_bytes
        self.metrics.in_progress += 1

        async def limited_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise body_error(limit)
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, limited_receive, marked_send)
        except RequestError as error:
            if begun:
                raise
            await error.to_response(scope["path"])(scope, receive, marked_send)
        except ClientDisconnect:  # while its request was read
            status = 499
            self.metrics.disconnects += 1
        except Exception as error:  # answered without details, which are for the log
            LOG.exception("%s %s failed", scope["method"], scope["path"])
            if begun:
                raise
            failure = RequestError(500, "the server failed", remedy="See its log.", code="server_failure")
            failure.__cause__ = error
            await failure.to_response(scope["path"])(scope, receive, marked_send)
        finally:
            self.metrics.in_progress -= 1
            endpoint = scope.get("endpoint")  # a path may hold anything
            self.metrics.count_request(getattr(endpoint, "__name__", "other"), status, time.perf_counter() - started)

    def check(self, scope: Scope) -> None:
        """Raise `RequestError` for a request that must not be read."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.is_own_host(host):
            raise RequestError(
                403,
                f"the host {host[:80]!r} is not this server",
                place="Host",
                remedy="Call it by its IP address, or start it with --allow-host NAME.",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit_host(origin) != host.lower():
            raise RequestError(403, f"the origin {origin[:80]!r} may not call this server", place="Origin", code="wrong_origin")
        path = scope["path"]
        if self.settings.api_key and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            kind, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode(), self.settings.api_key.encode()):
                raise RequestError(
                    401,
                    "the API key is missing or wrong",
                    place="Authorization",
                    remedy="Send the header Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            raise body_error(self.settings.max_body_bytes)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError(415, "compressed bodies are not read", place="Content-Encoding", remedy="Send it uncompressed.")

    def is_own_host(self, host: str) -> bool:
        """Return whether a Host header names this server: an address, localhost, or an allowed name.

        An address cannot be made to point elsewhere, as the name of a website can (DNS rebinding).
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self.settings.allowed_hosts or name == self.settings.host:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def urlsplit_host(origin: str) -> str:
    """Return host and port of an origin; "" if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def body_error(limit: int) -> RequestError:
    """Return the error for a body that is too large."""
    return RequestError(
        413,
        "the body is too large",
        remedy=f"Send at most {limit >> 20} MiB.",
        code="too_large",
        headers={"Connection": "close"},
    )
