"""The loop between the lanes and the model: requests in, steps to the device, answers out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.errors import Busy
from pipeline.lanes import Lane, LaneLimits, Lanes, Slice


@dataclass(frozen=True)
class Scores:
    """The best classes of each image, best first: `top_NK` int32 class indices, `scores_NK` float32 probabilities."""

    top_NK: np.ndarray
    scores_NK: np.ndarray


class Model(Protocol):
    """What scores a step. Called from one thread at a time."""

    def score(self, images_NHWC: np.ndarray, top_k: int) -> Scores:
        """uint8 images of the model's size in, their `top_k` best classes out."""


class Dispatcher:
    """Feeds one model from two lanes. All methods belong to the event loop that `run` runs on."""

    def __init__(self, model: Model, limits: LaneLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._clock = model, clock
        self._lanes: Lanes[_Request] = Lanes(limits)
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-model")
        self.images = dict.fromkeys(Lane, 0)

    def backlog(self, lane: Lane) -> int:
        """Images that wait in the lane."""
        return self._lanes.backlog(lane)

    async def submit(self, lane: Lane, images_NHWC: np.ndarray, top_k: int) -> Scores:
        """Scores a request's images, uint8 [N, H, W, 3] with N > 0. Raises `Busy` at once where the lane is full."""
        count = len(images_NHWC)
        scores = Scores(np.empty((count, top_k), np.int32), np.empty((count, top_k), np.float32))
        request = _Request(images_NHWC, scores, count, asyncio.get_running_loop().create_future())
        if not self._lanes.offer(lane, request, count, self._clock()):
            raise Busy(f"the {lane} lane is full: {self.backlog(lane)} images wait")
        self._arrived.set()
        try:
            return await request.done
        finally:
            if not request.done.done() or request.done.cancelled():
                self._lanes.drop(request)

    async def run(self) -> None:
        """Forms steps and has them scored, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            step = self._lanes.next_step(self._clock())
            if not step:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            try:
                found, step_ms = await loop.run_in_executor(self._thread, self._score, step)
            except Exception as error:  # the step's own: it goes to those who asked, and the loop goes on
                self._fail(step, error)
            else:
                self._lanes.observe(sum(map(len, step)), step_ms)
                self._answer(step, found)

    def _score(self, step: list[Slice[_Request]]) -> tuple[Scores, float]:
        """On the model's thread: the step's scores, and the ms that they took."""
        started = self._clock()
        images_NHWC = np.concatenate([part.token.images_NHWC[part.start : part.stop] for part in step])
        found = self._model.score(images_NHWC, max(part.token.top_k for part in step))
        return found, (self._clock() - started) * 1e3

    def _answer(self, step: list[Slice[_Request]], found: Scores) -> None:
        offset = 0
        for part in step:
            part.token.fill(part, found, offset)
            offset += len(part)
            self.images[part.lane] += len(part)

    def _fail(self, step: list[Slice[_Request]], error: Exception) -> None:
        for part in step:
            self._lanes.drop(part.token)
            if not part.token.done.done():
                part.token.done.set_exception(error)


@dataclass(eq=False)
class _Request:
    images_NHWC: np.ndarray
    scores: Scores
    remaining: int
    done: asyncio.Future[Scores]

    @property
    def top_k(self) -> int:
        return self.scores.top_NK.shape[1]

    def fill(self, part: Slice[_Request], found: Scores, offset: int) -> None:
        """Takes this request's slice out of a step's scores, and answers when it was the last one."""
        rows = slice(offset, offset + len(part))
        self.scores.top_NK[part.start : part.stop] = found.top_NK[rows, : self.top_k]
        self.scores.scores_NK[part.start : part.stop] = found.scores_NK[rows, : self.top_k]
        self.remaining -= len(part)
        if not self.remaining and not self.done.done():
            self.done.set_result(self.scores)
