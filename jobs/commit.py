"""Commits: the staged chunks of a shard become its output file, by one write."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.plan import Plan
from jobs.spec import JobPaths
from pipeline.chunks import from_ipc
from pipeline.errors import JobError, NotFound
from pipeline.output import shard_files
from pipeline.shards import Shard
from pipeline.storage import Store


def commit_shard(store: Store, plan: Plan, shard: Shard, staged: Sequence[str]) -> None:
    """Writes the shard's error file, if it has errors, then its output file, then drops the `staged` chunks.

    The output file is what commits: until it stands, the shard is done again from its stage, with the same result.
    """
    tables = (from_ipc(store.read(name)) for name in staged)
    try:
        scores, errors = shard_files(tables, shard.name, plan.metadata(shard))
    except NotFound as error:
        if _stands(store, shard):  # a driver that was replaced while it committed did so after all
            return
        raise JobError(
            f"{store.url}: staged chunks of {shard.name} are gone ({error}); submit the job again"
        ) from error
    if errors is not None:
        store.write(JobPaths.errors(shard), errors)
    else:
        store.delete([JobPaths.errors(shard)])  # of a driver that died just here, and had another outcome
    store.write(shard.output, scores)
    store.delete(staged)


def _stands(store: Store, shard: Shard) -> bool:
    try:
        store.stat(shard.output)
    except NotFound:
        return False
    return True
