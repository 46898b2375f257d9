"""A tar gives each of its images once, or says that it cannot: never fewer rows in silence."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ShardError, UsageError
from pipeline.inputs import Columns, Sample, open_reader, tar
from pipeline.local import LocalStore
from pipeline.shards import Shard

Members = Iterable[tuple[str | tarfile.TarInfo, bytes]]
BLOCK = tarfile.BLOCKSIZE
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "a.tar.gz": gzip.compress,
    "a.tgz": lambda data: b"".join(gzip.compress(data[at : at + 5000]) for at in range(0, len(data), 5000)),
    "bz2.tar": bz2.compress,
    "xz.tar": lzma.compress,
}


def tar_of(members: Members, format: int = tarfile.PAX_FORMAT, encoding: str = "utf-8") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format, encoding=encoding, errors="surrogateescape") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = info.size or len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def image(number: int) -> bytes:
    return random.Random(number).randbytes(100 + 700 * (number % 3))


TEN = [(f"{number:04d}.jpg", image(number)) for number in range(10)]


class Reading:
    """What a reader gave before it ended, and the error that it ended with."""

    def __init__(self, folder: Path, data: bytes, name: str = "a.tar", columns: Columns | None = None) -> None:
        (folder / name).write_bytes(data)
        shard = Shard(number=0, name=name, format="tar", output="a.parquet", size=len(data), etag="")
        self.samples: list[Sample] = []
        self.error: str | None = None
        try:
            self.samples.extend(open_reader(LocalStore(folder), shard, columns or Columns()))
        except ShardError as error:
            self.error = str(error)
            assert name in self.error

    @property
    def images(self) -> list[tuple[str, bytes | None]]:
        assert [sample.row for sample in self.samples] == list(range(len(self.samples)))
        return [(sample.key, sample.data) for sample in self.samples]

    def carried(self) -> list[dict[str, str | None]]:
        return [row for sample in self.samples if sample.carried for row in sample.carried.to_pylist()]


def keyed(members: Iterable[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(name.removesuffix(".jpg"), data) for name, data in members]


def test_images_come_in_the_order_of_their_members(tmp_path: Path) -> None:
    members = random.Random(2).sample(TEN, len(TEN))
    reading = Reading(tmp_path, tar_of(members))
    assert reading.images == keyed(members)
    assert reading.error is None


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_are_paths_up_to_the_first_dot(tmp_path: Path, format: int) -> None:
    names = {
        "./a/b.c/d.left.JPG": "a/b.c/d",
        "blank in.png": "blank in",
        "日本/語é🙂.webp": "日本/語é🙂",
        **{f"{'long/' * 18}{'n' * 90}.jpg": f"{'long/' * 18}{'n' * 90}"},
    }
    reading = Reading(tmp_path, tar_of([(name, name.encode()) for name in names], format))
    assert reading.images == [(key, name.encode()) for name, key in names.items()]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_are_read(tmp_path: Path, format: int) -> None:
    name = f"{'x' * 200}/{'y' * 2000}"
    assert Reading(tmp_path, tar_of([(f"{name}.jpg", b"1")], format)).images == [(name, b"1")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_need_not_be_utf8(tmp_path: Path, format: int) -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    assert Reading(tmp_path, tar_of([(f"{name}.jpg", b"1")], format)).images == [(name, b"1")]


def test_only_files_are_images(tmp_path: Path) -> None:
    others = []
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
        info = tarfile.TarInfo(f"x{kind.decode()}.jpg")
        info.type, info.linkname = kind, "0000.jpg"
        others.append((info, b""))
    assert Reading(tmp_path, tar_of([*others, *TEN, *others])).images == keyed(TEN)


def test_files_whose_names_begin_with_a_dot_are_no_samples(tmp_path: Path) -> None:
    members = [("._0000.jpg", b"resource fork"), ("dir/.hidden.jpg", b""), *TEN]
    assert Reading(tmp_path, tar_of(members)).images == keyed(TEN)


def test_a_key_that_stands_twice_is_an_error_row(tmp_path: Path) -> None:
    reading = Reading(tmp_path, tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.png", b"3"), ("c.jpg", b"4")]))
    assert reading.images == [("a", b"1"), ("b", b"2"), ("a@2", None), ("c", b"4")]
    assert [sample.error for sample in reading.samples] == [None, None, "the key 'a' stands twice in this shard", None]


def test_one_of_several_images_of_a_key_is_chosen_by_suffix(tmp_path: Path) -> None:
    data = tar_of([("a.mask.png", b"m1"), ("a.jpg", b"1"), ("b.jpg", b"2"), ("b.mask.png", b"m2")])
    assert Reading(tmp_path, data, columns=Columns(image="jpg")).images == [("a", b"1"), ("b", b"2")]
    assert Reading(tmp_path, data, columns=Columns(image="mask.png")).images == [("a", b"m1"), ("b", b"m2")]


def test_a_key_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'id'"):
        Reading(tmp_path, tar_of(TEN), columns=Columns(key="id"))


@given(order=st.permutations(["a.jpg", "a.cls", "a.json", "b.txt", "b.png", "c.jpg", "c.cls", "d/a.jpg", "d/a.cls"]))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sidecars_are_joined_wherever_they_stand(tmp_path: Path, order: list[str]) -> None:
    columns = Columns(carry=("cls", "txt", "json"))
    reading = Reading(tmp_path, tar_of([(name, f" {name}\n".encode()) for name in order]), columns=columns)
    assert {sample.key: row for sample, row in zip(reading.samples, reading.carried(), strict=True)} == {
        "a": {"cls": "a.cls", "txt": None, "json": "a.json"},
        "b": {"cls": None, "txt": "b.txt", "json": None},
        "c": {"cls": "c.cls", "txt": None, "json": None},
        "d/a": {"cls": "d/a.cls", "txt": None, "json": None},
    }


def test_what_is_carried_has_the_readers_schema(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("a.jpg", b"1"), ("a.cls", b"caf\xe9")]))
    shard = Shard(number=0, name="a.tar", format="tar", output="", size=0, etag="")
    reader = open_reader(LocalStore(tmp_path), shard, Columns(carry=("cls",)))
    assert reader.carried == pa.schema([("cls", pa.string())])
    (sample,) = reader
    assert sample.carried is not None
    assert sample.carried.schema == reader.carried
    assert sample.carried.to_pylist() == [{"cls": "caf\ufffd"}]


def test_sidecars_of_a_damaged_archive_are_carried_as_far_as_they_go(tmp_path: Path) -> None:
    data = tar_of([("a.jpg", b"1"), ("a.cls", b"A"), ("b.jpg", b"2"), ("b.cls", b"B")])
    reading = Reading(tmp_path, data[: 6 * BLOCK], columns=Columns(carry=("cls",)))
    assert reading.images == [("a", b"1"), ("b", b"2")]
    assert reading.carried() == [{"cls": "A"}, {"cls": None}]
    assert reading.error is not None


def test_an_image_beyond_the_limit_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_IMAGE_BYTES", 10)
    reading = Reading(tmp_path, tar_of([("a.jpg", b"x" * 10), ("b.jpg", b"x" * 11), ("c.jpg", b"3")]))
    assert reading.images == [("a", b"x" * 10), ("b", None), ("c", b"3")]
    assert "11 bytes" in (reading.samples[1].error or "")


def test_empty_images_are_images(tmp_path: Path) -> None:
    assert Reading(tmp_path, tar_of([("a.jpg", b""), ("b.jpg", b"")])).images == [("a", b""), ("b", b"")]


def sparse(name: str) -> bytes:
    """An old GNU sparse member: `ab`, then a hole, 1000 bytes in all."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[410:434] = b"%011o\0%011o\0" % (1000, 0)
    header[483:495] = b"%011o\0" % 1000
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"ab" + bytes(510)


def test_sparse_members_are_read_with_their_holes(tmp_path: Path) -> None:
    data = sparse("a.jpg") + tar_of([("b.jpg", b"2")])
    assert Reading(tmp_path, data).images == [("a", b"ab" + bytes(998)), ("b", b"2")]


# Damage


def assert_prefix_then_error(reading: Reading, whole: list[tuple[str, bytes]]) -> None:
    assert reading.error is not None, "rows are missing in silence"
    assert reading.images == whole[: len(reading.images)]


def end_of_members(data: bytes) -> int:
    """Where the end-of-archive mark begins."""
    return len(data.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_cut_off_at_any_block_gives_what_is_whole_and_an_error(tmp_path: Path, format: int) -> None:
    members = [*TEN[:4], (f"{'n' * 120}.jpg", b"x" * 600), *TEN[4:6]]
    data = tar_of(members, format) if format != tarfile.USTAR_FORMAT else tar_of(TEN[:6], format)
    whole = [(key, content) for key, content in Reading(tmp_path, data).images if content is not None]
    lengths = []
    for length in range(0, end_of_members(data) + 1, BLOCK):
        reading = Reading(tmp_path, data[:length])
        assert_prefix_then_error(reading, whole)
        lengths.append(len(reading.images))
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(whole), "with all members whole, only the end mark is missing"


@given(where=st.floats(0, 1), cut=st.booleans())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_archive_cut_off_anywhere_gives_what_is_whole_and_an_error(tmp_path: Path, where: float, cut: bool) -> None:
    data = tar_of(TEN)
    reading = Reading(tmp_path, data[: int(where * end_of_members(data))])
    assert_prefix_then_error(reading, keyed(TEN))


def test_an_archive_needs_one_block_of_its_end_mark_and_no_padding(tmp_path: Path) -> None:
    data = tar_of(TEN)
    reading = Reading(tmp_path, data[: end_of_members(data) + BLOCK])
    assert (reading.images, reading.error) == (keyed(TEN), None)


def test_what_follows_the_end_mark_may_be_anything_but_members(tmp_path: Path) -> None:
    data = tar_of(TEN)
    reading = Reading(tmp_path, data + random.Random(3).randbytes(5000) + b"ustar" * 1000)
    assert (reading.images, reading.error) == (keyed(TEN), None)


def test_a_second_archive_after_the_first_is_not_dropped_in_silence(tmp_path: Path) -> None:
    reading = Reading(tmp_path, tar_of(TEN[:5]) + tar_of(TEN[5:]))
    assert_prefix_then_error(reading, keyed(TEN[:5]))
    assert "end-of-archive mark" in (reading.error or "")


def test_a_header_lost_in_a_block_of_zeros_is_an_error(tmp_path: Path) -> None:
    whole = tar_of(TEN)
    for at in range(0, end_of_members(whole), BLOCK):
        if whole[at + 257 : at + 262] == b"ustar":
            reading = Reading(tmp_path, whole[:at] + bytes(BLOCK) + whole[at + BLOCK :])
            assert_prefix_then_error(reading, keyed(TEN))


@given(start=st.integers(0, 20), blocks=st.integers(1, 6), filled=st.sampled_from([0, 255]))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rubbish_in_the_middle_is_an_error_or_a_row(tmp_path: Path, start: int, blocks: int, filled: int) -> None:
    data = bytearray(tar_of(TEN))
    data[start * BLOCK : (start + blocks) * BLOCK] = bytes([filled]) * (blocks * BLOCK)
    reading = Reading(tmp_path, bytes(data))
    # tar keeps no check sums of content, so an image may be damaged; a row must not be missing
    keys = [key for key, _ in reading.images]
    assert keys == [key for key, _ in keyed(TEN)][: len(keys)]
    assert reading.error is not None or len(keys) == len(TEN)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_never_raises_anything_else(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    format = chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    data = bytearray(tar_of([(f"{'é' * 150}.jpg", b"1"), ("b.jpg", b"2")], format))
    for _ in range(chance.randint(1, 4)):
        block = chance.randrange(4) * BLOCK
        data[block + chance.randrange(BLOCK)] = chance.randrange(256)
        data[block + 148 : block + 156] = b" " * 8
        data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + BLOCK])
    Reading(tmp_path, bytes(data))


@pytest.mark.parametrize("record", [b"0 path=x\n", b"11 size=-99\n", b"12 size=1e99\n", b"30 GNU.sparse.map=9,9,9\n"])
def test_a_damaged_extended_header_is_an_error(tmp_path: Path, record: bytes) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    data = tar_of(TEN[:1])[:-BLOCK]
    body = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0")
    cut = end_of_members(tar_of(TEN[:1]))
    reading = Reading(tmp_path, data[:cut] + body + tar_of(TEN[1:]))
    assert [key for key, _ in reading.images[:1]] == ["0000"]
    assert reading.error is not None or len(reading.images) == len(TEN)


def test_headers_of_headers_without_end_are_an_error(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    reading = Reading(tmp_path, tar_of(TEN)[: end_of_members(tar_of(TEN))] + header.tobuf(tarfile.USTAR_FORMAT) * 5000)
    assert_prefix_then_error(reading, keyed(TEN))


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_archives_are_read(tmp_path: Path, name: str) -> None:
    reading = Reading(tmp_path, COMPRESSIONS[name](tar_of(TEN)), name)
    assert (reading.images, reading.error) == (keyed(TEN), None)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_compressed_archive_cut_off_anywhere_gives_what_is_whole_and_an_error(tmp_path: Path, name: str) -> None:
    data = COMPRESSIONS[name](tar_of(TEN))
    for length in [*range(24), *range(24, len(data), 97), len(data) - 1]:
        assert_prefix_then_error(Reading(tmp_path, data[:length], name), keyed(TEN))


def test_images_before_the_cut_of_a_gzip_are_not_lost(tmp_path: Path) -> None:
    data = gzip.compress(tar_of(TEN))
    assert len(Reading(tmp_path, data[: len(data) // 2], "a.tgz").images) >= 3


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_compressed_archive_with_a_flipped_bit_is_an_error(tmp_path: Path, name: str) -> None:
    whole = COMPRESSIONS[name](tar_of(TEN))
    for at in range(20, len(whole) - 8, 211):
        data = bytearray(whole)
        data[at] ^= 4
        reading = Reading(tmp_path, bytes(data), name)
        assert reading.error is not None, f"byte {at}"


@pytest.mark.parametrize("name", ["a.tar", *COMPRESSIONS])
def test_an_empty_archive_has_no_rows_and_no_error(tmp_path: Path, name: str) -> None:
    data = COMPRESSIONS.get(name, bytes)(tar_of([]))
    reading = Reading(tmp_path, data, name)
    assert (reading.images, reading.error) == ([], None)


@pytest.mark.parametrize(
    "data",
    [b"", b"no tar at all", b"\x1f\x8b", b"BZh", b"\xff\xd8\xff" * 1000, gzip.compress(b""), gzip.compress(b"no")],
)
def test_what_is_no_archive_is_an_error(tmp_path: Path, data: bytes) -> None:
    reading = Reading(tmp_path, data)
    assert reading.images == []
    assert reading.error is not None


def test_an_archive_without_images_names_what_it_holds(tmp_path: Path) -> None:
    reading = Reading(tmp_path, tar_of([("a.txt", b""), ("b.json", b"{}")]))
    assert reading.error == "a.tar holds no images among 2 files (such as 'a.txt')"
