"""A tar archive as a stream of members, of which damage takes none in silence.

tarfile ends an archive at most errors as if nothing were missing. Here each is a `ShardError`, after the members that
stand before it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from pipeline.errors import ShardError
from pipeline.shards import Shard
from pipeline.storage import Store

MAX_HEADER_BYTES = 1 << 20  # of an extended header: a long name, attributes, the map of a sparse file
BUFFER_BYTES = 1 << 20
MAX_READS_AT_END = 100


@contextmanager
def open_tar(store: Store, shard: Shard) -> Iterator[tarfile.TarFile]:
    """The archive, plain or compressed, for one pass. Raises `ShardError`, also while it is read."""
    name = shard.name
    with store.open(name, etag=shard.etag) as file:
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


def members_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members, of whatever type, in their order."""
    for member in archive:
        cast(Any, archive).members.clear()  # tarfile would keep them all
        yield member


def content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of the regular file that the archive is at."""
    file = archive.extractfile(member)
    assert file is not None, "only regular files are read"
    return file.read()


def check_end(archive: tarfile.TarFile, name: str) -> None:
    """Refuses what follows the end-of-archive mark: a second archive, or the rest after a hole of zeros.

    The mark is two blocks of zeros, of which some writers leave out the second. Raises `ShardError`.
    """
    stream = archive.fileobj
    assert stream is not None
    if any(stream.read(tarfile.BLOCKSIZE)):
        raise ShardError(f"{name} is damaged: a block of zeros stands where a member should")
    while block := stream.read(tarfile.BLOCKSIZE):
        if _is_header(block):
            raise ShardError(f"{name} goes on after its end-of-archive mark; make it one archive")


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


def _is_header(block: bytes) -> bool:
    if block[257:262] != b"ustar":
        return False
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        return True
    return False
