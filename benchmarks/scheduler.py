"""What a step costs the host before the device hears of it: the lanes alone, by the online requests in each step.

    python benchmarks/scheduler.py

Prints one JSON object: microseconds of a step (deciding when and of what size, taking from the lanes, learning from its
time), medians of rounds, and beside them those of queueing its requests.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.results import machine
from pipeline.lanes import Lane, LaneLimits, Lanes
from pipeline.steps import StepTimes

STEPS, ROUNDS, CHUNK, MAX_STEP = 5_000, 9, 256, 128
ONLINE = (0, 1, 6, 30)  # 6 come in a step of 8 ms at a tenth of what a ViT-B/16 on an H200 can do


def main() -> None:
    found = {}
    for online in ONLINE:
        rounds = [measure(online) for _ in range(ROUNDS)]
        step_us, offer_us = (round(statistics.median(values), 1) for values in zip(*rounds, strict=True))
        found[online] = {"step_us": step_us, "offer_us": offer_us}
    print(json.dumps({**machine(), "by_online_requests_in_a_step": found}))


def measure(online: int) -> tuple[float, float]:
    """Microseconds of a step, and of queueing what is in it."""
    lanes: Lanes[object] = Lanes(LaneLimits(max_step=MAX_STEP), StepTimes(MAX_STEP, {1: 0.71, MAX_STEP: 14.68}))
    now_s, step_s, requests = 0.0, 0.0, [object() for _ in range(online)]
    started_s = time.perf_counter()
    for _ in range(STEPS):
        if lanes.backlog(Lane.BATCH) < MAX_STEP:
            lanes.offer(Lane.BATCH, object(), CHUNK, now_s)
        for request in requests:
            lanes.offer(Lane.ONLINE, request, 1, now_s)
        formed_s = time.perf_counter()
        lanes.due_s(now_s)
        images = sum(map(len, lanes.next_step(now_s)))
        step_ms = lanes.times.ms(images)
        now_s += step_ms / 1e3
        lanes.launched(0.1)
        lanes.ended(now_s, images, step_ms)
        step_s += time.perf_counter() - formed_s
    total_s = time.perf_counter() - started_s
    return step_s / STEPS * 1e6, (total_s - step_s) / STEPS * 1e6


if __name__ == "__main__":
    main()
