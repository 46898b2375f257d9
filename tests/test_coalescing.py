"""Images wait for nothing when it is quiet, share calls when it is not, and each caller gets its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from deployments.coalescing import Coalescer
from pipeline.dispatcher import Scores
from pipeline.errors import Busy, Expired

REQUEST: ContextVar[str] = ContextVar("REQUEST", default="none")


@dataclass
class Answer:
    scores: Scores
    replica: str


class Pool:
    """Answers with each image's first pixel, once it is let; `calls` are the pixels of each call."""

    def __init__(self, *, error: Exception | None = None, expired: Sequence[bool] | None = None) -> None:
        self.calls: list[list[int]] = []
        self.asked: list[tuple[int, bool, list[float]]] = []
        self.requests: list[str] = []
        self.cancelled = 0
        self.free = asyncio.Semaphore(0)
        self._error, self._expired = error, expired

    async def call(self, images_NHWC: np.ndarray, top_k: int, details: bool, ends_s: Sequence[float]) -> Answer:
        pixels_N = images_NHWC[:, 0, 0, 0].astype(np.int32)
        self.calls.append(pixels_N.tolist())
        self.asked.append((top_k, details, list(ends_s)))
        self.requests.append(REQUEST.get())
        try:
            await self.free.acquire()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error:
            raise self._error
        top_NK = np.repeat(pixels_N[:, None], top_k, axis=1)
        logits_NC = top_NK.astype(np.float32) if details else None
        expired_N = None if self._expired is None else np.array(self._expired, np.uint8)
        scores = Scores(top_NK, top_NK.astype(np.float32), logits_NC, None, expired_N)
        return Answer(scores, f"replica-{len(self.calls)}")

    def let(self, calls: int = 1000) -> None:
        for _ in range(calls):
            self.free.release()


def _image(pixel: int) -> np.ndarray:
    return np.full((2, 2, 3), pixel, np.uint8)


def _ask(coalescer: Coalescer, pixel: int, top_k: int = 1, details: bool = False, ends_s: float = 9.0) -> Any:
    return asyncio.create_task(coalescer.score(_image(pixel), top_k, details, ends_s))


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def _run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


def test_a_lone_image_goes_at_once() -> None:
    async def test() -> None:
        pool = Pool()
        coalescer = Coalescer(pool.call, max_images=16, max_calls=4)
        task = _ask(coalescer, 7)
        await _turns()
        assert pool.calls == [[7]]
        pool.let()
        scores, replica = await task
        assert (scores.top_NK.tolist(), replica) == ([[7]], "replica-1")

    _run(test())


def test_those_that_are_ready_together_go_together() -> None:
    async def test() -> None:
        pool = Pool()
        coalescer = Coalescer(pool.call, max_images=3, max_calls=4)
        tasks = [_ask(coalescer, pixel) for pixel in range(7)]
        await _turns()
        assert pool.calls == [[0, 1, 2], [3, 4, 5], [6]]
        pool.let()
        assert [(await task)[0].top_NK.item() for task in tasks] == list(range(7))

    _run(test())


def test_while_calls_are_under_way_images_wait_and_then_share_the_next() -> None:
    async def test() -> None:
        pool = Pool()
        coalescer = Coalescer(pool.call, max_images=16, max_calls=2)
        tasks = []
        for pixel in range(6):
            tasks.append(_ask(coalescer, pixel))
            await _turns()
        assert pool.calls == [[0], [1]]
        pool.let(1)
        await _turns()
        assert pool.calls == [[0], [1], [2, 3, 4, 5]]
        pool.let()
        assert [(await task)[0].top_NK.item() for task in tasks] == list(range(6))

    _run(test())


def test_each_gets_what_it_wanted_of_a_call_that_has_the_most_of_all() -> None:
    async def test() -> None:
        pool = Pool()
        coalescer = Coalescer(pool.call, max_images=16, max_calls=1)
        plain, more = _ask(coalescer, 1, 1, False, 3.0), _ask(coalescer, 2, 5, True, 2.0)
        await _turns()
        assert pool.asked == [(5, True, [3.0, 2.0])]
        pool.let()
        (plain_scores, _), (more_scores, _) = await plain, await more
        assert (plain_scores.top_NK.shape, plain_scores.logits_NC) == ((1, 1), None)
        assert more_scores.top_NK.shape == (1, 5)
        assert more_scores.logits_NC is not None
        assert more_scores.logits_NC.tolist() == [[2.0] * 5]

    _run(test())


def test_a_call_that_fails_fails_those_in_it_alone() -> None:
    async def test() -> None:
        pool = Pool(error=Busy("full", 2.0))
        coalescer = Coalescer(pool.call, max_images=2, max_calls=1)
        tasks = [_ask(coalescer, pixel) for pixel in range(3)]
        await _turns()
        pool.let(1)
        for task in tasks[:2]:
            with pytest.raises(Busy, match="full"):
                await task
        pool._error = None
        pool.let()
        assert (await tasks[2])[0].top_NK.item() == 2

    _run(test())


def test_an_image_whose_caller_left_is_not_sent_and_a_call_that_all_left_is_ended() -> None:
    async def test() -> None:
        pool = Pool()
        coalescer = Coalescer(pool.call, max_images=2, max_calls=1)
        first, second, third, fourth = (_ask(coalescer, pixel) for pixel in range(4))
        await _turns()
        assert pool.calls == [[0, 1]]
        third.cancel()
        first.cancel()
        await _turns()
        assert pool.cancelled == 0  # the second one waits still
        second.cancel()
        await _turns()
        assert (pool.cancelled, pool.calls) == (1, [[0, 1], [3]])
        pool.let()
        assert (await fourth)[0].top_NK.item() == 3

    _run(test())


def test_a_call_does_not_belong_to_the_request_that_began_it() -> None:
    async def test() -> None:
        pool = Pool()
        pool.let()
        REQUEST.set("one request")
        await Coalescer(pool.call, max_images=2, max_calls=1).score(_image(1), 1, False, 9.0)
        assert pool.requests == ["none"]

    _run(test())


def test_an_image_whose_deadline_passed_fails_alone() -> None:
    async def test() -> None:
        pool = Pool(expired=[False, True, False])
        coalescer = Coalescer(pool.call, max_images=16, max_calls=1)
        first, late, last = (_ask(coalescer, pixel, ends_s=9.0 - pixel) for pixel in range(3))
        await _turns()
        pool.let()
        assert [(await task)[0].top_NK.item() for task in (first, last)] == [0, 2]
        with pytest.raises(Expired):
            await late

    _run(test())
