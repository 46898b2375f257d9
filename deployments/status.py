"""What the endpoint's page shows of the pool, of its own requests and of the jobs that run."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

from deployments.board import running_jobs
from pipeline.model_info import ModelInfo

EVERY_S = 1.0
LATELY_S = 60.0
MAX_REQUESTS = 10_000  # that are remembered


class Recent:
    """The requests that one process has answered in the last minute."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answered: deque[tuple[float, float]] = deque(maxlen=MAX_REQUESTS)

    def add(self, seconds: float) -> None:
        """Counts one that is answered now, after so long."""
        self._answered.append((self._clock(), seconds))

    def told(self) -> dict[str, float | None]:
        """How many came in a second, and half and 99 % of them took no longer than so many ms."""
        now_s = self._clock()
        took_s = sorted(seconds for at_s, seconds in self._answered if now_s - at_s <= LATELY_S)

        def percentile_ms(share: float) -> float | None:
            return round(took_s[min(len(took_s) - 1, int(share * len(took_s)))] * 1e3, 1) if took_s else None

        return {
            "per_s": round(len(took_s) / LATELY_S, 2),
            "p50_ms": percentile_ms(0.5),
            "p99_ms": percentile_ms(0.99),
        }


class Status:
    """Gathers it. However many watch, the pool is asked once a second."""

    def __init__(
        self, info: ModelInfo, recent: Recent, replicas: Callable[[], Awaitable[list[dict[str, Any]]]]
    ) -> None:
        self._info, self._recent, self._replicas = info, recent, replicas
        self._asked_s = -EVERY_S
        self._gathering: asyncio.Task[dict[str, Any]] | None = None

    async def __call__(self) -> dict[str, Any]:
        """What is told as JSON."""
        now_s = time.monotonic()
        if self._gathering is None or (self._gathering.done() and now_s - self._asked_s >= EVERY_S):
            self._asked_s = now_s
            self._gathering = asyncio.create_task(self._gather(), context=Context())  # it outlives its first request
        return await asyncio.shield(self._gathering)

    async def _gather(self) -> dict[str, Any]:
        replicas, jobs = await asyncio.gather(self._replicas(), asyncio.to_thread(running_jobs))
        return {
            "model": self._info.model,
            "revision": self._info.revision,
            "replicas": sorted(replicas, key=lambda one: str(one["replica"])),
            "requests": self._recent.told(),
            "jobs": jobs,
        }
