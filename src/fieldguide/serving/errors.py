"""Errors of requests: a status and a JSON body that names the problem, the place and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from fieldguide.core.errors import DataError, FieldguideError, SettingsError
from fieldguide.serving.json_values import encode_json

RETRY_SECONDS = 1  # when a client may try again if the server cannot tell


class RequestError(Exception):
    """A request that is not answered.

    `place` is where in the request the problem is, such as "rows[3].size", and `code` a word for programs. `headers` are added
    to the response.
    """

    def __init__(
        self,
        status: int,
        problem: str,
        *,
        place: str = "",
        remedy: str = "",
        code: str = "",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(problem)
        self.status, self.problem, self.place, self.remedy = status, problem, place, remedy
        self.code = code or HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response. `message`, `type`, `param` and `code` are the keys that clients of OpenAI read."""
        problem = self.problem.rstrip(".")
        return {
            "error": {
                "message": f"{problem}. {self.remedy}".strip() if self.remedy else f"{problem}.",
                "type": "server_error" if self.status >= 500 else "invalid_request_error",
                "code": self.code,
                "param": self.place or None,
                "remedy": self.remedy or None,
            }
        }

    def to_response(self, path: str = "") -> Response:
        """Return the response to a request of a path. The Open Inference Protocol (/v2) has a text as the error."""
        body = self.to_json()
        if path.startswith("/v2"):
            body = {"error": body["error"]["message"]}
        return Response(encode_json(body), self.status, self.headers, "application/json")


def describe_failure(error: FieldguideError, hidden: str = "") -> RequestError:
    """Return the response to an input or option that a predictor rejects; `hidden` is a folder that messages must not show."""
    text = hide_folder(str(error), hidden)
    if isinstance(error, DataError):
        return RequestError(422, text, place="rows", code="unusable_input")
    if isinstance(error, SettingsError):
        return RequestError(422, text, place="options", code="unusable_option")
    return RequestError(500, text, code="model_failure")


def hide_folder(text: str, folder: str) -> str:
    """Return a text without the path of a temporary folder."""
    return text.replace(f"{folder}/", "").replace(folder, "the request") if folder else text
