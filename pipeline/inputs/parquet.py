"""Parquet shards: a binary column, or Hugging Face's struct of `bytes` and `path`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ShardError, UsageError
from pipeline.inputs.sample import MAX_IMAGE_BYTES, Columns, Sample, too_large
from pipeline.shards import Shard
from pipeline.storage import Store

ROWS_AT_ONCE = 64  # bounds memory where images are large; row groups of images are often 1 GB
IMAGE_NAMES = ("image", "img", "bytes", "image_bytes", "content", "jpg", "jpeg", "png", "data")
KEY_NAMES = ("key", "__key__", "id", "image_id")
# OverflowError is what Python makes of a date or a duration beyond its own
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError)


class ParquetReader:
    """One Parquet file. Only the columns that are asked for are read."""

    def __init__(self, store: Store, shard: Shard, columns: Columns) -> None:
        columns.check_not_tar()
        self._name = shard.name
        self._file: BinaryIO = store.open(shard.name, etag=shard.etag)
        try:
            self._parquet = _opened(self._file, shard.name)
            schema = self._parquet.schema_arrow
            self._image = columns.image or _image_column(schema, shard.name)
            self._key = columns.key or next((name for name in KEY_NAMES if name in schema.names), None)
            _check(schema, shard.name, self._image, self._key, columns.carry)
        except BaseException:
            self._file.close()
            raise
        self.carried = pa.schema([schema.field(name) for name in columns.carry])
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sample]:
        wanted = list(dict.fromkeys([self._image, *([self._key] if self._key else ()), *self.carried.names]))
        row = 0
        try:
            for batch in self._batches(wanted):
                for sample in self._samples(batch, row):
                    yield sample
                    row += 1
        except _UNREADABLE as error:
            raise ShardError(f"{self._name} cannot be read past row {row}: {_reason(error)}") from error
        finally:
            self._file.close()

    def close(self) -> None:
        self._file.close()

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows as they come. Raises `ValueError` where they are not as many as the footer tells."""
        told = self._parquet.metadata
        rows = 0
        # by row group, so that a damaged one takes no rows of the one before with it
        for group in range(told.num_row_groups):
            before = rows
            for batch in self._batches_of_group(group, columns):
                yield batch
                rows += batch.num_rows
            _check_count(rows - before, told.row_group(group).num_rows, f"row group {group}")
        _check_count(rows, told.num_rows, "the file")

    def _batches_of_group(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        read = partial(self._parquet.iter_batches, row_groups=[group], columns=columns, use_threads=False)
        rows = 0
        try:
            for batch in read(ROWS_AT_ONCE):
                yield batch
                rows += batch.num_rows
        except _UNREADABLE:
            yield from islice(read(1), rows, None)  # in the batch that failed, rows before the damage are whole

    def _samples(self, batch: pa.RecordBatch, first_row: int) -> Iterator[Sample]:
        images = batch.column(self._image)
        keys = batch.column(self._key) if self._key else None
        carried = batch.select(self.carried.names) if self.carried.names else None
        for index in range(batch.num_rows):
            data, path = _parts(images[index].as_py())
            key = _text(keys[index].as_py()) if keys is not None else path
            row = first_row + index
            yield Sample(
                row=row,
                key=key if key is not None else f"{self._name}#{row}",
                data=None if data is None or len(data) > MAX_IMAGE_BYTES else data,
                error=_problem(data),
                carried=carried and carried.slice(index, 1),
            )


def _opened(file: BinaryIO, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
    except _UNREADABLE as error:
        raise ShardError(f"{name} is not a readable Parquet file: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """One line of it: pyarrow's have several, or end with a break."""
    return " ".join(str(error).split()) or type(error).__name__


def _text(key: Any) -> str | None:
    if isinstance(key, bytes):
        return key.decode(errors="surrogateescape")
    return None if key is None else str(key)


def _parts(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        return value.get("bytes"), _text(value.get("path"))
    return value, None


def _check_count(rows: int, told: int, what: str) -> None:
    """A damaged footer, or a damaged page without a check sum, can make pyarrow leave out rows in silence."""
    if rows != told:
        raise ValueError(f"{what} is said to have {told} rows, and {rows} are found")


def _problem(data: bytes | None) -> str | None:
    if data is None:
        return "the image is null"
    return too_large(len(data)) if len(data) > MAX_IMAGE_BYTES else None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _image_column(schema: pa.Schema, name: str) -> str:
    candidates = [field.name for field in schema if _is_image(field.type)]
    named = [candidate for candidate in IMAGE_NAMES if candidate in candidates]
    if not candidates:
        raise ShardError(f"{name} has no column of images (binary, or a struct with bytes) among {schema.names}")
    if len(candidates) > 1 and not named:
        raise UsageError(f"{name} has several binary columns, {candidates}; say which with --image-column")
    return (named or candidates)[0]


def _check(schema: pa.Schema, name: str, image: str, key: str | None, carry: tuple[str, ...]) -> None:
    for column in (image, *([key] if key else ()), *carry):
        if column not in schema.names:
            raise ShardError(f"{name} has no column {column!r}; it has {schema.names}")
        if schema.names.count(column) > 1:
            raise ShardError(f"{name} has several columns {column!r}")
    if not _is_image(schema.field(image).type):
        raise ShardError(f"{name}: column {image!r} is {schema.field(image).type}, not encoded images")
