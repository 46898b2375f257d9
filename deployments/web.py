"""The HTTP side, without Ray: routes, limits and errors around a scorer.

    POST /predict?top_k=5    an image of any type that Pillow opens, as the body
    GET  /healthz            200 while this process lives
    GET  /readyz             200 while the pool answers, otherwise 503

Errors are `application/problem+json` (RFC 9457); their `detail` says what to do.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments.config import EndpointConfig
from pipeline.errors import Busy, Expired, ImageError, PoolError
from pipeline.model_info import ModelInfo

REPLICA_HEADER = "x-tandem-replica"  # the replica that scored, as the pool's statistics call it
READY_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """One class of an image, and its score."""

    label: str
    score: float


class Scorer(Protocol):
    """What stands behind the routes."""

    async def score(self, image: bytes, top_k: int) -> tuple[list[dict[str, Any]], str]:
        """The best classes of an encoded image as `{"label", "score"}`, best first, and the replica that scored.

        Raises `ImageError`, and `Busy` where there is no room.
        """

    async def describe(self) -> ModelInfo:
        """The model behind it. Raises `TandemError` where there is none."""


class Problem(Exception):
    """An answer other than success: its HTTP status, and in words what is wrong and what to do."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def build_app(scorer: Scorer, config: EndpointConfig) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="Tandem", description="Scores images on the pool's model actors.", docs_url=None, redoc_url=None
    )

    @app.post("/predict", responses=_problems(400, 413, 422, 500, 503, 504), openapi_extra={"requestBody": _IMAGE})
    async def predict(
        request: Request, response: Response, top_k: Annotated[int, Query(ge=1, le=1000)] = 5
    ) -> list[Prediction]:
        """Scores one image; the answer lists its best classes, best first."""
        body = await _body(request, config.max_body_bytes)
        best, response.headers[REPLICA_HEADER] = await _within(config.timeout_s, scorer, body, top_k)
        return [Prediction(**one) for one in best]

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answers while this process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses=_problems(503))
    async def readyz() -> dict[str, str]:
        """Answers with the model while the pool does."""
        try:
            info = await asyncio.wait_for(scorer.describe(), READY_TIMEOUT_S)
        except Exception as error:  # whatever keeps the pool from answering, this is the answer
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "the pool does not answer; try again later") from error
        return {"status": "ready", "model": info.model, "revision": info.revision}

    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


async def _within(timeout_s: float, scorer: Scorer, body: bytes, top_k: int) -> tuple[list[dict[str, Any]], str]:
    try:
        async with asyncio.timeout(timeout_s):
            return await scorer.score(body, top_k)
    except ImageError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, str(error)) from error
    except Busy as error:
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}; try again", **headers) from error
    except (TimeoutError, Expired) as error:
        detail = f"no score within {timeout_s:g} s; try again later"
        raise Problem(HTTPStatus.GATEWAY_TIMEOUT, detail) from error
    except PoolError as error:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
    except Exception as error:
        # Not left to Starlette: it answers in plain text, and raises again into the Serve replica.
        _log.exception("a request failed")
        detail = "the endpoint failed on this request; its log says why"
        raise Problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail) from error


async def _body(request: Request, max_bytes: int) -> bytes:
    """The request's body. Raises `Problem` for an empty one, and as soon as it is known to be too long."""
    too_long = Problem(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an image may have {max_bytes} bytes here; send a smaller one"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise too_long
    except ClientDisconnect as error:  # nobody reads the answer, but raised on it would be logged as a failure
        raise Problem(HTTPStatus.BAD_REQUEST, "the request was cut off before its end") from error
    if not body:
        raise Problem(HTTPStatus.BAD_REQUEST, "the body is empty; send an image file as the body")
    return bytes(body)


_IMAGE = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
_PROBLEM_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail"],
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route's errors."""
    content = {"application/problem+json": {"schema": _PROBLEM_SCHEMA}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


async def _on_problem(request: Request, problem: Any) -> JSONResponse:
    content = {
        "type": "about:blank",
        "title": problem.status.phrase,
        "status": problem.status.value,
        "detail": problem.detail,
    }
    return JSONResponse(content, problem.status, problem.headers, media_type="application/problem+json")


async def _on_invalid(request: Request, error: Any) -> JSONResponse:
    reasons = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
    return await _on_problem(request, Problem(HTTPStatus.UNPROCESSABLE_ENTITY, reasons))


async def _on_http_error(request: Request, error: Any) -> JSONResponse:
    detail = f"{request.method} {request.url.path}: see POST /predict, GET /healthz and GET /readyz"
    return await _on_problem(request, Problem(HTTPStatus(error.status_code), detail, **(error.headers or {})))
