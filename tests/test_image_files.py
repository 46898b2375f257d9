"""A slice of image files gives each file once, in order, or a row that says why not."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.decode import decode_each, decode_image
from pipeline.errors import ShardError, Unavailable, UsageError
from pipeline.inputs import Columns, Sample, images, open_reader
from pipeline.local import LocalStore
from pipeline.shards import Shard, find_shards
from pipeline.storage import Store
from pipeline.transform import ImageTransform
from tests.images import real_images


class SlowStore(LocalStore):
    """A folder whose objects take a random time to read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._chance = random.Random(1)
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def read(self, name: str, *, etag: str = "") -> bytes:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self._chance.uniform(0, 0.01))
        with self._lock:
            self.at_once -= 1
        return super().read(name, etag=etag)


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path)
    for number in range(100):
        store.write(f"{number % 7}/{number:03d}.jpg", f"content {number}".encode())
        store.write(f"{number % 7}/{number:03d}.txt", b"no image")
    return store


def slices(store: Store, per_slice: int = 40) -> list[Shard]:
    return find_shards(store.list(), where="INPUT", per_slice=per_slice).shards


def read(store: Store, shard: Shard) -> list[Sample]:
    return list(open_reader(store, shard, Columns()))


def test_slices_give_every_file_once_in_order(folder: LocalStore) -> None:
    samples = [read(folder, shard) for shard in slices(folder)]
    assert [len(one) for one in samples] == [40, 40, 20]
    assert [[sample.row for sample in one] for one in samples] == [list(range(len(one))) for one in samples]
    names = [info.name for info in folder.list() if info.name.endswith(".jpg")]
    assert [(s.key, s.data, s.error) for one in samples for s in one] == [(n, folder.read(n), None) for n in names]


def test_files_are_read_at_once_and_given_in_order(folder: LocalStore) -> None:
    slow = SlowStore(folder.root)
    (shard,) = slices(folder, 100)
    assert [sample.data for sample in read(slow, shard)] == [sample.data for sample in read(folder, shard)]
    assert 4 <= slow.most_at_once <= images.READS_AT_ONCE


def test_a_bucket_gives_what_a_folder_does(store: Store) -> None:
    names = ["a b.jpg", "a+b%.png", "日本/語.webp", "what?#.gif", "zero.jpg"]
    for name in names:
        store.write(name, b"" if name == "zero.jpg" else name.encode())
    (shard,) = slices(store)
    assert [(sample.key, sample.data) for sample in read(store, shard)] == [
        (name, b"" if name == "zero.jpg" else name.encode()) for name in sorted(names, key=str.encode)
    ]


def test_what_is_no_image_by_its_name_is_passed_over(store: Store) -> None:
    others = ["_SUCCESS", ".DS_Store", "README.txt", "a/.DS_Store", "a/_tmp.jpg", "a/Thumbs.db", "b.jpg.md5", "jpg"]
    for name in [*others, "a/b.jpg"]:
        store.write(name, name.encode())
    (shard,) = slices(store)
    assert [(sample.key, sample.data) for sample in read(store, shard)] == [("a/b.jpg", b"a/b.jpg")]
    assert shard.size == len("a/b.jpg")


def test_a_wrong_suffix_does_not_matter_to_what_is_decoded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    right = {"a.png": real_images()["png-palette"], "b.gif": real_images()["animated-gif"], "c.webp": b"no image"}
    for (name, data), wrong in zip(right.items(), ("a.JPG", "b.png", "d.tiff"), strict=True):
        store.write(name, data)
        store.write(wrong, data)
    (shard,) = slices(store)
    data_of = {sample.key: sample.data or b"" for sample in read(store, shard)}
    transform = ImageTransform(height=32, width=32, resize_to=(32, 32))
    for name, wrong in (("a.png", "a.JPG"), ("b.gif", "b.png")):
        assert np.array_equal(decode_image(data_of[name], transform), decode_image(data_of[wrong], transform))
    (refused,) = decode_each([data_of["d.tiff"]], transform)
    assert "begin with b'no image'" in str(refused)


@pytest.mark.parametrize("change", ["new", "gone", "longer"])
def test_a_listing_that_changed_since_the_plan_is_an_error(folder: LocalStore, change: str) -> None:
    shards = slices(folder)
    name = shards[1].last
    match change:
        case "new":
            folder.write(f"{name.removesuffix('.jpg')}-.jpg", b"new")
        case "gone":
            folder.delete([name])
        case "longer":
            folder.write(name, b"a longer content than before")
    assert len(read(folder, shards[0])) == 40
    with pytest.raises(ShardError, match=f"images-000001 .*up to '{name}'.* changed"):
        read(folder, shards[1])
    assert len(read(folder, shards[2])) == 20


def test_what_is_no_image_may_come_and_go(folder: LocalStore) -> None:
    shards = slices(folder)
    folder.write("3/new.txt", b"")
    assert sum(len(read(folder, shard)) for shard in shards) == 100


def test_a_file_that_goes_or_changes_while_the_slice_is_read_is_an_error_row(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "READS_AT_ONCE", 1)
    (shard,) = slices(folder, 100)
    samples = iter(open_reader(folder, shard, Columns()))
    read_so_far = [next(samples)]
    names = [info.name for info in folder.list() if info.name.endswith(".jpg")]
    folder.delete([names[50]])
    folder.write(names[60], b"another content altogether")
    rest = [*read_so_far, *samples]
    assert [sample.key for sample in rest] == names
    assert [(sample.row, sample.data, sample.error) for sample in rest if sample.error] == [
        (50, None, "the file was deleted while the job ran"),
        (60, None, "the file was replaced while the job ran"),
    ]


def test_a_file_beyond_the_limit_is_an_error_row_and_not_read(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 9)
    (shard,) = slices(folder, 100)
    samples = read(folder, shard)
    assert [sample.data for sample in samples if sample.data] == [
        f"content {number}".encode() for number in (0, 7, 1, 8, 2, 9, 3, 4, 5, 6)
    ]
    assert sum("10 bytes" in (sample.error or "") for sample in samples) == 90


class DownStore(SlowStore):
    def read(self, name: str, *, etag: str = "") -> bytes:
        raise Unavailable("the store is down")


def test_a_store_that_fails_is_no_error_row(folder: LocalStore) -> None:
    with pytest.raises(Unavailable):
        read(DownStore(folder.root), slices(folder)[0])


def test_a_reader_that_is_left_leaves_no_thread(folder: LocalStore) -> None:
    samples = iter(open_reader(SlowStore(folder.root), slices(folder, 100)[0], Columns()))
    next(samples)
    samples.close()  # type: ignore[attr-defined]
    assert [thread for thread in threading.enumerate() if thread.name.startswith("tandem-read")] == []


@pytest.mark.parametrize("columns", [Columns(carry=("label",)), Columns(image="label"), Columns(key="label")])
def test_files_have_no_columns_to_ask_for(folder: LocalStore, columns: Columns) -> None:
    with pytest.raises(UsageError, match="'label'"):
        open_reader(folder, slices(folder)[0], columns)
