"""The seam at which Ray's errors become Tandem's."""

from __future__ import annotations

from collections.abc import Iterator

from ray.exceptions import RayError, RayTaskError

from deployments.config import PoolConfig
from jobs.datapath import DataPath
from jobs.receipts import Receipt
from pipeline.errors import JobError, TandemError
from pipeline.shards import Shard


def receipts(path: DataPath, work: list[tuple[Shard, frozenset[int]]], pool: PoolConfig) -> Iterator[Receipt]:
    """The data path's receipts. Raises a worker's own `TandemError`, and `JobError` for all else that Ray reports."""
    try:
        yield from path.receipts(work, pool)
    except RayTaskError as error:
        causes = [*_causes(error)] or [error]
        for cause in causes:
            if isinstance(cause, TandemError):
                raise type(cause)(_first_line(cause)) from error
        kind, reason = type(causes[-1]).__name__, _first_line(causes[-1])
        raise JobError(f"a worker failed: {kind}{reason and ': '}{reason}") from error
    except RayError as error:
        raise JobError(f"the cluster failed: {_first_line(error)}") from error


def _causes(error: RayTaskError) -> Iterator[BaseException]:
    """What was raised in the worker, and what that came from, without Ray's wrappers."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RayTaskError):  # which may be of the wrapped error's kind as well
            cause = cause.cause
        else:
            yield cause
            cause = cause.__cause__


def _first_line(error: BaseException) -> str:
    """Ray Data adds lines on how to retry."""
    return next(iter(str(error).strip().splitlines()), "")
