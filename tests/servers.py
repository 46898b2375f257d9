"""ASGI applications, asked directly and on a port of loopback."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from tests.stores import free_ports


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """What the application answers, without a port."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tandem") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL at which the application answers for as long as the context lasts."""
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
