"""A chunk gets its scores, whatever replicas do meanwhile, and its caller does not storm a pool that is full."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, ObjectFetchTimedOutError, ObjectLostError, OwnerDiedError, RayTaskError

from deployments.answer import Answer
from deployments.batch import ATTEMPTS, FIRST_PAUSE_S, LONGEST_BUSY_S, LONGEST_PAUSE_S, score_chunk
from pipeline.dispatcher import Scores
from pipeline.errors import Busy, DeviceLost, PoolFailed

IMAGES_NHWC = np.zeros((2, 4, 4, 3), np.uint8)
ANSWER = Answer(Scores(np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32)), "replica", "revision")


class Pool:
    """A handle whose calls end as it is told, one after another."""

    def __init__(self, *ends: Any) -> None:
        self._ends = iter(ends)
        self.asked: list[tuple[Any, int, int]] = []
        self.cancelled = 0
        self.score_batch = self

    def remote(self, nested: dict[str, Any], images: int, top_k: int) -> Pool:
        self.asked.append((nested["chunk"], images, top_k))
        return self

    def result(self, timeout_s: float) -> Any:
        end = next(self._ends)
        if isinstance(end, Exception) and not isinstance(end, Busy | DeviceLost):
            raise end
        return end

    def cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the caller paused, in seconds; nothing waits, and nothing is put."""
    found: list[float] = []
    monkeypatch.setattr("deployments.batch.time.sleep", found.append)
    monkeypatch.setattr("deployments.batch.random.uniform", lambda low, high: high)
    monkeypatch.setattr(ray, "put", lambda images: "reference")
    return found


def test_the_chunk_goes_by_reference_and_its_scores_come_back(pauses: list[float]) -> None:
    pool: Any = Pool(ANSWER)
    assert score_chunk(pool, IMAGES_NHWC, 3) is ANSWER
    assert pool.asked == [("reference", 2, 3)]
    assert pauses == []


def test_a_full_pool_is_asked_again_ever_less_often(pauses: list[float]) -> None:
    pool: Any = Pool(*[Busy("full", 0.01)] * 10, ANSWER)
    assert score_chunk(pool, IMAGES_NHWC, 1) is ANSWER
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_BUSY_S


def test_a_full_pool_is_asked_when_it_says_that_it_has_room(pauses: list[float]) -> None:
    pool: Any = Pool(Busy("full", 2.0), Busy("full", 1e9), ANSWER)
    score_chunk(pool, IMAGES_NHWC, 1)
    assert pauses == [2.0, LONGEST_BUSY_S]


def test_to_be_refused_is_no_failure() -> None:
    pool: Any = Pool(*[Busy("full")] * 2000, ANSWER)  # as in hours beside a crowd of online requests
    assert score_chunk(pool, IMAGES_NHWC, 1) is ANSWER


def test_replicas_that_die_are_called_again_and_not_for_ever(pauses: list[float]) -> None:
    pool: Any = Pool(*[ActorDiedError()] * (ATTEMPTS - 1), ANSWER)
    assert score_chunk(pool, IMAGES_NHWC, 1) is ANSWER
    assert sorted(pauses) == pauses
    assert pauses[-1] <= LONGEST_PAUSE_S

    pool = Pool(*[ActorDiedError()] * ATTEMPTS)
    with pytest.raises(PoolFailed, match=f"the pool did not score a chunk in {ATTEMPTS} attempts"):
        score_chunk(pool, IMAGES_NHWC, 1)


def test_a_step_that_fails_is_not_tried_again() -> None:
    pool: Any = Pool(RayTaskError("score_batch", "traceback", ValueError("bad step")))
    with pytest.raises(PoolFailed, match="the model failed on a chunk of 2 images: bad step"):
        score_chunk(pool, IMAGES_NHWC, 1)
    assert len(pool.asked) == 1


def test_a_call_that_timed_out_is_cancelled_before_the_chunk_is_sent_again() -> None:
    pool: Any = Pool(TimeoutError(), TimeoutError(), ANSWER)
    assert score_chunk(pool, IMAGES_NHWC, 1) is ANSWER
    assert pool.cancelled == 2


@pytest.mark.parametrize("kind", [ObjectLostError, ObjectFetchTimedOutError, OwnerDiedError])
def test_a_chunk_that_a_replica_cannot_fetch_is_put_and_sent_again(
    kind: type[ObjectLostError], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = iter(["first", "second", "third"])
    monkeypatch.setattr(ray, "put", lambda images: next(put))
    lost = RayTaskError("score_batch", "traceback", kind("00" * 28, None, "")).as_instanceof_cause()
    pool: Any = Pool(lost, ANSWER)

    assert score_chunk(pool, IMAGES_NHWC, 1) is ANSWER
    assert [chunk for chunk, _, _ in pool.asked] == ["first", "second"]


def test_a_chunk_that_can_never_be_fetched_is_not_called_a_failure_of_the_model() -> None:
    lost = RayTaskError("score_batch", "traceback", ObjectLostError("00" * 28, None, ""))
    pool: Any = Pool(*[lost] * ATTEMPTS)
    with pytest.raises(PoolFailed, match=f"did not score a chunk in {ATTEMPTS} attempts: Failed to retrieve object"):
        score_chunk(pool, IMAGES_NHWC, 1)


def test_a_replica_that_lost_its_device_is_no_end_of_the_job() -> None:
    pool: Any = Pool(DeviceLost("CUDA error: an illegal memory access was encountered"), ANSWER)
    assert score_chunk(pool, IMAGES_NHWC, 1) is ANSWER
