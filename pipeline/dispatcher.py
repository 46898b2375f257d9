"""The loop between the lanes and the model: requests in, steps to the device, answers out."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Protocol

import numpy as np

from pipeline.errors import Busy, Expired
from pipeline.lanes import Lane, LaneLimits, Lanes, Slice
from pipeline.steps import StepTimes

RECENT_STEPS = 1000
_ENDED = "the replica is shutting down"
_EXPIRED = "the request's deadline passed while it waited for the model"


@dataclass(frozen=True)
class Scores:
    """The best classes of each image, best first: `top_NK` int32 class indices, `scores_NK` float32 probabilities.

    Where asked for, the details: `logits_NC` float32 of every class, and `embeddings_ND` float32, which are what the
    model's last layer makes logits of, for a model that has such a layer.

    Scores of an image whose logits are not finite are NaN. Where each image had a deadline of its own, `expired_N`
    uint8 is 1 for those that were not scored by it; their rows are zeros.
    """

    top_NK: np.ndarray
    scores_NK: np.ndarray
    logits_NC: np.ndarray | None = None
    embeddings_ND: np.ndarray | None = None
    expired_N: np.ndarray | None = None

    @property
    def finite_N(self) -> np.ndarray:  # noqa: N802 -- layout of an array
        """bool: whether the image's scores are numbers."""
        finite_N: np.ndarray = np.isfinite(self.scores_NK[:, 0])
        return finite_N

    def part(self, start: int, stop: int, top_k: int, *, details: bool) -> Scores:
        """Those of images [start, stop)."""
        part = slice(start, stop)
        logits_NC, embeddings_ND = (self.logits_NC, self.embeddings_ND) if details else (None, None)
        return Scores(
            self.top_NK[part, :top_k],
            self.scores_NK[part, :top_k],
            None if logits_NC is None else logits_NC[part],
            None if embeddings_ND is None else embeddings_ND[part],
            None if self.expired_N is None else self.expired_N[part],
        )

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Those of one image after another."""
        return cls(
            np.concatenate([part.top_NK for part in parts]),
            np.concatenate([part.scores_NK for part in parts]),
            _joined([part.logits_NC for part in parts]),
            _joined([part.embeddings_ND for part in parts]),
            _joined([part.expired_N for part in parts]),
        )

    @classmethod
    def with_expired(cls, parts: Sequence[Scores | int]) -> Scores:
        """Those of one image after another, where a number stands for so many that expired; one part has scores."""
        like = next(part for part in parts if isinstance(part, Scores))
        return cls.joined([_expired(part, like) if isinstance(part, int) else _in_time(part) for part in parts])


def _expired(images: int, like: Scores) -> Scores:
    def rows(array: np.ndarray) -> np.ndarray:
        return np.zeros((images, *array.shape[1:]), array.dtype)

    return Scores(
        rows(like.top_NK),
        rows(like.scores_NK),
        None if like.logits_NC is None else rows(like.logits_NC),
        None if like.embeddings_ND is None else rows(like.embeddings_ND),
        np.ones(images, np.uint8),
    )


def _in_time(scores: Scores) -> Scores:
    return replace(scores, expired_N=np.zeros(len(scores.top_NK), np.uint8))


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The arrays in one, or None where they are not there."""
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None


class Model(Protocol):
    """What scores steps."""

    def launch(self, images: Sequence[np.ndarray], top_k: int, *, details: bool) -> Callable[[], Scores]:
        """Hands a step to the device, behind those handed to it before, and gives what waits for its scores.

        `images` are arrays of uint8 images of the model's size, [n, H, W, 3], whose best classes are found in their
        order, with details where asked for. Called from one thread at a time, and what it gives from another one, once
        each and in order.
        """


class Dispatcher:
    """Feeds one model from two lanes, for as long as `run` runs, whose event loop all methods belong to.

    `times` are the model's own. `clock` counts as the event loop's, in seconds.
    """

    def __init__(
        self, model: Model, limits: LaneLimits, times: StepTimes, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model, self._clock = model, clock
        self._lanes: Lanes[_Request] = Lanes(limits, times)
        self._changed = asyncio.Event()
        self._free_s = -math.inf
        self._ended = False
        self.images = dict.fromkeys(Lane, 0)
        self.steps = 0
        self.recent_steps: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)  # images and ms of each
        self.lane_busy_s = dict.fromkeys(Lane, 0.0)

    def backlog(self, lane: Lane) -> int:
        """Images that wait in the lane."""
        return self._lanes.backlog(lane)

    @property
    def busy_s(self) -> float:
        """Seconds that the model has worked on steps; in `lane_busy_s`, shared out by whose images were in them."""
        return sum(self.lane_busy_s.values())

    @contextmanager
    def expect(self, lane: Lane, images: int) -> Iterator[None]:
        """Keeps room in the lane for images that are on their way, while the context lasts. Raises `Busy`."""
        if not self._lanes.expect(lane, images):
            raise self._busy(lane)
        try:
            yield
        finally:
            self._lanes.arrived(lane, images)

    async def submit(
        self,
        lane: Lane,
        images_NHWC: np.ndarray,
        top_k: int,
        *,
        within_s: float = math.inf,
        details: bool = False,
    ) -> Scores:
        """Scores a request's images, uint8 [N, H, W, 3] with N > 0.

        Raises `Busy` at once where the lane is full, or has so much to do that `within_s` would not be enough;
        `Expired` where it was not enough after all; what the model raised, where a step that the request was in failed.
        """
        request = self._offer(lane, images_NHWC, top_k, within_s, details)
        try:
            return await request.done
        finally:
            self._leave([request])

    async def submit_each(
        self, lane: Lane, images_NHWC: np.ndarray, top_k: int, within_s: Sequence[float], *, details: bool = False
    ) -> Scores:
        """Scores images that have a deadline each: those that expire keep nobody else's from being scored.

        Raises as `submit` does, but `Expired` only where none of the images was scored in time.
        """
        requests, refused = dict[int, _Request](), Busy(_ENDED)
        runs = list(_runs(within_s))
        for start, stop in runs:
            try:
                requests[start] = self._offer(lane, images_NHWC[start:stop], top_k, within_s[start], details)
            except Busy as busy:  # for these images there is no time, or no room, left
                refused = busy
        if not requests:
            raise refused
        try:
            parts = [
                await _scores_or_expired(requests[start]) if start in requests else stop - start for start, stop in runs
            ]
        finally:
            self._leave(list(requests.values()))
        if all(isinstance(part, int) for part in parts):
            raise Expired(_EXPIRED)
        return Scores.with_expired(parts)

    def _offer(self, lane: Lane, images_NHWC: np.ndarray, top_k: int, within_s: float, details: bool) -> _Request:
        """Queues a request. Raises `Busy`."""
        if self._ended:
            raise Busy(_ENDED)
        now_s = self._clock()
        request = _Request(images_NHWC, top_k, details, len(images_NHWC), asyncio.get_running_loop().create_future())
        if not self._lanes.offer(lane, request, len(images_NHWC), now_s, now_s + within_s):
            raise self._busy(lane)
        self._changed.set()
        return request

    def _leave(self, requests: Sequence[_Request]) -> None:
        """Takes requests out of the lanes whose caller has left."""
        for request in requests:
            if not request.done.done():
                request.done.cancel()
            if request.done.cancelled():
                self._lanes.drop(request)
            else:
                request.done.exception()  # its caller has had another one

    async def run(self) -> None:
        """Forms steps and has them scored, until cancelled. It cannot run again: requests that wait then get `Busy`."""
        launching = ThreadPoolExecutor(1, thread_name_prefix="tandem-launch")
        reading = ThreadPoolExecutor(1, thread_name_prefix="tandem-model")
        under_way: set[asyncio.Task[None]] = set()
        try:
            while True:
                await self._until_due()
                formed_s = self._clock()
                if step := self._lanes.next_step(formed_s):
                    task = asyncio.create_task(self._carry_out(step, formed_s, launching, reading))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                self._fail_expired()
        finally:
            self._ended = True
            for task in under_way:
                task.cancel()
            for threads in (launching, reading):
                threads.shutdown(wait=False)
            while step := self._lanes.next_step(self._clock()):
                self._fail(step, Busy(_ENDED))
            self._fail_expired()

    async def _until_due(self) -> None:
        """Waits until it is time to form a step."""
        loop = asyncio.get_running_loop()
        while (due_s := self._lanes.due_s(now_s := self._clock())) > now_s:
            self._changed.clear()
            timer = None if math.isinf(due_s) else loop.call_later(due_s - now_s, self._changed.set)
            await self._changed.wait()
            if timer:
                timer.cancel()

    async def _carry_out(
        self, step: list[Slice[_Request]], formed_s: float, launching: Executor, reading: Executor
    ) -> None:
        loop = asyncio.get_running_loop()
        size = images = sum(map(len, step))
        step_ms = 0.0
        try:
            scores, launched_s = await loop.run_in_executor(launching, self._launch, step)
            self._lanes.launched((launched_s - formed_s) * 1e3)
            found, ended_s = await loop.run_in_executor(reading, self._read, scores)
            # a step begins when the device has it, and is done with the one before
            step_ms = (ended_s - max(launched_s, self._free_s)) * 1e3
            self._answer(step, found, images)
        except asyncio.CancelledError:
            self._fail(step, Busy(_ENDED))
            raise
        except Exception as error:  # the step's own: it goes to those who asked, and the loop goes on
            images, ended_s = 0, self._clock()
            self._fail(step, error)
        self._free_s = ended_s
        self._lanes.ended(ended_s, images, step_ms)
        self.steps += 1
        self.recent_steps.append((size, step_ms))
        for part in step:
            self.lane_busy_s[part.lane] += step_ms / 1e3 * len(part) / size
        self._changed.set()

    def _launch(self, step: list[Slice[_Request]]) -> tuple[Callable[[], Scores], float]:
        """On the launching thread: what waits for the step's scores, and when the device had it."""
        images = [part.token.images_NHWC[part.start : part.stop] for part in step]
        try:
            top_k, details = max(part.token.top_k for part in step), any(part.token.details for part in step)
            scores = self._model.launch(images, top_k, details=details)
        except Exception as error:  # told where the scores are read, so that steps end in their order
            scores = partial(_raise, error)
        return scores, self._clock()

    def _read(self, scores: Callable[[], Scores]) -> tuple[Scores, float]:
        """On the model's thread: the step's scores, and when the device was done with it."""
        return scores(), self._clock()

    def _answer(self, step: list[Slice[_Request]], found: Scores, images: int) -> None:
        if not images == len(found.top_NK) == len(found.scores_NK):
            raise ValueError(f"the model gave {len(found.top_NK)} scores for {images} images")
        offset = 0
        for part in step:
            token = part.token
            token.add(found.part(offset, offset + len(part), token.top_k, details=token.details))
            offset += len(part)
            self.images[part.lane] += len(part)

    def _fail(self, step: list[Slice[_Request]], error: Exception) -> None:
        for part in step:
            self._lanes.drop(part.token)
            part.token.fail(error)

    def _fail_expired(self) -> None:
        while self._lanes.expired:
            self._lanes.expired.pop().fail(Expired(_EXPIRED))

    def _busy(self, lane: Lane) -> Busy:
        wait_s = self._lanes.wait_s(lane, self._clock())
        return Busy(f"the {lane} lane is full: {self.backlog(lane)} images wait", wait_s)


@dataclass(eq=False)
class _Request:
    images_NHWC: np.ndarray
    top_k: int
    details: bool
    remaining: int
    done: asyncio.Future[Scores]
    parts: list[Scores] = field(default_factory=list)

    def add(self, part: Scores) -> None:
        """Takes the next of this request's scores, and answers when they are the last."""
        self.parts.append(part)
        self.remaining -= len(part.top_NK)
        if not self.remaining and not self.done.done():
            self.done.set_result(Scores.joined(self.parts))

    def fail(self, error: Exception) -> None:
        """Answers with the error, unless an answer was given."""
        if not self.done.done():
            self.done.set_exception(error)


def _raise(error: Exception) -> Scores:
    raise error


def _runs(values: Sequence[float]) -> Iterator[tuple[int, int]]:
    """The bounds [start, stop) of the stretches in which a value repeats."""
    start = 0
    for _, same in groupby(values):
        stop = start + len(list(same))
        yield start, stop
        start = stop


async def _scores_or_expired(request: _Request) -> Scores | int:
    """The request's scores, or, where it expired, how many images it has."""
    try:
        return await request.done
    except Expired:
        return len(request.images_NHWC)
