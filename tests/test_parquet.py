"""A Parquet file gives each of its rows once, with what is carried unchanged, or says where it breaks off."""

from __future__ import annotations

import decimal
import io
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import ranged, s3
from pipeline.errors import NotFound, ShardError, Unavailable, UsageError
from pipeline.inputs import Columns, Sample, open_reader, parquet
from pipeline.local import LocalStore
from pipeline.shards import Shard
from pipeline.storage import Store, open_store
from tests.conftest import lead_to_store, new_bucket
from tests.images import Edits, edited, edits

IMAGES = [random.Random(number).randbytes(900) for number in range(300)]
SHARD = Shard(number=0, name="a.parquet", format="parquet", output="a.parquet", size=0, etag="")


def parquet_of(table: pa.Table | dict[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink, **options)
    return sink.getvalue()


def read(folder: Path, data: bytes, **columns: Any) -> list[Sample]:
    (folder / SHARD.name).write_bytes(data)
    return list(open_reader(LocalStore(folder), SHARD, Columns(**columns)))


def images(samples: list[Sample]) -> list[bytes | None]:
    assert [sample.row for sample in samples] == list(range(len(samples)))
    return [sample.data for sample in samples]


def structs(values: list[Any]) -> pa.Array:
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("options", [{}, {"row_group_size": 70}, {"data_page_size": 2000, "compression": "zstd"}])
def test_images_come_in_the_order_of_their_rows(tmp_path: Path, kind: pa.DataType, options: dict[str, Any]) -> None:
    samples = read(tmp_path, parquet_of({"image": pa.array(IMAGES, kind)}, **options))
    assert images(samples) == IMAGES
    assert [sample.key for sample in samples[:2]] == ["a.parquet#0", "a.parquet#1"]


def test_hugging_face_structs_are_read_with_their_path_as_key(tmp_path: Path) -> None:
    values = [{"bytes": b"1", "path": "x/1.jpg"}, {"bytes": b"2", "path": None}, {"bytes": None, "path": "3.jpg"}, None]
    samples = read(tmp_path, parquet_of({"picture": structs(values), "label": [1, 2, 3, 4]}))
    assert images(samples) == [b"1", b"2", None, None]
    assert [sample.key for sample in samples] == ["x/1.jpg", "a.parquet#1", "3.jpg", "a.parquet#3"]
    assert [sample.error for sample in samples] == [None, None, "the image is null", "the image is null"]


def test_null_images_are_error_rows_and_empty_ones_are_not(tmp_path: Path) -> None:
    samples = read(tmp_path, parquet_of({"image": pa.array([b"1", None, b""], pa.binary())}))
    assert [(sample.data, sample.error) for sample in samples] == [
        *((b"1", None), (None, "the image is null"), (b"", None)),
    ]


def test_an_image_beyond_the_limit_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", 10)
    samples = read(tmp_path, parquet_of({"image": [b"x" * 10, b"x" * 11]}))
    assert images(samples) == [b"x" * 10, None]
    assert "11 bytes" in (samples[1].error or "")


def test_a_file_without_rows_has_none(tmp_path: Path) -> None:
    assert read(tmp_path, parquet_of({"image": pa.array([], pa.binary())})) == []


# Columns


@pytest.mark.parametrize("name", ["key", "__key__", "id", "image_id"])
def test_keys_are_found_by_name(tmp_path: Path, name: str) -> None:
    samples = read(tmp_path, parquet_of({"image": structs([{"bytes": b"1", "path": "p"}]), name: ["k"]}))
    assert [sample.key for sample in samples] == ["k"]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ([7, None], ["7", "a.parquet#1"]),
        ([b"abc", b"caf\xe9"], ["abc", "caf\udce9"]),
        (["é", ""], ["é", ""]),
    ],
)
def test_keys_of_any_type_become_text(tmp_path: Path, values: list[Any], keys: list[str]) -> None:
    data = parquet_of({"image": pa.array([b"1", b"2"]), "name": values})
    assert [sample.key for sample in read(tmp_path, data, image="image", key="name")] == keys


@pytest.mark.parametrize(
    ("kind", "path", "key"),
    [(pa.binary(), b"caf\xe9.jpg", "caf\udce9.jpg"), (pa.int64(), 7, "7"), (pa.string(), "", "")],
)
def test_paths_of_any_type_become_text(tmp_path: Path, kind: pa.DataType, path: Any, key: str) -> None:
    values = pa.array([{"bytes": b"1", "path": path}], pa.struct([("bytes", pa.binary()), ("path", kind)]))
    assert [sample.key for sample in read(tmp_path, parquet_of({"image": values}))] == [key]


@pytest.mark.parametrize(
    "keys",
    [
        pa.array([0, 10_000_000], pa.int32()).cast(pa.date32()),  # the year 29349
        pa.array([b"a", b"caf\xe9"]).view(pa.string()),
    ],
)
def test_a_key_that_python_cannot_hold_ends_the_shard_there_and_is_no_crash(tmp_path: Path, keys: pa.Array) -> None:
    samples, error = damaged_rows(tmp_path, parquet_of({"image": [b"1", b"2"], "key": keys}))
    assert images(samples) == [b"1"]
    assert "cannot be read past row 1" in (error or "")


def test_several_binary_columns_need_a_choice(tmp_path: Path) -> None:
    data = parquet_of({"left": [b"l"], "right": [b"r"]})
    with pytest.raises(UsageError, match=r"a.parquet.*\['left', 'right'\].*--image-column"):
        read(tmp_path, data)
    assert images(read(tmp_path, data, image="right")) == [b"r"]


def test_the_usual_name_is_chosen_among_several(tmp_path: Path) -> None:
    assert images(read(tmp_path, parquet_of({"hash": [b"h"], "image": [b"i"]}))) == [b"i"]


def test_names_with_dots_are_names(tmp_path: Path) -> None:
    data = parquet_of({"image": [b"i"], "image.jpg": [b"j"], "image.id": ["k"]})
    (sample,) = read(tmp_path, data, image="image.jpg", key="image.id", carry=("image",))
    assert (sample.data, sample.key) == (b"j", "k")
    assert sample.carried is not None
    assert sample.carried.to_pylist() == [{"image": b"i"}]


@pytest.mark.parametrize("asked", [{"image": "x"}, {"key": "x"}, {"carry": ("x",)}])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ShardError, match=r"a.parquet has no column 'x'; it has \['image', 'y'\]"):
        read(tmp_path, parquet_of({"image": [b"i"], "y": [1]}), **asked)


def test_a_column_that_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="'y' is int64"):
        read(tmp_path, parquet_of({"image": [b"i"], "y": [1]}), image="y")
    with pytest.raises(ShardError, match=r"no column of images.*\['y'\]"):
        read(tmp_path, parquet_of({"y": [1]}))


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"1"]), pa.array([b"2"])], names=["image", "image"])
    with pytest.raises(ShardError, match="several columns 'image'"):
        read(tmp_path, parquet_of(table))


CARRIED = pa.table(
    {
        "image": pa.array([b"1", b"2", b"3"]),
        "time": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
        "price": pa.array([decimal.Decimal("1.20"), None, decimal.Decimal("3.45")], pa.decimal128(9, 2)),
        "tags": pa.array([["a", None], None, []], pa.list_(pa.string())),
        "box": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
        "more": pa.array([{"x": 1, "y": ["a"]}, None, {"x": None, "y": None}]),
        "class": pa.array(["cat", None, "dog"]).dictionary_encode(),
        "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int8())),
        "float": pa.array([1.5, None, float("inf")], pa.float32()),
        "nothing": pa.nulls(3),
        "length": pa.array([5, None, 7], pa.duration("us")),
    }
)


def test_carried_columns_keep_their_types_and_values(tmp_path: Path) -> None:
    names = tuple(CARRIED.column_names)
    (tmp_path / SHARD.name).write_bytes(parquet_of(CARRIED, row_group_size=2))
    reader = open_reader(LocalStore(tmp_path), SHARD, Columns(carry=names))
    assert reader.carried.equals(CARRIED.schema)
    batches = [sample.carried for sample in reader]
    assert pa.Table.from_batches(batches).equals(CARRIED)


# Damage


def damaged_rows(folder: Path, data: bytes) -> tuple[list[Sample], str | None]:
    """What is read of a file, and the error that ends it."""
    samples: list[Sample] = []
    (folder / SHARD.name).write_bytes(data)
    try:
        samples.extend(open_reader(LocalStore(folder), SHARD, Columns()))
    except ShardError as error:
        return samples, str(error)
    return samples, None


@pytest.mark.parametrize("keep", [0, 3, 8, 1000, -1, -8, -200])
def test_a_file_cut_off_is_an_error(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ShardError, match=r"a.parquet is not a readable Parquet file"):
        read(tmp_path, parquet_of({"image": IMAGES})[:keep])


@pytest.mark.parametrize("row", [0, 40, 200])
def test_all_rows_before_a_damaged_page_in_the_middle_of_a_row_group_are_read(tmp_path: Path, row: int) -> None:
    pages_of_10: dict[str, Any] = {"data_page_size": 9000, "write_batch_size": 10, "use_dictionary": False}
    data = bytearray(parquet_of({"image": IMAGES}, **pages_of_10, write_statistics=False, write_page_checksum=True))
    start = data.index(IMAGES[row])
    data[start : start + 20] = bytes(20)
    samples, error = damaged_rows(tmp_path, bytes(data))
    assert images(samples) == IMAGES[:row]
    assert f"cannot be read past row {row}" in (error or "")


def test_rows_before_a_damaged_page_are_read(tmp_path: Path) -> None:
    data = bytearray(parquet_of({"image": IMAGES}, row_group_size=100, compression="zstd", write_page_checksum=True))
    start = data.index(IMAGES[150])  # random bytes do not compress
    data[start : start + 20] = bytes(20)
    (tmp_path / SHARD.name).write_bytes(data)
    samples: list[Sample] = []
    with pytest.raises(ShardError, match="cannot be read past row 100"):
        samples.extend(open_reader(LocalStore(tmp_path), SHARD, Columns()))
    assert images(samples) == IMAGES[:100]


@pytest.mark.parametrize("value", [0, 1, 0x40, 0x7F])
def test_no_byte_of_the_footer_makes_rows_go_missing_in_silence(tmp_path: Path, value: int) -> None:
    data = parquet_of({"image": IMAGES[:50]}, row_group_size=20, store_schema=False, write_statistics=False)
    for at in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)):
        samples, error = damaged_rows(tmp_path, data[:at] + bytes([value]) + data[at + 1 :])
        assert error is not None or len(samples) == 50, f"byte {at}"


MUTATED = [
    parquet_of({"image": pa.array([None, *IMAGES[:9]] * 5), "key": [f"k{n % 7}" for n in range(50)]}, **options)
    for options in (
        {"row_group_size": 20, "compression": "snappy"},
        {"row_group_size": 20, "compression": "none", "write_page_checksum": True},
        {"row_group_size": 20, "compression": "zstd", "data_page_version": "2.0", "use_dictionary": False},
        {"data_page_size": 2000, "compression": "gzip"},
    )
]


@pytest.mark.timeout(120)
@given(which=st.sampled_from(range(len(MUTATED))), edits=edits(), in_footer=st.booleans())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_file_is_rows_and_at_most_one_error(
    tmp_path: Path, which: int, edits: Edits, in_footer: bool
) -> None:
    data = MUTATED[which]
    kept = len(data) - 8 - int.from_bytes(data[-8:-4], "little") if in_footer else 0
    with suppress(UsageError):  # a second binary column, where the schema was damaged
        samples, error = damaged_rows(tmp_path, data[:kept] + edited(data[kept:], edits))
        assert [sample.row for sample in samples] == list(range(len(samples)))
        assert error is not None or len(samples) == 50
        assert "\n" not in (error or "")
        assert all((sample.data is None) == (sample.error is not None) for sample in samples)


class LostStore:
    """A store that opens an object and then loses it: once it is `lost`, reads raise."""

    url = "lost"

    def __init__(self, data: bytes, error: Exception) -> None:
        self.data, self.error, self.lost = data, error, False

    def fetch(self, start: int, stop: int) -> bytes:
        if self.lost:
            raise self.error
        return self.data[start:stop]

    def open(self, name: str, *, etag: str = "") -> Any:
        return ranged.open_ranged(self.fetch, len(self.data), window_bytes=1000)


@pytest.mark.parametrize("error", [NotFound("gone"), Unavailable("down")])
def test_a_store_that_fails_on_the_way_is_no_fault_of_the_shard(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.patience.PAUSES_S", ())
    store = LostStore(parquet_of({"image": IMAGES}, row_group_size=100), error)
    reader = open_reader(store, SHARD, Columns())  # type: ignore[arg-type]
    samples = iter(reader)
    next(samples)
    store.lost = True
    with pytest.raises(type(error), match=str(error)):
        list(samples)


# From a bucket


@pytest.fixture
def bucket(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    lead_to_store(monkeypatch, moto_port)
    yield open_store(f"s3://{new_bucket()}")
    s3._client.cache_clear()


def test_it_is_read_from_a_bucket_in_windows(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged.open_ranged, "__kwdefaults__", {"window_bytes": 5_000})
    bucket.write(SHARD.name, parquet_of({"image": IMAGES, "id": list(range(300))}, row_group_size=50))
    samples = list(open_reader(bucket, SHARD, Columns(carry=("id",))))
    assert images(samples) == IMAGES
    assert [sample.key for sample in samples] == [str(number) for number in range(300)]
