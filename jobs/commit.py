"""Commits: the staged chunks of a shard become its output file, by one write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.plan import Plan
from jobs.spec import JobPaths
from pipeline.chunks import from_ipc
from pipeline.counts import Counts
from pipeline.errors import JobError, NotFound
from pipeline.output import shard_files
from pipeline.shards import Shard
from pipeline.storage import Store


def commit_shard(store: Store, plan: Plan, shard: Shard, staged: Sequence[str]) -> Counts:
    """Writes the shard's error file, if it has errors, then its output file, then drops the `staged` chunks.

    The output file is what commits: until it stands, the shard is done again from its stage, with the same result. Its
    footer holds the shard's counts, which are returned.
    """
    stages = _Counted(store, staged)
    try:
        scores, errors = shard_files(stages, shard.name, plan.metadata(shard), lambda: stages.counts().to_metadata())
    except NotFound as error:
        if _stands(store, shard):  # a driver that was replaced while it committed did so after all
            return committed_counts(store, shard)
        raise JobError(
            f"{store.url}: staged chunks of {shard.name} are gone ({error}); submit the job again"
        ) from error
    if errors is not None:
        store.write(JobPaths.errors(shard), errors)
    else:
        store.delete([JobPaths.errors(shard)])  # of a driver that died just here, and had another outcome
    store.write(shard.output, scores)
    store.delete(staged)
    return stages.counts()


def committed_counts(store: Store, shard: Shard) -> Counts:
    """The counts in the footer of the shard's output file. Raises `JobError` where it has none."""
    try:
        with store.open(shard.output) as file:
            return Counts.from_metadata(pq.read_metadata(file).metadata)
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise JobError(
            f"{store.url}/{shard.output} is not an output file of this job ({error!r}); delete it and submit again"
        ) from error


class _Counted:
    """The tables of staged chunks, counted as they are read."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self._store, self._names = store, names
        self._sum = Counts()

    def __iter__(self) -> Iterator[pa.Table]:
        for name in self._names:
            table = from_ipc(self._store.read(name))
            self._sum += Counts.of_staged(table)
            yield table

    def counts(self) -> Counts:
        return self._sum.of_shard()


def _stands(store: Store, shard: Shard) -> bool:
    try:
        store.stat(shard.output)
    except NotFound:
        return False
    return True
