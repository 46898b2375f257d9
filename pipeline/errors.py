"""Every error that Tandem raises on purpose.

    TandemError
    |-- UsageError              an option, a path or a configuration that cannot work as given
    |-- StorageError            the store, or what was asked of it
    |   |-- NotFound
    |   |-- Changed             the object is not the one that was meant
    |   |-- Denied              access in general: the credentials, the bucket, the folder
    |   |-- Refused             one object alone: what it holds becomes an error row
    |   +-- Unavailable         worth another try: the store did not answer, or asked to slow down
    |-- ModelError              a checkpoint that cannot be loaded
    |   +-- HubUnreachable
    |-- ImageError              one image: it becomes an error row, or a 400
    |-- ShardError              one input shard: what could not be read of it becomes an error row
    |-- ProcessEnded            a child process that crashed: what it worked on becomes an error row
    |-- PoolError               the model actors
    |   |-- Busy                worth another try: the lane is full
    |   |-- Expired             a request that could not be scored by its deadline
    |   |-- DeviceLost          worth another try: the replica's accelerator failed, and the replica is replaced
    |   +-- PoolFailed          the pool does not come up, or does not come back
    +-- JobError                a batch job that cannot start, go on or finish
        +-- OutputConflict      OUTPUT holds a job, or files, that this job must not touch

A message names the thing at fault, its value, and what to do about it.
"""

from __future__ import annotations


class TandemError(Exception):
    """Root of the tree. `str(error)` is one line, fit for a user."""


class UsageError(TandemError):
    """An option, a path or a configuration that cannot work as given."""


class StorageError(TandemError):
    """The store, or what was asked of it, failed for good."""


class NotFound(StorageError):
    """No such bucket, object, folder or file."""


class Changed(StorageError):
    """The object was replaced since its tag was taken."""


class Denied(StorageError):
    """The credentials, or the file's permissions, do not allow it."""


class Refused(StorageError):
    """The store refuses one object alone: it is archived, another account's, or its key is out of reach."""


class Unavailable(StorageError):
    """The store did not answer, or asked to slow down; it may work later."""


class ModelError(TandemError):
    """A checkpoint that is missing, incomplete, or not an image classifier."""


class HubUnreachable(ModelError):
    """The model hub did not answer, and the checkpoint is not in the local cache."""


class ImageError(TandemError):
    """One image that cannot be turned into pixels."""


class ShardError(TandemError):
    """An input shard that cannot be read, or not to its end.

    `lost` is the number of images that were not read, where it is known.
    """

    def __init__(self, message: str, lost: int | None = None) -> None:
        super().__init__(message)
        self.lost = lost

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, int | None]]:
        return type(self), (str(self), self.lost)


class ProcessEnded(TandemError):
    """A child process ended before its work was done."""


class PoolError(TandemError):
    """The model actors did not do what was asked."""


class Busy(PoolError):
    """The replica's lane is full; another replica may have room, or this one in about `retry_after_s`."""

    def __init__(self, told: str, retry_after_s: float = 1.0) -> None:
        super().__init__(told)
        self.retry_after_s = retry_after_s


class Expired(PoolError):
    """The request's deadline passed before the model could get to it."""


class DeviceLost(PoolError):
    """The replica's accelerator failed for good; another replica, or the one that replaces it, can score."""


class PoolFailed(PoolError):
    """The pool does not come up, or does not come back."""


class JobError(TandemError):
    """A batch job that cannot start, go on or finish."""


class OutputConflict(JobError):
    """OUTPUT belongs to another job, or holds files that are not Tandem's."""
