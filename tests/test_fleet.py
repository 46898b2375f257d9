"""A job over many replicas, in simulated time: its callers, each with a router of its own, keep all of them at work."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.routing import LaneRouter
from jobs.datapath import WINDOW, callers_for
from tests.simulation import h200

CHUNK, STEP = 256, 128
CHUNK_MS = CHUNK / STEP * h200(STEP)
SECONDS = 8.0
# Between a chunk's scores and the next chunk at a replica: staging, the next row, a call.
LEAST_MS, MOST_MS = 5.0, 40.0


@dataclass
class Replica:
    """One model actor, which works on its chunks one after another."""

    replica_id: int
    free_ms: float = 0.0
    chunks: int = 0

    def take(self, now_ms: float) -> float:
        """Takes a chunk, and gives the time at which it is scored."""
        self.free_ms = max(now_ms, self.free_ms) + CHUNK_MS
        self.chunks += self.free_ms < SECONDS * 1e3
        return self.free_ms


class Caller:
    """A process that calls the pool: its router, and the calls that it has under way."""

    def __init__(self) -> None:
        self._router = LaneRouter.__new__(LaneRouter)  # Serve's own part wants a cluster
        self._router.initialize_state()
        self._ids = map(str, itertools.count())

    def call(self, replicas: list[Any], now_ms: float) -> tuple[float, Replica, str]:
        """Sends a chunk where the router wants it: when it is scored, by whom, and the call's id."""
        metadata = SimpleNamespace(call_method="score_batch", internal_request_id=next(self._ids))
        request: Any = SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace())
        replica: Any = _result(self._router.choose_replicas(replicas, request))[0][0]
        self._router.on_request_routed(request, replica.replica_id, None)
        return replica.take(now_ms), replica, metadata.internal_request_id

    def ended(self, replica: Any, call: str) -> None:
        self._router.on_request_completed(replica.replica_id, call)


def _result(coroutine: Any) -> Any:
    """What a coroutine that waits for nothing returns."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def throughput(count: int, *, window: int = WINDOW) -> float:
    """The share of the replicas' time that goes into chunks, with so many of them under way for each replica."""
    rng = random.Random(count)
    random.seed(count)  # the router breaks ties at random
    replicas = [Replica(number) for number in range(count)]
    processes, in_flight = callers_for(count)
    numbers = itertools.count()
    events: list[tuple[float, int, Caller, tuple[Replica, str] | None]] = []
    for caller in [Caller() for _ in range(processes)]:
        for _ in range(in_flight * window // WINDOW):
            heapq.heappush(events, (rng.uniform(0, MOST_MS), next(numbers), caller, None))
    while events[0][0] < SECONDS * 1e3:
        now_ms, _, caller, done = heapq.heappop(events)
        if done:
            caller.ended(*done)
            heapq.heappush(events, (now_ms + rng.uniform(LEAST_MS, MOST_MS), next(numbers), caller, None))
        else:
            scored_ms, replica, call = caller.call(replicas, now_ms)
            heapq.heappush(events, (scored_ms, next(numbers), caller, (replica, call)))
    return sum(replica.chunks for replica in replicas) * CHUNK_MS / (count * SECONDS * 1e3)


@pytest.mark.parametrize("replicas", [1, 2, 4, 8, 16, 32, 64])
def test_batch_throughput_grows_with_the_replicas(replicas: int) -> None:
    assert throughput(replicas) >= 0.95


def test_a_window_of_one_chunk_would_not_do() -> None:
    assert throughput(16, window=1) < 0.95
