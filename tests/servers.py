"""ASGI applications, asked directly and on a port of loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvloop

from deployments.web.listener import Listener


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """What the application answers, without a port."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tandem") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


class Listening:
    """The endpoint's listener with an application, in a thread of its own."""

    def __init__(self, app: Any, port: int) -> None:
        self._loop = uvloop.new_event_loop()  # as Ray gives it to the endpoint
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._listener = Listener(app, "127.0.0.1", port)
        self._closed = False
        self.port = self._listener.port

    def open(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listener.open(), self._loop).result(timeout=10)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._listener.close(), self._loop).result(timeout=60)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@contextmanager
def listening(app: Any, port: int = 0) -> Iterator[Listening]:
    """An application that listens, for as long as the context lasts; port 0 is one that is free."""
    one = Listening(app, port)
    one.open()
    try:
        yield one
    finally:
        one.close()


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL at which the endpoint's listener has the application, for as long as the context lasts."""
    with listening(app) as one:
        yield f"http://127.0.0.1:{one.port}"
