"""A folder and two S3 stores keep one contract, and every failure of theirs comes out as a StorageError."""

from __future__ import annotations

import builtins
import errno
import inspect
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3.exceptions
from botocore import exceptions as boto

from pipeline import local, patience, s3
from pipeline.errors import Changed, Denied, NotFound, StorageError, Unavailable, UsageError
from pipeline.local import LocalStore
from pipeline.ranged import WINDOW_BYTES
from pipeline.storage import Store, absolute, open_store, split_object
from tests.conftest import lead_to_store, new_bucket
from tests.stores import Radosgw, free_ports

ODD_NAMES = [
    *("a b.jpg", " lead", "trail ", "a+b", "100%", "%41", "what?", "hash#1", "it's", "&amp;", "a=b", "semi;colon"),
    *("back\\slash", 'quo"te', "<tag>", "star*", "br[0]", "{curly}", "pipe|", "til~de", "at@", "dol$", "com,ma"),
    *("é.jpg", "e\u0301.jpg", "日本/語.png", "🙂.jpg", "\ufffd", "col:on", "^caret", "..dots", "dots..", "tab\there"),
]


@pytest.fixture
def moto_store(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    lead_to_store(monkeypatch, moto_port)
    yield open_store(f"s3://{new_bucket()}/some/prefix")
    s3._client.cache_clear()


@pytest.fixture
def dead_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that nothing listens on, where the S3 store is said to be."""
    (port,) = free_ports(1)
    lead_to_store(monkeypatch, port)
    yield port
    s3._client.cache_clear()


def names(store: Store, after: str = "") -> list[str]:
    return [info.name for info in store.list(after=after)]


# The contract


def test_a_new_store_is_empty(store: Store) -> None:
    assert names(store) == []


def test_what_is_written_is_read_and_told_of(store: Store) -> None:
    store.write("a/b", b"content")
    assert store.read("a/b") == b"content"
    assert store.stat("a/b").size == 7
    assert list(store.list()) == [store.stat("a/b")]


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.write("nothing", b"")
    assert store.read("nothing") == b""
    assert store.stat("nothing").size == 0
    with store.open("nothing") as file:
        assert file.read() == b""


def test_a_listing_is_in_the_order_of_utf8_bytes(store: Store) -> None:
    written = ["a/b", "a.b", "a0", "a", "A", "é", "z", "\uffff", "🙂", "a/b/c.x"]
    written.remove("a")  # a folder cannot hold both `a` and `a/b`
    written.remove("a/b/c.x")
    for name in written:
        store.write(name, b"")
    assert names(store) == sorted(written, key=str.encode)


def test_a_listing_goes_on_after_a_name_whether_it_exists_or_not(store: Store) -> None:
    for name in ("a/1", "a/2", "b", "c"):
        store.write(name, b"")
    assert names(store, after="a/2") == ["b", "c"]
    assert names(store, after="a/15") == ["a/2", "b", "c"]
    assert names(store, after="c") == []


def test_a_listing_keeps_to_a_folder_of_the_store(store: Store) -> None:
    every = ["a!/4", "a/b-", "a/b/1", "a/b/c/2", "a/b0", "b/3", "z"]
    for name in every:
        store.write(name, b"")
    for under in ("", "a/", "a/b/", "b/", "nothing/"):
        inside = sorted((name for name in every if name.startswith(under)), key=str.encode)
        assert [info.name for info in store.list(under)] == inside
        for after in ["", "a/", "a/b", "a/b/1", "a/b/c/", "a/b/c/2", "a0", "zz"]:
            wanted = [name for name in inside if name.encode() > after.encode()]
            assert [info.name for info in store.list(under, after=after)] == wanted, (under, after)


def test_a_listing_keeps_to_its_prefix(store_url: str) -> None:
    for url in (store_url, f"{store_url}2", f"{store_url}/deeper"):
        open_store(url).write("x", b"")
    assert names(open_store(store_url)) == ["deeper/x", "x"]
    assert names(open_store(f"{store_url}/deeper")) == ["x"]


def test_names_may_hold_any_character(store: Store) -> None:
    for name in ODD_NAMES:
        store.write(name, name.encode())
    assert names(store) == sorted(ODD_NAMES, key=str.encode)
    assert [store.read(name) for name in ODD_NAMES] == [name.encode() for name in ODD_NAMES]
    assert [store.stat(name).size for name in ODD_NAMES] == [len(name.encode()) for name in ODD_NAMES]
    store.delete(ODD_NAMES)
    assert names(store) == []


def test_a_missing_object_is_not_found(store: Store) -> None:
    store.write("folder/file", b"")
    for name in ("missing", "folder", "folder/missing", "folder/file/below"):
        for call in (store.stat, store.read, store.open):
            with pytest.raises(NotFound, match=name):
                call(name)


def test_an_object_is_read_only_while_it_is_the_one_that_was_meant(store: Store) -> None:
    store.write("a", b"old")
    etag = store.stat("a").etag
    assert store.read("a", etag=etag) == b"old"
    with store.open("a", etag=etag) as file:
        assert file.read() == b"old"

    time.sleep(0.01)  # a folder tells by the time
    store.write("a", b"new")

    with pytest.raises(Changed, match="a was replaced meanwhile"):
        store.read("a", etag=etag)
    with pytest.raises(Changed, match="a was replaced meanwhile"):
        store.open("a", etag=etag)


def test_writing_again_replaces_and_changes_the_tag(store: Store) -> None:
    store.write("a", b"old")
    old = store.stat("a")
    store.write("a", b"new")
    assert store.read("a") == b"new"
    assert store.stat("a").etag != old.etag
    assert len(names(store)) == 1


def test_deleting_is_of_what_is_named_and_a_missing_name_is_no_error(store: Store) -> None:
    for name in ("a", "b/c", "b/d"):
        store.write(name, b"")
    store.delete(["a", "missing", "b/missing", "a/below", "b/d"])
    assert names(store) == ["b/c"]
    store.delete([])
    store.delete(name for name in ("b/c", "b"))
    assert names(store) == []


def test_an_open_object_seeks_and_reads_across_windows(store: Store) -> None:
    content = random.Random(1).randbytes(2 * WINDOW_BYTES + 12345)
    store.write("big", content)
    with store.open("big") as file:
        assert file.read(10) == content[:10]
        file.seek(WINDOW_BYTES - 5)
        assert file.read(10) == content[WINDOW_BYTES - 5 : WINDOW_BYTES + 5]
        file.seek(-7, os.SEEK_END)
        assert file.read() == content[-7:]
        file.seek(0)
        assert file.read() == content
    assert store.read("big") == content


def test_a_reader_never_sees_a_part_of_a_write(store: Store) -> None:
    contents = {letter * 300_000 for letter in (b"a", b"b")}
    store.write("x", min(contents))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                store.write("x", content)

    with ThreadPoolExecutor(1) as threads:
        writer = threads.submit(write)
        try:
            seen = {store.read("x") for _ in range(30)}
        finally:
            stop.set()
        writer.result()
    assert seen <= contents


# URLs


@pytest.mark.parametrize(
    "url", ["", "s3://", "s3:///key", "gs://bucket/key", "http://host/key", "file://host/key", "a\0b"]
)
def test_a_url_that_is_no_storage_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("s3://bucket/a?b#c", "s3://bucket/a?b#c"),
        ("s3://bucket/[x", "s3://bucket/[x"),
        ("/a/b/", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("/what?/is#this", "/what?/is#this"),
        ("~/data", str(Path.home() / "data")),
    ],
)
def test_a_url_names_a_root(url: str, root: str) -> None:
    assert open_store(url).url == root


def test_two_spellings_of_a_folder_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path / "a")
    assert {open_store(url).url for url in (".", "../a", "../link", "./", f"{tmp_path}/a/../a")} == {
        str(tmp_path / "a")
    }


def test_a_relative_path_is_made_absolute_and_a_url_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a/b") == str(tmp_path / "a/b")
    assert absolute("s3://bucket/a") == "s3://bucket/a"


def test_one_object_is_told_from_a_prefix(store_url: str) -> None:
    open_store(store_url).write("folder/a.tar", b"x")
    found = split_object(f"{store_url}/folder/a.tar")
    assert found is not None
    assert (found[0].url, found[1]) == (f"{store_url}/folder", "a.tar")
    for url in (store_url, f"{store_url}/folder", f"{store_url}/folder/", f"{store_url}/missing"):
        assert split_object(url) is None


def test_an_object_is_found_at_a_buckets_top(moto_store: s3.S3Store) -> None:
    root = open_store(f"s3://{moto_store.bucket}")
    root.write("a.tar", b"x")
    found = split_object(f"{root.url}/a.tar")
    assert found is not None
    assert names(found[0]) == ["a.tar"]
    assert split_object(root.url) is None


def test_a_local_file_is_found_by_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").touch()
    monkeypatch.chdir(tmp_path)
    for url in ("a.tar", "./a.tar", f"../{tmp_path.name}/a.tar", f"file://{tmp_path}/a.tar"):
        found = split_object(url)
        assert found is not None
        assert found[0].read(found[1]) == b""
    for url in (".", "..", "./", "/", f"{tmp_path}/.."):
        assert split_object(url) is None


# A folder


def test_names_that_lead_out_of_the_root_are_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    store.write("a", b"")
    (tmp_path / "root2").mkdir()
    for name in ("../x", "a/../../x", "../root2/x", "/etc/passwd", "", ".", "a/..", "nul\0"):
        for call in (
            store.stat,
            store.read,
            store.open,
            lambda name: store.write(name, b""),
            lambda n: store.delete([n]),
        ):
            with pytest.raises(StorageError):
                call(name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "root", "root2"]


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    store = LocalStore(tmp_path)
    assert [os.fsencode(name) for name in names(store)] == [b"caf\xe9.jpg"]
    assert store.read(names(store)[0]) == b"x"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file/below", "n" * 300):
        with pytest.raises(StorageError):
            store.write(name, b"x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_open_reader_keeps_the_old_content(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"old" * 100_000)
    with store.open("a") as file:
        file.read(1)
        store.write("a", b"new")
        assert file.read() == (b"old" * 100_000)[1:]


def test_partial_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / f"{local._PARTIAL}x").write_bytes(b"half")
    LocalStore(tmp_path).write("whole", b"")
    assert names(LocalStore(tmp_path)) == ["whole"]


def test_what_a_killed_writer_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("kept/whole", b"content")
    old, new = tmp_path / "dropped" / ".tandem-partial-1", tmp_path / "kept" / ".tandem-partial-2"
    old.parent.mkdir()
    for path in (old, new):
        path.write_bytes(b"half")
    an_hour_ago = time.time() - 3600
    os.utime(old, (an_hour_ago, an_hour_ago))
    os.utime(tmp_path / "kept" / "whole", (an_hour_ago, an_hour_ago))

    store.sweep()

    assert not old.parent.exists()
    assert new.read_bytes() == b"half"
    assert names(store) == ["kept/whole"]


def test_a_written_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    LocalStore(tmp_path).write("a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_vanishes_during_a_listing_is_left_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("a", "b", "c"):
        store.write(name, b"")
    listing = store.list()
    assert next(listing).name == "a"
    store.delete(["b"])
    assert [info.name for info in listing] == ["c"]


def test_a_link_to_a_file_counts_and_one_to_a_folder_or_nowhere_does_not(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    store.write("file", b"123")
    for name, target in {"link": "file", "nowhere": "missing", "around": "."}.items():
        (store.root / name).symlink_to(target)
    assert [(info.name, info.size) for info in store.list()] == [("file", 3), ("link", 3)]


def test_a_listing_of_a_file_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotFound, match="is a file"):
        names(LocalStore(tmp_path / "file"))


def test_empty_folders_are_dropped_but_not_the_root(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    store.write("a/b/c", b"")
    store.delete(["a/b/c"])
    assert list((tmp_path / "root").iterdir()) == []


def test_a_writer_does_not_lose_its_folder_to_one_who_drops_empty_ones(tmp_path: Path) -> None:
    store, stop = LocalStore(tmp_path), threading.Event()

    def drop() -> None:
        while not stop.is_set():
            store._drop_empty(tmp_path / "stage/shard")

    with ThreadPoolExecutor(1) as threads:
        dropper = threads.submit(drop)
        try:
            for _ in range(300):
                store.write("stage/shard/chunk", b"")
                store.delete(["stage/shard/chunk"])
        finally:
            stop.set()
        dropper.result()
    assert names(store) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads of /proc/self/mem fail on Linux only")
def test_a_disk_that_fails_while_it_is_read_is_the_stores_fault() -> None:
    with LocalStore(Path("/proc/self")).open("mem") as file:
        for size in (10, -1):
            with pytest.raises(StorageError, match="mem"):
                file.read(size)


_AS_NOBODY = """
import os, sys
from pathlib import Path
from pipeline.errors import Denied
from pipeline.local import LocalStore
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
def denied(call):
    try:
        call()
    except Denied as error:
        print("denied", error)
store = LocalStore(Path(sys.argv[1]))
denied(lambda: store.read("secret"))
denied(lambda: store.open("secret"))
denied(lambda: store.write("closed/x", b""))
denied(lambda: list(LocalStore(store.root / "closed").list()))
denied(lambda: list(store.list()))
"""


def test_missing_permission_is_denied_and_names_the_path(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "closed").mkdir(parents=True)
    (root / "secret").touch(mode=0)
    (root / "closed").chmod(0)
    opened = [folder for folder in (tmp_path, *tmp_path.parents) if folder.stat().st_uid == os.getuid()]
    modes = {folder: folder.stat().st_mode for folder in opened}
    try:
        for folder, mode in modes.items():
            folder.chmod(mode | 0o011)
        run = subprocess.run([sys.executable, "-c", _AS_NOBODY, str(root)], capture_output=True, text=True)
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
        (root / "closed").chmod(0o700)
    assert run.stderr == ""
    assert [("secret" in line, "closed" in line) for line in run.stdout.splitlines()] == [
        *((True, False), (True, False), (False, True), (False, True), (False, True)),
    ]


# A bucket


def test_listings_and_deletions_go_beyond_one_page(moto_store: Store) -> None:
    expected = [f"{number:05d}" for number in range(1100)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: moto_store.write(name, b""), expected))
    assert names(moto_store) == expected
    assert names(moto_store, after="00003") == expected[4:]
    moto_store.delete(expected[:-1])
    assert names(moto_store) == expected[-1:]


def test_objects_that_stand_for_folders_are_not_listed(moto_store: s3.S3Store) -> None:
    for key in ("some/prefix/", "some/prefix/folder/", "some/prefix/folder/file"):
        s3._client().put_object(Bucket=moto_store.bucket, Key=key, Body=b"")
    assert names(moto_store) == ["folder/file"]


@pytest.mark.parametrize("gateway", ["moto_port", "radosgw"])
def test_a_missing_bucket_is_not_found(
    gateway: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = request.getfixturevalue(gateway)
    lead_to_store(monkeypatch, getattr(server, "port", server))
    store = open_store("s3://there-is-no-such-bucket/prefix")
    for call in (lambda: names(store), lambda: store.read("a"), lambda: store.write("a", b""), lambda: store.open("a")):
        with pytest.raises(NotFound, match="there-is-no-such-bucket"):
            call()


@pytest.mark.parametrize(("key", "value"), [("AWS_ACCESS_KEY_ID", "unknown"), ("AWS_SECRET_ACCESS_KEY", "wrong")])
def test_bad_credentials_are_denied(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    lead_to_store(monkeypatch, radosgw.port)
    store = open_store(f"s3://{new_bucket()}")
    monkeypatch.setenv(key, value)
    s3._client.cache_clear()
    calls = (
        lambda: names(store), lambda: store.read("a"), lambda: store.write("a", b""), lambda: store.stat("a"),
        lambda: store.delete(["a"]),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(Denied, match="credentials"):
            call()


def test_no_credentials_are_denied(dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Denied, match="AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket").stat("a")


def test_an_endpoint_that_is_no_url_is_told(dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    for call in (lambda: names(open_store("s3://bucket")), lambda: open_store("s3://bucket").read("a")):
        with pytest.raises(StorageError, match="not a url"):
            call()


def test_a_store_is_given_seconds_to_come_back_and_not_minutes() -> None:
    assert sum(patience.PAUSES_S) * 0.5 > 10
    assert sum(patience.PAUSES_S) * 1.5 < 60


def test_every_call_to_a_store_that_is_down_is_unavailable(dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * len(patience.PAUSES_S))
    store = open_store("s3://bucket")
    calls = (
        lambda: names(store), lambda: store.stat("a"), lambda: store.open("a"), lambda: store.write("a", b""),
        lambda: store.delete(["a"]), lambda: store.read("a"),
    )  # fmt: skip
    started = time.monotonic()
    for call in calls:
        with pytest.raises(Unavailable, match=f"127.0.0.1:{dead_port}"):
            call()
    assert time.monotonic() - started < 10, "no waits but our own"


def test_a_store_that_comes_up_is_waited_for(dead_port: int) -> None:
    store = open_store("s3://no-such-bucket")
    calls = (
        lambda: names(store), lambda: store.read("a"), lambda: store.stat("a"), lambda: store.write("a", b""),
        lambda: store.delete(["a"]),
    )  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(dead_port)]
    with ThreadPoolExecutor(len(calls)) as threads:
        asked: list[Future[Any]] = [threads.submit(call) for call in calls]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                for call in asked:
                    with pytest.raises(NotFound):
                        call.result()
            finally:
                server.terminate()


@pytest.mark.parametrize("size", [WINDOW_BYTES + 1, 1])
def test_an_object_that_is_replaced_while_it_is_read_is_told(size: int, moto_store: Store) -> None:
    moto_store.write("a", b"x" * (WINDOW_BYTES + 1))
    with moto_store.open("a") as file:
        file.seek(WINDOW_BYTES)
        moto_store.write("a", b"y" * size)
        with pytest.raises(Changed, match="was replaced meanwhile"):
            file.read()


def test_threads_may_make_their_first_call_together(moto_store: Store) -> None:
    moto_store.write("a", b"x")
    s3._client.cache_clear()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(moto_store.read, ["a"] * 8)) == [b"x"] * 8


# Errors


def _oserrors() -> list[type[OSError]]:
    """The family that the file system raises; libraries add others of their own."""
    return [value for value in vars(builtins).values() if inspect.isclass(value) and issubclass(value, OSError)]


def _botocore_errors() -> list[type[BaseException]]:
    found = (value for value in vars(boto).values() if inspect.isclass(value) and issubclass(value, Exception))
    own = [cls for cls in found if cls.__module__ == boto.__name__ and not issubclass(cls, Warning)]
    # raised for a service's model and by test stubs, never by a call
    return [cls for cls in own if not issubclass(cls, boto.UndefinedModelAttributeError)]


def _instance(cls: type[BaseException]) -> BaseException:
    """Without its constructor: those of libraries want all kinds of arguments."""
    error = cls.__new__(cls, "what happened")
    if isinstance(error, boto.ClientError):
        error.response = {"Error": {"Code": "Strange"}}
    return error


@pytest.mark.parametrize("cls", _botocore_errors(), ids=lambda cls: cls.__name__)
def test_every_error_of_botocore_is_translated(cls: type[BaseException]) -> None:
    with pytest.raises(StorageError, match="s3://bucket/key") as caught, s3._translated("s3://bucket/key"):
        raise _instance(cls)
    assert isinstance(caught.value.__cause__, cls)


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (boto.EndpointConnectionError, Unavailable),
        (boto.ConnectTimeoutError, Unavailable),
        (boto.ReadTimeoutError, Unavailable),
        (boto.ConnectionClosedError, Unavailable),
        (boto.ResponseStreamingError, Unavailable),
        (boto.IncompleteReadError, Unavailable),
        (urllib3.exceptions.ProtocolError, Unavailable),
        (ConnectionResetError, Unavailable),
        (boto.NoCredentialsError, Denied),
        (boto.TokenRetrievalError, Denied),
        (boto.UnauthorizedSSOTokenError, Denied),
    ],
)
def test_errors_of_botocore_keep_their_kind(cls: type[BaseException], kind: type[StorageError]) -> None:
    with pytest.raises(kind), s3._translated("s3://bucket/key"):
        raise _instance(cls)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "404", NotFound),
        (404, "NoSuchKey", NotFound),
        (404, "NoSuchBucket", NotFound),
        (403, "403", Denied),
        (403, "RequestTimeTooSkewed", Denied),
        (400, "ExpiredToken", Denied),
        (503, "SlowDown", Unavailable),
        (500, "InternalError", Unavailable),
        (429, "TooManyRequests", Unavailable),
        (400, "InvalidArgument", StorageError),
    ],
)
def test_answers_of_the_store_keep_their_kind(status: int, code: str, kind: type[StorageError]) -> None:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(kind) as caught, s3._translated("s3://bucket/key"):
        raise boto.ClientError(answer, "GetObject")
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("cls", _oserrors(), ids=lambda cls: cls.__name__)
def test_every_oserror_is_translated(cls: type[OSError]) -> None:
    with pytest.raises(StorageError, match="/a/b"), local._translated("/a/b"):
        raise _instance(cls)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, NotFound),
        (errno.ENOTDIR, NotFound),
        (errno.EISDIR, NotFound),
        (errno.EACCES, Denied),
        (errno.EPERM, Denied),
        (errno.ENOSPC, StorageError),
        (errno.EROFS, StorageError),
    ],
)
def test_errors_of_the_file_system_keep_their_kind(code: int, kind: type[StorageError]) -> None:
    with pytest.raises(kind, match="/a/b") as caught, local._translated("/a/b"):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind


def test_an_object_is_created_once(store: Store) -> None:
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read("a/b") == b"first"


def test_of_many_who_create_an_object_at_once_one_does(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(lambda number: store.create("x", f"{number}".encode()), range(8)))
    assert sum(created) == 1
    assert store.read("x") == f"{created.index(True)}".encode()


def test_an_objects_age_is_told_from_its_writing(store: Store) -> None:
    store.write("x", b"")
    time.sleep(1.1)
    assert 1 <= store.age_s("x") < 60
    with pytest.raises(NotFound):
        store.age_s("y")


def test_folders_that_are_dropped_during_a_listing_do_not_end_it(tmp_path: Path) -> None:
    store, stop = LocalStore(tmp_path), threading.Event()
    store.write("stays", b"")

    def come_and_go() -> None:
        while not stop.is_set():
            store.write("a/b/c", b"")
            store.delete(["a/b/c"])

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        listings = [[info.name for info in store.list()] for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all("stays" in names for names in listings)
