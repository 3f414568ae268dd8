"""Addresses of the server."""

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .. import __version__
from .answers import Answer, chat_answer, ollama_answer, responses_answer
from .errors import (
    ApiError,
    ClientGone,
    answer_api_error,
    answer_client_gone,
    answer_failure,
    answer_http_error,
    json_response,
)
from .metrics import CountRequests
from .options import API_KEY_VARIABLE
from .requests import ChatRequest, OllamaRequest, RequestShape, ResponsesRequest
from .service import Service

DOORS: dict[str, tuple[type[RequestShape], Answer]] = {
    "/v1/chat/completions": (ChatRequest, chat_answer),
    "/v1/responses": (ResponsesRequest, responses_answer),
    "/api/generate": (OllamaRequest, ollama_answer),
}
OTHERS = ("/v1/models", "/api/tags", "/api/version", "/health", "/live", "/metrics")


def make_app(service: Service) -> FastAPI:
    """Return the application of a service. It starts the service with its lifespan.

    Args:
        service: the captioner that answers.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(CountRequests, metrics=service.batcher.metrics, paths=frozenset([*DOORS, *OTHERS]))
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(ClientGone, answer_client_gone)
    app.add_exception_handler(Exception, answer_failure)
    app.include_router(guarded_routes(service))
    app.include_router(open_routes(service))
    return app


def key_check(key: str | None):  # type: ignore[no-untyped-def]
    """Return a dependency that refuses requests without the API key."""

    async def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given_bytes = given.strip().encode("latin-1", "replace")  # as headers are decoded
        # `compare_digest` takes equally long for every wrong key.
        if key is not None and (scheme.lower() != "bearer" or not hmac.compare_digest(given_bytes, key.encode())):
            raise ApiError(
                401,
                f"The API key is missing or wrong: send that of {API_KEY_VARIABLE} as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                close=True,
            )

    return check


def guarded_routes(service: Service) -> APIRouter:
    """Return the addresses that need the API key, if there is one."""
    router = APIRouter(dependencies=[Depends(key_check(service.options.api_key))])
    name = service.options.name
    listed = {"id": name, "object": "model", "created": 0, "owned_by": "qformer-captioner"}

    def add_door(path: str, shape: type[RequestShape], answer: Answer) -> None:
        @router.post(path)
        async def door(request: Request) -> Response:
            wanted = await service.receive(request, shape)
            captioned = await service.answer(request, wanted)
            limit = min(wanted.max_tokens or service.limit, service.limit)
            return answer(wanted, captioned, name, limit)

    for path, (shape, answer) in DOORS.items():
        add_door(path, shape, answer)

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [listed]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if model != name:
            raise ApiError(404, f"There is no model {model[:100]!r}: use {name!r}.", "model", "model_not_found")
        return json_response(listed)

    @router.get("/api/tags")
    async def tags() -> Response:
        return json_response({"models": [{"name": name, "model": name, "modified_at": "1970-01-01T00:00:00Z"}]})

    @router.get("/api/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    return router


def open_routes(service: Service) -> APIRouter:
    """Return the addresses that need no key: those for the operator's own machinery."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        is_ready = service.status == "ready"
        return json_response({"status": service.status}, 200 if is_ready else 503)

    @router.get("/live")
    async def live() -> Response:
        return json_response({"status": service.status})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.batcher.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
