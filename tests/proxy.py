"""An HTTP proxy in front of a real S3 store that breaks, cuts, delays and refuses as networks and busy stores do.

Whoever is led to the proxy's port speaks to the store at the other port, with its own signatures: the `Host` that they
cover goes on as it came, like every byte but `Expect`, which the proxy answers itself.
"""

from __future__ import annotations

import io
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import unquote

HOST = "127.0.0.1"
PART_BYTES = 1 << 18
LAST_CHUNK_BYTES = len(b"\r\n0\r\n\r\n")
SLOW_DOWN = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>Slow down</Message></Error>"
# as S3 does, the connection ends with it: so nobody need read a body first that nobody wants
SLOW_DOWN_HEAD = (
    f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n"
    "Connection: close\r\n\r\n"
).encode()


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The share (0 to 1) of the requests that each fault befalls; none by default.

    slow_down  answered with 503 `SlowDown`; the store does not hear of them
    reset      done by the store; then the connection is reset within the answer's body, or before an answer without one
    stall      done by the store; the answer pauses for `stall_s` at the same point, then goes on
    short      done by the store; the answer's body ends too early, the connection in good order. Only where it has one

    Half of the bodies that are broken are so before their first byte, the others anywhere. The choices are those of
    `seed`: the same for requests in the same order. Only requests whose "METHOD /path" holds a match of `of` have
    faults.
    """

    slow_down: float = 0.0
    reset: float = 0.0
    stall: float = 0.0
    short: float = 0.0
    stall_s: float = 5.0
    of: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.slow_down, self.reset, self.stall, self.short)
        if min(shares) < 0 or self.slow_down > 1 or sum(shares[1:]) > 1:
            raise ValueError(f"{self}: shares are 0 to 1, those of answers in sum")


class Hold:
    """Requests that are kept from the store until `release`; those whose client is gone by then never get there."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)
        self._held, self._released = threading.Event(), threading.Event()

    def wait(self, timeout_s: float) -> bool:
        """True as soon as a request is held, whole; False after `timeout_s` without one."""
        return self._held.wait(timeout_s)

    def release(self) -> None:
        """Lets what is held go on, and what comes later pass."""
        self._released.set()

    def keep(self, request: str) -> None:
        """Returns once the request may go on."""
        if not self._released.is_set() and self._pattern.search(request):
            self._held.set()
            self._released.wait()


class Proxy:
    """Listens on `port` while it is entered as a context. `faults` may be replaced at any time.

    `injected` counts the faults that happened, by the names of their fields.
    """

    def __init__(self, store_port: int) -> None:
        self.injected: Counter[str] = Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.faults = Faults()
        self._store_port, self._holds = store_port, list[Hold]()
        self.connections = set[_Connection]()
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="proxy")

    def __enter__(self) -> Proxy:
        self._acceptor.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        for hold in self._holds:
            hold.release()
        socket.create_connection((HOST, self.port)).close()  # wakes the acceptor
        self._acceptor.join()
        self._listener.close()
        for connection in tuple(self.connections):
            connection.cut()
            connection.join()

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        with self._lock:
            self._faults, self._random = faults, random.Random(faults.seed)

    @contextmanager
    def hold(self, pattern: str) -> Iterator[Hold]:
        """Holds requests whose "METHOD /path" holds a match, while the context lasts or until they are released."""
        hold = Hold(pattern)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            hold.release()
            self._holds.remove(hold)

    def keep(self, request: str) -> None:
        """Returns once nobody holds the request."""
        for hold in tuple(self._holds):
            hold.keep(request)

    def draw(self, request: str, *kinds: str) -> str | None:
        """The fault, of these, that befalls the request."""
        with self._lock:
            number = self._random.random()
            if re.search(self._faults.of, request):
                for kind in kinds:
                    number -= getattr(self._faults, kind)
                    if number < 0:
                        self.injected[kind] += 1
                        return kind
        return None

    def cut_of(self, length: int) -> int:
        """How many bytes of a body come before its fault: fewer than `length`, every second time none."""
        with self._lock:
            return self._random.randrange(length) * self._random.randrange(2)

    def _accept(self) -> None:
        while True:
            client = self._listener.accept()[0]
            if self.closing.is_set():
                client.close()
                return
            connection = _Connection(self, client, self._store_port)
            self.connections.add(connection)
            connection.start()


class _Connection(threading.Thread):
    """A client's connection, and one of its own to the store, which lasts as long unless the store ends it."""

    def __init__(self, proxy: Proxy, client: socket.socket, store_port: int) -> None:
        super().__init__(name="proxy-connection")
        self._proxy, self._client = proxy, _Peer(client)
        self._store: _Peer | None = None
        self._store_port = store_port

    def run(self) -> None:
        try:
            while self._exchange():
                pass
        except OSError:  # either side is gone, or is to look so
            self._client.reset()
        finally:
            self._client.close()
            self._leave_store()
            self._proxy.connections.discard(self)

    def cut(self) -> None:
        """Ends the connection from another thread."""
        for peer in (self._client, self._store):
            if peer:
                peer.shut(socket.SHUT_RDWR)

    def _exchange(self) -> bool:
        """One request and its answer; whether another may follow."""
        head = _Head(self._client.reader)
        method, target, _ = head.lines[0].decode().split(" ", 2)
        request = f"{method} {unquote(target.partition('?')[0])}"
        if self._proxy.draw(request, "slow_down"):
            self._refuse(method)
            return False
        message = head.to_store() + self._request_body(head)
        self._proxy.keep(request)
        if self._client.is_gone():
            return False
        return self._answer(method, request, self._sent(message)) and head.keeps_alive

    def _refuse(self, method: str) -> None:
        self._client.send(SLOW_DOWN_HEAD + (b"" if method == "HEAD" else SLOW_DOWN))
        self._client.shut(socket.SHUT_WR)
        while self._client.reader.read(PART_BYTES):  # to close on bytes unread would reset, and lose the answer
            pass

    def _request_body(self, head: _Head) -> bytes:
        if head.expects:
            self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if head.is_chunked:
            return _chunked(self._client.reader)
        return _exactly(self._client.reader, head.length)

    def _sent(self, message: bytes) -> _Peer:
        """The store, which now has the message. A connection that it ended while idle is replaced, as clients do."""
        if self._store and self._store.is_gone():
            self._leave_store()
        self._store = self._store or _Peer(socket.create_connection((HOST, self._store_port)))
        self._store.send(message)
        return self._store

    def _answer(self, method: str, request: str, store: _Peer) -> bool:
        """Passes the store's answer on, with its fault; whether another may follow."""
        head = _Head(store.reader)
        body, length, breakable = _answer_body(method, head, store.reader)
        if not length:
            self._befall(self._proxy.draw(request, "reset", "stall"))
            self._client.send(head.to_client())
            return head.keeps_alive
        fault = self._proxy.draw(request, "reset", "stall", "short")
        cut = self._proxy.cut_of(breakable) if fault else length
        self._client.send(head.to_client())
        self._copy(body, cut)
        self._befall(fault)
        if fault == "short":
            return False
        self._copy(body, length - cut)
        return head.keeps_alive

    def _befall(self, fault: str | None) -> None:
        if fault == "reset":
            raise ConnectionResetError
        if fault == "stall":
            self._proxy.closing.wait(self._proxy.faults.stall_s)

    def _copy(self, body: io.BufferedIOBase, length: int) -> None:
        while length:
            part = body.read1(min(length, PART_BYTES))
            if not part:
                raise ConnectionAbortedError
            self._client.send(part)
            length -= len(part)

    def _leave_store(self) -> None:
        if self._store:
            self._store.close()
            self._store = None


class _Peer:
    """One end of a connection, and what was read ahead of it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.reader = connection, connection.makefile("rb")
        self.send = connection.sendall

    def is_gone(self) -> bool:
        """Whether the other side, whose turn to speak it is not, has ended the connection."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def shut(self, how: int) -> None:
        """Ends one direction or both: the other side, and a thread of ours that waits for it, see an end."""
        with suppress(OSError):
            self._socket.shutdown(how)

    def reset(self) -> None:
        """Closes with RST instead of FIN."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.reader.close()
        self._socket.close()


class _Head:
    """A message up to its body: its lines as they came, and what is asked of them."""

    def __init__(self, reader: io.BufferedIOBase) -> None:
        self.lines = [_line(reader)]
        while self.lines[-1] != b"\r\n":
            self.lines.append(_line(reader))
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in self.lines)}
        self.is_chunked = fields.get(b"transfer-encoding", b"").lower() == b"chunked"
        self.length = int(fields.get(b"content-length", 0))
        self.keeps_alive = fields.get(b"connection", b"").lower() != b"close"
        self.expects = b"expect" in fields

    def to_store(self) -> bytes:
        """A request's lines as they go to the store: nobody waits for its 100 Continue."""
        if not self.expects:
            return self.to_client()
        return b"".join(line for line in self.lines if not line.lower().startswith(b"expect:"))

    def to_client(self) -> bytes:
        return b"".join(self.lines)


def _answer_body(method: str, head: _Head, reader: io.BufferedIOBase) -> tuple[io.BufferedIOBase, int, int]:
    """Where the body comes from, its length, and how much of it may come without being enough."""
    if method == "HEAD" or head.lines[0].split()[1] in (b"204", b"304"):
        return reader, 0, 0
    if not head.is_chunked:
        return reader, head.length, head.length
    chunks = _chunked(reader)
    return io.BytesIO(chunks), len(chunks), max(1, len(chunks) - LAST_CHUNK_BYTES)


def _chunked(reader: io.BufferedIOBase) -> bytes:
    """A body in chunks, with their framing."""
    parts, size = [], -1
    while size:
        parts.append(_line(reader))
        size = int(parts[-1].partition(b";")[0], 16)
        parts.append(_exactly(reader, size + 2 if size else 0))
    while parts[-1] != b"\r\n":  # trailers
        parts.append(_line(reader))
    return b"".join(parts)


def _line(reader: io.BufferedIOBase) -> bytes:
    line = reader.readline()
    if not line.endswith(b"\n"):
        raise ConnectionAbortedError
    return line


def _exactly(reader: io.BufferedIOBase, count: int) -> bytes:
    data = reader.read(count)
    if len(data) < count:
        raise ConnectionAbortedError
    return data
