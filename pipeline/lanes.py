"""Two queues in front of one model: online goes first, batch takes the rest.

Plain Python, without threads, clocks or Ray: the caller says what time it is. Work comes as requests of some images
each, and leaves as steps: slices of requests that the model scores at once. A request may span steps, and a step may
hold many requests of both lanes.

A batch job may add to an online request the rest of the step that it finds running, and what its own step is topped up
with. Both are bounded by `online_step_ms`: while online traffic is about, no step that holds batch takes longer, and
the two together take at most `ADDED_STEPS` times as long. Within that, and always when online is quiet, a step has the
size at which the model is fastest.

Two steps are under way at most: the next one is formed just before the last one's expected end, late enough for
requests that come meanwhile to be in it, early enough for the device to find it waiting.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from pipeline.steps import SMOOTHING, StepTimes

Token = TypeVar("Token")

ONLINE_QUIET_S = 10.0  # so long after the last online request, steps are long again
ADDED_STEPS = 1.15
BATCH_SHARE = 1 / 16  # of the images: what batch gets where online alone would fill every step
STEPS_UNDER_WAY = 2
TIMER_MS = 1.0  # by which an event loop may be late


class Lane(StrEnum):
    ONLINE = "online"
    BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class LaneLimits:
    """Sizes in images, times in ms. Backlogs count images that wait, those of steps under way not included."""

    max_step: int = 32
    online_step_ms: float = 8.0
    max_online_backlog: int = 1024
    max_batch_backlog: int = 1024


@dataclass(slots=True)
class Slice(Generic[Token]):
    """Images [start, stop) of the request that `token` stands for."""

    token: Token
    lane: Lane
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(eq=False, slots=True)
class _Request(Generic[Token]):
    token: Token
    images: int
    arrived_s: float
    deadline_s: float
    taken: int = 0


@dataclass
class _Queue(Generic[Token]):
    limit: int
    requests: deque[_Request[Token]] = field(default_factory=deque)
    backlog: int = 0
    expected: int = 0
    earliest_s: float = math.inf  # no request's deadline is before it


class Lanes(Generic[Token]):
    """The two queues, the steps under way, and the rules by which steps are formed."""

    def __init__(self, limits: LaneLimits, times: StepTimes) -> None:
        self.limits, self.times = limits, times
        self.expired: list[Token] = []
        self._queues: dict[Lane, _Queue[Token]] = {
            Lane.ONLINE: _Queue(limits.max_online_backlog),
            Lane.BATCH: _Queue(limits.max_batch_backlog),
        }
        self._last_online_s = float("-inf")
        self._under_way: deque[float] = deque()  # the expected ms of each step
        self._busy_until_s = float("-inf")
        self._lead_ms = 0.0
        self._owed = 0.0  # images, to batch

    def backlog(self, lane: Lane) -> int:
        """Images that wait in the lane."""
        return self._queues[lane].backlog

    def expect(self, lane: Lane, images: int) -> bool:
        """Keeps room for images that are on their way to the lane, until `arrived`. False where there is none."""
        if room := self._room(lane, images):
            self._queues[lane].expected += images
        return room

    def arrived(self, lane: Lane, images: int) -> None:
        """Gives back the room that was kept."""
        self._queues[lane].expected -= images

    def wait_s(self, lane: Lane, now_s: float) -> float:
        """How long what comes to the lane now is expected to wait for its step, were there no other lane."""
        waiting_ms = self.backlog(lane) / self.times.images_per_ms
        return max(0.0, self._busy_until_s - now_s) + waiting_ms / 1e3

    def offer(self, lane: Lane, token: Token, images: int, now_s: float, deadline_s: float = math.inf) -> bool:
        """Queues a request of `images` > 0 images; False where there is no room, or not enough time until `deadline_s`.

        Where nothing waits, the expected time refuses no request: only steps correct an estimate that is too long.

        Raises `ValueError` for a request without images.
        """
        if images < 1:
            raise ValueError(f"a request has {images} images; it must have at least 1")
        queue = self._queues[lane]
        ends_s = now_s + self.wait_s(lane, now_s) + self.times.ms(images) / 1e3
        if (queue.backlog and ends_s > deadline_s) or not self._room(lane, images):
            return False
        queue.requests.append(_Request(token, images, now_s, deadline_s))
        queue.backlog += images
        queue.earliest_s = min(queue.earliest_s, deadline_s)
        if lane is Lane.ONLINE:
            self._last_online_s = now_s
        return True

    def drop(self, token: Token) -> None:
        """Forgets what still waits of a request: its caller has gone."""
        for queue in self._queues.values():
            for request in [request for request in queue.requests if request.token is token]:
                queue.requests.remove(request)
                queue.backlog -= request.images - request.taken

    def due_s(self, now_s: float) -> float:
        """When to ask for the next step, unless one ends or a request comes before. Infinite where there is no need."""
        if len(self._under_way) == STEPS_UNDER_WAY or not (self.backlog(Lane.ONLINE) or self.backlog(Lane.BATCH)):
            return math.inf
        return self._busy_until_s - self._lead_ms / 1e3 if self._under_way else now_s

    def next_step(self, now_s: float) -> list[Slice[Token]]:
        """The next step, which the caller starts behind those under way; empty where nothing waits.

        Requests whose deadline has passed are left in `expired` instead.
        """
        starts_s = max(now_s, self._busy_until_s) if self._under_way else now_s
        self._expire(starts_s)
        size = self.step_size(starts_s)
        online = list(self._take(Lane.ONLINE, size - self._reserved()))
        taken = sum(map(len, online))
        batch = list(self._take(Lane.BATCH, size - taken))
        topped_up = sum(map(len, batch))
        if not taken + topped_up:
            return []
        self._owed = max(0.0, self._owed + BATCH_SHARE * (taken + topped_up) - topped_up)
        if not self.backlog(Lane.BATCH):
            self._owed = 0.0
        step_ms = self.times.ms(taken + topped_up)
        self._under_way.append(step_ms)
        self._busy_until_s = starts_s + step_ms / 1e3
        return online + batch

    def step_size(self, starts_s: float) -> int:
        """The most images of a step that starts then."""
        fastest = self.times.fastest
        online = self.backlog(Lane.ONLINE)
        if not online and starts_s - self._last_online_s > ONLINE_QUIET_S:
            return fastest
        budget_ms, needed = self.limits.online_step_ms, 1
        if online:
            waited_ms = (starts_s - self._queues[Lane.ONLINE].requests[0].arrived_s) * 1e3
            needed = self.times.fit(online + self._reserved())
            budget_ms = min(budget_ms, ADDED_STEPS * budget_ms - waited_ms + self.times.ms(online))
        return max(needed, min(fastest, self.times.largest_within(budget_ms)))

    def launched(self, launch_ms: float) -> None:
        """Tells how long it took from forming a step until the device had it: so much sooner the next one is due."""
        lead_ms = 2 * launch_ms + TIMER_MS
        self._lead_ms += SMOOTHING * (lead_ms - self._lead_ms) if self._lead_ms else lead_ms

    def ended(self, now_s: float, images: int = 0, step_ms: float = 0.0) -> None:
        """Tells that the oldest step under way has ended, and how long one of `images` took, if it did not fail."""
        self._under_way.popleft()
        if images:
            self.times.observe(images, step_ms)
        self._busy_until_s = now_s + sum(self._under_way) / 1e3

    def _room(self, lane: Lane, images: int) -> bool:
        """An empty lane has room for any request, so that none is refused for ever."""
        queue = self._queues[lane]
        held = queue.backlog + queue.expected
        return not held or held + images <= queue.limit

    def _reserved(self) -> int:
        """Images of the next step that batch gets before online."""
        return min(int(self._owed), self.backlog(Lane.BATCH))

    def _expire(self, starts_s: float) -> None:
        """Drops the requests, wherever they wait, whose step would start too late for them."""
        for queue in self._queues.values():
            if queue.earliest_s < starts_s:
                late = [request for request in queue.requests if request.deadline_s < starts_s]
                queue.requests = deque(request for request in queue.requests if request.deadline_s >= starts_s)
                queue.backlog -= sum(request.images - request.taken for request in late)
                queue.earliest_s = min((request.deadline_s for request in queue.requests), default=math.inf)
                self.expired.extend(request.token for request in late)

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
