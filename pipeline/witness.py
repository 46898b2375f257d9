"""Whether a store refuses one object, or everything: a witness decides.

"Access denied" can mean that one object belongs to another account, or that the credentials expired; a HEAD request
does not even say that much. Planning therefore looks for a witness, an object of INPUT that can be read. Where a reader
is denied another object, it reads the witness again, after the refusal: if that works, the object alone is `Refused`.
Otherwise everything is, and the witness's own answer has the reason.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import BinaryIO, cast

from pipeline.errors import Changed, Denied, NotFound, Refused
from pipeline.shards import Shard, slice_of
from pipeline.storage import ObjectInfo, Store

WITNESSES_TRIED = 5
BUFFER_BYTES = 1 << 17


def find_witness(store: Store, shards: Sequence[Shard]) -> str:
    """The name of an object among the first shards' that can be read; "" where the first ones are gone.

    Raises `Denied` or `Refused`, that of the first object, where all that are tried are refused.
    """
    refusals: list[Denied | Refused] = []
    for name in islice(_names(store, shards), WITNESSES_TRIED):
        try:
            store.probe(name)
        except (Denied, Refused) as error:
            refusals.append(error)
        except (NotFound, Changed):
            continue
        else:
            return name
    if refusals:
        raise refusals[0]
    return ""


def _names(store: Store, shards: Sequence[Shard]) -> Iterator[str]:
    for shard in shards:
        if shard.format == "images":
            yield from (info.name for info in slice_of(store.list(after=shard.after), shard.last))
        else:
            yield shard.name


class Witnessed:
    """A store whose `Denied` for one object is `Refused` where the object `witness` can still be read.

    With an empty `witness` it is the store itself. It holds no connection, so it travels between processes.
    """

    def __init__(self, store: Store, witness: str) -> None:
        self._store, self._witness = store, witness
        self.url = store.url
        self._asking = _Shared()

    def __reduce__(self) -> tuple[type[Witnessed], tuple[Store, str]]:
        return type(self), (self._store, self._witness)

    def list(self, under: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        return self._store.list(under, after=after)

    def stat(self, name: str) -> ObjectInfo:
        with self._judged():
            return self._store.stat(name)

    def read(self, name: str, *, etag: str = "") -> bytes:
        with self._judged():
            return self._store.read(name, etag=etag)

    def open(self, name: str, *, etag: str = "") -> BinaryIO:
        with self._judged():
            file = self._store.open(name, etag=etag)
        return cast(BinaryIO, io.BufferedReader(_File(file, self), BUFFER_BYTES))

    def probe(self, name: str) -> None:
        with self._judged():
            self._store.probe(name)

    def write(self, name: str, data: bytes) -> None:
        self._store.write(name, data)

    def create(self, name: str, data: bytes) -> bool:
        return self._store.create(name, data)

    def age_s(self, name: str) -> float:
        return self._store.age_s(name)

    def delete(self, names: Iterable[str]) -> None:
        self._store.delete(names)

    def sweep(self) -> None:
        self._store.sweep()

    @contextmanager
    def _judged(self) -> Iterator[None]:
        try:
            yield
        except Denied as error:
            if not self._witness:
                raise
            self._asking.ask(self._ask)
            raise Refused(f"{error} (other objects of INPUT can be read)") from error

    def _ask(self) -> None:
        """Raises `Denied` where the witness is denied, too."""
        # an answer about that object alone comes from a store that lets us in
        with suppress(NotFound, Changed, Refused):
            self._store.probe(self._witness)


class _File(io.RawIOBase):
    """A file of the store whose reads are judged as the store's are."""

    def __init__(self, file: BinaryIO, store: Witnessed) -> None:
        self._file, self._store = file, store

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with self._store._judged():
            return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


class _Shared:
    """One call for many threads: each gets the outcome of a call that began after it asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = 0
        self._begun_at = 0  # how many had asked when the last successful call began
        self._counting = threading.Lock()

    def ask(self, call: Callable[[], None]) -> None:
        """Returns once such a call has succeeded. Raises what it raises."""
        with self._counting:
            self._asked += 1
            ticket = self._asked
        with self._lock:
            if self._begun_at >= ticket:
                return
            with self._counting:
                begun_at = self._asked
            call()
            self._begun_at = begun_at
