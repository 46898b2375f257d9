"""The channels of one process to the replicas of a pool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from deployments.answer import Answer
from deployments.channels.client import Channel, ChannelLost
from deployments.channels.frames import Address
from pipeline.errors import PoolFailed

LOOK_EVERY_S = 1.0  # for replicas that are new, while calls come

_log = logging.getLogger(__name__)


class Channels:
    """Sends each call to the replica that works on the fewest from here; of several, to each in turn.

    `find` gives the address of one replica of the pool after another, new ones first, or None where they have none.
    It raises `PoolFailed` where no replica answers.
    """

    def __init__(self, find: Callable[[], Awaitable[Address | None]]) -> None:
        self._find = find
        self._channels: dict[str, Channel] = {}  # those whose turn is next come first
        self._looking: asyncio.Task[None] | None = None
        self._look_s = 0.0
        self._unreached: set[str] = set()

    async def call(self, images_NHWC: np.ndarray, top_k: int, within_s: Sequence[float], details: bool) -> Answer:
        """See `Channel.call`. Raises `ChannelLost` at once where no channel is open."""
        self._look_if_due()
        self._channels = {replica: one for replica, one in self._channels.items() if one.usable}
        channel = min(self._channels.values(), key=lambda one: one.under_way, default=None)
        if channel is None:
            raise ChannelLost("no channel is open")
        self._channels[channel.replica] = self._channels.pop(channel.replica)
        return await channel.call(images_NHWC, top_k, within_s, details)

    async def close(self) -> None:
        """Ends all of them."""
        if self._looking:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    def _look_if_due(self) -> None:
        """Looks for replicas as calls come, and not by itself: to look wakes a pool that sleeps."""
        loop = asyncio.get_running_loop()
        if (self._looking is None or self._looking.done()) and loop.time() >= self._look_s:
            self._looking = loop.create_task(self._look())

    async def _look(self) -> None:
        try:
            while (address := await self._find()) and address.replica not in self._channels:
                self._channels[address.replica] = await Channel.open(address)
        except PoolFailed as error:
            _log.info("no replica found: %s", error)
        except ChannelLost as error:
            assert address is not None
            if address.replica not in self._unreached:
                self._unreached.add(address.replica)
                _log.warning("replica %s is called through Serve, at a higher cost: %s", address.replica, error)
        finally:
            self._look_s = asyncio.get_running_loop().time() + LOOK_EVERY_S
