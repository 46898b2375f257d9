"""Tar shards as WebDataset writes them.

A member's key is its path up to the first dot of its file name, as WebDataset defines it; a file whose name begins
with a dot has no key and is no sample. Members are not grouped by adjacency: each image is a row of its own, wherever
it stands, and what is carried along is joined to it by key.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.errors import ShardError, UsageError
from pipeline.inputs.sample import MAX_IMAGE_BYTES, Columns, Sample, too_large
from pipeline.shards import Shard, is_image
from pipeline.storage import Store

MAX_SIDECAR_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of an extended header: a long name, attributes, the map of a sparse file
BUFFER_BYTES = 1 << 20
MAX_READS_AT_END = 100


class TarReader:
    """A tar archive, plain or compressed, read as a stream. Sidecars are text, carried under their suffix's name."""

    def __init__(self, store: Store, shard: Shard, columns: Columns) -> None:
        if columns.key:
            raise UsageError(f"{columns.key!r} is asked for as the key, but in a tar the names of members are the keys")
        self._store, self._shard, self._image = store, shard, columns.image
        self.carried = pa.schema([(suffix, pa.string()) for suffix in columns.carry])
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sample]:
        # A sidecar may stand before its image or long after it, so those that are wanted are collected first.
        sidecars = self._sidecars() if self.carried.names else {}
        seen: set[str] = set()
        row, others, other = 0, 0, ""
        with self._members() as archive:
            for member in _files(archive):
                if self._is_image(member):
                    yield self._sample(archive, member, row, seen, sidecars)
                    row += 1
                else:
                    others, other = others + 1, other or member.name
            self._check_end(archive)
        if others and not row:
            raise ShardError(f"{self._shard.name} holds no images among {others} files (such as {other!r})")

    def close(self) -> None:
        """Nothing is open but while it is read."""

    def _is_image(self, member: tarfile.TarInfo) -> bool:
        stem, suffix = _split_file(member.name)
        return bool(stem) and (suffix == self._image if self._image else is_image(member.name))

    def _sample(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, row: int, seen: set[str], sidecars: dict[str, str]
    ) -> Sample:
        key, _ = split_key(member.name)
        carried = self._carried(key, sidecars)
        if key in seen:
            reason = f"the key {key!r} stands twice in this shard"
            return Sample(row=row, key=f"{key}@{row}", data=None, error=reason, carried=carried)
        seen.add(key)
        if member.size > MAX_IMAGE_BYTES:
            return Sample(row=row, key=key, data=None, error=too_large(member.size), carried=carried)
        return Sample(row=row, key=key, data=_content(archive, member), carried=carried)

    def _carried(self, key: str, sidecars: dict[str, str]) -> pa.RecordBatch | None:
        if not self.carried.names:
            return None
        values = [pa.array([sidecars.get(f"{key}.{suffix}")], pa.string()) for suffix in self.carried.names]
        return pa.RecordBatch.from_arrays(values, schema=self.carried)

    def _sidecars(self) -> dict[str, str]:
        found: dict[str, str] = {}
        # damage is met again when the images are read, after those that stand before it
        with suppress(ShardError), self._members() as archive:
            for member in _files(archive):
                key, suffix = split_key(member.name)
                if suffix in self.carried.names and member.size <= MAX_SIDECAR_BYTES:
                    found[f"{key}.{suffix}"] = _content(archive, member).decode(errors="replace").strip()
        return found

    def _check_end(self, archive: tarfile.TarFile) -> None:
        """Refuses what goes on after the end-of-archive mark: a second archive, or the rest after a hole of zeros.

        The mark is two blocks of zeros, of which some writers leave out the second.
        """
        stream = archive.fileobj
        assert stream is not None
        if any(stream.read(tarfile.BLOCKSIZE)):
            raise ShardError(f"{self._shard.name} is damaged: a block of zeros stands where a member should")
        while block := stream.read(tarfile.BLOCKSIZE):
            if _is_header(block):
                raise ShardError(f"{self._shard.name} goes on after its end-of-archive mark; make it one archive")

    @contextmanager
    def _members(self) -> Iterator[tarfile.TarFile]:
        name = self._shard.name
        with self._store.open(name, etag=self._shard.etag) as file:
            try:
                with tarfile.open(
                    fileobj=cast(BinaryIO, _Unpacked(file)),
                    mode="r|",
                    bufsize=BUFFER_BYTES,
                    tarinfo=_StrictTarInfo,
                    encoding="utf-8",
                    errors="surrogateescape",
                ) as archive:
                    yield archive
            except _BadHeader as error:
                raise ShardError(f"{name}: the archive is cut off or damaged ({error})") from error
            except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
                raise ShardError(f"{name} is not a readable tar archive: {error}") from error
            # a store's own errors are StorageError, and pass
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise ShardError(f"{name} cannot be unpacked: {error}") from error


_COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}


class _Unpacked:
    """The archive's bytes, of a compressed file as they come: what stands before damage is not lost to buffering.

    Unlike tarfile's own decompression of streams, this checks check sums and reads files of several parts.
    """

    def __init__(self, file: BinaryIO) -> None:
        magic = file.read(6)
        file.seek(0)
        opener = next((opener for start, opener in _COMPRESSED.items() if magic.startswith(start)), None)
        self._read: Callable[[int], bytes] = opener(file).read1 if opener else file.read
        self._reads_at_end = 0

    def read(self, size: int) -> bytes:
        data = self._read(size)
        self._reads_at_end += not data
        # tarfile reads its way to where a member should end, were that a billion reads past the archive's end
        if self._reads_at_end > MAX_READS_AT_END:
            raise tarfile.ReadError("unexpected end of data")
        return data


class _BadHeader(Exception):
    """Not a `tarfile.HeaderError`: most of those end an archive as if nothing were missing."""


_EXTENDED = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}


class _StrictTarInfo(tarfile.TarInfo):
    """A member whose header is whole, and whose size can be."""

    @classmethod
    def frombuf(cls, block: bytes, encoding: str, errors: str) -> _StrictTarInfo:  # type: ignore[override]
        return _checked(super().frombuf(block, encoding, errors))

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return _checked(super().fromtarfile(archive))  # again, for a PAX header before it may tell another size
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise _BadHeader(error) from error
        except IndexError as error:  # what tarfile makes of a sparse file's map that is cut off
            raise _BadHeader("truncated header") from error


def _checked(member: _StrictTarInfo) -> _StrictTarInfo:
    if member.size < 0 or (member.type in _EXTENDED and member.size > MAX_HEADER_BYTES):
        raise _BadHeader(f"{member.name!r} is said to have {member.size} bytes")
    return member


def split_key(name: str) -> tuple[str, str]:
    """A member's key and suffix: `a/b.left.jpg` is key `a/b`, suffix `left.jpg`."""
    folder, slash, _ = name.removeprefix("./").rpartition("/")
    stem, suffix = _split_file(name)
    return folder + slash + stem, suffix


def _split_file(name: str) -> tuple[str, str]:
    stem, _, suffix = name.rpartition("/")[2].partition(".")
    return stem, suffix


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        cast(Any, archive).members.clear()  # tarfile would keep them all
        if member.isfile():
            yield member


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "only regular files are read"
    return file.read()


def _is_header(block: bytes) -> bool:
    if block[257:262] != b"ustar":
        return False
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        return True
    return False
