"""What the page is told of requests, replicas and jobs."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import board, status
from deployments.board import STALE_S, current
from deployments.status import LATELY_S, Recent, Status
from tests.test_web import Pool


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_percentiles_are_those_of_the_last_minute() -> None:
    clock = Clock()
    recent = Recent(clock=clock)
    assert recent.told() == {"per_s": 0.0, "p50_ms": None, "p99_ms": None}
    recent.add(9.0)
    clock.now_s += LATELY_S + 1
    for ms in range(1, 121):
        recent.add(ms / 1e3)
    assert recent.told() == {"per_s": 2.0, "p50_ms": 61.0, "p99_ms": 119.0}


def test_however_many_watch_the_pool_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def replicas() -> list[dict[str, Any]]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return [{"replica": "b"}, {"replica": "a"}]

    monkeypatch.setattr(status, "running_jobs", list)

    async def test() -> None:
        one = Status(Pool().info, Recent(), replicas)
        told = await asyncio.gather(*(one() for _ in range(20)))
        assert [replica["replica"] for replica in told[-1]["replicas"]] == ["a", "b"]
        await one()
        assert asked == 1
        monkeypatch.setattr(status, "EVERY_S", 0.0)
        await one()
        assert asked == 2

    asyncio.run(test())


def test_a_watcher_that_leaves_does_not_end_what_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def replicas() -> list[dict[str, Any]]:
        await asyncio.sleep(0.05)
        return []

    monkeypatch.setattr(status, "running_jobs", list)

    async def test() -> None:
        one = Status(Pool().info, Recent(), replicas)
        leaves, stays = asyncio.create_task(one()), asyncio.create_task(one())
        await asyncio.sleep(0.01)
        leaves.cancel()
        assert (await stays)["replicas"] == []

    asyncio.run(test())


def test_a_job_stays_posted_while_it_has_nothing_to_tell_and_is_taken_down_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store: dict[str, bytes] = {}
    kv = SimpleNamespace(
        _internal_kv_put=lambda key, entry, namespace: store.update({key: entry}),
        _internal_kv_del=lambda key, namespace: store.pop(key),
        _internal_kv_list=lambda prefix, namespace: [key for key in store if key.startswith(prefix)],
        _internal_kv_get=lambda key, namespace: store[key],
    )
    monkeypatch.setattr(board, "internal_kv", kv)
    monkeypatch.setattr(board, "AGAIN_S", 0.01)
    monkeypatch.setattr(board, "STALE_S", 0.3)
    with board.posted(output="out") as post:
        assert board.running_jobs() == []
        post({"phase": "pool", "elapsed_s": 0.0})
        time.sleep(0.6)
        assert board.running_jobs() == [{"output": "out", "phase": "pool", "elapsed_s": 0.0}]
    assert board.running_jobs() == []


def test_a_job_whose_driver_is_silent_is_left_out_and_the_oldest_comes_first() -> None:
    def entry(output: str, elapsed_s: float, told_at_s: float) -> bytes:
        return json.dumps({"output": output, "elapsed_s": elapsed_s, "told_at_s": told_at_s}).encode()

    entries = [entry("new", 1, 999), entry("killed", 9, 1000 - STALE_S), entry("old", 5, 1000.5)]
    assert [job["output"] for job in current(entries, 1000)] == ["old", "new"]
    assert "told_at_s" not in current(entries, 1000)[0]
