"""Clients that hang up while their requests wait, in a process of its own beside the endpoint.

    python -m tests.hangups GCS_ADDRESS URL

Calls of many images keep the online lane full meanwhile. Prints how many clients were answered, how many hung up
before, and how many images were scored for those.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from deployments.cluster import join_ray
from jobs.corpus import digits, encode
from jobs.models import shipped

CLIENTS = 10
PATIENCE_S = 0.05
CALLS, CALL_IMAGES = 3, 320  # a little less than the lane holds


async def main(url: str) -> dict[str, int]:
    """Has the clients come one after another."""
    from deployments.pool import pool_handle

    pool = pool_handle(str(shipped("digits-vit")))
    before = (await pool.stats.remote())["online"]["scored"]
    stop = asyncio.Event()
    calls = [asyncio.create_task(_keep_full(pool, stop)) for _ in range(CALLS)]
    while (await pool.stats.remote())["online"]["backlog"] < CALL_IMAGES:
        await asyncio.sleep(0.01)
    answered = sum([await _answered(url) for _ in range(CLIENTS)])
    stop.set()
    direct = sum(await asyncio.gather(*calls))
    after = (await pool.stats.remote())["online"]["scored"]
    return {"answered": answered, "hung_up": CLIENTS - answered, "scored": after - before - direct - answered}


async def _keep_full(pool: Any, stop: asyncio.Event) -> int:
    """One call after another; the images that they had."""
    images = 0
    while not stop.is_set():
        await pool.score_online.remote(np.zeros((CALL_IMAGES, 32, 32, 3), np.uint8), 1, [60.0] * CALL_IMAGES)
        images += CALL_IMAGES
    return images


async def _answered(url: str) -> bool:
    """Whether a client was answered before it hung up."""
    host = urlsplit(url)
    reader, writer = await asyncio.open_connection(host.hostname, host.port)
    _, body = encode(digits()[0])
    head = f"POST /predict HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        async with asyncio.timeout(PATIENCE_S):
            return bool(await reader.read(1))
    except TimeoutError:
        return False
    finally:
        writer.close()


if __name__ == "__main__":
    join_ray(sys.argv[1])
    print(json.dumps(asyncio.run(main(sys.argv[2]))))
