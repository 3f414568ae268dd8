"""Errors of requests in OpenAI's and Ollama's shapes."""

import asyncio
import json
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ..common.errors import one_line

TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # other statuses: by their first digit
DISCARD_SECONDS = 5
RETRY_AFTER = {429: "1", 503: "5"}  # seconds


class ApiError(Exception):
    """Error that answers a request.

    Args:
        status: HTTP status.
        message: one sentence that names the mistake and the remedy.
        param: the field of the request that is wrong.
        code: a word for programs.
        close: close the connection, because the rest of the request was not read.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, close: bool = False
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.close = status, message, param, code, close


class ClientGone(Exception):
    """The client of a request has closed its connection."""


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response in JSON whose text is ASCII, because a request may quote half of a surrogate pair."""
    return Response(json.dumps(content), status, headers, "application/json")


def error_response(path: str, error: ApiError) -> Response:
    """Return the response for an error: in Ollama's shape below `/api/`, and in OpenAI's elsewhere."""
    message = one_line(error.message)
    headers = {"Connection": "close"} if error.close else {}
    if error.status in RETRY_AFTER:
        headers["Retry-After"] = RETRY_AFTER[error.status]
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith("/api/"):
        return json_response({"error": message}, error.status, headers)
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    content = {"message": message, "type": kind, "param": error.param, "code": error.code}
    return json_response({"error": content}, error.status, headers)


async def answer_api_error(request: Request, error: Exception) -> Response:
    """Answer a request with an [`ApiError`]."""
    assert isinstance(error, ApiError)
    if error.close and error.status != 408:
        await discard_body(request)
    return error_response(request.url.path, error)


async def discard_body(request: Request) -> None:
    """Receive the rest of a body without keeping it. Many clients read no answer before they have sent their body."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await request.receive()).get("more_body"):
                pass


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Answer a request for an address or a method that does not exist."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405 and error.headers:
        methods = error.headers["Allow"]
        message = f"{path[:100]} takes {methods}, not {request.method[:20]}: send it as {methods}."
        response = error_response(path, ApiError(405, message, code="method_not_allowed"))
        response.headers["Allow"] = methods
        return response
    message = f"{path[:100]} is not an address of this server: see /v1/chat/completions."
    return error_response(path, ApiError(error.status_code, message, code="unknown_url"))


async def answer_client_gone(request: Request, error: Exception) -> Response:
    """Return a response that nobody reads, so that the request is counted."""
    return Response(status_code=499)


async def answer_failure(request: Request, error: Exception) -> Response:
    """Answer a request that failed through a fault of the server. The server logs the traceback."""
    return error_response(request.url.path, ApiError(500, "The server failed: its log says why."))
