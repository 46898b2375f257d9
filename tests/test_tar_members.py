"""Every member of an archive is a sample or is counted; links, suffixes and keys are what people mean by them."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ShardError, UsageError
from pipeline.inputs import Columns, Sample, open_reader, tar, tar_scan
from pipeline.inputs.tar_scan import check_suffixes
from pipeline.local import LocalStore
from pipeline.shards import Shard

Member = tuple[str, bytes, str]  # name, type, and content or, of a link, its target


def archive_of(members: Sequence[Member]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            data = content.encode() if kind == tarfile.REGTYPE else b""
            info.linkname = "" if kind == tarfile.REGTYPE else content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def shard_of(folder: Path, data: bytes, number: int = 0) -> Shard:
    (folder / f"{number}.tar").write_bytes(data)
    return Shard(number=number, name=f"{number}.tar", format="tar", output=f"{number}.parquet", size=len(data), etag="")


def read(
    folder: Path, members: Sequence[Member], columns: Columns | None = None
) -> tuple[list[Sample], dict[str, int]]:
    reader = open_reader(LocalStore(folder), shard_of(folder, archive_of(members)), columns or Columns())
    return list(reader), reader.skipped


def file(name: str, content: str = "") -> Member:
    return name, tarfile.REGTYPE, content or name


def link(name: str, target: str) -> Member:
    return name, tarfile.LNKTYPE, target


_NAMES = st.sampled_from(["a.jpg", "b.JPG", "c.heic", "d.txt", "e", ".f.jpg", "g/h.png", "./i.cls", "__MACOSX/j.jpg"])
_KINDS = st.sampled_from(
    [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)


@given(members=st.lists(st.tuples(_NAMES, _KINDS, _NAMES), max_size=12), carry=st.booleans())
def test_every_member_is_a_sample_or_is_counted(
    tmp_path_factory: pytest.TempPathFactory, members: list[Member], carry: bool
) -> None:
    folder = tmp_path_factory.mktemp("members")
    samples, skipped = read(folder, members, Columns(carry=("cls",) if carry else ()))
    assert len(samples) + sum(skipped.values()) == len(members)
    assert [sample.row for sample in samples] == list(range(len(samples)))


def test_what_is_skipped_is_counted_by_its_reason(tmp_path: Path) -> None:
    members = [
        file("a.jpg"), file("a.json"), file("a.CLS"), file("b.tar.gz"), file("README"), file("._a.jpg"),
        file("__MACOSX/a.jpg"), ("folder", tarfile.DIRTYPE, ""), ("b.jpg", tarfile.SYMTYPE, "a.jpg"),
        ("pipe.jpg", tarfile.FIFOTYPE, ""),
    ]  # fmt: skip
    samples, skipped = read(tmp_path, members, Columns(carry=("cls",)))
    assert [sample.key for sample in samples] == ["a"]
    assert skipped == {
        ".json": 1, "carried": 1, ".gz": 1, "no suffix": 1, "hidden": 2, "folder": 1, "symlink": 1, "not a file": 1,
    }  # fmt: skip


def test_names_of_one_file_that_gnu_tar_packs_are_images_each(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    (tmp_path / "b.jpg").write_bytes(b"two")
    os.link(tmp_path / "a.jpg", tmp_path / "c.jpg")
    os.link(tmp_path / "a.jpg", tmp_path / "d.jpg")
    os.symlink("a.jpg", tmp_path / "e.jpg")
    subprocess.run(
        ["tar", "-C", tmp_path, "-czf", tmp_path / "0.tar", *(f"./{name}.jpg" for name in "abcde")], check=True
    )
    shard = shard_of(tmp_path, (tmp_path / "0.tar").read_bytes())

    reader = open_reader(LocalStore(tmp_path), shard, Columns())

    assert [(sample.key, sample.data) for sample in reader] == [
        ("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"one"),
    ]  # fmt: skip
    assert reader.skipped == {"symlink": 1}


def test_links_to_links_and_linked_sidecars_are_followed(tmp_path: Path) -> None:
    members = [
        file("a.jpg", "image"), file("a.cls", "7"), link("b.jpg", "./a.jpg"), link("b.cls", "a.cls"),
        link("c.jpg", "b.jpg"),
    ]  # fmt: skip
    samples, _ = read(tmp_path, members, Columns(carry=("cls",)))
    assert [sample.data for sample in samples] == [b"image"] * 3
    assert [sample.carried and sample.carried.to_pylist() for sample in samples] == [
        [{"cls": "7"}], [{"cls": "7"}], [{"cls": None}],
    ]  # fmt: skip


@pytest.mark.parametrize("members", [
    [link("a.jpg", "gone.jpg")],
    [link("a.jpg", "b.jpg"), file("b.jpg")],
    [link("a.jpg", "b.jpg"), link("b.jpg", "a.jpg")],
    [link("a.jpg", "a.jpg")],
])  # fmt: skip
def test_a_link_without_a_file_before_it_is_an_error_row_that_names_both(tmp_path: Path, members: list[Member]) -> None:
    samples, _ = read(tmp_path, members)
    assert samples[0].data is None
    assert samples[0].error is not None
    assert f"the hard link 'a.jpg' has no file {members[0][2]!r} before it" in samples[0].error


def test_suffixes_compare_without_case(tmp_path: Path) -> None:
    members = [file("a.JPG"), file("a.CLS", "1"), file("a.seg.png"), file("b.jpg"), file("b.cls", "2"), file("c.Jpg")]
    samples, _ = read(tmp_path, members, Columns(image=".jpg", carry=("cls",)))
    assert [sample.key for sample in samples] == ["a", "b", "c"]
    assert [sample.carried and sample.carried["cls"][0].as_py() for sample in samples] == ["1", "2", None]


@pytest.mark.parametrize(("names", "option"), [
    (("a.jpg", "a.seg.png"), "--image-column jpg or seg.png"),
    (("12.30.15.jpg", "12.30.16.jpg"), "--key-until last-dot"),
    (("a.jpg", "a.jpg"), "rename one of them"),
    (("a.jpg", "a.JPG"), "rename one of them"),
])  # fmt: skip
def test_a_key_that_stands_twice_names_both_members_and_the_option(
    tmp_path: Path, names: tuple[str, str], option: str
) -> None:
    samples, _ = read(tmp_path, [file(name) for name in names])
    assert samples[1].error is not None
    assert option in samples[1].error
    assert all(repr(name) in samples[1].error for name in names)


def test_keys_until_the_last_dot(tmp_path: Path) -> None:
    members = [
        file("d.x/2023-01-05 12.30.15.jpg"),
        file("d.x/2023-01-05 12.30.16.jpg"),
        file("d.x/2023-01-05 12.30.16.txt"),
    ]
    samples, _ = read(tmp_path, members, Columns(key_until="last-dot", carry=("txt",)))
    assert [sample.key for sample in samples] == ["d.x/2023-01-05 12.30.15", "d.x/2023-01-05 12.30.16"]
    assert samples[1].carried is not None
    assert samples[1].carried["txt"][0].as_py() == "d.x/2023-01-05 12.30.16.txt"


@pytest.mark.parametrize("format", ["parquet", "images"])
def test_keys_until_a_dot_are_for_tars(tmp_path: Path, format: str) -> None:
    shard = Shard(number=0, name="a", format=format, output="a.parquet", size=0, etag="")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--key-until last-dot is for tar shards"):
        open_reader(LocalStore(tmp_path), shard, Columns(key_until="last-dot"))


def test_sidecars_are_bounded_in_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_SIDECARS_BYTES", 5)
    members = [file("a.cls", "123"), file("b.cls", "456"), file("a.jpg"), file("b.jpg")]
    with pytest.raises(ShardError, match="sidecars cls have more than 5 bytes in all; carry fewer"):
        read(tmp_path, members, Columns(carry=("cls",)))


@pytest.mark.parametrize(("columns", "option"), [
    (Columns(carry=("json", "cls")), "--carry cls"),
    (Columns(image="png"), "--image-column png"),
])  # fmt: skip
def test_a_suffix_that_no_member_has_is_refused_with_those_there_are(
    tmp_path: Path, columns: Columns, option: str
) -> None:
    shards = [
        shard_of(tmp_path, archive_of([file(f"{number}.jpg"), file(f"{number}.json")]), number) for number in range(2)
    ]
    with pytest.raises(UsageError, match=f"{option}: no member .* has this suffix; they have jpg, json"):
        check_suffixes(LocalStore(tmp_path), shards, columns)


def test_a_suffix_that_a_later_shard_has_is_taken(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path, archive_of([file("a.jpg")]), 0), shard_of(tmp_path, archive_of([file("a.CLS")]), 1)]
    check_suffixes(LocalStore(tmp_path), shards, Columns(carry=("cls",)))


def test_sidecars_may_stand_behind_more_images_than_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_scan, "MAX_SCAN_BYTES", 100)
    shard = shard_of(tmp_path, archive_of([file("a.jpg"), file("b.jpg"), file("a.cls")]))
    check_suffixes(LocalStore(tmp_path), [shard], Columns(carry=("cls",)))
