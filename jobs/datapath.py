"""The data path of a job, as a Ray Data dataset: read -> decode -> score and stage -> receipts.

Every row is one chunk, and every block one row. Readers and decoders are tasks on CPUs; the scoring stage only calls
the pool, which owns the accelerators. Nothing here raises for a bad image: that is a row with an error.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from deployments.config import PoolConfig
from deployments.scheduling import give_way
from jobs.lease import Fence
from jobs.receipts import Receipt
from jobs.spec import JobPaths
from pipeline.chunks import ENDS_SHARD, Chunk, ChunkLimits, chunks, failed_shard, from_ipc, to_ipc
from pipeline.counts import Counts
from pipeline.decode import decode_each
from pipeline.dispatcher import Scores
from pipeline.errors import ImageError, JobError, OutputConflict, ShardError
from pipeline.imports import uncollected
from pipeline.inputs import Columns, open_reader
from pipeline.isolation import IsolatedReader, decode_isolated
from pipeline.output import scored_or_failed, with_errors
from pipeline.shards import Shard
from pipeline.storage import Store
from pipeline.transform import ImageTransform

# A caller waits for the pool and asks for no CPU. Decoders leave a tenth of each for what asks for little (readers, the
# endpoint): where nodes die, what is left over beside it must still have room for a decoder, or the job would wait for
# ever.
READ_CPUS, DECODE_CPUS = 0.1, 0.9
# A model on CPUs takes all cores, and while it waits for images it takes none: then the few decoders that fit beside it
# would leave some idle.
FEW_DECODERS, THREADS_OF_FEW = 3, 2
REPLICAS_PER_CALLER = 4
WINDOW = 4  # chunks under way for each replica: enough to hide a call's latency, few enough for its lane
SHARDS_AT_ONCE = 2000
CONNECT_WITHIN_S = 60.0
CRASHES_TAKEN = 3  # of a task's worker, before its images are what is suspected

PIXELS = "pixels"

_READ = pa.schema(
    [
        ("shard", pa.int32()),
        ("chunk", pa.int32()),
        ("last", pa.bool_()),
        ("read_s", pa.float64()),
        ("rows", pa.large_binary()),
        ("images", pa.large_list(pa.large_binary())),
    ]
)
_DECODED = pa.schema(
    [*(field for field in _READ if field.name != "images"), ("bytes", pa.int64()), ("decode_s", pa.float64()),
     (PIXELS, pa.large_binary())]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataPath:
    """What the stages need to know. It travels to every worker, so it is small."""

    source: Store
    target: Store
    columns: Columns
    carried: pa.Schema
    limits: ChunkLimits
    fence: Fence
    model: str
    scores_as: str
    transform: ImageTransform
    labels: tuple[str, ...]
    top_k: int

    def receipts(self, work: list[tuple[Shard, frozenset[int]]], pool: PoolConfig) -> Iterator[Receipt]:
        """Scores the shards, except their chunks that are staged already, and yields a receipt for each chunk.

        The pool gets work for all replicas that it may have, whether or not they are there yet.

        One dataset after another, so that what Ray keeps of each task does not grow with the job, and so that each
        finds anew how many decoders the cluster has room for.
        """
        _configure(DataContext.get_current())
        for start in range(0, len(work), SHARDS_AT_ONCE):
            yield from self._stretch(work[start : start + SHARDS_AT_ONCE], pool)

    def _stretch(self, work: list[tuple[Shard, frozenset[int]]], pool: PoolConfig) -> Iterator[Receipt]:
        from deployments.pool import cpus_to_come  # see `_Caller`

        resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        decoders, decode_cpus = decoders_for(resources.get("CPU", 0.0), cpus_to_come(self.model, pool))
        callers, in_flight = callers_for(pool.ceiling)
        dataset = (
            ray.data.read_datasource(
                _Shards(self, work),
                override_num_blocks=len(work),
                num_cpus=READ_CPUS,
                concurrency=max(1, decoders // 4),
            )
            .map_batches(
                partial(_decode, self.transform, THREADS_OF_FEW if decoders <= FEW_DECODERS else 1),
                batch_size=1,
                batch_format="pyarrow",
                zero_copy_batch=True,
                num_cpus=decode_cpus,
                # an explicit size keeps Ray from fusing this stage with its neighbours
                compute=TaskPoolStrategy(size=decoders),
            )
            .map_batches(
                _Caller,
                fn_constructor_args=(self,),
                batch_size=1,
                batch_format="pyarrow",
                zero_copy_batch=True,
                num_cpus=0,
                compute=ActorPoolStrategy(
                    size=callers,
                    max_tasks_in_flight_per_actor=in_flight + 2,
                    max_concurrent_calls_per_actor=in_flight,
                    enable_true_multi_threading=True,
                ),
            )
        )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in table.to_pylist():
                yield Receipt(**row)


def _configure(context: DataContext) -> None:
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.raise_original_map_exception = True  # or a stage's error comes as text, and what kind it was is lost
    # Ray holds a stage's rows back until a block is full; a chunk should move on at once, so a block is one row.
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    context.execution_options.resource_limits = ExecutionResources.for_limits(gpu=0)


def callers_for(replicas: int) -> tuple[int, int]:
    """How many processes call so many replicas, and the chunks that each of them keeps under way."""
    callers = math.ceil(replicas / REPLICAS_PER_CALLER)
    return callers, WINDOW * math.ceil(replicas / callers)


def decoders_for(free_cpus: float, kept_cpus: float) -> tuple[int, float]:
    """Decode tasks at once, and CPUs of each: what the pool, its endpoint, the caller and the reader leave.

    `kept_cpus` of the free ones are left to replicas that are still to come, but for those of one task. Where less than
    one CPU is left, the task takes what there is: one that asks for more would wait for ever. Raises `JobError`.
    """
    if free_cpus <= READ_CPUS:
        raise JobError(
            f"the cluster has {free_cpus:g} free CPUs, and a job needs more than {READ_CPUS:g} beside the pool: add a "
            "node, or give the pool fewer cpus or replicas"
        )
    cpus = min(DECODE_CPUS, round(free_cpus - READ_CPUS, 2))
    return max(1, int((free_cpus - READ_CPUS - kept_cpus) / cpus)), cpus


class _Shards(Datasource):
    """One read task for each shard."""

    def __init__(self, path: DataPath, work: list[tuple[Shard, frozenset[int]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path, self._work = path, work

    def estimate_inmemory_data_size(self) -> int:
        return sum(shard.size for shard, _ in self._work)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read, self._path, shard, staged),
                BlockMetadata(num_rows=None, size_bytes=shard.size, input_files=None, exec_stats=None),
                schema=_READ,
            )
            for shard, staged in self._work
        ]


def _read(path: DataPath, shard: Shard, staged: frozenset[int]) -> Iterator[pa.Table]:
    give_way()
    started, before = time.perf_counter(), Counts()
    for chunk in _chunks(path, shard):
        counts = Counts.of_chunk(chunk, shard, before)
        before += counts
        if chunk.index not in staged:
            row = {
                "shard": shard.number,
                "chunk": chunk.index,
                "last": chunk.last,
                "read_s": time.perf_counter() - started,
                "rows": to_ipc(chunk.rows.replace_schema_metadata(counts.to_metadata())),
                "images": chunk.images,
            }
            yield pa.Table.from_pylist([row], schema=_READ)
        started = time.perf_counter()


def _suspect() -> bool:
    """Whether this task's worker ended so often that the next try must expect it, and be `pipeline.isolation`'s.

    Ray starts a task again as often as its worker dies, and tells which try it is in no public way.
    """
    worker: Any = ray._private.worker.global_worker
    attempt: int = worker.core_worker.get_current_task_attempt_number()
    return attempt >= CRASHES_TAKEN


def _chunks(path: DataPath, shard: Shard) -> Iterator[Chunk]:
    try:
        reader = (IsolatedReader if _suspect() else open_reader)(path.source, shard, path.columns)
        _check_carried(reader.carried, path.carried, shard.name)
    except ENDS_SHARD as error:
        yield failed_shard(shard.name, error, path.carried)
    else:
        yield from chunks(reader, shard.name, path.limits.steady() if shard.number else path.limits)


def _check_carried(found: pa.Schema, planned: pa.Schema, shard_name: str) -> None:
    """All files of an output have the same columns, or no reader takes them together."""
    for name, kind, other in zip(planned.names, planned.types, found.types, strict=True):
        if kind != other:
            raise ShardError(f"{shard_name}: column {name!r} is {other} here, but {kind} in the job's first shard")


def _decode(transform: ImageTransform, threads: int, table: pa.Table) -> pa.Table:
    give_way()
    started = time.perf_counter()
    (row,) = table.drop_columns("images").to_pylist()
    encoded = _only(table["images"]).flatten()
    images = [image.as_py() for image in encoded]
    decoded = decode_isolated(images, transform) if _suspect() else decode_each(images, transform, threads)
    pixels_NHWC, errors = _pixels(decoded, len(encoded), transform)
    if len(pixels_NHWC) < len(encoded):
        row["rows"] = to_ipc(with_errors(from_ipc(row["rows"]), "decode", errors))
    row |= {
        "bytes": sum(image.as_buffer().size for image in encoded),
        "decode_s": time.perf_counter() - started,
    }
    decoded = pa.Table.from_pylist([row], schema=pa.schema([field for field in _DECODED if field.name != PIXELS]))
    return decoded.append_column(PIXELS, _binary_of(pixels_NHWC))


def _only(column: pa.ChunkedArray) -> pa.Array:
    """The one value of a column of a chunk's row, as an array: where it lies, without a copy."""
    (part,) = (part for part in column.chunks if len(part))
    return part


def _binary_of(pixels_NHWC: np.ndarray) -> pa.Array:
    """One binary value, which is the array's memory."""
    buffers = [None, pa.array([0, pixels_NHWC.nbytes], pa.int64()).buffers()[1], pa.py_buffer(pixels_NHWC)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)


def _pixels(
    decoded: Iterable[np.ndarray | ImageError], count: int, transform: ImageTransform
) -> tuple[np.ndarray, list[str | None]]:
    """uint8 [N, H, W, 3] of those of `count` images that decode, and for every image its error or None."""
    pixels_NHWC = np.empty((count, transform.height, transform.width, 3), np.uint8)
    errors: list[str | None] = []
    good = 0
    for result in decoded:
        if isinstance(result, ImageError):
            errors.append(str(result))
        else:
            pixels_NHWC[good] = result
            errors.append(None)
            good += 1
    return pixels_NHWC[:good], errors


class _Caller:
    """Sends chunks to the pool and stages what comes back. Called from several threads."""

    def __init__(self, path: DataPath) -> None:
        # not with the module, which readers and decoders import too: they would load Serve, for a second each
        with uncollected():
            from deployments.batch import score_chunk
            from deployments.pool import connect

        give_way()
        pool, _ = connect(path.model, CONNECT_WITHIN_S)
        self._path, self._score_chunk = path, partial(score_chunk, pool)

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.drop_columns(PIXELS).to_pylist()
        height, width = self._path.transform.height, self._path.transform.width
        pixels = np.frombuffer(_only(table[PIXELS])[0].as_buffer(), np.uint8)
        scores, replica, score_s = self._score(pixels.reshape(-1, height, width, 3))
        started = time.perf_counter()
        rows = scored_or_failed(from_ipc(row["rows"]), self._path.labels, scores.top_NK, scores.scores_NK)
        counts = Counts.of_staged(rows)
        name = JobPaths.staged(row["shard"], row["chunk"], last=row["last"])
        self._path.fence.check()
        self._path.target.write(name, to_ipc(rows))
        return Receipt(
            shard=row["shard"],
            chunk=row["chunk"],
            last=row["last"],
            rows=counts.rows,
            errors=counts.errors,
            bytes=row["bytes"],
            read_s=row["read_s"],
            decode_s=row["decode_s"],
            score_s=score_s,
            stage_s=time.perf_counter() - started,
            replica=replica,
            example=counts.example,
            counts=json.dumps(counts.to_dict()),
        ).to_table()

    def _score(self, images_NHWC: np.ndarray) -> tuple[Scores, str, float]:
        started = time.perf_counter()
        if not len(images_NHWC):
            nothing = np.empty((0, self._path.top_k))
            return Scores(nothing.astype(np.int32), nothing.astype(np.float32)), "", 0.0
        answer = self._score_chunk(images_NHWC, self._path.top_k)
        if answer.scores_as != self._path.scores_as:
            raise OutputConflict(
                f"the pool of {self._path.model} changed from {self._path.scores_as} to {answer.scores_as} while the "
                "job ran; bring the former back and submit again, or submit to a new OUTPUT"
            )
        return answer.scores, answer.replica, time.perf_counter() - started
