"""Tar shards as WebDataset writes them.

A member's key is its path up to the first dot of its file name, as WebDataset defines it. Members are not grouped by
adjacency: each image is a row of its own, wherever it stands, and what is carried along is joined to it by key.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.errors import ShardError
from pipeline.inputs.sample import MAX_IMAGE_BYTES, Columns, Sample, too_large
from pipeline.shards import Shard, is_image
from pipeline.storage import Store

MAX_SIDECAR_BYTES = 1 << 20
BUFFER_BYTES = 1 << 20


class TarReader:
    """A tar archive, plain or compressed, read as a stream. Sidecars are text, carried under their suffix's name."""

    def __init__(self, store: Store, shard: Shard, columns: Columns) -> None:
        self._store, self._shard, self._carry = store, shard, columns.carry
        self.carried = pa.schema([(suffix, pa.string()) for suffix in columns.carry])

    def __iter__(self) -> Iterator[Sample]:
        # A sidecar may stand before its image or long after it, so those that are wanted are collected first.
        sidecars = self._sidecars() if self._carry else {}
        seen: set[str] = set()
        members = 0
        with self._members() as archive:
            for row, member in enumerate(self._images(archive)):
                members += 1
                yield self._sample(archive, member, row, seen, sidecars)
        if not members:
            self._check_empty()

    def _sample(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, row: int, seen: set[str], sidecars: dict[str, Any]
    ) -> Sample:
        key, _ = split_key(member.name)
        carried = tuple(sidecars.get(f"{key}.{suffix}") for suffix in self._carry)
        if key in seen:
            reason = f"the key {key!r} stands twice in this shard"
            return Sample(row=row, key=f"{key}@{row}", data=None, error=reason, carried=carried)
        seen.add(key)
        if member.size > MAX_IMAGE_BYTES:
            return Sample(row=row, key=key, data=None, error=too_large(member.size), carried=carried)
        return Sample(row=row, key=key, data=_content(archive, member), carried=carried)

    def _images(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        return (member for member in archive if member.isfile() and is_image(member.name))

    def _sidecars(self) -> dict[str, str]:
        found: dict[str, str] = {}
        with self._members() as archive:
            for member in archive:
                key, suffix = split_key(member.name)
                if member.isfile() and suffix in self._carry and member.size <= MAX_SIDECAR_BYTES:
                    found[f"{key}.{suffix}"] = _content(archive, member).decode(errors="replace").strip()
        return found

    def _check_empty(self) -> None:
        with self._members() as archive:
            names = [member.name for member in archive if member.isfile()]
        if names:
            raise ShardError(f"{self._shard.name} holds no images among {len(names)} members (such as {names[0]!r})")

    @contextmanager
    def _members(self) -> Iterator[tarfile.TarFile]:
        with self._store.open(self._shard.name) as file:
            try:
                with tarfile.open(
                    fileobj=file, mode="r|*", bufsize=BUFFER_BYTES, tarinfo=_StrictTarInfo, errors="surrogateescape"
                ) as archive:
                    yield archive
            except _BadHeader as error:
                raise ShardError(f"{self._shard.name}: {error}") from error
            except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
                raise ShardError(f"{self._shard.name} is not a readable tar archive: {error}") from error
            except OSError as error:  # gzip, lzma and zlib report bad data so; a store's own errors are StorageError
                raise ShardError(f"{self._shard.name} cannot be unpacked: {error}") from error


class _BadHeader(Exception):
    """Not a `tarfile.HeaderError`: that one ends the archive as if nothing were missing."""


class _StrictTarInfo(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end-of-archive mark
            raise _BadHeader(f"the archive is cut off or damaged ({error})") from error


def split_key(name: str) -> tuple[str, str]:
    """A member's key and suffix: `a/b.left.jpg` is key `a/b`, suffix `left.jpg`."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "only regular files are read"
    return file.read()
