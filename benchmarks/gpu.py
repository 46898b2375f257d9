"""What one GPU gives: the model alone, decode, images from JPEG files to scores, online beside a job. Under 8 minutes.

    python benchmarks/gpu.py                      # ViT-B/16 in bfloat16 on the GPU: writes results
    python benchmarks/gpu.py --device cpu --small # to see that it runs: a small model, few images, nothing is written

The weights are random, which costs what trained ones cost. Steps that are run as CUDA graphs, and compiled ones, must
give the scores of plain ones before they are timed. Online requests come to the pool at random, up to a tenth of what a
job alone scores; their latency counts from when they were due.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.arrivals import arrivals
from benchmarks.photos import write_checkpoint, write_photos
from benchmarks.results import percentile, write_results
from jobs.receipts import Progress
from pipeline.checkpoint import find_checkpoint
from pipeline.decode import decode_image
from pipeline.dispatcher import Scores
from pipeline.model import Classifier
from pipeline.transform import ImageTransform
from tests.corpora import tar_of

CORES = os.cpu_count() or 1
ENGINES = {
    "eager": {"compile": False, "graphs": False},
    "graphs": {"compile": False, "graphs": True},
    "compiled": {"compile": True, "graphs": True},
}
UNDER_WAY = 2  # steps, as the pool has
PHOTOS, PER_TAR = 512, 1000
ONLINE_SHARE, MOST_ONLINE_PER_S, ONLINE_WITHIN_S = 0.1, 100.0, 60.0
SCORES_APART = {"bfloat16": 0.05, "float32": 1e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=list(SCORES_APART))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--tar-images", type=int, default=40_000, help="of the job from tar shards; 0 for none")
    parser.add_argument("--small", action="store_true", help="a small model, few images; nothing is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    print(json.dumps(found))
    if not options.small:
        write_results("gpu", found)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of it, each part told as it is done."""
    photos, model = folder / "photos", folder / "model"
    write_photos(photos, 32 if options.small else PHOTOS)
    files = [path.read_bytes() for path in sorted(photos.iterdir())]
    paths = sorted(photos.iterdir())[:60]
    write_checkpoint(model, paths) if options.small else write_base(model)
    sizes = (1, 4) if options.small else (1, 8, 16, 32, 64, 128)
    found: dict[str, Any] = {"device": device_name(options.device), "dtype": options.dtype, "photos": len(files)}

    def tell(name: str, value: Any) -> None:
        found[name] = value
        print(name, value, file=sys.stderr)

    classifiers = {engine: classifier(str(model), options, engine, sizes[-1]) for engine in options.engines}
    transform = classifiers[options.engines[0]].info.transform
    pixels_NHWC = np.stack([decode_image(file, transform) for file in files[: sizes[-1]]])
    plain = classifier(str(model), options, None, sizes[-1]).score(pixels_NHWC, 5)
    for engine, one in classifiers.items():
        check_same(engine, one.launch([pixels_NHWC], 5, details=False)(), plain, SCORES_APART[options.dtype])
        tell(f"model_{engine}", {size: images_per_s(one, pixels_NHWC[:size], options.seconds) for size in sizes})
    tell("decode_threads", decoded_per_s(ThreadPoolExecutor(CORES), files, transform, options.seconds))
    tell("decode_processes", decoded_per_s(ProcessPoolExecutor(CORES), files, transform, options.seconds))
    if options.device == "cuda":
        tell("decode_gpu", decoded_on_gpu(files, transform, options.seconds))
    tell("from_memory", from_memory(classifiers[options.engines[-1]], files, sizes[-1], options.seconds))
    del classifiers, one  # the job has its own model
    if options.tar_images:
        for name, value in from_tars(folder, str(model), files, options).items():
            tell(name, value)
    return found


def write_base(folder: Path) -> None:
    """Saves a ViT-B/16 at 224 with 1,000 classes, as google/vit-base-patch16-224 is."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    labels = {index: f"class {index}" for index in range(1000)}
    ViTForImageClassification(ViTConfig(id2label=labels)).save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def classifier(model: str, options: argparse.Namespace, engine: str | None, max_step: int) -> Classifier:
    """The model as an engine runs it; None for plain calls."""
    how = ENGINES[engine] if engine else {"compile": False, "graphs": False}
    one = Classifier(find_checkpoint(model), device=options.device, dtype=options.dtype, compile=how["compile"])
    if engine:
        one.warm(max_step, graphs=how["graphs"])
    return one


def check_same(engine: str, found: Scores, expected: Scores, apart: float) -> None:
    """Ends the benchmark where an engine's scores are not those of plain calls."""
    worst = float(np.abs(found.scores_NK - expected.scores_NK).max())
    assert worst <= apart, f"{engine}: scores differ by {worst}, more than {apart}"


def images_per_s(one: Classifier, pixels_NHWC: np.ndarray, seconds: float) -> float:
    """Of steps of these images, with the next one launched before the last is read."""
    under_way: deque[Callable[[], Scores]] = deque()
    steps, started_s = 0, time.perf_counter()
    while time.perf_counter() < started_s + seconds:
        under_way.append(one.launch([pixels_NHWC], 5, details=False))
        if len(under_way) == UNDER_WAY:
            under_way.popleft()()
            steps += 1
    while under_way:
        under_way.popleft()()
        steps += 1
    return round(steps * len(pixels_NHWC) / (time.perf_counter() - started_s), 1)


def decoded_per_s(
    workers: ThreadPoolExecutor | ProcessPoolExecutor, files: list[bytes], transform: ImageTransform, seconds: float
) -> float:
    """Of workers that decode and resize, and give back what stands for the pixels."""
    with workers:
        list(workers.map(partial(decode_some, transform), parts(files)))
        count, started_s = 0, time.perf_counter()
        while time.perf_counter() < started_s + seconds:
            count += sum(workers.map(partial(decode_some, transform), parts(files)))
        return round(count / (time.perf_counter() - started_s), 1)


def parts(files: list[bytes], size: int = 8) -> Iterator[list[bytes]]:
    return (files[start : start + size] for start in range(0, len(files), size))


def decode_some(transform: ImageTransform, files: list[bytes]) -> int:
    return len([decode_image(file, transform) for file in files])


def decoded_on_gpu(files: list[bytes], transform: ImageTransform, seconds: float) -> dict[str, float]:
    """nvJPEG and an antialiased resize on the device: images/s, and how far its pixels are from the exact ones."""
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-not-found]
    from torchvision.transforms.v2.functional import resize  # type: ignore[import-not-found]

    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]

    def decode(some: list[torch.Tensor]) -> torch.Tensor:
        images = decode_jpeg(some, mode=ImageReadMode.RGB, device="cuda")
        return torch.stack([resize(image, [transform.height, transform.width], antialias=True) for image in images])

    exact_NHWC = np.stack([decode_image(file, transform) for file in files[:32]]).astype(np.int16)
    apart = np.abs(decode(encoded[:32]).permute(0, 2, 3, 1).cpu().numpy().astype(np.int16) - exact_NHWC)
    count, started_s = 0, time.perf_counter()
    while time.perf_counter() < started_s + seconds:
        for start in range(0, len(encoded), 128):
            count += len(decode(encoded[start : start + 128]))
    torch.cuda.synchronize()
    rate = count / (time.perf_counter() - started_s)
    return {"images_per_s": round(rate, 1), "mean_apart": float(apart.mean()), "most_apart": float(apart.max())}


def from_memory(one: Classifier, files: list[bytes], step: int, seconds: float) -> float:
    """From encoded images in memory to scores, decoded by threads of this process."""
    transform = one.info.transform

    def pixels(some: list[bytes]) -> np.ndarray:
        return np.stack([decode_image(file, transform) for file in some])

    waiting: deque[Any] = deque()
    under_way: deque[Callable[[], Scores]] = deque()
    count, number, started_s = 0, 0, time.perf_counter()
    some = list(parts(files, max(1, step // CORES)))
    with ThreadPoolExecutor(CORES) as threads:
        while time.perf_counter() < started_s + seconds:
            while len(waiting) < 4 * CORES:
                waiting.append(threads.submit(pixels, some[number % len(some)]))
                number += 1
            arrays = [waiting.popleft().result()]
            while waiting and sum(map(len, arrays)) + len(some[0]) <= step:
                arrays.append(waiting.popleft().result())
            under_way.append(one.launch(arrays, 5, details=False))
            if len(under_way) == UNDER_WAY:
                count += len(under_way.popleft()().top_NK)
        took_s = time.perf_counter() - started_s
        for future in waiting:
            future.cancel()
    return round(count / took_s, 1)


def from_tars(folder: Path, model: str, files: list[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """A job of Tandem's on a pool that runs; then online requests alone, and beside the same job."""
    from deployments.cluster import local_ray, own_ray, start_serve
    from deployments.config import Config, PoolConfig

    own_ray()
    from deployments.pool import bring_up, pool_handle
    from jobs.prepare import prepare
    from jobs.run import run_job
    from jobs.spec import JobSpec

    (folder / "tars").mkdir()
    for start in range(0, options.tar_images, PER_TAR):
        numbers = range(start, min(options.tar_images, start + PER_TAR))
        members = {f"{number:08}.jpg": files[number % len(files)] for number in numbers}
        (folder / "tars" / f"{start:08}.tar").write_bytes(tar_of(members))
    config = Config(pool=PoolConfig(dtype=options.dtype, device=options.device))

    def job(output: str, scoring: threading.Event) -> dict[str, Any]:
        def watch(progress: Progress) -> None:
            if progress.images:
                scoring.set()

        try:
            spec = JobSpec(input=str(folder / "tars"), output=str(folder / output), model=model)
            report = run_job(prepare(spec), config, watch).to_dict()
            return {name: report[name] for name in ("images", "images_per_s", "seconds", "stage_seconds")}
        finally:
            scoring.set()

    with local_ray(), ThreadPoolExecutor(1) as threads:
        start_serve()
        info = bring_up(model, config.pool).info
        pixels_NHWC = decode_image(files[0], info.transform)[None]
        plain = job("plain", threading.Event())
        per_s = min(ONLINE_SHARE * plain["images_per_s"], MOST_ONLINE_PER_S)

        async def online(ended: Callable[[], bool]) -> dict[str, float | None]:
            return await random_requests(pool_handle(model).score_online, pixels_NHWC, per_s, options.seconds, ended)

        alone = asyncio.run(online(lambda: False))
        scoring = threading.Event()
        shared = threads.submit(job, "shared", scoring)
        scoring.wait()
        beside = asyncio.run(online(shared.done))
        return {
            "from_tars": plain,
            "online_alone": alone,
            "online_beside_job": beside,
            "job_beside_online": shared.result(),
        }


async def random_requests(
    ask: Any, pixels_NHWC: np.ndarray, per_s: float, seconds: float, ended: Callable[[], bool]
) -> dict[str, float | None]:
    """The latencies of requests for so long, or until it has `ended`."""
    waiting = []

    async def one(due_s: float) -> float:
        await ask.remote(pixels_NHWC, 5, [ONLINE_WITHIN_S])
        return (time.perf_counter() - due_s) * 1e3

    await one(time.perf_counter())  # the first one makes the way, and is not counted
    async for due_s in arrivals(per_s, seconds, random.Random()):
        if ended():
            break
        waiting.append(asyncio.create_task(one(due_s)))
    latencies_ms = await asyncio.gather(*waiting)
    p50_ms, p99_ms = (percentile(latencies_ms, share) if latencies_ms else None for share in (0.5, 0.99))
    return {"per_s": round(per_s, 1), "requests": len(waiting), "p50_ms": p50_ms, "p99_ms": p99_ms}


if __name__ == "__main__":
    main()
