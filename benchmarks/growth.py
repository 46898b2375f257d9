"""What an image costs a job as jobs grow: 1,000, 10,000 and 100,000 images, on a pool that runs.

    python benchmarks/growth.py            # some 10 minutes: writes results
    python benchmarks/growth.py --rounds 1 --sizes 6000 8000

Everything is real: tars of the digits that ship, their model, the pool, each output. Sizes take turns. While a job's
processes start it decodes ahead, and at its end it has only to score what it has decoded; what an image costs is looked
at in between, in seconds and in CPU time of all processes (Ray's too). It would be more in a larger job if anything in
one did work for all that went before, or for all that is to come.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.processes import Cpu
from benchmarks.results import write_results
from benchmarks.scale import MODEL, write_input
from deployments.cluster import local_ray, own_ray, start_serve
from deployments.config import Config
from jobs.spec import JobSpec

SIZES = (1_000, 10_000, 100_000)
IMAGES_PER_SHARD = 1_000
AHEAD = 2_000  # images that may be decoded while a job starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="images, from few to many")
    options = parser.parse_args()
    own_ray()
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(Path(folder), tuple(options.sizes), options.rounds)
    result = {"seconds": medians(runs, "seconds"), "an_image": {kind: medians(runs, kind) for kind in ("ms", "cpu_ms")}}
    print(json.dumps(result, indent=1))
    if tuple(options.sizes) == SIZES:
        write_results("growth", {"rounds": options.rounds, **result, "runs": runs})


def measure(folder: Path, sizes: tuple[int, ...], rounds: int) -> dict[int, list[dict[str, float]]]:
    """Of each size its rounds, after a first job that is not measured."""
    from deployments.pool import bring_up

    for size in sizes:
        shards = -(-size // IMAGES_PER_SHARD)
        write_input(folder / str(size), shards, size // shards)
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with local_ray():
        start_serve()
        bring_up(MODEL, Config().pool)
        one_job(folder, sizes[0], 0)
        for number, size in itertools.product(range(1, rounds + 1), sizes):
            runs[size].append(one_job(folder, size, number))
            print(size, runs[size][-1], file=sys.stderr)
    return runs


def one_job(folder: Path, size: int, number: int) -> dict[str, float]:
    """A whole job: its seconds, and what an image costs in its middle, if it has one."""
    from jobs.prepare import prepare
    from jobs.run import run_job

    spec = JobSpec(input=str(folder / str(size)), output=str(folder / f"out-{size}-{number}"), model=MODEL)
    marks: list[Mark] = []
    with Cpu(os.getpid()) as cpu:
        started_s = time.perf_counter()
        report = run_job(
            prepare(spec), Config(), lambda now: marks.append(Mark(now.images, time.perf_counter(), cpu.used_s))
        )
        took_s = time.perf_counter() - started_s
    assert (report.images, report.errors) == (size, 0), report
    return {"seconds": round(took_s, 2), **of_an_image(marks, size)}


class Mark(NamedTuple):
    """How far a job has come."""

    images: int
    seconds: float
    cpu_s: float


def of_an_image(marks: list[Mark], size: int) -> dict[str, float]:
    """What one costs in ms, ahead of what is scored last and behind what is decoded first."""
    middle = [mark for mark in marks if AHEAD <= mark.images <= size - AHEAD]
    if len(middle) < 2:
        return {}
    first, last = middle[0], middle[-1]
    images = last.images - first.images
    return {
        "ms": round((last.seconds - first.seconds) / images * 1e3, 3),
        "cpu_ms": round((last.cpu_s - first.cpu_s) / images * 1e3, 3),
    }


def medians(runs: dict[int, list[dict[str, float]]], kind: str) -> dict[int, float]:
    """Of each size that has it."""
    return {
        size: statistics.median(one[kind] for one in rounds)
        for size, rounds in runs.items()
        if all(kind in one for one in rounds)
    }


if __name__ == "__main__":
    main()
