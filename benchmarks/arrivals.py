"""Requests that come at random, whatever the answers do: a Poisson process."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator


async def arrivals(per_s: float, seconds: float, randoms: random.Random) -> AsyncIterator[float]:
    """When a request is due (`time.perf_counter`), at that time, or as soon after it as the event loop is free.

    A latency counts from then: a request that could not be sent in time has waited too.
    """
    due_s = time.perf_counter()
    ends_s = due_s + seconds
    while (due_s := due_s + randoms.expovariate(per_s)) < ends_s:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        yield due_s
