"""Clients that are slow, greedy, broken or gone, and an endpoint that is to end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpx
import pytest
import uvloop

from deployments.config import EndpointConfig
from deployments.web import connections
from deployments.web.app import build_app
from deployments.web.connections import MAX_HEAD_BYTES
from deployments.web.listener import Listener
from tests.servers import listening, served
from tests.test_web import Pool


class Application:
    """Answers `ok` to all, but to what it is told to dawdle on; knows what it was asked, and what was cancelled."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.answered: list[str] = []
        self.dawdle_s = 0.3

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.asked.append(path)
        try:
            if path == "/dawdle":
                await asyncio.sleep(self.dawdle_s)
            body = b"x" * (64 << 20) if path == "/large" else b"ok"
            length = (b"content-length", str(len(body)).encode())
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": body})
            self.answered.append(path)
        except asyncio.CancelledError:
            self.cancelled.append(path)
            raise


@pytest.fixture
def app() -> Application:
    return Application()


@pytest.fixture
def address(app: Application) -> Iterator[tuple[str, int]]:
    with served(app) as url:
        yield "127.0.0.1", httpx.URL(url).port or 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the bounds on time small enough to wait for."""
    for name in ("HEAD_S", "DISCARD_S", "WRITE_S"):
        monkeypatch.setattr(connections, name, 0.3)


def _read(client: socket.socket, end: bytes = b"") -> bytes:
    """All that comes until it ends so, or otherwise until the other end closes."""
    client.settimeout(10)
    read = bytearray()
    with suppress(ConnectionResetError):
        while not (end and read.endswith(end)) and (part := client.recv(1 << 16)):
            read += part
    return bytes(read)


def _drip(client: socket.socket, data: bytes) -> float:
    """Sends it now and then, and returns the seconds until the other end had enough."""
    started_s = time.monotonic()
    try:
        while time.monotonic() < started_s + 5:
            client.sendall(data)
            time.sleep(0.05)
    except OSError:
        pass
    return time.monotonic() - started_s


def _until(true: Any) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: tandem\r\nX-A: "])
def test_a_head_that_does_not_end_in_time_is_refused(address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address) as client:
        client.sendall(sent)
        answer = _read(client)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"content-type: application/problem+json\r\n" in answer


@pytest.mark.usefixtures("impatient")
def test_a_head_of_one_byte_now_and_then_is_refused_too(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        assert _drip(client, b"X: 1\r\n") < 2


@pytest.mark.usefixtures("impatient")
def test_blank_lines_do_not_keep_a_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: tandem\r\n\r\n")
        assert _drip(client, b"\r\n") < 2


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES,
        b"GET / HTTP/1.1\r\n" + b"X: abc\r\n" * (MAX_HEAD_BYTES // 4),
    ],
    ids=["path", "header", "headers"],
)
@pytest.mark.parametrize("end", [b"\r\n\r\n", b""])
def test_a_long_head_is_refused_whether_or_not_it_ends(
    app: Application, address: tuple[str, int], head: bytes, end: bytes
) -> None:
    with socket.create_connection(address) as client:
        client.sendall(head + end)
        answer = _read(client)
    assert answer.startswith(b"HTTP/1.1 431 ") or not answer  # the rest of what was sent may reset the connection
    assert app.asked == []


def test_a_head_within_the_bound_is_taken(app: Application, address: tuple[str, int]) -> None:
    path = "/" + "a" * (MAX_HEAD_BYTES // 2)
    assert httpx.get(f"http://127.0.0.1:{address[1]}{path}").text == "ok"
    assert app.asked == [path]


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_not_http_is_refused(app: Application, address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address) as client:
        client.sendall(sent)
        answer = _read(client)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"without TLS" in answer
    assert app.asked == []


@pytest.mark.usefixtures("impatient")
def test_a_body_that_nobody_waits_for_is_not_read_for_ever(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: tandem\r\nContent-Length: 1000000000\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert _drip(client, b"more") < 2


def test_a_body_that_comes_after_its_answer_leaves_the_connection_to_the_next(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        for _ in range(3):
            client.sendall(b"POST / HTTP/1.1\r\nHost: tandem\r\nContent-Length: 4\r\n\r\n")
            assert _read(client, b"ok")
            client.sendall(b"late")


@pytest.mark.usefixtures("impatient")
def test_who_does_not_read_an_answer_does_not_keep_it(app: Application, address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: tandem\r\n\r\n")
        _until(lambda: app.answered)
        time.sleep(1)
        assert len(_read(client)) < 64 << 20  # it was cut off


def test_who_reads_slowly_gets_a_large_answer_whole(app: Application, address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: tandem\r\nConnection: close\r\n\r\n")
        time.sleep(0.5)
        assert _read(client).endswith(b"x" * (64 << 20))


def test_the_work_for_a_client_that_hangs_up_is_cancelled(app: Application, address: tuple[str, int]) -> None:
    app.dawdle_s = 30
    with socket.create_connection(address) as client:
        client.sendall(b"GET /dawdle HTTP/1.1\r\nHost: tandem\r\n\r\n")
        _until(lambda: app.asked)
        assert not app.cancelled
    _until(lambda: app.cancelled)


def test_a_head_that_is_slow_beside_an_answer_does_not_spoil_it(
    app: Application, address: tuple[str, int], impatient: None
) -> None:
    app.dawdle_s = 1.0
    with socket.create_connection(address) as client:
        client.sendall(b"GET /dawdle HTTP/1.1\r\nHost: tandem\r\n\r\nGET /")
        assert _read(client, b"\r\n\r\nok")
        assert _read(client).startswith(b"HTTP/1.1 408")


def test_more_connections_than_there_may_be_are_told(
    app: Application, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with closing(socket.create_connection(address)) as first, socket.create_connection(address) as second:
        second.sendall(b"GET / HTTP/1.1\r\nHost: tandem\r\n\r\n")
        assert _read(second, b"ok")
        with socket.create_connection(address) as third:
            answer = _read(third)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        first.close()
        _until(lambda: httpx.get(f"http://127.0.0.1:{address[1]}").is_success)


def test_what_is_under_way_is_answered_before_the_end(app: Application) -> None:
    app.dawdle_s = 1.0
    with listening(app) as listener:
        url, answers = f"http://127.0.0.1:{listener.port}", []
        thread = threading.Thread(target=lambda: answers.append(httpx.get(f"{url}/dawdle")))
        thread.start()
        _until(lambda: app.asked)
        closing = threading.Thread(target=listener.close)
        closing.start()
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
        for one in (closing, thread):
            one.join()
    assert answers[0].text == "ok"
    assert answers[0].headers["connection"] == "close"


def test_a_process_follows_another_on_its_port_without_an_error(app: Application) -> None:
    failures: list[Exception] = []
    stop = threading.Event()
    follower = Application()

    def ask(url: str) -> None:
        try:
            with httpx.Client(base_url=url) as client:
                while not stop.is_set():
                    assert client.get("/").text == "ok"
        except (httpx.HTTPError, AssertionError) as error:
            failures.append(error)

    with listening(app) as former:
        threads = [threading.Thread(target=ask, args=(f"http://127.0.0.1:{former.port}",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        _until(lambda: len(app.asked) > 20)
        with listening(follower, former.port):
            former.close()
            seen = len(follower.asked)
            _until(lambda: len(follower.asked) > seen + 20 or failures)
            stop.set()
            for thread in threads:
                thread.join()
    assert not failures


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_bodies_of_any_size_are_taken_however_they_come(parts: int) -> None:
    with (
        served(build_app(Pool(), EndpointConfig())) as url,
        socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as raw,
    ):
        for size in (1, 1000, MAX_HEAD_BYTES - 100, MAX_HEAD_BYTES, 3 * MAX_HEAD_BYTES, 20 * MAX_HEAD_BYTES):
            head = f"POST /predict HTTP/1.1\r\nHost: tandem\r\nContent-Length: {size}\r\n\r\n".encode()
            request = head + b"x" * size
            step = -(-len(request) // parts)
            for start in range(0, len(request), step):
                raw.sendall(request[start : start + step])
                time.sleep(0.02)
            assert _read(raw, b"}]}").startswith(b"HTTP/1.1 200"), size


def test_connections_that_come_at_once_are_taken_in_few_turns_of_the_loop(app: Application) -> None:
    async def turns(clients: int) -> int:
        listener = Listener(app, "127.0.0.1", 0)
        await listener.open()
        with ExitStack() as stack:
            for _ in range(clients):  # while the loop is blocked
                client = stack.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
                client.sendall(b"GET / HTTP/1.1\r\nHost: tandem\r\n\r\n")
            taken = 0
            while len(app.asked) < clients:
                await asyncio.sleep(0)
                taken += 1
        await listener.close()
        return taken

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(asyncio.wait_for(turns(100), 10)) < 50


def test_the_endpoint_speaks_through_it() -> None:
    with served(build_app(Pool(), EndpointConfig())) as url:
        answer = httpx.post(f"{url}/predict", content=b"cat")
    assert answer.status_code == 200
    assert answer.headers["x-request-id"]
    assert "server" not in answer.headers
