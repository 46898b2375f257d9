"""A folder as a store."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.errors import Changed, Denied, NotFound, StorageError
from pipeline.storage import ObjectInfo

# Names that a writer of this store uses before the rename; never listed.
_PARTIAL = ".tandem-partial-"

BUFFER_BYTES = 1 << 17
FOLDER_WITHIN_S = 5.0
PARTIAL_S = 60.0  # a file that is older is nobody's


class LocalStore:
    """The files under `root`. A link to a file counts as the file; a link to a folder is not followed."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root.expanduser()))  # so that two spellings of a folder are one URL
        self.url = str(self.root)

    def list(self, under: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        folder = self._path(under) if under else self.root
        for name in self._walk(folder, under, os.fsencode(after)):
            with suppress(NotFound):  # deleted since
                yield self.stat(name)

    def stat(self, name: str) -> ObjectInfo:
        path = self._path(name)
        with _translated(path):
            status = path.stat()
            if path.is_dir():
                raise NotFound(f"{path} is a folder, not a file")
        return ObjectInfo(name=name, size=status.st_size, etag=_tag(status))

    def read(self, name: str, *, etag: str = "") -> bytes:
        with self.open(name, etag=etag) as file:
            return file.read()

    def open(self, name: str, *, etag: str = "") -> BinaryIO:
        path = self._path(name)
        with _translated(path):
            file = _File(path)
            if etag and _tag(os.fstat(file.fileno())) != etag:
                file.close()
                raise Changed(f"{path} was replaced meanwhile")
            return cast(BinaryIO, io.BufferedReader(file, BUFFER_BYTES))

    def probe(self, name: str) -> None:
        with self.open(name) as file:
            file.read(1)

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with _translated(path), _written(path.parent, data) as partial:
            os.replace(partial, path)

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        with _translated(path), _written(path.parent, data) as partial:
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
        return True

    def age_s(self, name: str) -> float:
        path = self._path(name)
        with _translated(path):
            return time.time() - path.stat().st_mtime

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            with suppress(NotFound), _translated(path):
                path.unlink()
                self._drop_empty(path.parent)

    def sweep(self) -> None:
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError), _translated(path):
                    if name.startswith(_PARTIAL) and time.time() - path.stat().st_mtime > PARTIAL_S:
                        path.unlink()
                        self._drop_empty(path.parent)

    def _path(self, name: str) -> Path:
        path = Path(os.path.normpath(self.root / name))
        if self.root not in path.parents or "\0" in name:
            raise StorageError(f"{name!r} is not the name of a file under {self.root}")
        return path

    def _walk(self, folder: Path, prefix: str, after: bytes) -> Iterator[str]:
        """The names in `folder`, each with `prefix`, that are greater than `after`. Holds one folder of each level."""
        for entry in self._entries(folder):
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                inside = os.fsencode(f"{name}/")
                if inside > after or after.startswith(inside):
                    yield from self._walk(folder / entry.name, f"{name}/", after)
            elif os.fsencode(name) > after and entry.is_file() and not entry.name.startswith(_PARTIAL):
                yield name

    def _entries(self, folder: Path) -> Sequence[os.DirEntry[str]]:
        """What the folder holds, in the order in which a listing of whole names has it."""
        with _translated(folder):
            try:
                found = list(os.scandir(folder))
            except FileNotFoundError:  # like a prefix, it need not exist to be empty; or it was dropped since
                return []
            return sorted(found, key=lambda one: os.fsencode(one.name) + b"/" * one.is_dir(follow_symlinks=False))

    def _drop_empty(self, folder: Path) -> None:
        # A bucket has no folders to leave behind, so a folder leaves none either.
        with suppress(OSError):
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent


class _File(io.FileIO):
    """A file whose reads fail with Tandem's errors, as those of a store's objects do."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        with _translated(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _translated(self.name):
            return super().readall()


def _tag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


@contextmanager
def _written(folder: Path, data: bytes) -> Iterator[str]:
    """A file of the folder with the data on disk, under a name that is never listed; gone when the context ends."""
    handle, partial = _make_partial(folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        yield partial
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)


def _make_partial(folder: Path) -> tuple[int, str]:
    ends_s = time.monotonic() + FOLDER_WITHIN_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(prefix=_PARTIAL, dir=folder)
        except (FileNotFoundError, FileExistsError):
            # whoever deletes the folder's last file drops the folder, perhaps just now, and again and again
            if time.monotonic() > ends_s:
                raise


def _umask() -> int:
    # mkstemp makes 0600; an output is meant to be read by others, as any file that a user makes.
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    return 0o022


@contextmanager
def _translated(path: object) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist") from error
    except NotADirectoryError as error:
        raise NotFound(f"{path} does not exist: it, or a folder of its path, is a file") from error
    except IsADirectoryError as error:
        raise NotFound(f"{path} is a folder, not a file") from error
    except PermissionError as error:
        raise Denied(f"{error.filename or path}: permission denied; check its owner and mode") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
