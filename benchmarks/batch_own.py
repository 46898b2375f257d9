"""Tandem, and what bounds it, on a folder of images: for `benchmarks/batch.py`.

    python benchmarks/batch_own.py tandem|model_alone|limit MODEL DTYPE [threads|processes]

`model_alone` scores pixels that are there already; `limit` decodes files and scores them, with nothing in between. Each
is arranged in two ways: one process whose decoders and model have all cores as threads, or for each core a process
that decodes and scores by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.contender import Answers, Done, answer_runs

CORES = os.cpu_count() or 1
STEPS = (8, 16, 32, 64)
IMAGES_PER_STEP_SIZE = 64
STEP = 32  # of `limit`, as Tandem has on a CPU


def tandem(model: str, dtype: str) -> Callable[[str], Done]:
    """Jobs on a pool that runs, with the defaults."""
    from deployments.cluster import local_ray, own_ray, start_serve
    from deployments.config import PoolConfig

    own_ray()
    from deployments.pool import bring_up

    _open.enter_context(local_ray())
    start_serve()
    bring_up(model, PoolConfig(dtype=dtype))  # type: ignore[arg-type]
    return partial(_job, model)


def _job(model: str, folder: str) -> Done:
    from pyarrow import parquet

    from deployments.config import Config
    from jobs.prepare import prepare
    from jobs.receipts import Progress
    from jobs.run import run_job
    from jobs.spec import JobSpec

    started_s, told = time.perf_counter(), dict[str, float]()

    def watch(progress: Progress) -> None:
        if progress.images:
            told.setdefault("startup_s", time.perf_counter() - started_s)

    with tempfile.TemporaryDirectory() as output:
        report = run_job(prepare(JobSpec(input=folder, output=output, model=model)), Config(), watch)
        took_s = time.perf_counter() - started_s
        rows = parquet.read_table(output, columns=["key", "label", "score"]).to_pylist()
    answers = {row["key"]: (row["label"], row["score"]) for row in rows}
    return Done(answers, {**told, "seconds": took_s, "stage_seconds": report.stage_seconds})


def model_alone(model: str, dtype: str, arrangement: str) -> Callable[[str], Done]:
    """As many images as the folder has, at the step size that was fastest."""
    if arrangement == "threads":
        _load(model, dtype, CORES)
        step = min(STEPS, key=_ms_per_image)
        return lambda folder: _noise_alone(step, len(os.listdir(folder)))
    pool = multiprocessing.get_context("spawn").Pool(CORES, _load, (model, dtype, 1))
    step = min(STEPS, key=lambda size: sum(pool.map(_ms_per_image, [size] * CORES, chunksize=1)))

    def run(folder: str) -> Done:
        images = len(os.listdir(folder))
        pool.map(partial(_noise_alone, step), [images // CORES] * CORES, chunksize=1)
        return Done(told={"step": step})

    return run


def limit(model: str, dtype: str, arrangement: str) -> Callable[[str], Done]:
    """The folder's files, decoded and scored."""
    if arrangement == "threads":
        _load(model, dtype, CORES)
        return _files_by_threads
    pool = multiprocessing.get_context("spawn").Pool(CORES, _load, (model, dtype, 1))

    def run(folder: str) -> Done:
        answers: Answers = {}
        for some in pool.imap_unordered(_files_alone, _steps(folder)):
            answers |= some
        return Done(answers)

    return run


_open = ExitStack()  # for as long as this process lasts
_here: Any = None  # the model of this process


def _load(model: str, dtype: Any, threads: int) -> None:
    global _here
    from pipeline.checkpoint import find_checkpoint
    from pipeline.model import Classifier

    _here = Classifier(find_checkpoint(model), device="cpu", dtype=dtype)
    _here.use_threads(threads)
    _here.warm(STEP)


def _ms_per_image(step: int) -> float:
    pixels = _noise(step)
    _here.launch([pixels], 1, details=False)()
    started_s = time.perf_counter()
    for _ in range(IMAGES_PER_STEP_SIZE // step):
        _here.launch([pixels], 1, details=False)()
    return (time.perf_counter() - started_s) / IMAGES_PER_STEP_SIZE * 1e3


def _noise_alone(step: int, images: int) -> Done:
    pixels = _noise(step)
    for _ in range(images // step):
        _here.launch([pixels], 1, details=False)()
    if rest := images % step:
        _here.launch([pixels[:rest]], 1, details=False)()
    return Done(told={"step": step})


def _noise(images: int) -> np.ndarray:
    transform = _here.info.transform
    return np.random.default_rng(0).integers(0, 256, (images, transform.height, transform.width, 3), np.uint8)


def _files_by_threads(folder: str) -> Done:
    """Decodes the next steps while one is scored."""
    answers: Answers = {}
    with ThreadPoolExecutor(CORES) as threads:
        steps = [(paths, threads.submit(_pixels, paths)) for paths in _steps(folder)]
        for paths, pixels in steps:
            answers |= _scored(paths, pixels.result())
    return Done(answers)


def _files_alone(paths: list[Path]) -> Answers:
    return _scored(paths, _pixels(paths))


def _steps(folder: str) -> Iterator[list[Path]]:
    paths = sorted(Path(folder).iterdir())
    for start in range(0, len(paths), STEP):
        yield paths[start : start + STEP]


def _pixels(paths: list[Path]) -> np.ndarray:
    from pipeline.decode import decode_image

    return np.stack([decode_image(path.read_bytes(), _here.info.transform) for path in paths])


def _scored(paths: list[Path], pixels_NHWC: np.ndarray) -> Answers:
    best, labels = _here.launch([pixels_NHWC], 1, details=False)(), _here.info.labels
    return {
        path.name: (labels[index], float(score))
        for path, index, score in zip(paths, best.top_NK[:, 0], best.scores_NK[:, 0], strict=True)
    }


if __name__ == "__main__":
    kinds: dict[str, Any] = {"tandem": tandem, "model_alone": model_alone, "limit": limit}
    kind, *options = sys.argv[1:]
    with _open:
        answer_runs(kinds[kind](*options))
