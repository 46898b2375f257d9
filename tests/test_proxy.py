"""The proxy does to a real store's answers what it says, and S3Store gets through all of it."""

from __future__ import annotations

import http.client
import io
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest

from pipeline import patience, s3
from pipeline.errors import NotFound, Unavailable
from pipeline.ranged import WINDOW_BYTES
from pipeline.storage import Store, open_store
from tests.conftest import lead_to_store, new_bucket
from tests.proxy import Faults, Proxy
from tests.stores import Radosgw


@pytest.fixture
def proxy(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the real store, which this process is led to, with many short pauses."""
    with _led_to_proxy(radosgw.port, monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def moto_proxy(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The same in front of the emulator, whose answers all have a length, and which ends its connections."""
    with _led_to_proxy(moto_port, monkeypatch) as proxy:
        yield proxy


@contextmanager
def _led_to_proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(patience, "PAUSES_S", (0.01,) * 30)
    with Proxy(port) as proxy:
        lead_to_store(monkeypatch, proxy.port)
        yield proxy
    s3._client.cache_clear()


@pytest.fixture
def store(proxy: Proxy) -> Store:
    return open_store(f"s3://{new_bucket()}/some/prefix")


def names(store: Store) -> list[str]:
    return [info.name for info in store.list()]


def is_same(content: bytes, expected: bytes) -> bool:
    """Equality, less pytest's minutes of explaining where large contents differ."""
    return content == expected


# Without faults


def _answers(bucket: str) -> list[Any]:
    """What the store tells in answers of each kind: with a length, without a body, in chunks, and an error."""
    client, key = s3._client(), {"Bucket": bucket, "Key": "a b+é"}
    with pytest.raises(client.exceptions.NoSuchKey) as missing:
        client.get_object(Bucket=bucket, Key="missing")
    answers = [
        client.get_object(**key), client.get_object(**key, Range="bytes=10-19"), client.head_object(**key),
        client.put_object(Bucket=bucket, Key="written", Body=b"x"), client.delete_object(Bucket=bucket, Key="written"),
        client.list_objects_v2(Bucket=bucket), missing.value.response,
    ]  # fmt: skip
    return [_lasting(answer) for answer in answers]


def _lasting(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer less what differs from request to request."""
    told = answer.pop("ResponseMetadata")
    fields = {name: value for name, value in told["HTTPHeaders"].items() if name not in ("date", "x-amz-request-id")}
    body = answer.pop("Body").read() if "Body" in answer else None
    return {"status": told["HTTPStatusCode"], "fields": fields, "body": body, **answer}


def test_what_a_store_answers_comes_through(proxy: Proxy, radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = new_bucket()
    s3._client().put_object(Bucket=bucket, Key="a b+é", Body=b"0123456789" * 100)
    through = _answers(bucket)
    assert [answer["status"] for answer in through] == [200, 206, 200, 200, 204, 200, 404]
    lead_to_store(monkeypatch, radosgw.port)
    assert through == _answers(bucket)


def test_a_connection_serves_many_requests(proxy: Proxy, store: Store) -> None:
    store.write("a", b"x")
    connections = set(proxy.connections)
    assert [store.read("a") for _ in range(20)] == [b"x"] * 20
    assert names(store) == ["a"]
    assert set(proxy.connections) == connections
    assert len(connections) == 1


def test_many_threads_are_served_at_once(proxy: Proxy, store: Store) -> None:
    contents = {f"{number:03d}": f"{number}".encode() * 100 for number in range(100)}
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(store.write, contents.keys(), contents.values()))
        assert list(threads.map(store.read, contents)) == list(contents.values())
    assert names(store) == list(contents)
    assert not proxy.injected


@pytest.mark.parametrize("slow_down", [0.0, 0.5])
def test_a_body_that_waits_to_be_asked_for_is_asked_for(proxy: Proxy, slow_down: float) -> None:
    bucket, content = new_bucket(), random.Random(1).randbytes(1 << 20)

    def put() -> None:
        with s3._translated(bucket):  # botocore sends `Expect: 100-continue` for files
            s3._client().put_object(Bucket=bucket, Key="a", Body=io.BytesIO(content))

    proxy.faults = Faults(slow_down=slow_down)
    for _ in range(6):
        patience.patiently(put)
    assert is_same(open_store(f"s3://{bucket}").read("a"), content)
    assert bool(proxy.injected["slow_down"]) is bool(slow_down)


def test_who_asks_whether_to_send_a_body_is_told_at_once(proxy: Proxy) -> None:
    for slow_down, line in ((0, b"HTTP/1.1 100 Continue"), (1, b"HTTP/1.1 503 Slow Down")):
        proxy.faults = Faults(slow_down=slow_down)
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(b"PUT /bucket/a HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(100).startswith(line)


def test_who_sends_a_body_unasked_is_refused_in_order(proxy: Proxy) -> None:
    proxy.faults = Faults(slow_down=1)
    with closing(http.client.HTTPConnection("127.0.0.1", proxy.port)) as client:
        client.request("PUT", "/bucket/a", b"x" * (8 << 20))
        answer = client.getresponse()
        assert (answer.status, b"<Code>SlowDown</Code>" in answer.read()) == (503, True)


def test_a_body_in_chunks_is_no_part_of_the_next_request(proxy: Proxy, radosgw: Radosgw) -> None:
    bucket, statuses = new_bucket(), []
    s3._client().put_bucket_acl(Bucket=bucket, ACL="public-read-write")  # for requests without a signature
    for port in (proxy.port, radosgw.port):
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as client:
            for method, body in (("PUT", iter([b"first", b"second" * 10_000])), ("HEAD", None), ("GET", None)):
                client.request(method, f"/{bucket}/a", body, encode_chunked=True)
                with client.getresponse() as answer:
                    answer.read()
                statuses.append(answer.status)
    assert statuses == [411, 404, 404] * 2, "the store wants a length, and had the whole body"


# Faults


def use(store: Store) -> None:
    """Every call of a store, some of them several times; each must do what it does without faults."""
    contents = {f"{number:02d}": random.Random(number).randbytes(10_000) for number in range(10)}
    for name, content in contents.items():
        store.write(name, content)
        assert store.read(name) == content
        assert store.stat(name).size == len(content)
        assert store.create(f"created/{name}", content), "a lost answer does not make it another's"
        assert not store.create(f"created/{name}", b"of another")
    assert names(store) == [*contents, *(f"created/{name}" for name in contents)]
    assert 0 <= store.age_s("00") < 60
    store.delete(contents)
    assert names(store) == [f"created/{name}" for name in contents]
    with pytest.raises(NotFound):
        store.read("00")


@pytest.mark.parametrize(
    "faults",
    [Faults(slow_down=0.3), Faults(reset=0.3), Faults(short=0.3), Faults(stall=0.3, stall_s=0.02),
     Faults(slow_down=0.2, reset=0.2, short=0.2, stall=0.2, stall_s=0.02)],
    ids=["slow_down", "reset", "short", "stall", "all"],
)  # fmt: skip
def test_every_call_gets_through(proxy: Proxy, store: Store, faults: Faults) -> None:
    proxy.faults = faults
    use(store)
    assert set(proxy.injected) == {kind for kind in ("slow_down", "reset", "short", "stall") if getattr(faults, kind)}


@pytest.mark.parametrize("kind", ["reset", "short"])
def test_large_objects_come_whole_though_their_bodies_break(proxy: Proxy, store: Store, kind: str) -> None:
    content = random.Random(1).randbytes(WINDOW_BYTES + 12345)
    store.write("big", content)
    proxy.faults = Faults(**{kind: 0.6}, of="GET .*/big$")  # type: ignore[arg-type]
    for _ in range(3):
        assert is_same(store.read("big"), content)
        with store.open("big") as file:
            file.seek(WINDOW_BYTES - 5)
            assert file.read(10) == content[WINDOW_BYTES - 5 : WINDOW_BYTES + 5]
            file.seek(0)
            assert is_same(file.read(), content)
    assert proxy.injected[kind] > 5


@pytest.mark.parametrize(
    ("faults", "error"), [(Faults(reset=1), ConnectionResetError), (Faults(short=1), http.client.IncompleteRead)]
)
def test_a_reset_is_no_orderly_end_and_a_short_body_has_one(
    proxy: Proxy, faults: Faults, error: type[Exception]
) -> None:
    bucket = new_bucket()
    s3._client().put_object(Bucket=bucket, Key="a", Body=b"x" * 100_000, ACL="public-read")
    proxy.faults = faults
    for _ in range(8):
        with closing(http.client.HTTPConnection("127.0.0.1", proxy.port)) as client:
            client.request("GET", f"/{bucket}/a")
            with pytest.raises(error):
                client.getresponse().read()


def test_a_stall_delays_an_answer(proxy: Proxy, store: Store) -> None:
    store.write("a", b"content")
    proxy.faults = Faults(stall=1, stall_s=0.3)
    for call in (lambda: store.read("a"), lambda: store.stat("a"), lambda: names(store)):
        started = time.monotonic()
        call()
        assert 0.3 <= time.monotonic() - started < 5
    assert proxy.injected == {"stall": 3}


def test_a_stall_that_outlasts_patience_is_another_try(
    proxy: Proxy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.3)
    s3._client.cache_clear()
    store.write("a", b"content" * 100_000)
    proxy.faults = Faults(stall=0.5, stall_s=30)
    started = time.monotonic()
    for _ in range(3):
        assert store.read("a") == b"content" * 100_000
        assert names(store) == ["a"]
    assert proxy.injected["stall"] > 0
    assert time.monotonic() - started < 30


def test_a_listing_that_ends_early_is_not_taken_for_one_of_fewer_objects(moto_proxy: Proxy) -> None:
    store = open_store(f"s3://{new_bucket()}")
    store.write("a", b"")
    moto_proxy.faults = Faults(short=0.5)
    assert [names(store) for _ in range(10)] == [["a"]] * 10


@pytest.mark.parametrize(
    ("faults", "message", "arrived"),
    [(Faults(slow_down=1), "come back later", []), (Faults(reset=1), "does not answer", ["new"])],
)
def test_what_is_refused_does_not_reach_the_store_and_what_is_reset_does(
    proxy: Proxy, store: Store, monkeypatch: pytest.MonkeyPatch, faults: Faults, message: str, arrived: list[str]
) -> None:
    store.write("old", b"content")
    monkeypatch.setattr(patience, "PAUSES_S", ())
    proxy.faults = faults
    calls = (
        lambda: store.read("old"), lambda: store.stat("old"), lambda: names(store), lambda: store.delete(["other"]),
        lambda: store.write("new", b"x" * (4 << 20)),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(Unavailable, match=message):
            call()
    assert proxy.injected.total() == len(calls)
    proxy.faults = Faults()
    assert names(store) == [*arrived, "old"]


def test_faults_befall_the_requests_that_they_are_for(
    proxy: Proxy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", ())
    proxy.faults = Faults(slow_down=1, of="^PUT /.*/é hit$")
    store.write("miss", b"")
    with pytest.raises(Unavailable):
        store.write("é hit", b"")
    with pytest.raises(NotFound):
        store.stat("é hit")
    assert proxy.injected == {"slow_down": 1}


def test_the_same_seed_is_the_same_faults(proxy: Proxy) -> None:
    drawn = []
    for seed in (1, 1, 2):
        proxy.faults = Faults(reset=0.3, short=0.3, seed=seed)
        drawn.append([(proxy.draw("GET /a", "reset", "stall", "short"), proxy.cut_of(1000)) for _ in range(100)])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("shares", [{"reset": -0.1}, {"slow_down": 1.1}, {"reset": 0.6, "short": 0.6}])
def test_shares_that_cannot_be_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        Faults(**shares)  # type: ignore[arg-type]


# Requests that are held


def test_a_request_that_is_held_gets_to_the_store_when_it_is_released(proxy: Proxy, store: Store) -> None:
    with ThreadPoolExecutor(1) as threads, proxy.hold("PUT .*/_SUCCESS$") as held:
        store.write("other", b"")
        assert not held.wait(0)
        written = threads.submit(store.write, "_SUCCESS", b"done")
        assert held.wait(10)
        assert names(store) == ["other"]
        held.release()
        written.result(10)
        assert store.read("_SUCCESS") == b"done"


def test_a_request_whose_client_is_killed_while_it_is_held_does_not_get_to_the_store(
    proxy: Proxy, store: Store
) -> None:
    write = "import sys; from pipeline.storage import open_store; open_store(sys.argv[1]).write('_SUCCESS', b'done')"
    with proxy.hold("PUT .*/_SUCCESS$") as held:
        with subprocess.Popen([sys.executable, "-c", write, store.url]) as writer:
            assert held.wait(60)
            writer.kill()
        held.release()
        time.sleep(0.3)  # what it would take the request to get there, many times over
    assert names(store) == []


# A store that is gone


@contextmanager
def _gone(radosgw: Radosgw) -> Iterator[None]:
    radosgw.kill_gateway()
    try:
        yield
    finally:
        radosgw.start_gateway()


def test_a_store_that_is_gone_is_unavailable_until_it_is_back(
    proxy: Proxy, store: Store, radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", b"content")
    monkeypatch.setattr(patience, "PAUSES_S", ())
    with _gone(radosgw):
        pass
    assert store.read("a") == b"content", "the connection that the proxy had is no hindrance"
    with ThreadPoolExecutor(1) as threads:
        with _gone(radosgw):
            started = time.monotonic()
            for call in (lambda: store.read("a"), lambda: store.write("a", b""), lambda: names(store)):
                with pytest.raises(Unavailable):
                    call()
            assert time.monotonic() - started < 5
            monkeypatch.setattr(patience, "PAUSES_S", (0.1,) * 600)
            waiting = threads.submit(store.read, "a")
            time.sleep(1)
            assert not waiting.done()
        assert waiting.result(60) == b"content"
