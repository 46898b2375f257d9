"""The HTTP side: every answer, good or bad, is what its documentation says, in the form it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI

from deployments import web
from deployments.config import EndpointConfig
from deployments.web import REPLICA_HEADER, build_app
from pipeline.errors import Busy, Expired, ImageError, ModelError, PoolError
from pipeline.model_info import ModelInfo
from pipeline.transform import ImageTransform

_INFO = ModelInfo(
    model="org/name",
    revision="abc",
    labels=("cat", "dog"),
    transform=ImageTransform(height=2, width=2, resize_to=(2, 2)),
    dtype="float32",
    versions={},
)
_SMALL = EndpointConfig(max_body_bytes=10, timeout_s=0.05)


class Pool:
    """A scorer that echoes what it is given, after what a test has it do first."""

    def __init__(self, first: Callable[[], Awaitable[Any]] | None = None) -> None:
        self._first = first

    async def score(self, image: bytes, top_k: int) -> tuple[list[dict[str, Any]], str]:
        if self._first:
            await self._first()
        return [{"label": image.decode(), "score": 1 / top_k}], "replica-7"

    async def describe(self) -> ModelInfo:
        if self._first:
            await self._first()
        return _INFO


def _raises(error: Exception) -> Pool:
    async def fail() -> None:
        raise error

    return Pool(fail)


def _hangs() -> Pool:
    return Pool(asyncio.Event().wait)


def _ask(scorer: Pool, method: str, path: str, *, config: EndpointConfig = _SMALL, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(scorer, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://tandem") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def _problem(response: httpx.Response, status: int) -> str:
    """The detail of a problem answer, whose form is checked."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    content = response.json()
    assert content.keys() == {"type", "title", "status", "detail"}
    assert (content["status"], content["type"]) == (status, "about:blank")
    assert "\n" not in content["detail"]
    return str(content["detail"])


async def _parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def test_an_image_is_answered_with_its_classes_and_the_replica_that_scored() -> None:
    response = _ask(Pool(), "POST", "/predict?top_k=4", content=b"cat")
    assert response.status_code == 200
    assert response.json() == [{"label": "cat", "score": 0.25}]
    assert response.headers[REPLICA_HEADER] == "replica-7"


def test_top_k_is_five_unless_told() -> None:
    assert _ask(Pool(), "POST", "/predict", content=b"cat").json() == [{"label": "cat", "score": 0.2}]


@pytest.mark.parametrize("top_k", ["0", "-1", "1001", "five", "2.5", ""])
def test_a_top_k_that_cannot_be_is_told(top_k: str) -> None:
    response = _ask(Pool(), "POST", f"/predict?top_k={top_k}", content=b"cat")
    assert _problem(response, 422).startswith("top_k: ")


def test_a_bad_image_is_told_why_it_is_bad() -> None:
    response = _ask(_raises(ImageError("the image is too large: 9 x 9 pixels")), "POST", "/predict", content=b"cat")
    assert _problem(response, 400) == "the image is too large: 9 x 9 pixels"


def test_an_empty_body_is_told_what_to_send() -> None:
    assert "send an image file" in _problem(_ask(Pool(), "POST", "/predict"), 400)


def test_a_full_lane_says_when_to_come_again() -> None:
    for retry_after_s, told in ((0.0, "1"), (0.3, "1"), (2.1, "3")):
        busy = Busy("the online lane is full", retry_after_s)
        response = _ask(_raises(busy), "POST", "/predict", content=b"cat")
        assert _problem(response, 503) == "the online lane is full; try again"
        assert response.headers["retry-after"] == told


def test_a_pool_that_fails_is_unavailable() -> None:
    response = _ask(_raises(PoolError("no replica answers")), "POST", "/predict", content=b"cat")
    assert _problem(response, 503) == "no replica answers"


def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    for scorer in (_hangs(), _raises(Expired("the deadline passed"))):
        assert "within 0.05 s" in _problem(_ask(scorer, "POST", "/predict", content=b"cat"), 504)


def test_an_unforeseen_error_is_answered_in_form_and_told_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    response = _ask(_raises(ZeroDivisionError("a secret")), "POST", "/predict", content=b"cat")
    detail = _problem(response, 500)
    assert "secret" not in response.text
    assert "log" in detail
    assert "ZeroDivisionError: a secret" in caplog.text


@pytest.mark.parametrize("size", [11, 10**9])
def test_a_body_that_is_declared_too_large_is_refused_unread(size: int) -> None:
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"x")
        yield read[-1]

    headers = {"content-length": str(size)}
    response = _ask(Pool(_fail_if_called), "POST", "/predict", content=body(), headers=headers)
    assert "10 bytes" in _problem(response, 413)
    assert not read


def test_a_stream_that_grows_too_large_is_refused_on_the_way() -> None:
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            read.append(b"12345")
            yield read[-1]

    response = _ask(Pool(_fail_if_called), "POST", "/predict", content=body())
    assert "10 bytes" in _problem(response, 413)
    assert len(read) <= 4


async def _fail_if_called() -> None:
    raise AssertionError("too large a body came to the scorer")


def test_a_body_of_just_the_limit_in_many_parts_is_scored_whole() -> None:
    response = _ask(Pool(), "POST", "/predict", content=_parts(b"01234", b"", b"5678", b"9"))
    assert response.json()[0]["label"] == "0123456789"


def test_a_client_that_hangs_up_midway_is_no_failure_and_not_scored() -> None:
    app = build_app(Pool(_fail_if_called), _SMALL)
    asked: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert _raw(app, "/predict", asked)[0]["status"] == 400


def _raw(app: FastAPI, path: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the application sends for a POST of the messages."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.mark.parametrize("path", ["/", "/nothing", "/predict/more"])
def test_an_unknown_path_is_told_the_known_ones(path: str) -> None:
    detail = _problem(_ask(Pool(), "GET", path), 404)
    assert f"GET {path}" in detail
    assert "POST /predict" in detail


@pytest.mark.parametrize(("method", "path"), [("GET", "/predict"), ("POST", "/healthz"), ("DELETE", "/readyz")])
def test_a_wrong_method_is_told_the_right_one(method: str, path: str) -> None:
    response = _ask(Pool(), method, path)
    assert "POST /predict" in _problem(response, 405)
    assert response.headers["allow"] in ("POST", "GET")


def test_health_needs_no_pool() -> None:
    assert _ask(_hangs(), "GET", "/healthz").json() == {"status": "ok"}


def test_ready_names_the_model() -> None:
    assert _ask(Pool(), "GET", "/readyz").json() == {"status": "ready", "model": "org/name", "revision": "abc"}


@pytest.mark.parametrize("error", [ModelError("no weights"), PoolError("gone"), RuntimeError("a secret")])
def test_not_ready_where_the_pool_does_not_answer(error: Exception) -> None:
    assert "does not answer" in _problem(_ask(_raises(error), "GET", "/readyz"), 503)


def test_not_ready_where_the_pool_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "READY_TIMEOUT_S", 0.05)
    assert "does not answer" in _problem(_ask(_hangs(), "GET", "/readyz"), 503)


def test_openapi_lists_the_routes_and_their_answers() -> None:
    document = _ask(Pool(), "GET", "/openapi.json").json()
    OpenAPI.model_validate(document)
    answers = {
        f"{method} {path}": set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert answers == {
        "post /predict": {"200", "400", "413", "422", "500", "503", "504"},
        "get /healthz": {"200"},
        "get /readyz": {"200", "503"},
    }
    predict = document["paths"]["/predict"]["post"]
    assert predict["requestBody"]["required"]
    assert {*predict["responses"]["422"]["content"]} == {"application/problem+json"}
    assert {*_resolved(document, predict["responses"]["200"])["items"]["properties"]} == {"label", "score"}


def _resolved(document: dict[str, Any], response: dict[str, Any]) -> Any:
    """The schema of a response with its reference filled in."""
    schema = response["content"]["application/json"]["schema"]
    name = schema["items"]["$ref"].removeprefix("#/components/schemas/")
    return json.loads(json.dumps(schema | {"items": document["components"]["schemas"][name]}))
