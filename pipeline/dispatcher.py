"""The loop between the lanes and the model: requests in, steps to the device, answers out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pipeline.errors import Busy
from pipeline.lanes import Lane, LaneLimits, Lanes, Slice

_ENDED = "the replica is shutting down"


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
    """Feeds one model from two lanes, for as long as `run` runs, whose event loop all methods belong to."""

    def __init__(self, model: Model, limits: LaneLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._clock = model, clock
        self._lanes: Lanes[_Request] = Lanes(limits)
        self._arrived = asyncio.Event()
        self._ended = False
        self.images = dict.fromkeys(Lane, 0)

    def backlog(self, lane: Lane) -> int:
        """Images that wait in the lane."""
        return self._lanes.backlog(lane)

    async def submit(self, lane: Lane, images_NHWC: np.ndarray, top_k: int) -> Scores:
        """Scores a request's images, uint8 [N, H, W, 3] with N > 0. Raises `Busy` at once where the lane is full.

        Raises what the model raised where a step that the request was in failed.
        """
        if self._ended:
            raise Busy(_ENDED)
        request = _Request(images_NHWC, top_k, len(images_NHWC), asyncio.get_running_loop().create_future())
        if not self._lanes.offer(lane, request, len(images_NHWC), self._clock()):
            raise Busy(f"the {lane} lane is full: {self.backlog(lane)} images wait")
        self._arrived.set()
        try:
            return await request.done
        finally:
            if not request.done.done() or request.done.cancelled():
                self._lanes.drop(request)

    async def run(self) -> None:
        """Forms steps and has them scored, until cancelled. It cannot run again: requests that wait then get `Busy`."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-model")
        step: list[Slice[_Request]] = []
        try:
            while True:
                if step := self._lanes.next_step(self._clock()):
                    await self._run_step(thread, step)
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:
            self._ended = True
            thread.shutdown(wait=False)
            while step:
                self._fail(step, Busy(_ENDED))
                step = self._lanes.next_step(self._clock())

    async def _run_step(self, thread: Executor, step: list[Slice[_Request]]) -> None:
        try:
            found, step_ms = await asyncio.get_running_loop().run_in_executor(thread, self._score, step)
            self._answer(step, found)
        except Exception as error:  # the step's own: it goes to those who asked, and the loop goes on
            self._fail(step, error)
        else:
            self._lanes.observe(sum(map(len, step)), step_ms)

    def _score(self, step: list[Slice[_Request]]) -> tuple[Scores, float]:
        """On the model's thread: the step's scores, and the ms that they took."""
        started = self._clock()
        images_NHWC = np.concatenate([part.token.images_NHWC[part.start : part.stop] for part in step])
        found = self._model.score(images_NHWC, max(part.token.top_k for part in step))
        return found, (self._clock() - started) * 1e3

    def _answer(self, step: list[Slice[_Request]], found: Scores) -> None:
        images = sum(map(len, step))
        if not images == len(found.top_NK) == len(found.scores_NK):
            raise ValueError(f"the model gave {len(found.top_NK)} scores for {images} images")
        offset = 0
        for part in step:
            part.token.add(found.top_NK[offset : offset + len(part)], found.scores_NK[offset : offset + len(part)])
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
    top_k: int
    remaining: int
    done: asyncio.Future[Scores]
    tops: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)

    def add(self, top_NK: np.ndarray, scores_NK: np.ndarray) -> None:
        """Takes the next of this request's scores, and answers when they are the last."""
        self.tops.append(top_NK[:, : self.top_k])
        self.scores.append(scores_NK[:, : self.top_k])
        self.remaining -= len(top_NK)
        if not self.remaining and not self.done.done():
            self.done.set_result(Scores(np.concatenate(self.tops), np.concatenate(self.scores)))
