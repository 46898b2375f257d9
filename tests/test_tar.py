"""A tar gives each of its images once, or says that it cannot: never fewer rows in silence."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tracemalloc
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
from tests.images import Edits, edited, edits

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
        reader = open_reader(LocalStore(folder), shard, columns or Columns())
        self.skipped = reader.skipped
        try:
            self.samples.extend(reader)
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
        " lead/trail ..jpg": " lead/trail ",
        "tab\there/line\nbreak.jpg": "tab\there/line\nbreak",
        "%41+&#?'\"\\.jpg": "%41+&#?'\"\\",
        "/absolute/../a.jpg": "/absolute/../a",
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


def test_names_do_not_depend_on_the_machines_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarfile.TarFile, "encoding", "iso-8859-1")
    assert Reading(tmp_path, tar_of([("é.jpg", b"1")], tarfile.GNU_FORMAT)).images == [("é", b"1")]


def test_only_files_are_images(tmp_path: Path) -> None:
    others = []
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
        info = tarfile.TarInfo(f"x{kind.decode()}.jpg")
        info.type, info.linkname = kind, "0000.jpg"
        others.append((info, b""))
    reading = Reading(tmp_path, tar_of([*others, *TEN, *others]))
    assert reading.images == keyed(TEN)
    assert reading.skipped == {"folder": 2, "symlink": 2, "not a file": 6}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_with_long_names_and_targets_are_passed_over(tmp_path: Path, format: int) -> None:
    link = tarfile.TarInfo(f"{'é' * 150}.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, f"../{'ü' * 150}.jpg"
    assert Reading(tmp_path, tar_of([TEN[0], (link, b""), TEN[1]], format)).images == keyed(TEN[:2])


def test_files_whose_names_begin_with_a_dot_are_no_samples(tmp_path: Path) -> None:
    members = [("._0000.jpg", b"resource fork"), ("dir/.hidden.jpg", b""), *TEN]
    assert Reading(tmp_path, tar_of(members)).images == keyed(TEN)


def test_a_key_that_stands_twice_is_an_error_row(tmp_path: Path) -> None:
    reading = Reading(tmp_path, tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.png", b"3"), ("c.jpg", b"4")]))
    assert reading.images == [("a", b"1"), ("b", b"2"), ("a@2", None), ("c", b"4")]
    assert [sample.error is None for sample in reading.samples] == [True, True, False, True]


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


def test_an_image_whose_sidecar_is_beyond_the_limit_is_an_error_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "MAX_SIDECAR_BYTES", 3)
    data = tar_of([("a.cls", b"123"), ("a.jpg", b"1"), ("b.cls", b"1234"), ("b.jpg", b"2")])
    reading = Reading(tmp_path, data, columns=Columns(carry=("cls",)))
    assert reading.carried() == [{"cls": "123"}, {"cls": None}]
    assert [sample.error for sample in reading.samples] == [None, "its sidecar b.cls has 4 bytes; the limit is 3"]


def test_an_image_beyond_the_limit_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_IMAGE_BYTES", 10)
    reading = Reading(tmp_path, tar_of([("a.jpg", b"x" * 10), ("b.jpg", b"x" * 11), ("c.jpg", b"3")]))
    assert reading.images == [("a", b"x" * 10), ("b", None), ("c", b"3")]
    assert "11 bytes" in (reading.samples[1].error or "")


def test_empty_images_are_images(tmp_path: Path) -> None:
    assert Reading(tmp_path, tar_of([("a.jpg", b""), ("b.jpg", b"")])).images == [("a", b""), ("b", b"")]


def signed(header: bytes | bytearray) -> bytes:
    """The header with the check sum that it should have."""
    blank = bytes(header[:148]) + b" " * 8 + bytes(header[156:])
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def sparse(name: str, size: int = 1000, *, map_goes_on: bool = False) -> bytes:
    """An old GNU sparse member: `ab`, then a hole, `size` bytes in all."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[410:434] = b"%011o\0%011o\0" % (size, 0)
    header[482] = map_goes_on
    header[483:495] = b"%011o\0" % size
    return signed(header) + b"ab" + bytes(510)


def test_sparse_members_are_read_with_their_holes(tmp_path: Path) -> None:
    data = sparse("a.jpg") + tar_of([("b.jpg", b"2")])
    assert Reading(tmp_path, data).images == [("a", b"ab" + bytes(998)), ("b", b"2")]


# As GNU tar --sparse-version=0.0, 0.1 and 1.0 writes 1000 bytes that begin with `ab` and end with `z`
SPARSE_PAX = {
    "0.0": (
        {"size": "1000", "numblocks": "2", "offset": "0", "numbytes": "2"},
        b"28 GNU.sparse.offset=999\n25 GNU.sparse.numbytes=1\n",
        b"abz",
    ),
    "0.1": ({"size": "1000", "numblocks": "2", "map": "0,2,999,1", "name": "dir/a.jpg"}, b"", b"abz"),
    "1.0": (
        {"major": "1", "minor": "0", "name": "dir/a.jpg", "realsize": "1000"},
        b"",
        b"2\n0\n2\n999\n1\n".ljust(BLOCK, b"\0") + b"abz",
    ),
}


@pytest.mark.parametrize("version", SPARSE_PAX)
def test_sparse_members_of_pax_are_read_with_their_holes(tmp_path: Path, version: str) -> None:
    fields, more, body = SPARSE_PAX[version]
    name = "GNUSparseFile.0/a.jpg" if "name" in fields else "dir/a.jpg"
    records = b"".join(pax_record(f"GNU.sparse.{field}={value}") for field, value in fields.items()) + more
    data = pax_header(records) + tar_of([(name, body)])[: -(-len(body) // BLOCK) * BLOCK + BLOCK]
    reading = Reading(tmp_path, data + tar_of([("b.jpg", b"2")]))
    assert reading.images == [("dir/a", b"ab" + bytes(997) + b"z"), ("b", b"2")]
    assert reading.error is None


def pax_record(text: str) -> bytes:
    """`text` after the length that the record has, counted with the length itself."""
    for length in range(len(text) + 3, len(text) + 10):
        record = f"{length} {text}\n"
        if len(record) == length:
            return record.encode()
    raise AssertionError(text)


def pax_header(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """The extended header that says more of the member after it."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK)


def test_a_hole_beyond_the_limit_is_an_error_row(tmp_path: Path) -> None:
    reading = Reading(tmp_path, sparse("a.jpg", 1 << 32) + tar_of(TEN))
    assert reading.images == [("a", None), *keyed(TEN)]
    assert "4294967296 bytes" in (reading.samples[0].error or "")


def peak_bytes(folder: Path, count: int) -> int:
    """The memory that reading so many members takes; none is an image but the last."""
    data = tar_of([*((f"{number:05d}.txt", b"") for number in range(count)), ("a.jpg", b"")])
    tracemalloc.start()
    try:
        assert len(Reading(folder, data).images) == 1
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_members_that_were_read_take_no_memory(tmp_path: Path) -> None:
    # tarfile keeps some 800 bytes of each; both archives are larger than what is buffered
    assert peak_bytes(tmp_path, 10_000) - peak_bytes(tmp_path, 5_000) < 5_000 * 50


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


def member_of_size(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of `x.jpg`, which says that so many bytes follow."""
    info = tarfile.TarInfo("x.jpg")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", [-1, -BLOCK, -BLOCK * 20, 1 << 40, 1 << 70, (1 << 87) - 1])
def test_a_size_that_cannot_be_is_an_error_and_no_hang(tmp_path: Path, size: int) -> None:
    ten = tar_of(TEN)
    reading = Reading(tmp_path, ten[: end_of_members(ten)] + member_of_size(size) + tar_of([("b.jpg", b"2")]))
    assert reading.error is not None
    assert reading.images[:10] == keyed(TEN)
    # the image may have a row of its own, which then is an error row
    assert [sample.data for sample in reading.samples[10:]] in ([], [None])


@pytest.mark.timeout(30)
@pytest.mark.parametrize("size", ["-1", "-5120", "9" * 30])
def test_a_size_of_pax_that_cannot_be_is_an_error_and_no_hang(tmp_path: Path, size: str) -> None:
    ten, header = tar_of(TEN), pax_header(pax_record(f"size={size}"))
    reading = Reading(tmp_path, ten[: end_of_members(ten)] + header + tar_of([("b.jpg", b"2")]))
    assert reading.error is not None
    assert reading.images[:10] == keyed(TEN)
    assert [sample.data for sample in reading.samples[10:]] in ([], [None])


EXTENDED = [
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
]


@pytest.mark.parametrize("kind", EXTENDED)
@pytest.mark.parametrize("size", [-BLOCK, (1 << 20) + 1, 1 << 40])
def test_an_extended_header_whose_size_cannot_be_is_not_read_into_memory(
    tmp_path: Path, kind: bytes, size: int
) -> None:
    reading = Reading(tmp_path, tar_of(TEN[:1])[: 2 * BLOCK] + member_of_size(size, kind) + bytes(3 << 20))
    assert reading.images == keyed(TEN[:1])
    assert f"{size} bytes" in (reading.error or "")


@pytest.mark.parametrize("kept", [0, 1, 100, BLOCK - 1])
def test_a_sparse_map_that_is_cut_off_is_an_error(tmp_path: Path, kept: int) -> None:
    header = sparse("x.jpg", map_goes_on=True)[:BLOCK]
    reading = Reading(tmp_path, tar_of(TEN[:1])[: 2 * BLOCK] + header + b"1" * kept)
    assert_prefix_then_error(reading, keyed(TEN[:1]))
    assert len(reading.images) == 1


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
def test_rubbish_after_a_compressed_archive_takes_no_image_with_it(tmp_path: Path, name: str) -> None:
    for rubbish in (b"\0", bytes(10_000), b"rubbish", random.Random(1).randbytes(3_000_000)):
        reading = Reading(tmp_path, COMPRESSIONS[name](tar_of(TEN)) + rubbish, name)
        assert reading.images == keyed(TEN)  # with or without an error after them


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


@pytest.mark.parametrize("size", [BLOCK, 2 * BLOCK, 20 * BLOCK, 5000 * BLOCK])
def test_the_end_mark_alone_is_an_empty_archive(tmp_path: Path, size: int) -> None:
    reading = Reading(tmp_path, bytes(size))
    assert (reading.images, reading.error) == ([], None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(BLOCK - 1),
        b"no tar at all",
        b"\x1f\x8b",
        b"BZh",
        b"\xff\xd8\xff" * 1000,
        gzip.compress(b"", mtime=0),
        gzip.compress(b"no", mtime=0),
    ],
)
def test_what_is_no_archive_is_an_error(tmp_path: Path, data: bytes) -> None:
    reading = Reading(tmp_path, data)
    assert reading.images == []
    assert reading.error is not None


def test_an_archive_without_images_counts_what_it_holds(tmp_path: Path) -> None:
    reading = Reading(tmp_path, tar_of([("a.txt", b""), ("b.json", b"{}"), ("c", b"")]))
    assert (reading.images, reading.error) == ([], None)
    assert reading.skipped == {".txt": 1, ".json": 1, "no suffix": 1}


# Mutations


def repaired(data: bytes) -> bytes:
    """With right check sums, so that what the headers say is believed."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    return b"".join(signed(block) if block[257:262] == b"ustar" and len(block) == BLOCK else block for block in blocks)


MUTATED = [
    tar_of([*TEN[:4], ("é" * 70 + ".jpg", b"5"), ("a/0000.cls", b"c")], tarfile.GNU_FORMAT),
    tar_of([*TEN[:4], ("é" * 70 + ".jpg", b"5"), ("a/0000.cls", b"c")], tarfile.PAX_FORMAT),
    sparse("s.jpg") + tar_of(TEN[:3]),
]


@pytest.mark.timeout(120)
@given(
    which=st.sampled_from(range(len(MUTATED))),
    edits=edits(),
    repair=st.booleans(),
    name=st.sampled_from(["a.tar", "a.tgz"]),
)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_archive_is_rows_and_at_most_one_error(
    tmp_path: Path, which: int, edits: Edits, repair: bool, name: str
) -> None:
    data = edited(MUTATED[which], edits)
    data = repaired(data) if repair else data
    reading = Reading(tmp_path, gzip.compress(data) if name == "a.tgz" else data, name, Columns(carry=("cls",)))
    assert "\n" not in (reading.error or "")
    assert len(reading.carried()) == len(reading.images)
    assert len({key for key, _ in reading.images}) == len(reading.images)


@given(edits=edits())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_gzip_gives_what_is_whole_and_an_error(tmp_path: Path, edits: Edits) -> None:
    data = gzip.compress(tar_of(TEN), mtime=0)
    reading = Reading(tmp_path, edited(data, edits), "a.tgz")
    assert reading.error is not None or [key for key, _ in reading.images] == [key for key, _ in keyed(TEN)]
