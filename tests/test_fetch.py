"""What a stranger's URL cannot reach."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from deployments.config import EndpointConfig
from deployments.web.app import build_app
from deployments.web.fetch import Fetcher, is_public
from deployments.web.problems import Problem
from tests.servers import ask
from tests.test_web import Pool

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "not an address", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"])
def test_public_addresses_are_known(address: str) -> None:
    assert is_public(address)


class Web(BaseHTTPRequestHandler):
    """What answers on loopback for hosts of the tests; it keeps what it was asked."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.headers["host"], self.path))
        match self.path.split("/")[1:]:
            case ["to", *rest]:
                self.send_response(302)
                self.send_header("location", "/".join(rest))
                self.end_headers()
            case ["loop"]:
                self.send_response(301)
                self.send_header("location", "/loop")
                self.end_headers()
            case ["long"]:
                self._body(b"x" * 1000)
            case ["endless"]:
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(b"x" * 1000)
                    time.sleep(0.01)
            case ["slow"]:
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            case ["missing"]:
                self.send_error(404)
            case _:
                self._body(b"cat")

    def _body(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...

    def handle(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
            super().handle()


@contextmanager
def _web() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    asked: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Web,), {"asked": asked}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def web() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    with _web() as one:
        yield one


def _fetcher(port: int, *, loopback_is_allowed: bool = True, timeout_s: float = 5.0) -> Fetcher:
    """Knows `images.test`, `sub.images.test`, and `rebound.test`; all are on loopback."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        if not host.endswith(".test"):
            raise OSError("no such name")
        return ["127.0.0.1"]

    hosts = [f"{name}:{port}" for name in ("images.test", "*.images.test", "rebound.test")]
    allowed: Callable[[str], bool] = (lambda address: address == "127.0.0.1") if loopback_is_allowed else is_public
    return Fetcher(hosts=hosts, max_bytes=500, timeout_s=timeout_s, resolve=resolve, is_allowed=allowed)


def _fetch(fetcher: Fetcher, url: str) -> bytes:
    return asyncio.run(fetcher.fetch(url))


def _refused(fetcher: Fetcher, url: str, status: int = 422) -> str:
    with pytest.raises(Problem) as caught:
        _fetch(fetcher, url)
    assert caught.value.status == status
    return caught.value.detail


Server = tuple[int, list[tuple[str, str]]]


def test_an_image_is_fetched_by_its_name_from_the_address_that_was_checked(web: Server) -> None:
    port, asked = web
    assert _fetch(_fetcher(port), f"http://images.test:{port}/cat.png?a=b") == b"cat"
    assert _fetch(_fetcher(port), f"http://SUB.images.test:{port}/") == b"cat"
    assert asked == [(f"images.test:{port}", "/cat.png?a=b"), (f"sub.images.test:{port}", "/")]


def test_hosts_that_are_not_listed_are_not_asked(web: Server) -> None:
    port, asked = web
    for url in (
        f"http://other.test:{port}/",
        f"http://images.test.evil.test:{port}/",
        f"http://evilimages.test:{port}/",
        f"http://127.0.0.1:{port}/",
        f"http://[::1]:{port}/",
        f"http://2130706433:{port}/",
        f"http://images.test:{port + 1}/",
        "http://images.test/",
    ):
        assert "not on this endpoint's list" in _refused(_fetcher(port), url), url
    assert not asked


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("file:///etc/passwd", "http://"),
        ("gopher://images.test/", "http://"),
        ("//images.test/", "http://"),
        ("http://", "list"),
        ("http://user:secret@images.test/", "a user or a password"),
        ("http://images.test:99999/", "list"),
        ("http://images.test/\0", "no URL"),
    ],
)
def test_what_is_no_plain_url_is_refused(url: str, told: str) -> None:
    detail = _refused(_fetcher(80), url)
    assert told in detail
    assert "secret" not in detail


def test_a_listed_name_with_a_private_address_is_refused(web: Server) -> None:
    port, asked = web
    detail = _refused(_fetcher(port, loopback_is_allowed=False), f"http://images.test:{port}/")
    assert "an address that is not public" in detail
    assert not asked


def test_a_name_with_one_private_address_among_public_ones_is_refused() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return [PUBLIC, "10.0.0.1"]

    fetcher = Fetcher(hosts=["images.test"], max_bytes=9, timeout_s=1, resolve=resolve)
    assert "not public" in _refused(fetcher, "http://images.test/")


def test_a_name_that_changes_its_address_is_asked_for_it_once(web: Server) -> None:
    port, asked = web
    answers = iter([["127.0.0.1"]])  # a second look-up would end the test

    async def resolve(host: str, port: int) -> Sequence[str]:
        return next(answers)

    fetcher = Fetcher(
        hosts=[f"rebound.test:{port}"], max_bytes=500, timeout_s=5, resolve=resolve,
        is_allowed=lambda address: address == "127.0.0.1",
    )  # fmt: skip
    assert _fetch(fetcher, f"http://rebound.test:{port}/") == b"cat"
    assert asked == [(f"rebound.test:{port}", "/")]


def test_redirects_are_checked_as_any_url(web: Server) -> None:
    port, asked = web
    base = f"http://images.test:{port}/to/"
    assert _fetch(_fetcher(port), f"{base}http://sub.images.test:{port}/cat") == b"cat"
    asked.clear()
    for target in (f"http://127.0.0.1:{port}/", "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd"):
        _refused(_fetcher(port), base + target)
    assert len(asked) == 3  # the redirects alone


def test_redirects_without_end_are_ended(web: Server) -> None:
    port, asked = web
    assert "more than 3 times" in _refused(_fetcher(port), f"http://images.test:{port}/loop")
    assert len(asked) == 4


@pytest.mark.parametrize("path", ["long", "endless"])
def test_more_bytes_than_an_image_may_have_are_not_taken(web: Server, path: str) -> None:
    port, _ = web
    assert "more than 500 bytes" in _refused(_fetcher(port), f"http://images.test:{port}/{path}", 413)


def test_a_host_that_dawdles_is_given_up(web: Server) -> None:
    port, _ = web
    started = time.monotonic()
    _refused(_fetcher(port, timeout_s=0.3), f"http://images.test:{port}/slow", 504)
    assert time.monotonic() - started < 3


def test_what_is_not_there_is_told(web: Server) -> None:
    port, _ = web
    assert "images.test answers 404" in _refused(_fetcher(port), f"http://images.test:{port}/missing")
    assert "is not known" in _refused(
        Fetcher(hosts=["nowhere.invalid"], max_bytes=9, timeout_s=5), "http://nowhere.invalid/"
    )


def test_the_proxy_of_the_environment_is_not_asked(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port, _ = web
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert _fetch(_fetcher(port), f"http://images.test:{port}/") == b"cat"


def _get(path: str, config: EndpointConfig, fetcher: Fetcher | None = None) -> httpx.Response:
    return ask(build_app(Pool(), config, fetcher=fetcher), "GET", path)


def test_urls_are_fetched_only_where_hosts_are_listed(web: Server) -> None:
    port, asked = web
    path = f"/predict_image_class?image_url=http://images.test:{port}/cat.png&top_k=4"
    off = _get(path, EndpointConfig())
    assert (off.status_code, "image_url_hosts" in off.json()["detail"]) == (403, True)
    assert not asked
    on = _get(path, EndpointConfig(), _fetcher(port))
    assert on.json() == {"predictions": [{"label": "cat", "score": 0.25}]}


def test_the_hosts_of_the_configuration_are_those_that_are_asked() -> None:
    config = EndpointConfig(image_url_hosts=("localhost",))
    loopback = _get("/predict_image_class?image_url=http://localhost/", config)
    other = _get("/predict_image_class?image_url=http://other.test/", config)
    assert (loopback.status_code, "not public" in loopback.json()["detail"]) == (422, True)
    assert (other.status_code, "list" in other.json()["detail"]) == (422, True)
