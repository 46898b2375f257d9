"""Two queues in front of one model: online goes first, batch takes the rest.

Plain Python, without threads, clocks or Ray: the caller says what time it is. Work comes as requests of some images
each, and leaves as steps: slices of requests that the model scores at once. A request may span steps, and a step may
hold many requests of both lanes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

Token = TypeVar("Token")

ONLINE_QUIET_S = 1.0  # so long after the last online request, steps are long again
SMOOTHING = 0.2  # weight of the newest step in the running mean of the time per image


class Lane(StrEnum):
    ONLINE = "online"
    BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class LaneLimits:
    """Sizes in images, times in ms. Backlogs count images that wait, those of the running step not included."""

    max_step: int = 32
    online_step_ms: float = 50.0
    max_online_backlog: int = 1024
    max_batch_backlog: int = 1024


@dataclass(frozen=True)
class Slice(Generic[Token]):
    """Images [start, stop) of the request that `token` stands for."""

    token: Token
    lane: Lane
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class _Request(Generic[Token]):
    token: Token
    images: int
    taken: int = 0


@dataclass
class _Queue(Generic[Token]):
    requests: deque[_Request[Token]] = field(default_factory=deque)
    backlog: int = 0


class Lanes(Generic[Token]):
    """The two queues, and the rule by which steps are formed."""

    def __init__(self, limits: LaneLimits) -> None:
        self.limits = limits
        self._queues: dict[Lane, _Queue[Token]] = {lane: _Queue() for lane in Lane}
        self._ms_per_image: float | None = None
        self._last_online_s = float("-inf")

    def backlog(self, lane: Lane) -> int:
        """Images that wait in the lane."""
        return self._queues[lane].backlog

    def offer(self, lane: Lane, token: Token, images: int, now_s: float) -> bool:
        """Queues a request of `images` > 0 images; False where the lane is full.

        An empty lane takes a request of any size, so that a chunk larger than the bound is not refused for ever.
        Raises `ValueError` for a request without images.
        """
        if images < 1:
            raise ValueError(f"a request has {images} images; it must have at least 1")
        queue = self._queues[lane]
        limit = self.limits.max_online_backlog if lane is Lane.ONLINE else self.limits.max_batch_backlog
        if queue.backlog and queue.backlog + images > limit:
            return False
        queue.requests.append(_Request(token, images))
        queue.backlog += images
        if lane is Lane.ONLINE:
            self._last_online_s = now_s
        return True

    def drop(self, token: Token) -> None:
        """Forgets what still waits of a request: its caller has gone."""
        for queue in self._queues.values():
            for request in [request for request in queue.requests if request.token is token]:
                queue.requests.remove(request)
                queue.backlog -= request.images - request.taken

    def next_step(self, now_s: float) -> list[Slice[Token]]:
        """The next step: all of online that fits, topped up with batch; empty where nothing waits."""
        room = self.step_size(now_s)
        step: list[Slice[Token]] = []
        for lane in (Lane.ONLINE, Lane.BATCH):
            for part in self._take(lane, room):
                step.append(part)
                room -= len(part)
        return step

    def step_size(self, now_s: float) -> int:
        """The most images of a step: the largest, or with online traffic about, what `online_step_ms` allows."""
        quiet = now_s - self._last_online_s > ONLINE_QUIET_S and not self.backlog(Lane.ONLINE)
        if quiet or not self._ms_per_image:
            return self.limits.max_step
        # Rounded up: where a step has a fixed cost, rounding down could keep steps at one image for ever.
        return max(1, math.ceil(min(self.limits.max_step, self.limits.online_step_ms / self._ms_per_image)))

    def observe(self, images: int, step_ms: float) -> None:
        """Tells how long a step took, for the sizes of those to come."""
        seen = step_ms / images
        known = self._ms_per_image
        self._ms_per_image = seen if known is None else (1 - SMOOTHING) * known + SMOOTHING * seen

    def _take(self, lane: Lane, room: int) -> Iterator[Slice[Token]]:
        queue = self._queues[lane]
        while room and queue.requests:
            request = queue.requests[0]
            start, stop = request.taken, min(request.taken + room, request.images)
            request.taken = stop
            queue.backlog -= stop - start
            room -= stop - start
            if stop == request.images:
                queue.requests.popleft()
            yield Slice(request.token, lane, start, stop)
