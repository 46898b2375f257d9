"""Readers: a shard in, its images as samples out, in the order of their rows."""

from __future__ import annotations

from pipeline.inputs.images import ImagesReader
from pipeline.inputs.parquet import ParquetReader
from pipeline.inputs.sample import Columns, Reader, Sample
from pipeline.inputs.tar import TarReader
from pipeline.shards import Format, Shard
from pipeline.storage import Store

__all__ = ["Columns", "Reader", "Sample", "open_reader"]

_READERS: dict[Format, type[TarReader] | type[ParquetReader] | type[ImagesReader]] = {
    "tar": TarReader,
    "parquet": ParquetReader,
    "images": ImagesReader,
}


def open_reader(store: Store, shard: Shard, columns: Columns) -> Reader:
    """The reader for the shard's format. Raises `ShardError` for a file that is not what its name says."""
    return _READERS[shard.format](store, shard, columns)
