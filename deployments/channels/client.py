"""The caller's end of a channel to one replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from deployments.answer import Answer
from deployments.channels.frames import BUFFER_BYTES, GREETING, Address, Frame, expect_loss, receive, send
from pipeline.dispatcher import Scores
from pipeline.errors import Busy, DeviceLost, Expired, PoolError, PoolFailed

CONNECT_S = 5.0

_log = logging.getLogger(__name__)


class ChannelLost(PoolError):
    """There is no connection to the replica, or it ended before the answer came."""


class Channel:
    """Calls to one replica, as many at once as its callers make."""

    def __init__(self, replica: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.replica = replica
        self._writer = writer
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._going = False
        self._receiving = asyncio.create_task(self._receive(reader))

    @classmethod
    async def open(cls, address: Address) -> Channel:
        """Connects. Raises `ChannelLost`."""
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(address.host, address.port, limit=BUFFER_BYTES)
        except (OSError, TimeoutError) as error:
            raise ChannelLost(f"cannot connect to {address.host}:{address.port}: {error!r}") from error
        expect_loss(writer)
        writer.write(GREETING + address.token)
        return cls(address.replica, reader, writer)

    @property
    def under_way(self) -> int:
        """The calls that wait for their answers."""
        return len(self._waiting)

    @property
    def usable(self) -> bool:
        """Whether the replica stays, as far as is known."""
        return not (self._going or self._receiving.done())

    async def call(self, images_NHWC: np.ndarray, top_k: int, within_s: Sequence[float], details: bool) -> Answer:
        """The scores of uint8 images [N, H, W, 3], N > 0, each within its time.

        Raises `Busy`, `Expired` and `DeviceLost` as the replica does, `PoolFailed` where the model failed, and
        `ChannelLost` where no answer came. A caller that is cancelled takes its call along.
        """
        if not self.usable:
            raise ChannelLost(f"replica {self.replica} goes, or is gone")
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        call = {"top_k": top_k, "within_s": list(within_s), "details": details}
        send(self._writer, Frame(number, {"call": call}, {"images": images_NHWC}))
        try:
            return await answer
        except asyncio.CancelledError:
            if not self._receiving.done():
                send(self._writer, Frame(number, {"cancel": True}, {}))
            raise
        finally:
            del self._waiting[number]
            self._leave_if_done()

    async def close(self) -> None:
        """Ends the channel, and the calls that are under way."""
        self._receiving.cancel()
        await asyncio.wait([self._receiving])

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        why = "the connection was closed"
        try:
            while True:
                frame = await receive(reader)
                answer = self._waiting.get(frame.number)
                if "going" in frame.told:
                    self._going = True
                    self._leave_if_done()
                elif answer is not None and not answer.done():  # who waited for it may have left
                    _settle(answer, frame.told, frame.arrays)
        except (EOFError, OSError) as error:
            why = str(error)
        except Exception as error:
            _log.exception("replica %s sent what is no answer; its channel is closed", self.replica)
            why = f"no answer: {error!r}"
        finally:
            self._writer.close()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ChannelLost(f"replica {self.replica}: {why}"))

    def _leave_if_done(self) -> None:
        if self._going and not self._waiting:
            self._writer.close()


def _settle(answer: asyncio.Future[Answer], told: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    if "busy" in told:
        answer.set_exception(Busy(told["busy"], told["retry_after_s"]))
    elif "expired" in told:
        answer.set_exception(Expired(told["expired"]))
    elif "lost" in told:
        answer.set_exception(DeviceLost(told["lost"]))
    elif "failed" in told:
        answer.set_exception(PoolFailed("the model failed on this request; the log of its replica says why"))
    else:
        answer.set_result(Answer(Scores(**arrays), told["replica"], told["scores_as"]))
