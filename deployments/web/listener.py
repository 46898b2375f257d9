"""Where the endpoint listens: a port, which the endpoint's processes on a node share, and uvicorn behind it.

Serve's own proxy would be a process before the endpoint's, which costs more than all that the endpoint does for a
request, and it knows no bounds for heads and slow clients.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from deployments.web.connections import Connection
from pipeline.errors import UsageError

BACKLOG = 1024  # of each socket
SOCKETS = 8  # at one port: uvloop accepts one connection of each in a turn of its loop, which is long under load
KEEP_ALIVE_S = 75  # longer than load balancers keep theirs (60 s): the end that closes first should be the client's
IDLE_S = 2.0  # for clients that keep a connection to notice, by an answer, that this process goes
POLL_S = 0.01


def check_free(host: str, port: int) -> None:
    """Raises `UsageError` where nobody can listen at that address, or another does.

    To be asked before the first process of an endpoint is started: they share their port with one another, and would
    share it as well with those of another endpoint of the same user.
    """
    try:
        _bound(host, port, socket.SO_REUSEADDR).close()
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from error


def _bound(host: str, port: int, *options: int) -> socket.socket:
    ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    one = socket.socket(family, kind, protocol)
    try:
        for option in options:
            one.setsockopt(socket.SOL_SOCKET, option, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


class Listener:
    """An application at an address."""

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        """Binds, and does not listen yet. Raises `OSError`. Port 0 is one that is free."""
        options = socket.SO_REUSEADDR, socket.SO_REUSEPORT
        self._sockets = [_bound(host, port, *options)]
        self.port: int = self._sockets[0].getsockname()[1]
        self._sockets += [_bound(host, self.port, *options) for _ in range(SOCKETS - 1)]
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        self._config, self._server = config, uvicorn.Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def listens(self) -> bool:
        """Whether it answers."""
        return self._serving is not None and not self._serving.done() and self._server.started

    async def open(self) -> None:
        """Listens from now on."""
        self._serving = asyncio.create_task(self._server.serve(self._sockets))
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Takes no new connection, and ends once those that are there have their answers.

        An answer says that its connection ends with it; only one on which nothing comes is closed without.
        """
        if self._serving is None:
            for one in self._sockets:
                one.close()
            return
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            assert isinstance(connection, Connection)
            connection.finish()
        last = (b"connection", b"close")  # for requests that still come
        self._config.encoded_headers.append(last)
        self._server.server_state.default_headers = [*self._server.server_state.default_headers, last]
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S):
                while self._server.server_state.connections:
                    await asyncio.sleep(POLL_S)
        self._server.should_exit = True
        await self._serving
