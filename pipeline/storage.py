"""Objects by name, in a bucket or in a folder.

A store is a root (`s3://bucket/prefix`, or a folder) and the objects under it; a name is a path relative to that
root, with forward slashes. Everything else in Tandem speaks to storage through these few methods, so that a bucket
and a folder behave alike: listings are sorted, writes are whole or absent, and errors are Tandem's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.errors import NotFound, UsageError


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object: its name under the store's root, its size in bytes, and a tag that changes with its content."""

    name: str
    size: int
    etag: str


class Store(Protocol):
    """A root and the objects under it. Every method raises `StorageError` or one of its kinds."""

    url: str

    def list(self, under: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        """The objects with a name greater than `after`, in the order of their names' UTF-8 bytes.

        `under` is a folder of the store, such as `train/`, that they lie in; all do in "".
        """

    def stat(self, name: str) -> ObjectInfo:
        """One object's size and tag. Raises `NotFound`."""

    def read(self, name: str, *, etag: str = "") -> bytes:
        """The whole object. Raises `NotFound`, and `Changed` where an `etag` is given and is not the object's."""

    def open(self, name: str, *, etag: str = "") -> BinaryIO:
        """The object as a seekable, buffered file. Raises as `read` does, also while it is read."""

    def probe(self, name: str) -> None:
        """Reads the object's first byte, if it has one. Raises as `read` does, and `Changed` of an empty object."""

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces the object at once: a reader sees the old content or the new, never a part."""

    def create(self, name: str, data: bytes) -> bool:
        """Creates the object; False, and nothing done, where it exists. Of several callers one has True."""

    def age_s(self, name: str) -> float:
        """Seconds since the object was written, by the store's own clock. Raises `NotFound`."""

    def delete(self, names: Iterable[str]) -> None:
        """Deletes the objects; one that does not exist is no error."""

    def sweep(self) -> None:
        """Deletes what writers that were killed left half-written, where such a thing takes up room."""


def open_store(url: str) -> Store:
    """The store at `url`: `s3://BUCKET[/PREFIX]`, `file:///PATH`, or a path. Raises `UsageError`."""
    # not urlsplit: it cuts at '?' and '#', which are ordinary characters in a key
    scheme, separator, rest = url.partition("://")
    if not url or "\0" in url:
        raise UsageError(f"{url!r} is not storage: write s3://BUCKET/PREFIX or a local path")
    if not separator:
        return _folder(Path(url))
    if scheme.lower() == "file" and rest.startswith("/"):
        return _folder(Path(rest))
    if scheme.lower() != "s3":
        raise UsageError(f"{url!r} is not storage that Tandem knows: write s3://BUCKET/PREFIX or a local path")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError(f"{url!r} names no bucket: write s3://BUCKET/PREFIX")
    from pipeline.s3 import S3Store  # boto3 takes 0.3 s to import: only for those who use it

    return S3Store(bucket, prefix.strip("/"))


def _folder(path: Path) -> Store:
    from pipeline.local import LocalStore

    return LocalStore(path)


def absolute(url: str) -> str:
    """`url` as it means the same in another process: a relative path is made absolute."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def split_object(url: str) -> tuple[Store, str] | None:
    """The parent store and the name, where `url` is one object rather than a prefix; otherwise None."""
    parent, slash, name = url.rpartition("/")
    if name in ("", ".", "..") or parent.lower() == "s3:/":
        return None
    store = open_store(parent + slash or ".")
    try:
        store.stat(name)
    except NotFound:
        return None
    return store, name
