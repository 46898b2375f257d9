"""What readers yield."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import pyarrow as pa

from pipeline.errors import UsageError

MAX_IMAGE_BYTES = 256 << 20

KeyUntil = Literal["first-dot", "last-dot"]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which parts of an input row are read: of Parquet, columns; of a tar, members by suffix.

    `image` and `key` None mean: found by name and type. `carry` names what goes along into the output. A tar member's
    key ends at the first dot of its file name, or at the last. A reader raises `UsageError` for what its format does
    not have.
    """

    image: str | None = None
    key: str | None = None
    carry: tuple[str, ...] = ()
    key_until: KeyUntil = "first-dot"

    def check_not_tar(self) -> None:
        """For readers of other formats. Raises `UsageError`."""
        if self.key_until != "first-dot":
            raise UsageError(f"--key-until {self.key_until} is for tar shards, whose members' names are the keys")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One input image: its place in the shard, its key, and its encoded bytes, or why there are none.

    `carried` is one row of the reader's `carried` schema, so that values of every Arrow type pass unchanged; None
    where nothing is carried.
    """

    row: int
    key: str
    data: bytes | None
    error: str | None = None
    carried: pa.RecordBatch | None = None


class Reader(Protocol):
    """A shard opened for reading, once, from front to back.

    `skipped` counts what the shard holds and no sample stands for, by reason: a suffix (".json"), "no suffix",
    "hidden", "symlink". It is complete once the shard is read.

    Iterating raises `ShardError` where the shard cannot be read any further; what was yielded before stands.
    `StorageError` is raised as it comes: `Refused` where the store refuses this shard alone, `Changed` where the shard
    is not the one that was planned.
    """

    carried: pa.Schema
    skipped: Counter[str]

    def __iter__(self) -> Iterator[Sample]: ...

    def close(self) -> None: ...


def too_large(size: int) -> str:
    return f"the image has {size} bytes; the limit is {MAX_IMAGE_BYTES}"
