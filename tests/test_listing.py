"""A listing of any length gives every image to one slice, in order, and goes on after any name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import FakeKey, s3_backends
from moto.server import ThreadedMotoServer

from pipeline import s3
from pipeline.local import LocalStore
from pipeline.shards import IMAGES_PER_SHARD, Fingerprint, Shard, find_shards, slice_of
from pipeline.storage import Store, open_store
from tests.conftest import lead_to_store, new_bucket

# Without what XML cannot hold, such as U+0001 or U+FFFF: Ceph 16 answers 500 where such a name ends a page
ODD = [
    *(
        " ",
        "+",
        "%",
        "%41",
        "%2F",
        "&",
        "&amp;",
        "#",
        "?",
        "=",
        ";",
        ":",
        ",",
        "@",
        "$",
        "'",
        '"',
        "`",
        "\\",
        "<",
        ">",
        "|",
    ),
    *("*", "[0]", "{0}", "~", "^", "!", "(1)", "..", "...", "\t", "é", "e\u0301", "日本", "🙂", "-"),
]
LINE_BREAKS = ["\n", "\r", "\r\n"]
KEYS_PER_PAGE = 150  # of moto, which takes a millisecond for each key that it lists


def in_order(names: list[str]) -> list[str]:
    return sorted(names, key=os.fsencode)


def assert_slices_cover(shards: list[Shard], names: list[str]) -> None:
    """That the slices hold `names`, which are in order, a thousand each, and begin where the one before ends."""
    lasts = names[IMAGES_PER_SHARD - 1 :: IMAGES_PER_SHARD]
    lasts += [] if lasts[-1:] == names[-1:] else names[-1:]
    assert [(shard.after, shard.last) for shard in shards] == list(zip(["", *lasts], lasts, strict=False))
    assert [int(shard.etag.partition("-")[0]) for shard in shards[:-1]] == [IMAGES_PER_SHARD] * (len(lasts) - 1)


def assert_found_again(store: Store, shard: Shard, names: list[str]) -> None:
    """That the slice, listed anew from where it begins, is what it was."""
    found = list(slice_of(store.list(after=shard.after), shard.last))
    first = shard.number * IMAGES_PER_SHARD
    assert [info.name for info in found] == names[first : first + IMAGES_PER_SHARD]
    again = Fingerprint()
    for info in found:
        again.add(info)
    assert again.etag() == shard.etag


def test_100_000_files_of_a_folder(tmp_path: Path) -> None:
    # "-" and "." come before "/", so a folder stands behind the files that begin with its name
    names = in_order(
        [f"{n // 998:03}/{n % 998:03}.jpg" for n in range(99_800)]
        + [f"{n:03}{end}" for n in range(100) for end in (".jpg", "-.jpg")]
    )
    for name in names:
        folder = tmp_path / name.rpartition("/")[0]
        folder.mkdir(exist_ok=True)
        os.close(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY))
    for other in ("_SUCCESS", ".DS_Store", "README.txt", "050/Thumbs.db", "099/.DS_Store"):
        (tmp_path / other).touch()
    store = LocalStore(tmp_path)
    shards = find_shards(store.list(), where="INPUT").shards
    assert len(names) == 100_000
    assert_slices_cover(shards, names)
    for shard in shards[::9]:
        assert_found_again(store, shard, names)


@pytest.fixture
def filled_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A bucket of 5,000 images and some other objects, and the names of the images, in order."""
    names = in_order([f"{n // 50:03}{ODD[n % len(ODD)]}/{n:05}.jpg" for n in range(5_000)])
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", str(KEYS_PER_PAGE))
    others = ["_SUCCESS", ".DS_Store", "README.txt", "100 /", "100 /_metadata.jpg"]
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        lead_to_store(monkeypatch, server.get_host_and_port()[1])
        bucket = new_bucket()
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys
        for name in [*names, *others]:
            key = f"some/prefix/{name}"
            keys[key] = FakeKey(key, b"", account_id=DEFAULT_ACCOUNT_ID, region_name="us-east-1", etag="tag")
        yield bucket, names
    finally:
        server.stop()
        s3_backends.reset()
        s3._client.cache_clear()


def test_a_bucket_of_many_pages(filled_bucket: tuple[str, list[str]]) -> None:
    bucket, names = filled_bucket
    pages: list[str] = []
    s3._client().meta.events.register("before-call.s3.ListObjectsV2", lambda **_: pages.append(""))
    store = open_store(f"s3://{bucket}/some/prefix")
    shards = find_shards(store.list(), where="INPUT").shards
    assert len(pages) == 34  # of 5,005 objects
    assert_slices_cover(shards, names)
    for shard in (shards[1], shards[-1]):
        assert_found_again(store, shard, names)


def test_a_real_store_of_three_pages(radosgw_bucket: str) -> None:
    store = open_store(f"s3://{radosgw_bucket}/some prefix")
    odd = [*ODD, *LINE_BREAKS]
    names = in_order([f"{n // 600}{odd[n % len(odd)]}//{n:05}{odd[n * 7 % len(odd)]}.jpg" for n in range(2_300)])
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: store.write(name, b""), names))
    assert [info.name for info in store.list()] == names
    shards = find_shards(store.list(), where="INPUT").shards
    assert_slices_cover(shards, names)
    for shard in shards:
        assert_found_again(store, shard, names)


def assert_goes_on_after_each(store: Store, names: list[str]) -> None:
    for name in names:
        store.write(name, b"")
    for index, name in enumerate(names):
        assert [info.name for info in store.list(after=name)] == names[index + 1 :], repr(name)


def test_a_listing_goes_on_after_any_name(store: Store) -> None:
    assert_goes_on_after_each(store, in_order([f"a{odd}b{end}" for odd in ODD for end in (".jpg", "/c.jpg")]))


def test_a_listing_goes_on_after_a_name_with_a_line_break(radosgw_bucket: str, tmp_path: Path) -> None:
    names = in_order([f"a{odd}b{end}" for odd in LINE_BREAKS for end in (".jpg", "/c.jpg")])
    for url in (f"s3://{radosgw_bucket}", str(tmp_path)):  # moto takes none
        assert_goes_on_after_each(open_store(url), names)
