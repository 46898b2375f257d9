"""Every request gets the scores of its own images, whatever shares its steps, fails or goes away."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from pipeline.dispatcher import Dispatcher, Scores
from pipeline.errors import Busy, Expired
from pipeline.lanes import Lane, LaneLimits
from pipeline.steps import StepTimes

CLASSES = 6
UNFIT = 254  # an image of these pixels cannot be launched
BAD = 255  # an image of these pixels makes the step fail
# A step is formed before the last one's expected end. Of a model that is taken for so slow it is never formed before
# the real one, and of one that is taken for so fast it is formed at once.
SLOW_MS, FAST_MS = 1e6, 1e-3


class Checksums:
    """A model whose best class of an image is its first pixel modulo `CLASSES`, scored by the sum of its pixels.

    Where it is made so, it blocks until it is let: `entered` tells that it has a step, `let` says how many may pass.
    """

    def __init__(self, *, blocks: bool = False) -> None:
        self.entered, self._passes = threading.Semaphore(0), threading.Semaphore(0)
        self._blocks = blocks
        self.launched: list[list[int]] = []
        self.steps: list[list[int]] = []

    def let(self, steps: int = 1000) -> None:
        self._passes.release(steps)

    def launch(self, images: Sequence[np.ndarray], top_k: int, *, details: bool) -> Callable[[], Scores]:
        images_NHWC = np.concatenate(images)
        self.launched.append([int(image[0, 0, 0]) for image in images_NHWC])
        if (images_NHWC == UNFIT).any():
            raise MemoryError("an image that the device has no room for")
        return lambda: self._score(images_NHWC, top_k, details)

    def _score(self, images_NHWC: np.ndarray, top_k: int, details: bool) -> Scores:
        self.steps.append([int(image[0, 0, 0]) for image in images_NHWC])
        self.entered.release()
        assert not self._blocks or self._passes.acquire(timeout=10)
        if (images_NHWC == BAD).any():
            raise ArithmeticError("a bad image in the step")
        k = min(top_k, CLASSES)
        first_N1 = images_NHWC[:, 0, 0, :1].astype(np.int32)
        sums_N1 = images_NHWC.sum(axis=(1, 2, 3))[:, None].astype(np.float32)
        top_NK = (first_N1 + np.arange(k, dtype=np.int32)) % CLASSES
        logits_NC, embeddings_ND = (np.repeat(sums_N1, n, axis=1) for n in (CLASSES, 4))
        return Scores(
            top_NK,
            sums_N1 - np.arange(k, dtype=np.float32),
            logits_NC if details else None,
            embeddings_ND if details else None,
        )


class Uneven:
    """A model that loses an image."""

    def launch(self, images: Sequence[np.ndarray], top_k: int, *, details: bool) -> Callable[[], Scores]:
        count = sum(map(len, images)) - 1
        return lambda: Scores(np.zeros((count, 1), np.int32), np.zeros((count, 1), np.float32))


def _times(max_step: int, step_ms: float = SLOW_MS) -> StepTimes:
    return StepTimes(max_step, {1: step_ms, max_step: step_ms})


def _images(*values: int) -> np.ndarray:
    """One image of 2 x 2 pixels for each value."""
    return np.array(values, np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)


def _check(scores: Scores, *values: int, top_k: int = 1) -> None:
    assert scores.top_NK.tolist() == [[(value + place) % CLASSES for place in range(top_k)] for value in values]
    assert scores.scores_NK.tolist() == [[12.0 * value - place for place in range(top_k)] for value in values]
    assert (str(scores.top_NK.dtype), str(scores.scores_NK.dtype)) == ("int32", "float32")


@asynccontextmanager
async def _running(
    model: Checksums | Uneven, *, step_ms: float = SLOW_MS, max_step: int = 4, max_batch_backlog: int = 1024
) -> AsyncIterator[Dispatcher]:
    limits = LaneLimits(max_step=max_step, online_step_ms=1e12, max_batch_backlog=max_batch_backlog)
    dispatcher = Dispatcher(model, limits, _times(max_step, step_ms))
    loop = asyncio.create_task(dispatcher.run())
    try:
        yield dispatcher
    finally:
        if isinstance(model, Checksums):
            model.let()
        assert not loop.done(), "nothing that is asked may end the loop"
        loop.cancel()
        await asyncio.wait([loop])


@asynccontextmanager
async def _blocked(model: Checksums, **running: Any) -> AsyncIterator[Dispatcher]:
    """A dispatcher whose model works on a step of one batch image, 0, until it is let."""
    async with _running(model, **running) as dispatcher:
        first = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(0), 1))
        assert await asyncio.to_thread(model.entered.acquire, timeout=10)
        yield dispatcher
        _check(await first, 0)


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def _run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def test_answers_belong_to_their_own_images_across_split_and_merged_steps() -> None:
    async def test() -> None:
        model, values = Checksums(), itertools.cycle(range(200))
        async with _running(model, max_step=5) as dispatcher:
            asked = [
                (lane, [next(values) for _ in range(images)], top_k)
                for images, top_k, lane in itertools.product((1, 3, 5, 7, 23), (1, 2, CLASSES), Lane)
            ]
            answers = await asyncio.gather(*(dispatcher.submit(lane, _images(*own), k) for lane, own, k in asked))
        for (_, own, top_k), answer in zip(asked, answers, strict=True):
            _check(answer, *own, top_k=top_k)
        assert {len(step) for step in model.steps[:-1]} == {5}

    _run(test())


def test_requests_of_different_top_k_share_a_step() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model) as dispatcher:
            tasks = [asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(10 * k), k)) for k in (1, 3, 2)]
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 3)
            model.let()
            for k, answer in zip((1, 3, 2), await asyncio.gather(*tasks), strict=True):
                _check(answer, 10 * k, top_k=k)
        assert model.steps == [[0], [10, 30, 20]]

    _run(test())


def test_top_k_above_the_number_of_classes_gives_all_classes() -> None:
    async def test() -> None:
        async with _running(Checksums()) as dispatcher:
            _check(await dispatcher.submit(Lane.ONLINE, _images(7, 8, 9, 10, 11), 50), 7, 8, 9, 10, 11, top_k=CLASSES)

    _run(test())


def test_details_are_for_those_who_asked_for_them_and_of_their_own_images() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, max_step=3) as dispatcher:
            asked = [
                asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(*values), 1, details=details))
                for values, details in (((7,), False), ((1, 2, 3, 4), True))
            ]
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 5)
            model.let()
            plain, detailed = await asyncio.gather(*asked)
        assert any(7 in step and 1 in step for step in model.steps), model.steps
        _check(detailed, 1, 2, 3, 4)
        assert detailed.logits_NC is not None
        assert detailed.embeddings_ND is not None
        assert detailed.logits_NC.tolist() == [[12.0 * value] * CLASSES for value in (1, 2, 3, 4)]
        assert detailed.embeddings_ND.shape == (4, 4)
        assert (plain.logits_NC, plain.embeddings_ND) == (None, None)

    _run(test())


def test_a_full_lane_is_busy_at_once_and_the_other_lane_is_not() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, max_batch_backlog=2) as dispatcher:
            waits = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(1, 2), 1))
            await _until(lambda: dispatcher.backlog(Lane.BATCH) == 2)
            with pytest.raises(Busy, match="batch lane is full: 2 images wait"):
                await dispatcher.submit(Lane.BATCH, _images(3), 1)
            online = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(4), 1))
            model.let()
            _check(await waits, 1, 2)
            _check(await online, 4)

    _run(test())


def test_online_overtakes_a_backlog_of_batch() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model) as dispatcher:
            batch = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(*range(1, 11)), 1))
            await _until(lambda: dispatcher.backlog(Lane.BATCH) == 10)
            online = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(100, 101), 1))
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 2)
            model.let()
            await asyncio.gather(batch, online)
        assert model.steps[:2] == [[0], [100, 101, 1, 2]]

    _run(test())


def test_a_failing_step_fails_those_in_it_and_the_loop_goes_on() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, max_step=3) as dispatcher:
            # steps: [1, BAD, 2] and what follows; the rest of the third request leaves with its first image
            requests = [_images(1), _images(BAD), _images(2, 3, 4, 5), _images(6, 7)]
            tasks = [asyncio.create_task(dispatcher.submit(Lane.BATCH, images, 1)) for images in requests]
            await _until(lambda: dispatcher.backlog(Lane.BATCH) == 8)
            model.let()
            *failed, fine = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in failed] == [ArithmeticError] * 3
            assert isinstance(fine, Scores)
            _check(fine, 6, 7)
            assert dispatcher.backlog(Lane.BATCH) == 0
        assert model.steps == [[0], [1, BAD, 2], [6, 7]]

    _run(test())


def test_a_model_that_loses_an_image_fails_the_step_and_not_the_loop() -> None:
    async def test() -> None:
        async with _running(Uneven()) as dispatcher:
            for _ in range(2):
                with pytest.raises(ValueError, match="2 scores for 3 images"):
                    await dispatcher.submit(Lane.ONLINE, _images(1, 2, 3), 1)

    _run(test())


def test_a_request_without_images_is_refused_and_the_loop_goes_on() -> None:
    async def test() -> None:
        async with _running(Checksums()) as dispatcher:
            with pytest.raises(ValueError, match="at least 1"):
                await dispatcher.submit(Lane.ONLINE, _images(), 1)
            _check(await dispatcher.submit(Lane.ONLINE, _images(5), 1), 5)

    _run(test())


def test_a_clock_that_stands_still_does_not_stop_the_loop() -> None:
    async def test() -> None:
        dispatcher = Dispatcher(Checksums(), LaneLimits(max_step=4), _times(4), clock=lambda: 0.0)
        loop = asyncio.create_task(dispatcher.run())
        for value in range(3):
            _check(await dispatcher.submit(Lane.ONLINE, _images(value), 1), value)
        loop.cancel()

    _run(test())


def test_a_cancelled_request_leaves_its_lane() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model) as dispatcher:
            gone = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(1, 2, 3), 1))
            stays = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(4), 1))
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 4)
            gone.cancel()
            await asyncio.wait([gone])
            assert dispatcher.backlog(Lane.ONLINE) == 1
            model.let()
            _check(await stays, 4)
        assert model.steps == [[0], [4]]

    _run(test())


@pytest.mark.parametrize(("images", "steps"), [(2, [[9, 1, 2, 99]]), (6, [[9, 1, 2, 3], [99]])], ids=["all", "half"])
def test_a_request_cancelled_within_its_step_does_not_break_the_others_in_it(
    images: int, steps: list[list[int]]
) -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model) as dispatcher:
            gone = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(*range(1, images + 1)), 1))
            await _until(lambda: dispatcher.backlog(Lane.BATCH) == images)
            behind = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(99), 1))
            online = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(9), 1))
            await _until(lambda: dispatcher.backlog(Lane.BATCH) + dispatcher.backlog(Lane.ONLINE) == images + 2)
            model.let(1)
            assert await asyncio.to_thread(model.entered.acquire, timeout=10)
            gone.cancel()
            await asyncio.wait([gone])
            model.let()
            _check(await online, 9)
            _check(await behind, 99)
        assert model.steps == [[0], *steps]

    _run(test())


def test_a_request_cancelled_within_a_step_that_fails_does_not_end_the_loop() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _running(model) as dispatcher:
            gone = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(BAD), 1))
            assert await asyncio.to_thread(model.entered.acquire, timeout=10)
            gone.cancel()
            await asyncio.wait([gone])
            model.let()
            _check(await dispatcher.submit(Lane.BATCH, _images(7), 1), 7)

    _run(test())


def test_the_next_step_is_on_the_device_before_the_last_one_is_read_and_no_third_one() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, step_ms=FAST_MS) as dispatcher:
            chunk = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(*range(1, 10)), 1))
            await _until(lambda: len(model.launched) == 2)
            await asyncio.sleep(0.05)
            assert model.launched == [[0], [1, 2, 3, 4]]
            assert model.steps == [[0]]
            online = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(100), 1))
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 1)
            model.let(1)
            await _until(lambda: len(model.launched) == 3)
            assert model.launched[2] == [100, 5, 6, 7]
            model.let()
            _check(await chunk, *range(1, 10))
            _check(await online, 100)

    _run(test())


def test_a_step_that_cannot_be_launched_fails_in_its_turn_and_the_loop_goes_on() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, step_ms=FAST_MS) as dispatcher:
            failed = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(1, 2, 3, UNFIT), 1))
            await _until(lambda: len(model.launched) == 2)
            fine = asyncio.create_task(dispatcher.submit(Lane.BATCH, _images(5), 1))
            model.let()
            with pytest.raises(MemoryError, match="no room for"):
                await failed
            _check(await fine, 5)
        assert model.steps == [[0], [5]]

    _run(test())


def test_a_request_that_the_model_does_not_get_to_in_time_is_told_so() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, step_ms=FAST_MS, max_step=1) as dispatcher:
            patient = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(1, 2), 1))
            await _until(lambda: len(model.launched) == 2)
            hasty = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(3), 1, within_s=0.05))
            await asyncio.sleep(0.1)
            model.let()
            with pytest.raises(Expired, match="deadline passed"):
                await hasty
            _check(await patient, 1, 2)
        assert model.steps == [[0], [1], [2]]

    _run(test())


def test_a_request_that_could_not_be_scored_in_time_is_refused_at_once_and_told_when_to_come_again() -> None:
    async def test() -> None:
        async with _blocked(model := Checksums(blocks=True), step_ms=10_000.0) as dispatcher:
            waits = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(1), 1))
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 1)
            with pytest.raises(Busy, match="online lane is full: 1 images wait") as refused:
                await dispatcher.submit(Lane.ONLINE, _images(2), 1, within_s=15.0)
            assert 5.0 <= refused.value.retry_after_s <= 12.5
            model.let()
            _check(await waits, 1)

    _run(test())


def test_room_is_kept_for_images_that_are_on_their_way_and_given_back_whatever_happens() -> None:
    async def test() -> None:
        async with _running(Checksums(), max_batch_backlog=4) as dispatcher:
            with pytest.raises(ConnectionError), dispatcher.expect(Lane.BATCH, 4), dispatcher.expect(Lane.ONLINE, 1):
                raise ConnectionError
            with dispatcher.expect(Lane.BATCH, 3), pytest.raises(Busy), dispatcher.expect(Lane.BATCH, 2):
                raise AssertionError("there is no room")
            with dispatcher.expect(Lane.BATCH, 4):
                pass
            _check(await dispatcher.submit(Lane.BATCH, _images(1, 2, 3, 4), 1), 1, 2, 3, 4)

    _run(test())


def test_counters_tell_the_images_that_were_scored() -> None:
    async def test() -> None:
        async with _running(Checksums()) as dispatcher:
            await asyncio.gather(
                dispatcher.submit(Lane.ONLINE, _images(1, 2), 1), dispatcher.submit(Lane.BATCH, _images(*range(9)), 1)
            )
            with pytest.raises(ArithmeticError):
                await dispatcher.submit(Lane.ONLINE, _images(BAD), 1)
            assert dispatcher.images == {Lane.ONLINE: 2, Lane.BATCH: 9}
            assert dispatcher.steps == 4

    _run(test())


def test_the_time_that_the_model_is_busy_is_counted_once() -> None:
    class Sleeper(Checksums):
        def _score(self, images_NHWC: np.ndarray, top_k: int, details: bool) -> Scores:
            time.sleep(0.02)
            return super()._score(images_NHWC, top_k, details)

    async def test() -> None:
        async with _running(Sleeper(), step_ms=FAST_MS) as dispatcher:
            started = time.monotonic()
            await dispatcher.submit(Lane.BATCH, _images(*range(20)), 1)
            assert 0.1 <= dispatcher.busy_s <= time.monotonic() - started

    _run(test())


def test_requests_that_wait_when_the_loop_ends_are_told_to_go_elsewhere() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        dispatcher = Dispatcher(model, LaneLimits(max_step=1), _times(1))
        loop = asyncio.create_task(dispatcher.run())
        tasks = [asyncio.create_task(dispatcher.submit(lane, _images(1, 2), 1)) for lane in Lane]
        assert await asyncio.to_thread(model.entered.acquire, timeout=10)
        loop.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Busy, Busy]
        with pytest.raises(Busy, match="shutting down"):
            await dispatcher.submit(Lane.ONLINE, _images(3), 1)
        model.let()

    _run(test())


def test_the_models_thread_ends_with_the_loop() -> None:
    async def test() -> None:
        async with _running(Checksums()) as dispatcher:
            await dispatcher.submit(Lane.ONLINE, _images(1), 1)
            assert _threads()
        await _until(lambda: not _threads())

    _run(test())


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tandem-model")]


def test_images_of_one_call_expire_each_by_its_own_deadline() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, step_ms=FAST_MS, max_step=2) as dispatcher:
            ahead = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(1, 2), 1))
            await _until(lambda: len(model.launched) == 2)
            call = dispatcher.submit_each(Lane.ONLINE, _images(3, 4, 5), 1, [9.0, 0.05, 9.0], details=True)
            task = asyncio.create_task(call)
            await asyncio.sleep(0.1)
            model.let()
            scores = await task
            _check(await ahead, 1, 2)
        assert scores.expired_N is not None
        assert scores.expired_N.tolist() == [0, 1, 0]
        _check(scores.part(0, 1, 1, details=False), 3)
        _check(scores.part(2, 3, 1, details=False), 5)
        assert scores.logits_NC is not None
        assert scores.logits_NC[:, 0].tolist() == [36.0, 0.0, 60.0]
        assert [image for step in model.steps for image in step] == [0, 1, 2, 3, 5]

    _run(test())


def test_a_call_whose_images_have_all_expired_says_so() -> None:
    async def test() -> None:
        model = Checksums(blocks=True)
        async with _blocked(model, step_ms=FAST_MS, max_step=1) as dispatcher:
            ahead = asyncio.create_task(dispatcher.submit(Lane.ONLINE, _images(1), 1))
            await _until(lambda: len(model.launched) == 2)
            task = asyncio.create_task(dispatcher.submit_each(Lane.ONLINE, _images(2, 3), 1, [0.04, 0.05]))
            await asyncio.sleep(0.1)
            model.let()
            with pytest.raises(Expired):
                await task
            _check(await ahead, 1)

    _run(test())


def test_a_call_of_images_that_is_cancelled_leaves_the_lane() -> None:
    async def test() -> None:
        async with _blocked(model := Checksums(blocks=True), max_step=1) as dispatcher:
            task = asyncio.create_task(dispatcher.submit_each(Lane.ONLINE, _images(1, 2, 3), 1, [7e9, 8e9, 9e9]))
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 3 or len(model.launched) == 2)
            task.cancel()
            await asyncio.wait([task])
            await _until(lambda: dispatcher.backlog(Lane.ONLINE) == 0)
            model.let()

    _run(test())
