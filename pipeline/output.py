"""What a job writes: staged chunks, and one Parquet file for each shard.

A staged chunk is the `rows` of the chunk with the scores beside them. A shard is committed when all its chunks are
staged: their rows become the output file, and those with an error become the shard's file in the error table.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.chunks import ERROR, KEY, OWN_FIELDS, ROW, STAGE, utf8

ROW_GROUP_ROWS = 65_536

SCORE_FIELDS = [
    pa.field("label", pa.string()),
    pa.field("score", pa.float32()),
    pa.field("labels", pa.list_(pa.string())),
    pa.field("scores", pa.list_(pa.float32())),
]


def scored(rows: pa.Table, labels: Sequence[str], top_NK: np.ndarray, scores_NK: np.ndarray) -> pa.Table:
    """The chunk's rows with their scores: of the rows without an error, in order.

    `top_NK` holds class indices (integers) and `scores_NK` float32 probabilities, best first; `labels[index]` names a
    class. Rows with an error get nulls.
    """
    good = pc.is_null(rows[STAGE]).combine_chunks()
    if (count := int(pc.sum(good).as_py() or 0)) != len(top_NK):
        raise ValueError(f"{count} rows without an error, but {len(top_NK)} scores")
    k = top_NK.shape[1]
    names = pa.array(labels, pa.string()).take(pa.array(top_NK.ravel()))
    values = pa.array(scores_NK.astype(np.float32, copy=False).ravel())
    bounds = pa.array(np.arange(count + 1, dtype=np.int32) * k)
    columns = [
        pa.array(labels, pa.string()).take(pa.array(top_NK[:, 0])),
        pa.array(np.ascontiguousarray(scores_NK[:, 0], dtype=np.float32)),
        pa.ListArray.from_arrays(bounds, names),
        pa.ListArray.from_arrays(bounds, values),
    ]
    places = _places(good)
    for field, column in zip(SCORE_FIELDS, columns, strict=True):
        rows = rows.append_column(field, column.take(places))
    return rows


NOT_FINITE = "the model's scores of this image are not finite (NaN or infinite logits)"


def scored_or_failed(rows: pa.Table, labels: Sequence[str], top_NK: np.ndarray, scores_NK: np.ndarray) -> pa.Table:
    """The same, where scores that are not finite make an error of stage `score`."""
    finite_N = np.isfinite(scores_NK).all(axis=1)
    if not finite_N.all():
        rows = with_errors(rows, "score", [None if finite else NOT_FINITE for finite in finite_N])
    return scored(rows, labels, top_NK[finite_N], scores_NK[finite_N])


def with_errors(rows: pa.Table, stage: str, errors: Sequence[str | None]) -> pa.Table:
    """The rows with `errors` filled in: an entry for each row without an error so far, None where it still has none."""
    good = pc.is_null(rows[STAGE]).combine_chunks()
    if (count := int(pc.sum(good).as_py() or 0)) != len(errors):
        raise ValueError(f"{count} rows without an error, but {len(errors)} results")
    places = _places(good)
    found = pa.array([error and utf8(error) for error in errors], pa.string()).take(places)
    stages = pc.if_else(pc.is_valid(found), pa.scalar(stage), rows[STAGE].combine_chunks())
    messages = pc.coalesce(found, rows[ERROR].combine_chunks())
    return rows.set_column(rows.schema.get_field_index(STAGE), OWN_FIELDS[2], stages).set_column(
        rows.schema.get_field_index(ERROR), OWN_FIELDS[3], messages
    )


def shard_files(
    stages: Iterable[pa.Table], shard_name: str, metadata: dict[str, str], footer: Callable[[], dict[str, str]] = dict
) -> tuple[bytes, bytes | None]:
    """The output file, and the error file or None, of a shard's staged chunks.

    The tables come in the order of their chunks. Both files carry `metadata`, keys prefixed with `tandem.`. What
    `footer` returns once all tables have come is added to the output file's, as it is.
    """
    shard_name = utf8(shard_name)
    described = {f"tandem.{key}": utf8(value) for key, value in metadata.items()}
    scores, errors = _File(described), _File(described)
    for stage in stages:
        good = pc.is_null(stage[STAGE])
        scores.add(_score_table(stage.filter(good), shard_name))
        errors.add(_error_table(stage.filter(pc.invert(good)), shard_name))
    return scores.finish(footer()), errors.finish() if errors.rows else None


def _score_table(table: pa.Table, shard_name: str) -> pa.Table:
    own = [KEY, "shard", ROW, *(field.name for field in SCORE_FIELDS)]
    carried = [name for name in table.column_names if name not in (*own, STAGE, ERROR)]
    return _with_shard(table, shard_name).select([*own, *carried])


def _error_table(table: pa.Table, shard_name: str) -> pa.Table:
    return _with_shard(table, shard_name).select([KEY, "shard", ROW, STAGE, ERROR])


def _with_shard(table: pa.Table, shard_name: str) -> pa.Table:
    names = pa.array([shard_name], pa.string()).take(pa.array(np.zeros(len(table), np.int8)))
    return table.append_column(pa.field("shard", pa.string(), nullable=False), names)


def _places(good: pa.Array) -> pa.Array:
    """For each row its place among the good ones, null for the others: what `take` needs to spread values out."""
    mask = good.to_numpy(zero_copy_only=False)
    return pa.array(np.cumsum(mask) - 1, mask=~mask)


class _File:
    """One Parquet file, written in memory row group by row group."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.rows = 0
        self._metadata = metadata
        self._sink = io.BytesIO()
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.Table] = []
        self._held_rows = 0

    def add(self, table: pa.Table) -> None:
        self.rows += len(table)
        self._held.append(table)
        self._held_rows += len(table)
        if self._held_rows >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self, footer: Mapping[str, str] = MappingProxyType({})) -> bytes:
        self._flush()
        assert self._writer is not None, "a shard has at least one chunk"
        self._writer.add_key_value_metadata(footer)
        self._writer.close()
        return self._sink.getvalue()

    def _flush(self) -> None:
        for table in _merged(self._held):
            if self._writer is None:
                schema = table.schema.with_metadata(self._metadata)
                self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")
            self._writer.write_table(table.replace_schema_metadata(self._metadata), ROW_GROUP_ROWS)
        self._held, self._held_rows = [], 0


def _merged(tables: list[pa.Table]) -> Iterator[pa.Table]:
    if tables:
        yield pa.concat_tables(tables)
