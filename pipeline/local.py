"""A folder as a store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.errors import Denied, NotFound, StorageError
from pipeline.storage import ObjectInfo

# Names that a writer of this store uses before the rename; never listed.
_PARTIAL = ".tandem-partial-"


class LocalStore:
    """The files under `root`. A link to a file counts as the file; a link to a folder is not followed."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def list(self, *, after: str = "") -> Iterator[ObjectInfo]:
        with _translated(self.url):
            # like a prefix, a folder need not exist to be empty
            names = sorted(self._walk(self.root, ""), key=os.fsencode) if self.root.exists() else []
        for name in names:
            if os.fsencode(name) > os.fsencode(after):
                yield self.stat(name)

    def stat(self, name: str) -> ObjectInfo:
        path = self._path(name)
        with _translated(path):
            status = path.stat()
            if path.is_dir():
                raise NotFound(f"{path} is a folder, not a file")
        return ObjectInfo(name=name, size=status.st_size, etag=f"{status.st_mtime_ns:x}-{status.st_size:x}")

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with _translated(path):
            return path.read_bytes()

    def open(self, name: str) -> BinaryIO:
        path = self._path(name)
        with _translated(path):
            return cast(BinaryIO, path.open("rb"))

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(partial, 0o666 & ~_umask())
                os.replace(partial, path)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(partial)
                raise

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            with _translated(path):
                path.unlink(missing_ok=True)
                self._drop_empty(path.parent)

    def _path(self, name: str) -> Path:
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(self.root):
            raise StorageError(f"{name!r} leads out of {self.root}")
        return path

    def _walk(self, folder: Path, prefix: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(folder / entry.name, f"{prefix}{entry.name}/")
                elif entry.is_file() and not entry.name.startswith(_PARTIAL):
                    yield prefix + entry.name

    def _drop_empty(self, folder: Path) -> None:
        # A bucket has no folders to leave behind, so a folder leaves none either.
        with suppress(OSError):
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent


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
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise NotFound(f"{path} is a folder, not a file") from error
    except PermissionError as error:
        raise Denied(f"{path}: permission denied; check its owner and mode") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
