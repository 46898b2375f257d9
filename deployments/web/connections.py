"""One client's connection: uvicorn's, with bounds on what a client may take, and an end to work that nobody waits for.

uvicorn lets a head be as long and as slow as its sender likes, drops the rest of a body that is not wanted for as long
as it comes, waits for ever for one who does not read, and goes on with a request whose sender has hung up.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deployments.web.problems import Problem, problem_json

MAX_CONNECTIONS = 2048  # to one endpoint process
MAX_HEAD_BYTES = 64 << 10
HEAD_S = 10.0  # from a connection's start, or a head's first byte, to the head's end
DISCARD_S = 10.0  # for the rest of a body that is answered already
WRITE_S = 30.0  # for an answer that does not fit into the buffers

_NOT_HTTP = Problem(HTTPStatus.BAD_REQUEST, "this is not HTTP/1.1; the endpoint speaks that, without TLS")
_TOO_LONG = Problem(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"path and headers may have {MAX_HEAD_BYTES} bytes here; send fewer"
)
_TOO_SLOW = Problem(HTTPStatus.REQUEST_TIMEOUT, f"path and headers did not come within {HEAD_S:g} s; send them faster")
_TOO_MANY = Problem(
    HTTPStatus.SERVICE_UNAVAILABLE,
    f"{MAX_CONNECTIONS} are connected already; try again",
    **{"retry-after": "1"},
)


class Connection(HttpToolsProtocol):
    """What uvicorn makes for each connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.app = self._remembered(self.app)
        self._task: asyncio.Task[Any] | None = None
        self._in_head, self._head_bytes = True, 0
        self._read_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._refusal = _NOT_HTTP

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(_TOO_MANY)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._in_head:
            self._await_head()
            self._head_bytes += len(data)  # it is 0 again once the head has ended
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_TOO_LONG)

    def on_message_begin(self) -> None:
        """See `httptools.HttpRequestParser`."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _TOO_LONG
            raise ValueError("the head is too long")  # for the parser, which ends in `send_400_response`
        self._in_head, self._head_bytes = False, 0
        self._stop_read_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        self._in_head = True
        self._stop_read_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called once an answer is written."""
        super().on_response_complete()
        if not self._in_head and self._read_timer is None:
            self._read_timer = self.loop.call_later(DISCARD_S, self.transport.abort)
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._stop_read_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
        if self._task is not None and self.cycle.disconnected:
            self._task.cancel()

    def send_400_response(self, msg: str) -> None:
        """Called for what the parser does not take."""
        self._refuse(self._refusal)

    def finish(self) -> None:
        """Has the connection end with the answer that is under way, if there is one."""
        if self._answering:
            self.cycle.keep_alive = False

    def _remembered(self, app: ASGIApp) -> ASGIApp:
        """The application, whose task is known while it runs, to be cancelled where the client hangs up."""

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            self._task = asyncio.current_task()
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:
                if not self.cycle.disconnected:
                    raise
            finally:
                self._task = None

        return run

    def _await_head(self) -> None:
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._read_timer = None
        if self._answering:  # what is late is the head after it, and that can wait
            self._await_head()
        else:
            self._refuse(_TOO_SLOW)

    def _await_reader(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_S, self._abort_unread)

    def _abort_unread(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Answers, where no answer is under way, and closes."""
        if not self._answering:
            response = problem_json(problem)
            headers = [*response.raw_headers, (b"connection", b"close")]
            lines = (b"%s: %s\r\n" % header for header in headers)
            self.transport.write(b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()
