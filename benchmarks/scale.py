"""What a job costs as it grows: memory and work of its driver, of its workers and of Ray's object store, by shards.

    python benchmarks/scale.py --shards 2000 --images 1000          # the whole data path, but the model
    python benchmarks/scale.py --shards 100000 --images 1000 --no-data   # plan and commit only

Scoring is stubbed at the pool's seam: a pool of the same name whose replica answers at once. With `--no-data` the data
path is stubbed too: its receipts come, and its chunks are staged, without an image being read. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script, and uses what the tests do

from benchmarks.results import machine
from deployments.cluster import local_ray, own_ray, start_serve
from deployments.config import Config, PoolConfig
from jobs.corpus import digits, encode
from jobs.models import shipped
from jobs.spec import JobSpec
from pipeline.chunks import IMAGES_PER_CHUNK, ChunkLimits
from tests.corpora import tar_of

MODEL = str(shipped("digits-vit"))
SAMPLE_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--images", type=int, default=1000, help="in each shard")
    parser.add_argument("--chunk-images", type=int, default=IMAGES_PER_CHUNK, help="few, to see what a chunk costs")
    parser.add_argument("--no-data", action="store_true", help="plan and commit only")
    parser.add_argument("--folder", default=None, help="where INPUT and OUTPUT are made, such as /dev/shm")
    options = parser.parse_args()
    own_ray()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_input(Path(folder) / "in", options.shards, options.images)
        result = measure(Path(folder), options)
    print(json.dumps({**machine(), **vars(options), **result}))


def write_input(folder: Path, shards: int, images: int) -> None:
    """One tar of `images` digits under `shards` names: hard links, which a reader takes for a file each."""
    folder.mkdir()
    encoded = [encode(digit) for digit in digits()[:100]]
    members = {f"{index:06}.{suffix}": data for index in range(images) for suffix, data in [encoded[index % 100]]}
    first = folder / "00000000.tar"
    first.write_bytes(tar_of(members))
    for number in range(1, shards):
        place = folder / f"{number // 1000:05}"
        place.mkdir(exist_ok=True)
        # a file has some 65,000 links at most
        if number % 50_000 == 0:
            first = place / f"{number:08}.tar"
            first.write_bytes(tar_of(members))
        else:
            os.link(first, place / f"{number:08}.tar")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the job and tells its times and peaks."""
    from jobs.prepare import prepare
    from jobs.run import run_job

    limits = ChunkLimits(images=options.chunk_images)
    spec = JobSpec(input=str(folder / "in"), output=str(folder / "out"), model=MODEL, limits=limits)
    before_mb = rss_mb(os.getpid())
    started_s = time.perf_counter()
    job = prepare(spec)
    prepare_s = time.perf_counter() - started_s
    with local_ray():
        start_serve()
        deploy_stub()
        stub = mock.patch("jobs.datapath.DataPath.receipts", staged_without_data(options.images, limits))
        watch = Watch()
        with watch, stub if options.no_data else nullcontext():
            cpu_s = time.process_time()
            report = run_job(job, Config())
            cpu_s = time.process_time() - cpu_s
    return {
        "prepare_s": round(prepare_s, 1),
        "run_s": report.seconds,
        "images_per_s": report.images_per_s,
        "ms_per_shard": round(report.seconds / options.shards * 1e3, 2),
        "driver_cpu_s": round(cpu_s, 2),
        "driver_before_mb": before_mb,
        "driver_peak_mb": watch.driver_mb,
        "worker_peak_mb": watch.worker_mb,
        "object_store_peak_mb": watch.store_mb,
    }


def deploy_stub() -> None:
    """A pool for MODEL, by its own name, whose replica has an answer ready."""
    from ray import serve

    from deployments.answer import Answer
    from deployments.pool import DEPLOYMENT, Running, app_name, wait_running
    from pipeline.dispatcher import Scores

    class Stub:
        def __init__(self) -> None:
            from pipeline.checkpoint import find_checkpoint
            from pipeline.model import Classifier

            self._info = Classifier(find_checkpoint(MODEL)).info

        def describe(self) -> Any:
            return Running(self._info, PoolConfig(), {})

        async def score_batch(self, nested: dict[str, Any], images: int, top_k: int) -> Any:
            count = len(await nested["chunk"])
            top_NK = np.tile(np.arange(top_k, dtype=np.int32), (count, 1))
            return Answer(Scores(top_NK, np.full((count, top_k), 0.1, np.float32)), "stub", self._info.scores_as)

    deployment = serve.deployment(name=DEPLOYMENT, ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=10_000)
    target = serve.RunTarget(deployment(Stub).bind(), name=app_name(MODEL), route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    wait_running(app_name(MODEL), 120)


def staged_without_data(images: int, limits: ChunkLimits) -> Any:
    """A `DataPath.receipts` that stages chunks of made-up rows."""
    from jobs.receipts import Receipt
    from jobs.spec import JobPaths
    from pipeline.chunks import chunks, to_ipc
    from pipeline.inputs import Sample
    from pipeline.output import scored

    class Reader:
        carried, skipped = pa.schema([]), Counter[str]()

        def __iter__(self) -> Iterator[Sample]:
            for row in range(images):
                yield Sample(row=row, key=f"{row:06}", data=b"")

        def close(self) -> None: ...

    def receipts(path: Any, work: list[Any], pool: PoolConfig) -> Iterator[Receipt]:
        ready = []
        for chunk in chunks(Reader(), "shard", limits):
            count = len(chunk.images)
            top_NK = np.tile(np.arange(path.top_k, dtype=np.int32), (count, 1))
            rows = scored(chunk.rows, path.labels, top_NK, np.full(top_NK.shape, 0.1, np.float32))
            ready.append((chunk, to_ipc(rows)))
        assert len(ready) == -(-images // limits.images)
        for shard, _ in work:
            for chunk, data in ready:
                path.target.write(JobPaths.staged(shard.number, chunk.index, last=chunk.last), data)
                yield Receipt(
                    shard=shard.number, chunk=chunk.index, last=chunk.last, rows=len(chunk.images), errors=0, bytes=0,
                    read_s=0.0, decode_s=0.0, score_s=0.0, stage_s=0.0, replica="stub", example="",
                )  # fmt: skip

    return receipts


class Watch:
    """The peaks of memory while the context lasts, in MB: this process, the largest worker, Ray's object store."""

    def __init__(self) -> None:
        self.driver_mb = self.worker_mb = self.store_mb = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self.driver_mb = max(self.driver_mb, rss_mb(os.getpid()))
            self.worker_mb = max([self.worker_mb, *(rss_mb(worker) for worker in data_workers())])
            self.store_mb = max(self.store_mb, store_mb())


def rss_mb(process: int) -> float:
    """Anonymous memory: what is mapped from the object store counts there."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


def data_workers() -> Iterator[int]:
    """The processes of this job's readers, decoders and callers."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if title.startswith(("ray::Read", "ray::Map")):
            yield int(path.parent.name)


def store_mb() -> float:
    """What Ray's object store holds now."""
    import ray

    resources = ray._private.internal_api.get_memory_info_reply(
        ray._private.internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    )
    return float(resources.store_stats.object_store_bytes_used) / 1e6


if __name__ == "__main__":
    main()
