"""Every sample of a shard is in one chunk, and the n-th chunk is the same on every read."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.chunks import (
    ENDS_SHARD,
    OWN_FIELDS,
    RESERVED,
    Chunk,
    ChunkLimits,
    carried_name,
    chunks,
    failed_shard,
    from_ipc,
    rows_schema,
    to_ipc,
)
from pipeline.decode import decode_each
from pipeline.errors import ImageError, ShardError, Unavailable
from pipeline.inputs import Columns, Sample, open_reader
from pipeline.local import LocalStore
from pipeline.output import SCORE_FIELDS
from pipeline.shards import FORMATS, Format, Shard, find_shards
from pipeline.transform import ImageTransform
from tests.corpora import write_corpus
from tests.images import Edits, edited, edits, real_images

CARRIED = pa.schema([("label", pa.int8()), ("tags", pa.list_(pa.string())), ("kind", pa.dictionary("int8", "string"))])


class ListReader:
    """Samples from a list, and then an error if there is one."""

    def __init__(self, samples: Sequence[Sample], error: Exception | None = None, carried: pa.Schema = CARRIED) -> None:
        self.carried, self._samples, self._error = carried, samples, error
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sample]:
        yield from self._samples
        if self._error:
            raise self._error

    def close(self) -> None:
        """Nothing is open."""


def carried(row: int) -> pa.RecordBatch:
    values = {"label": row % 100, "tags": [str(row)] if row % 3 else None, "kind": f"kind {row % 2}"}
    return pa.RecordBatch.from_pylist([values], schema=CARRIED)


def sample(row: int, size: int | None) -> Sample:
    """An image of `size` bytes, or a row with an error."""
    if size is None:
        return Sample(row=row, key=f"k{row}", data=None, error=f"bad {row}", carried=carried(row))
    return Sample(row=row, key=f"k{row}", data=bytes([row % 256]) * size, carried=carried(row))


def samples(sizes: Sequence[int | None]) -> list[Sample]:
    return [sample(row, size) for row, size in enumerate(sizes)]


def rows(found: Sequence[Chunk]) -> list[dict[str, Any]]:
    return [row for chunk in found for row in chunk.rows.to_pylist()]


_sizes = st.lists(st.none() | st.integers(0, 60), max_size=60)
_limits = st.builds(ChunkLimits, images=st.integers(1, 9), bytes=st.integers(1, 200), first=st.integers(1, 9))


@given(sizes=_sizes, limits=_limits, broken=st.booleans())
def test_every_sample_is_in_one_chunk_in_order(sizes: list[int | None], limits: ChunkLimits, broken: bool) -> None:
    given = samples(sizes)
    found = list(chunks(ListReader(given, ShardError("broken") if broken else None), "shard", limits))
    expected = [
        {
            "key": one.key,
            "row": one.row,
            "stage": "read" if one.error else None,
            "error": one.error,
            **{carried_name(name): value for name, value in carried(one.row).to_pylist()[0].items()},
        }
        for one in given
    ]
    if broken:
        nothing = dict.fromkeys(map(carried_name, CARRIED.names))
        expected.append({"key": "shard", "row": None, "stage": "read", "error": "broken", **nothing})
    assert rows(found) == expected
    assert [image for chunk in found for image in chunk.images] == [one.data for one in given if one.data is not None]


@given(sizes=_sizes, limits=_limits, broken=st.booleans())
def test_chunks_keep_to_their_limits_and_the_last_says_so(
    sizes: list[int | None], limits: ChunkLimits, broken: bool
) -> None:
    found = list(chunks(ListReader(samples(sizes), ShardError("broken") if broken else None), "shard", limits))
    assert [chunk.index for chunk in found] == list(range(len(found)))
    assert [chunk.last for chunk in found] == [False] * (len(found) - 1) + [True]
    for chunk in found:
        good = [row for row in chunk.rows.to_pylist() if row["stage"] is None]
        # images and rows without an error are the same ones: a row with an error shifts nothing
        assert len(chunk.images) == len(good)
        assert all(
            image == bytes([row["row"] % 256]) * len(image) for image, row in zip(chunk.images, good, strict=True)
        )
        assert sum(row["row"] is not None for row in chunk.rows.to_pylist()) <= limits.images_of(chunk.index)
        assert sum(map(len, chunk.images[:-1])) < limits.bytes
        assert chunk.rows.schema == rows_schema(CARRIED)
    for chunk in found[:-1]:
        assert len(chunk.rows) == limits.images_of(chunk.index) or sum(map(len, chunk.images)) >= limits.bytes


def test_the_first_chunks_are_small_and_those_of_further_shards_are_not() -> None:
    limits = ChunkLimits(images=20, first=4)
    first = chunks(ListReader(samples([1] * 70)), "shard", limits)
    further = chunks(ListReader(samples([1] * 70)), "shard", limits.steady())
    assert [len(chunk.rows) for chunk in first] == [4, 8, 16, 20, 20, 2]
    assert [len(chunk.rows) for chunk in further] == [20, 20, 20, 10]


@given(sizes=_sizes, limits=_limits)
def test_chunks_are_the_same_on_every_read(sizes: list[int | None], limits: ChunkLimits) -> None:
    first, second = (list(chunks(ListReader(samples(sizes)), "shard", limits)) for _ in range(2))
    assert [(to_ipc(chunk.rows), chunk.images) for chunk in first] == [
        (to_ipc(chunk.rows), chunk.images) for chunk in second
    ]


@given(sizes=_sizes)
def test_rows_travel_unchanged(sizes: list[int | None]) -> None:
    for chunk in chunks(ListReader(samples(sizes)), "shard", ChunkLimits(images=7)):
        again = from_ipc(to_ipc(chunk.rows))
        assert again.schema.equals(chunk.rows.schema, check_metadata=True)
        assert again.equals(chunk.rows)


def test_a_shard_without_samples_is_one_empty_chunk() -> None:
    (chunk,) = chunks(ListReader([]), "shard", ChunkLimits())
    assert (chunk.index, chunk.last, len(chunk.rows), chunk.images) == (0, True, 0, [])
    assert chunk.rows.schema == rows_schema(CARRIED)


def test_a_shard_that_cannot_be_opened_is_one_error_row() -> None:
    chunk = failed_shard("a.tar", ShardError("no archive"), pa.schema([("cls", pa.string())]))
    assert (chunk.index, chunk.last, chunk.images) == (0, True, [])
    told = {"key": "a.tar", "row": None, "stage": "read", "error": "no archive", "cls": None}
    assert chunk.rows.to_pylist() == [told]


def test_a_store_that_fails_is_not_made_a_row() -> None:
    with pytest.raises(Unavailable):
        list(chunks(ListReader(samples([1]), Unavailable("down")), "shard", ChunkLimits()))


def test_names_that_are_not_utf8_can_still_be_told_apart() -> None:
    odd = [b"caf\xe9", b"caf\xe8", "café".encode()]
    given = [Sample(row=n, key=key.decode(errors="surrogateescape"), data=b"") for n, key in enumerate(odd)]
    error = ShardError("caf\udce9 is broken")
    (chunk,) = chunks(ListReader(given, error, pa.schema([])), "caf\udce9.tar", ChunkLimits())
    assert chunk.rows["key"].to_pylist() == ["caf\\xe9", "caf\\xe8", "café", "caf\\xe9.tar"]
    assert chunk.rows["error"].to_pylist()[-1] == "caf\\xe9 is broken"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_carried_column_does_not_hide_one_of_the_output(name: str) -> None:
    schema = rows_schema(pa.schema([(name, pa.int8()), ("other", pa.int8())]))
    assert schema.names[len(OWN_FIELDS) :] == [f"input_{name}", "other"]


def test_every_output_column_is_reserved() -> None:
    assert {field.name for field in (*OWN_FIELDS, *SCORE_FIELDS)} | {"shard"} == RESERVED


_SMALL = sorted(name for name, data in real_images().items() if len(data) < 60_000)


@given(
    format=st.sampled_from(FORMATS),
    damaged=st.lists(st.tuples(st.sampled_from(_SMALL), edits()), min_size=1, max_size=8),
)
@settings(max_examples=200, deadline=timedelta(seconds=20), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_key_of_damaged_images_is_there_once_with_pixels_or_an_error(
    tmp_path: Path, format: Format, damaged: list[tuple[str, Edits]]
) -> None:
    store = LocalStore(Path(tempfile.mkdtemp(dir=tmp_path)))
    images = {f"{n}.jpg": edited(real_images()[name], edits) for n, (name, edits) in enumerate(damaged)}
    keys = write_corpus(store, format, images)
    (shard,) = find_shards(store.list(), where="INPUT")
    found = list(chunks(open_reader(store, shard, Columns()), shard.name, ChunkLimits(images=3)))
    assert [(row["key"], row["error"]) for row in rows(found)] == [(keys[name], None) for name in sorted(images)]
    for chunk in found:
        results = list(decode_each(chunk.images, ImageTransform(height=32, width=32, resize_to=(32, 32))))
        assert len(results) == len(chunk.rows)
        assert all(isinstance(result, ImageError) or result.shape == (32, 32, 3) for result in results)


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_that_is_not_the_one_that_was_planned_becomes_an_error_row(format: Format, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_corpus(store, format, {f"{index}.jpg": data for index, data in enumerate(real_images().values())})
    shard = replace(next(iter(find_shards(store.list(), where="INPUT"))), etag="another")

    (chunk,) = _chunks_of(store, shard)

    assert (chunk.images, chunk.last) == ([], True)
    (row,) = chunk.rows.to_pylist()
    assert (row["key"], row["row"], row["stage"]) == (shard.name, None, "read")
    assert "was replaced meanwhile" in row["error"] or "changed since the job was planned" in row["error"]


def _chunks_of(store: LocalStore, shard: Shard) -> list[Chunk]:
    """As the data path reads them."""
    try:
        return list(chunks(open_reader(store, shard, Columns()), shard.name, ChunkLimits()))
    except ENDS_SHARD as error:
        return [failed_shard(shard.name, error, pa.schema([]))]
