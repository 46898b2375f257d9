"""A replica's end of its channels."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np

from deployments.answer import Answer, Refusal
from deployments.channels.frames import BUFFER_BYTES, GREETING, TOKEN_BYTES, Address, Frame, expect_loss, receive, send
from pipeline.dispatcher import Scores
from pipeline.errors import Busy, DeviceLost, Expired

GREETING_S = 5.0
STRANGERS = 64  # at most, that have not sent their greeting yet

# uint8 [N, H, W, 3], top_k, the seconds within which to score each image, details
Score = Callable[[np.ndarray, int, Sequence[float], bool], Awaitable[Answer | Refusal]]

_log = logging.getLogger(__name__)


class ChannelServer:
    """Has `score` answer calls, each until its caller leaves. One that is to go says so, and waits for its clients."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._strangers = 0
        self._clients: dict[asyncio.StreamWriter, asyncio.Task[Any] | None] = {}

    async def open(self, replica: str, host: str) -> Address:
        """Listens at a free port of `host` from now on. Raises `OSError`."""
        self._server = await asyncio.start_server(self._connected, host, 0, limit=BUFFER_BYTES)
        return Address(replica, host, self._server.sockets[0].getsockname()[1], self._token)

    async def close(self) -> None:
        """Takes no new client, and waits until those that are there have their answers and leave."""
        self._server.close()
        for client in self._clients:
            send(client, Frame(0, {"going": True}, {}))
        if self._clients:
            await asyncio.wait([task for task in self._clients.values() if task])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._strangers < STRANGERS and await self._greeted(reader) and self._server.is_serving():
                expect_loss(writer)
                self._clients[writer] = asyncio.current_task()
                await self._serve(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            self._clients.pop(writer, None)

    async def _greeted(self, reader: asyncio.StreamReader) -> bool:
        expected = GREETING + self._token
        self._strangers += 1
        try:
            async with asyncio.timeout(GREETING_S):
                return hmac.compare_digest(await reader.readexactly(len(expected)), expected)
        except (EOFError, OSError, TimeoutError):
            return False
        finally:
            self._strangers -= 1

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one client's calls until it leaves."""
        calls: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                frame = await receive(reader)
                if "call" in frame.told:
                    call = asyncio.create_task(self._answer(writer, frame))
                    calls[frame.number] = call
                    call.add_done_callback(partial(_forget, calls, frame.number))
                elif frame.number in calls:
                    calls[frame.number].cancel()
        except (EOFError, OSError):
            pass
        except Exception:
            _log.exception("a client sent what is no call, and is heard no more")
        finally:
            for call in list(calls.values()):
                call.cancel()

    async def _answer(self, writer: asyncio.StreamWriter, frame: Frame) -> None:
        call = frame.told["call"]
        try:
            answer = await self._score(frame.arrays["images"], call["top_k"], call["within_s"], call["details"])
            told, arrays = _told(answer)
        except Exception:
            _log.exception("the replica failed on a call")
            told, arrays = {"failed": True}, {}
        send(writer, Frame(frame.number, told, arrays))


def _told(answer: Answer | Refusal) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An answer as the client's end of a channel reads it."""
    if isinstance(answer, Busy):
        return {"busy": str(answer), "retry_after_s": answer.retry_after_s}, {}
    if isinstance(answer, Expired):
        return {"expired": str(answer)}, {}
    if isinstance(answer, DeviceLost):
        return {"lost": str(answer)}, {}
    arrays = {field.name: getattr(answer.scores, field.name) for field in fields(Scores)}
    there = {name: array for name, array in arrays.items() if array is not None}
    return {"replica": answer.replica, "scores_as": answer.scores_as}, there


def _forget(calls: dict[int, asyncio.Task[None]], number: int, _: asyncio.Task[None]) -> None:
    calls.pop(number, None)  # a client may have given its number twice
