"""What became of a shard's images, as numbers that add up: to a shard's, and to a job's.

A chunk's counts travel in the metadata of its staged table, a shard's in the footer of its output file. So the whole
job's are known from OUTPUT alone, whichever runs did the work.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyarrow as pa

from pipeline.chunks import ERROR, STAGE, Chunk
from pipeline.shards import Shard

PREFIX = "tandem."
EXAMPLE_CHARACTERS = 500

Metadata = Mapping[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of images, and of what stands for images that nobody could read.

    `rows` are scored images and error rows, of which `errors` failed. `read` images of `bytes` encoded bytes in all
    were read. Where a shard ended early, its error row counts for one image; `lost` are the others, as far as their
    number is known. Otherwise `unread_bytes` of it were not read, or it is one of `failed_shards` of which nothing at
    all is known. `whole_shards` of `whole_rows` rows did not end early. `skipped` counts by reason what no row stands
    for. `example` is the first error in words, or empty.
    """

    rows: int = 0
    errors: int = 0
    read: int = 0
    bytes: int = 0
    lost: int = 0
    unread_bytes: int = 0
    failed_shards: int = 0
    whole_shards: int = 0
    whole_rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    example: str = ""

    @property
    def scored(self) -> int:
        return self.rows - self.errors

    @property
    def estimated(self) -> int:
        """Images lost with shards of which only the size is known, or not even that; by the mean of the others."""
        by_bytes = self.unread_bytes * self.read / self.bytes if self.bytes else 0.0
        by_shards = self.failed_shards * self.whole_rows / self.whole_shards if self.whole_shards else 0.0
        return round(by_bytes + by_shards)

    def __add__(self, other: Counts) -> Counts:
        return self._with(other, 1)

    def __sub__(self, other: Counts) -> Counts:
        """The reverse of `+`, except that an example stays."""
        return self._with(other, -1)

    def _with(self, other: Counts, sign: int) -> Counts:
        sums = {name: getattr(self, name) + sign * getattr(other, name) for name in _NUMBERS}
        skipped = self.skipped
        if other.skipped:
            skipped = Counter(self.skipped)
            for reason, count in other.skipped.items():
                skipped[reason] += sign * count
            skipped = Counter({reason: count for reason, count in skipped.items() if count})
        return Counts(**sums, skipped=skipped, example=self.example or other.example)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Counts:
        """The reverse of `to_dict`. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        numbers = {name: _natural(content[name]) for name in _NUMBERS}
        skipped = Counter({str(reason): _natural(count) for reason, count in dict(content["skipped"]).items()})
        return cls(**numbers, skipped=skipped, example=str(content["example"]))

    def to_metadata(self) -> dict[str, str]:
        """As metadata of a schema or of a Parquet file: a JSON value under `tandem.NAME` for each field."""
        return {PREFIX + name: json.dumps(value) for name, value in self.to_dict().items()}

    @classmethod
    def from_metadata(cls, metadata: Metadata | None) -> Counts:
        """The reverse of `to_metadata`, among other keys. Raises as `from_dict` does."""
        values = metadata or {}
        return cls.from_dict({one.name: json.loads(values[(PREFIX + one.name).encode()]) for one in fields(cls)})

    @classmethod
    def of_chunk(cls, chunk: Chunk, shard: Shard, before: Counts) -> Counts:
        """Those of a chunk as it was read, behind chunks of the same shard with counts `before`."""
        read, size = len(chunk.images), sum(map(len, chunk.images))
        counts = cls(rows=len(chunk.rows), read=read, bytes=size, skipped=Counter(chunk.skipped))
        if not chunk.last:
            return counts
        lost = chunk.lost
        if lost is None and shard.images is not None:
            lost = shard.images - (before.rows + counts.rows - 1)
        if lost is not None:
            return replace(counts, lost=max(0, lost - 1), whole_shards=int(not lost))
        unread = max(0, shard.size - before.bytes - size)
        return replace(counts, unread_bytes=unread, failed_shards=int(not shard.size))

    @classmethod
    def of_staged(cls, table: pa.Table) -> Counts:
        """Those of a staged chunk: of its rows, and of how they were read, as far as its metadata states that."""
        read = cls.from_metadata(table.schema.metadata) if table.schema.metadata else cls()
        example = next((error for error in table[ERROR].to_pylist() if error), "")
        return replace(
            read,
            rows=len(table),
            errors=len(table) - table[STAGE].null_count,
            whole_rows=len(table) * read.whole_shards,
            example=example[:EXAMPLE_CHARACTERS],
        )

    def of_shard(self) -> Counts:
        """The sum of all chunks of one shard, as those of the shard."""
        return replace(self, whole_rows=self.rows * self.whole_shards)


_NUMBERS = tuple(one.name for one in fields(Counts) if one.name not in ("skipped", "example"))


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
