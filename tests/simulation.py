"""The lanes in front of a simulated accelerator, in simulated time: what a day of traffic does, in a second."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.lanes import Lane, LaneLimits, Lanes, Slice
from pipeline.steps import StepTimes


def h200(images: int) -> float:
    """The ms of a step of ViT-B/16 on an H200, nearly."""
    return 0.6 + 0.11 * images


@dataclass(eq=False)
class Request:
    """A request as its caller sees it. Times in ms; the last two are those of the step that holds its last image."""

    lane: Lane
    images: int
    arrived_ms: float
    deadline_ms: float = math.inf
    taken: list[int] = field(default_factory=list)
    formed_ms: float = math.nan
    ended_ms: float = math.nan

    @property
    def took_ms(self) -> float:
        return self.ended_ms - self.arrived_ms


@dataclass
class Step:
    """What the device worked on, from when to when, and when that was decided."""

    parts: list[Slice[Request]]
    formed_ms: float
    begun_ms: float
    ended_ms: float

    def images(self, lane: Lane | None = None) -> int:
        return sum(len(part) for part in self.parts if lane in (None, part.lane))


class Simulation:
    """Runs arrivals through lanes and device. `batch` keeps its lane full with chunks of so many images."""

    def __init__(
        self,
        limits: LaneLimits,
        device: Callable[[int], float] = h200,
        *,
        batch: int = 0,
        launch_ms: float = 0.1,
        measured: Callable[[int], float] | None = None,
    ) -> None:
        known = measured or device
        self.lanes: Lanes[Request] = Lanes(
            limits, StepTimes(limits.max_step, {size: known(size) for size in (1, limits.max_step)})
        )
        self.steps: list[Step] = []
        self.refused: list[Request] = []
        self.expired: list[Request] = []
        self._device, self._batch, self.launch_ms = device, batch, launch_ms

    def run(self, arrivals: Iterable[Request], until_ms: float) -> None:
        """Until then, and on until nothing waits; batch comes no more after it."""
        coming = sorted(arrivals, key=lambda request: request.arrived_ms)
        coming.reverse()
        under_way: list[Step] = []
        now_ms = 0.0
        while True:
            while coming and coming[-1].arrived_ms <= now_ms:
                self._offer(coming.pop(), now_ms)
            while self._batch and now_ms < until_ms and self._offer(Request(Lane.BATCH, self._batch, now_ms), now_ms):
                pass
            while under_way and under_way[0].ended_ms <= now_ms:
                step = under_way.pop(0)
                self.lanes.ended(now_ms / 1e3, step.images(), step.ended_ms - step.begun_ms)
            while self.lanes.due_s(now_ms / 1e3) * 1e3 <= now_ms + 1e-9:
                self._form(under_way, now_ms)
            due_ms = self.lanes.due_s(now_ms / 1e3) * 1e3
            events = [due_ms, *(step.ended_ms for step in under_way[:1]), *(one.arrived_ms for one in coming[-1:])]
            next_ms = min(events)
            if math.isinf(next_ms):
                return
            now_ms = next_ms

    def _offer(self, request: Request, now_ms: float) -> bool:
        accepted = self.lanes.offer(request.lane, request, request.images, now_ms / 1e3, request.deadline_ms / 1e3)
        if not accepted and request.lane is Lane.ONLINE:
            self.refused.append(request)
        return accepted

    def _form(self, under_way: list[Step], now_ms: float) -> None:
        parts = self.lanes.next_step(now_ms / 1e3)
        self.expired += self.lanes.expired
        self.lanes.expired.clear()
        if not parts:
            return
        self.lanes.launched(self.launch_ms)
        launched_ms = now_ms + self.launch_ms
        begins_ms = max(launched_ms, self.steps[-1].ended_ms if self.steps else 0.0)
        step = Step(parts, now_ms, begins_ms, begins_ms + self._device(sum(map(len, parts))))
        self.steps.append(step)
        under_way.append(step)
        for part in parts:
            part.token.taken += range(part.start, part.stop)
            part.token.formed_ms, part.token.ended_ms = now_ms, step.ended_ms


def poisson(images_per_ms: float, until_ms: float, seed: int, sizes: tuple[int, ...] = (1,)) -> list[Request]:
    """Online requests that come at random, as many images as are told on the average."""
    rng, mean = random.Random(seed), sum(sizes) / len(sizes)
    return [Request(Lane.ONLINE, rng.choice(sizes), at_ms) for at_ms in _times(rng, images_per_ms / mean, until_ms)]


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of them, 0 to 1, do not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _times(rng: random.Random, per_ms: float, until_ms: float) -> Iterator[float]:
    at_ms = rng.expovariate(per_ms)
    while at_ms < until_ms:
        yield at_ms
        at_ms += rng.expovariate(per_ms)
