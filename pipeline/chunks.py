"""Chunks: some hundred images of one shard, the unit that travels, is scored, and is tried again.

A chunk is **one row** of a Ray Data block, so that no splitting or coalescing of blocks can tear it. The rows of the
shard that it stands for are a table of their own inside it: `rows`, in Arrow's IPC format, is passed on untouched from
reader to output while the images beside it are decoded and scored.

The n-th chunk of a shard is the same on every read: its bounds follow from the shard's content and the limits below,
which the plan records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa

from pipeline.errors import Changed, NotFound, Refused, ShardError, TandemError
from pipeline.inputs import Reader, Sample

IMAGES_PER_CHUNK = 256
FIRST_IMAGES = 32
BYTES_PER_CHUNK = 32 << 20  # of encoded images

# What ends one shard, and not a job: it is damaged, was replaced or deleted, or the store refuses it alone.
ENDS_SHARD = (ShardError, Changed, NotFound, Refused)

# The columns of `rows` that are Tandem's own; what is carried along follows them.
KEY, ROW, STAGE, ERROR = "key", "row", "stage", "error"
OWN_FIELDS = [
    pa.field(KEY, pa.string(), nullable=False),
    pa.field(ROW, pa.int64()),  # null where a whole shard, not one of its rows, is at fault
    pa.field(STAGE, pa.string()),  # where it failed: read, decode or score; null for a row without an error
    pa.field(ERROR, pa.string()),
]
# Output columns have these names already, so an input column of the same name is carried as `input_NAME`.
RESERVED = frozenset(("key", "shard", "row", "label", "score", "labels", "scores", "stage", "error"))


@dataclass(frozen=True, kw_only=True)
class ChunkLimits:
    """A chunk ends at so many images, or when its encoded images pass so many bytes.

    The first one ends at `first` images, the next at twice as many, and so on up to `images`: a model is at work soon.
    """

    images: int = IMAGES_PER_CHUNK
    bytes: int = BYTES_PER_CHUNK
    first: int = FIRST_IMAGES

    def steady(self) -> ChunkLimits:
        """Those of shards that come when a model is at work already."""
        return replace(self, first=self.images)

    def images_of(self, index: int) -> int:
        """The images at which the `index`-th chunk ends."""
        return min(self.images, self.first << min(index, 32))


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The `index`-th chunk of a shard. `images` are the encoded images of those rows that have no error, in order.

    The last chunk has what its shard `skipped`, by reason, and the number of images `lost` where the shard ended early:
    None where that is unknown.
    """

    index: int
    last: bool
    rows: pa.Table
    images: list[bytes]
    skipped: Mapping[str, int] = field(default_factory=dict)
    lost: int | None = 0


def chunks(reader: Reader, shard_name: str, limits: ChunkLimits) -> Iterator[Chunk]:
    """The shard's chunks, at least one, the final one marked `last`.

    What ends the shard early becomes an error row of the final chunk: what was read before it is not lost.
    """
    schema = rows_schema(reader.carried)
    lost: int | None = 0
    index, held = 0, _Held()
    try:
        for sample in reader:
            if len(held.keys) >= limits.images_of(index) or held.bytes >= limits.bytes:
                yield held.chunk(schema, index, last=False)
                index, held = index + 1, _Held()
            held.add(sample)
    except ENDS_SHARD as error:
        held.fail(shard_name, str(error))
        lost = _lost(error)
    yield replace(held.chunk(schema, index, last=True), skipped=dict(reader.skipped), lost=lost)


def failed_shard(shard_name: str, error: TandemError, carried: pa.Schema) -> Chunk:
    """The only chunk of a shard that cannot even be opened; `carried` is what other shards carry."""
    held = _Held()
    held.fail(shard_name, str(error))
    return replace(held.chunk(rows_schema(carried), 0, last=True), lost=_lost(error))


def _lost(error: TandemError) -> int | None:
    """The images that a shard lost as the error ended it, where their number is known."""
    return error.lost if isinstance(error, ShardError) else None


def rows_schema(carried: pa.Schema) -> pa.Schema:
    """Tandem's own columns, then those carried along, under names that do not hide an output column."""
    return pa.schema([*OWN_FIELDS, *(column.with_name(carried_name(column.name)) for column in carried)])


def carried_name(name: str) -> str:
    """An input column's name in the output."""
    return f"input_{name}" if name in RESERVED else name


def utf8(text: str) -> str:
    """`text` as Arrow can hold it: names in old archives and folders need not be UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def to_ipc(table: pa.Table) -> bytes:
    """The table in Arrow's IPC stream format, schema and metadata included."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_ipc(data: bytes | pa.Buffer) -> pa.Table:
    """The reverse of `to_ipc`."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


@dataclass
class _Held:
    """The chunk being filled."""

    keys: list[str] = field(default_factory=list)
    numbers: list[int | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    carried: list[pa.RecordBatch | None] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    bytes: int = 0

    def add(self, sample: Sample) -> None:
        self.keys.append(sample.key)
        self.numbers.append(sample.row)
        self.errors.append(sample.error)
        self.carried.append(sample.carried)
        if sample.data is not None:
            self.images.append(sample.data)
            self.bytes += len(sample.data)

    def fail(self, key: str, error: str) -> None:
        self.keys.append(key)
        self.numbers.append(None)
        self.errors.append(error)
        self.carried.append(None)

    def chunk(self, schema: pa.Schema, index: int, *, last: bool) -> Chunk:
        stages = ["read" if error else None for error in self.errors]
        own = [list(map(utf8, self.keys)), self.numbers, stages, [error and utf8(error) for error in self.errors]]
        arrays = [pa.array(values, field.type) for values, field in zip(own, OWN_FIELDS, strict=True)]
        arrays += [self._column(index, field.type) for index, field in enumerate(list(schema)[len(OWN_FIELDS) :])]
        return Chunk(index=index, last=last, rows=pa.table(arrays, schema=schema), images=self.images)

    def _column(self, index: int, kind: pa.DataType) -> pa.Array:
        parts = [pa.nulls(1, kind) if row is None else row.column(index) for row in self.carried]
        return pa.concat_arrays(parts) if parts else pa.nulls(0, kind)
