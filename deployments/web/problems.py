"""Answers other than success: one kind of error within, and on the wire the shape that each protocol has for it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

PROBLEM_JSON = "application/problem+json"


class Problem(Exception):
    """An answer other than success: its HTTP status, and in words what is wrong and what to do."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


Shape = Callable[[Problem], Response]


def problem_json(problem: Problem, **members: str) -> Response:
    """As RFC 9457 says, which lets a problem have further members."""
    content = {
        "type": "about:blank",
        "title": problem.status.phrase,
        "status": problem.status.value,
        "detail": problem.detail,
        **members,
    }
    return JSONResponse(content, problem.status, problem.headers, media_type=PROBLEM_JSON)


def early_json(problem: Problem) -> Response:
    """As what is refused before its route is known: with the `error` that the clients of other protocols look for."""
    return problem_json(problem, error=problem.detail)


def error_json(problem: Problem) -> Response:
    """As Hugging Face, the Open Inference Protocol and TensorFlow Serving say it."""
    return JSONResponse({"error": problem.detail}, problem.status, problem.headers)


def answers_in(shape: Shape) -> type[APIRoute]:
    """A class of routes whose problems are answered in that shape."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_in_shape(request: Request) -> Response:
                try:
                    return await handle(request)
                except Problem as problem:
                    return shape(problem)
                except RequestValidationError as error:
                    return shape(_invalid(error))

            return handle_in_shape

    return Route


def answer_the_rest(app: FastAPI) -> None:
    """Has the application answer in problem+json what comes to none of its routes."""

    async def answer(request: Request, error: Any) -> Response:
        detail = f"{request.method} {request.url.path}: there is no such route; /openapi.json lists those there are"
        return problem_json(Problem(HTTPStatus(error.status_code), detail, **(error.headers or {})))

    app.add_exception_handler(HTTPException, answer)


def _invalid(error: RequestValidationError) -> Problem:
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, reasons(error.errors(), 1))


def reasons(errors: Any, skip: int = 0) -> str:
    """pydantic's findings in one line, each with the place of it, but for its first `skip` steps."""
    told = (f"{'.'.join(map(str, one['loc'][skip:])) or 'the body'}: {one['msg']}" for one in errors)
    return "; ".join(told)


_PROBLEM = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail"],
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def documented(shape: Shape, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route's errors.

    A name in a path may be one that makes it the path of no route, or of another one, and an endpoint that is full
    refuses before it looks at the route: so 404, 405 and 503 may also come in problem+json.
    """
    media, schema = (PROBLEM_JSON, _PROBLEM) if shape is problem_json else ("application/json", _ERROR)
    found = {status: {media: {"schema": schema}} for status in statuses}
    for status in found.keys() & {404, 503}:
        found[status] |= {PROBLEM_JSON: {"schema": _PROBLEM}}
    if 404 in found:
        found[405] = {PROBLEM_JSON: {"schema": _PROBLEM}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status, content in found.items()}
