"""The HTTP side: every answer, good or bad, is what its documentation says, in the form it says."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI

from deployments.config import EndpointConfig
from deployments.web import scoring
from deployments.web.app import build_app
from deployments.web.scoring import REPLICA_HEADER, Image, Scored, Wanted
from pipeline.errors import Busy, Expired, ImageError, ModelError, PoolError, UsageError
from pipeline.model_info import ModelInfo
from pipeline.transform import ImageTransform
from tests.servers import ask

_INFO = ModelInfo(
    model="org/name",
    revision="abc",
    labels=("cat", "dog"),
    transform=ImageTransform(height=2, width=2, resize_to=(2, 2)),
    dtype="float32",
    versions={},
)
_SMALL = EndpointConfig(max_body_bytes=10, max_images=2, timeout_s=0.05)
_ROOMY = EndpointConfig(max_images=2)


class Pool:
    """A scorer that echoes what it is given, after what a test has it do first."""

    def __init__(self, first: Callable[[], Awaitable[Any]] | None = None) -> None:
        self._first = first

    async def score(self, images: Sequence[Image], wanted: Wanted, within_s: float) -> list[Scored | ImageError]:
        if self._first:
            await self._first()
        return [_scored(image, wanted, f"replica-{number + 7}") for number, image in enumerate(images)]

    async def describe(self) -> ModelInfo:
        if self._first:
            await self._first()
        return _INFO

    @property
    def info(self) -> ModelInfo:
        return _INFO


def _scored(image: Image, wanted: Wanted, replica: str) -> Scored | ImageError:
    assert isinstance(image, bytes)
    if image == b"bad":
        return ImageError("the image is too large: 9 x 9 pixels")
    embedding = [0.5] if wanted.embedding else None
    return Scored([0], [image.decode()], [1 / wanted.top_k], embedding, replica)


def _raises(error: Exception) -> Pool:
    async def fail() -> None:
        raise error

    return Pool(fail)


def _hangs() -> Pool:
    return Pool(asyncio.Event().wait)


def _ask(scorer: Pool, method: str, path: str, *, config: EndpointConfig = _SMALL, **options: Any) -> httpx.Response:
    return ask(build_app(scorer, config), method, path, **options)


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
    assert response.json() == {"predictions": [{"label": "cat", "score": 0.25}]}
    assert response.headers[REPLICA_HEADER] == "replica-7"


def test_top_k_is_five_unless_told() -> None:
    assert _ask(Pool(), "POST", "/predict", content=b"cat").json()["predictions"][0]["score"] == 0.2


@pytest.mark.parametrize("top_k", ["0", "-1", "100001", "five", "2.5", ""])
def test_a_top_k_that_cannot_be_is_told(top_k: str) -> None:
    response = _ask(Pool(), "POST", f"/predict?top_k={top_k}", content=b"cat")
    assert _problem(response, 422).startswith("top_k: ")


def test_a_bad_image_is_told_why_it_is_bad() -> None:
    response = _ask(Pool(), "POST", "/predict", content=b"bad")
    assert _problem(response, 422) == "the image is too large: 9 x 9 pixels"


def test_what_the_model_cannot_give_is_told() -> None:
    response = _ask(_raises(UsageError("it has no embedding")), "POST", "/predict?embedding=true", content=b"cat")
    assert _problem(response, 422) == "it has no embedding"


def test_an_option_that_there_is_not_is_told() -> None:
    response = _ask(Pool(), "POST", "/predict?topk=4", content=b"cat")
    assert _problem(response, 422).startswith("topk: ")


def _form(*files: bytes, **fields: str) -> dict[str, Any]:
    return {"files": [("image", (f"{n}.png", file)) for n, file in enumerate(files)], "data": fields}


def test_of_several_images_each_has_its_answer_or_its_error_in_its_place() -> None:
    response = _ask(Pool(), "POST", "/predict?embedding=1", config=_ROOMY, **_form(b"cat", b"bad"))
    good, bad = response.json()["results"]
    assert good == {"predictions": [{"label": "cat", "score": 0.2}], "embedding": [0.5]}
    assert bad == {"error": "the image is too large: 9 x 9 pixels"}
    assert response.headers[REPLICA_HEADER] == "replica-7"


def test_the_replicas_of_several_images_are_told() -> None:
    response = _ask(Pool(), "POST", "/predict", config=_ROOMY, json={"images": ["Y2F0", "data:image/png;base64,ZG9n"]})
    assert [one["predictions"][0]["label"] for one in response.json()["results"]] == ["cat", "dog"]
    assert response.headers[REPLICA_HEADER] == "replica-7,replica-8"


@pytest.mark.parametrize("body", [_form(b"1", b"2", b"3"), {"json": {"images": ["MQ==", "Mg==", "Mw=="]}}])
def test_more_images_than_a_request_may_have_are_refused(body: dict[str, Any]) -> None:
    response = _ask(Pool(_fail_if_called), "POST", "/predict", config=_ROOMY, **body)
    assert "2" in _problem(response, 413)


@pytest.mark.parametrize(
    ("json", "status", "told"),
    [
        ({"images": ["?"]}, 422, "images.0: Value error, not base64"),
        ({"images": [7]}, 422, "images.0: Value error, an image in JSON is a string of base64"),
        ({"images": []}, 422, "images: List should have at least 1 item"),
        ({"images": ["MQ=="], "topk": 1}, 422, "topk: "),
        ([], 422, "the body: "),
    ],
)
def test_json_that_cannot_be_is_told_where(json: Any, status: int, told: str) -> None:
    assert _problem(_ask(Pool(), "POST", "/predict", config=_ROOMY, json=json), status).startswith(told)


def test_what_is_not_json_is_told() -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = _ask(Pool(), "POST", "/predict", content=b"{", headers=headers)
    assert _problem(response, 400).startswith("the body: Invalid JSON")


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("text/html", 415, "text/html is not read here; send an image or multipart/form-data or application/json"),
        ("multipart/form-data", 400, "no boundary"),
        ("multipart/form-data; boundary=x", 400, "multipart body cannot be read"),
    ],
)
def test_a_body_of_another_type_is_told_the_types_there_are(kind: str, status: int, told: str) -> None:
    response = _ask(Pool(), "POST", "/predict", content=b"cat", headers={"content-type": kind})
    assert told in _problem(response, status)


def test_a_field_of_a_form_is_told_where_options_go() -> None:
    response = _ask(Pool(), "POST", "/predict", config=_ROOMY, **_form(b"cat", top_k="3"))
    assert "the part 'top_k' is no file; send images as files, and options in the query" in _problem(response, 422)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_that_grows_too_large_when_unpacked_is_refused(encoding: str) -> None:
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | (16 if encoding == "gzip" else 0))
    config = EndpointConfig(max_body_bytes=10_000)
    bomb = packer.compress(bytes(10_000_000)) + packer.flush()
    assert len(bomb) < 10_000
    headers = {"content-encoding": encoding}
    response = _ask(Pool(_fail_if_called), "POST", "/predict", config=config, content=bomb, headers=headers)
    assert "10000 bytes" in _problem(response, 413)
    response = _ask(Pool(_fail_if_called), "POST", "/predict", config=config, content=bomb[:-9], headers=headers)
    _problem(response, 413)
    response = _ask(Pool(_fail_if_called), "POST", "/predict", content=b"not", headers=headers)
    assert f"not {encoding}" in _problem(response, 400)


def test_an_encoding_that_is_not_read_is_told() -> None:
    response = _ask(Pool(), "POST", "/predict", content=b"cat", headers={"content-encoding": "br"})
    assert "send gzip, deflate or none" in _problem(response, 415)


def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(5)
        yield b"y"

    response = _ask(Pool(_fail_if_called), "POST", "/predict", content=body())
    assert "within 0.05 s" in _problem(response, 408)


def test_an_empty_body_is_told_what_to_send() -> None:
    assert "send an image file" in _problem(_ask(Pool(), "POST", "/predict"), 400)


def test_a_full_lane_says_when_to_come_again() -> None:
    for retry_after_s, told in ((0.0, "1"), (0.3, "1"), (2.1, "3")):
        busy = Busy("the online lane is full", retry_after_s)
        response = _ask(_raises(busy), "POST", "/predict", content=b"cat")
        assert _problem(response, 503) == "the online lane is full; try again"
        assert response.headers["retry-after"] == told


@pytest.mark.parametrize("path", ["/predict", "/", "/v2/models/name/infer", "/v1/models/name:predict", "/invocations"])
def test_an_endpoint_with_a_full_backlog_refuses_unread_until_there_is_room(path: str) -> None:
    async def asked() -> tuple[httpx.Response, list[int]]:
        came, free = asyncio.Semaphore(0), asyncio.Event()

        async def wait() -> None:
            came.release()
            await free.wait()

        async def unread() -> AsyncIterator[bytes]:
            raise AssertionError("the body was read")
            yield b""

        app = build_app(Pool(wait), EndpointConfig(max_backlog=2))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tandem") as client:
            waiting = []
            for files in ([b"cat"], [b"cat"] * 3):  # there is some room for the second, so it is taken whole
                waiting.append(asyncio.create_task(client.post("/predict", **_form(*files))))
                await came.acquire()
            refused = await client.post(path, content=unread())
            free.set()
            answers = [*await asyncio.gather(*waiting), await client.post("/predict", content=b"cat")]
            return refused, [answer.status_code for answer in answers]

    refused, statuses = asyncio.run(asyncio.wait_for(asked(), 10))
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    told = refused.json()
    assert told["error"] == told["detail"] == "the endpoint is full: 4 images wait; try again"
    assert statuses == [200, 200, 200]


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
    assert response.json()["predictions"][0]["label"] == "0123456789"


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


@pytest.mark.parametrize("path", ["/nothing", "/predict/more", "/v2/other"])
def test_an_unknown_path_is_told_where_the_known_ones_are(path: str) -> None:
    detail = _problem(_ask(Pool(), "GET", path), 404)
    assert f"GET {path}" in detail
    assert "/openapi.json" in detail


@pytest.mark.parametrize(("method", "path"), [("GET", "/predict"), ("POST", "/healthz"), ("DELETE", "/readyz")])
def test_a_wrong_method_is_told_the_right_one(method: str, path: str) -> None:
    response = _ask(Pool(), method, path)
    _problem(response, 405)
    assert response.headers["allow"] in ("POST", "GET")


def test_health_needs_no_pool() -> None:
    assert _ask(_hangs(), "GET", "/healthz").json() == {"status": "ok"}


def test_ready_names_the_model() -> None:
    assert _ask(Pool(), "GET", "/readyz").json() == {"status": "ready", "model": "org/name", "revision": "abc"}


@pytest.mark.parametrize("error", [ModelError("no weights"), PoolError("gone"), RuntimeError("a secret")])
def test_not_ready_where_the_pool_does_not_answer(error: Exception) -> None:
    assert "does not answer" in _problem(_ask(_raises(error), "GET", "/readyz"), 503)


def test_not_ready_where_the_pool_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "READY_TIMEOUT_S", 0.05)
    assert "does not answer" in _problem(_ask(_hangs(), "GET", "/readyz"), 503)


def test_openapi_lists_the_routes_and_their_answers() -> None:
    document = _ask(Pool(), "GET", "/openapi.json").json()
    OpenAPI.model_validate(document)
    answers = {
        f"{method} {path}": set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    bodies = {"200", "400", "408", "413", "415", "422", "500", "503", "504"}
    assert answers["post /predict"] == bodies
    assert answers["post /v2/models/{name}/infer"] == bodies | {"404", "405"}
    assert answers["get /healthz"] == {"200"}
    assert answers["get /readyz"] == {"200", "503"}
    predict = document["paths"]["/predict"]["post"]
    assert predict["requestBody"]["required"]
    assert {*predict["requestBody"]["content"]} >= {"application/json", "multipart/form-data", "image/*"}
    assert {*predict["responses"]["422"]["content"]} == {"application/problem+json"}
    assert {one["name"] for one in predict["parameters"]} == {"top_k", "function_to_apply", "embedding"}
