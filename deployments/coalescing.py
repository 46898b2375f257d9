"""Images of many requests in few calls.

A call costs some milliseconds of CPU at both its ends, whatever it carries. While few calls are under way, an image
goes at once; while many are, those that become ready wait for one to end, and go together. So nothing waits when it is
quiet, and under load calls grow larger instead of more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from pipeline.dispatcher import Scores
from pipeline.errors import Expired


class Scored(Protocol):
    """What a call gives: scores of its images, and who scored."""

    @property
    def scores(self) -> Scores:
        """In the order of the images."""

    @property
    def replica(self) -> str:
        """Its id."""


# uint8 [N, H, W, 3], top_k, details, and of each image the event loop's time at which nobody waits for it any more
Call = Callable[[np.ndarray, int, bool, Sequence[float]], Awaitable[Scored]]


@dataclass(eq=False, slots=True)
class _Item:
    image_HWC: np.ndarray
    top_k: int
    details: bool
    ends_s: float
    done: asyncio.Future[tuple[Scores, str]]


class Coalescer:
    """Puts images into calls of at most `max_images`, of which at most `max_calls` are under way."""

    def __init__(self, call: Call, *, max_images: int, max_calls: int) -> None:
        self._call, self._max_images, self._max_calls = call, max_images, max_calls
        self._waiting: deque[_Item] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._due = False

    async def score(self, image_HWC: np.ndarray, top_k: int, details: bool, ends_s: float) -> tuple[Scores, str]:
        """The scores of one image, and the replica that gave them. Raises what its call raises."""
        loop = asyncio.get_running_loop()
        item = _Item(image_HWC, top_k, details, ends_s, loop.create_future())
        self._waiting.append(item)
        self._send_soon(loop)
        return await item.done

    def _send_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """At the end of this turn of the loop, so that what becomes ready in one turn goes together."""
        if not self._due:
            self._due = True
            loop.call_soon(self._send)

    def _send(self) -> None:
        self._due = False
        while len(self._calls) < self._max_calls and (items := self._next()):
            # in a context of its own: it is of several requests, and what one has there, its trace, is not all theirs
            task = asyncio.create_task(self._carry(items), context=Context())
            self._calls.add(task)
            task.add_done_callback(self._ended)
            for item in items:
                item.done.add_done_callback(partial(_end_if_left, items, task))

    def _next(self) -> list[_Item]:
        """Those that go together next, without those whose callers have left."""
        items: list[_Item] = []
        while self._waiting and len(items) < self._max_images:
            item = self._waiting.popleft()
            if not item.done.done():
                items.append(item)
        return items

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if self._waiting:
            self._send_soon(task.get_loop())

    async def _carry(self, items: list[_Item]) -> None:
        try:
            answer = await self._call(
                np.stack([item.image_HWC for item in items]),
                max(item.top_k for item in items),
                any(item.details for item in items),
                [item.ends_s for item in items],
            )
        except Exception as error:
            for item in items:
                if not item.done.done():
                    item.done.set_exception(error)
            return
        expired_N = answer.scores.expired_N
        for index, item in enumerate(items):
            if item.done.done():
                continue
            if expired_N is not None and expired_N[index]:
                item.done.set_exception(Expired("the request's deadline passed while it waited for the model"))
            else:
                part = answer.scores.part(index, index + 1, item.top_k, details=item.details)
                item.done.set_result((part, answer.replica))


def _end_if_left(items: list[_Item], task: asyncio.Task[None], _: object) -> None:
    """Ends the call of which no caller is left."""
    if all(item.done.cancelled() for item in items):
        task.cancel()
