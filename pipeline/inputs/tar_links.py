"""Hard links in tar archives: the second name of a file, whose content stands at the first.

`tar` stores a file that it meets again as a link to the earlier member. An archive is read as a stream, so the content
has gone by when a link is met: then the archive is read again, once for the links' targets, and once for what they
hold, which goes to a temporary file. An archive without links is read once.
"""

from __future__ import annotations

import tarfile
import tempfile
from contextlib import ExitStack, suppress
from typing import IO, NamedTuple

from pipeline.errors import ShardError
from pipeline.inputs.tar_stream import content_of, members_of, open_tar
from pipeline.shards import Shard
from pipeline.storage import Store


class _Held(NamedTuple):
    """Where a target stands: as which member of the archive, and where in the temporary file."""

    member: int
    start: int
    size: int


class Links:
    """The contents of a shard's hard links, each of at most `max_bytes`, until the context ends."""

    def __init__(self, store: Store, shard: Shard, max_bytes: int) -> None:
        self._store, self._shard, self._max_bytes = store, shard, max_bytes
        self._targets: dict[str, str] = {}
        self._held: dict[str, _Held] = {}
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._file = None

    def content(self, index: int, link: tarfile.TarInfo) -> bytes | None:
        """What the link that is the `index`-th member stands for; None where `problem` says why there is nothing."""
        if self._file is None:
            file = tempfile.TemporaryFile(prefix="tandem-links-")  # noqa: SIM115 -- the stack closes it
            self._file = self._stack.enter_context(file)
            self._collect(self._file)
        held = self._held.get(self._final(_normal(link.name)))
        if held is None or held.member > index:
            return None
        self._file.seek(held.start)
        return self._file.read(held.size)

    def problem(self, link: tarfile.TarInfo) -> str:
        """Why there is no content."""
        return (
            f"the hard link {link.name!r} has no file {link.linkname!r} before it in this archive, or one of more than "
            f"{self._max_bytes} bytes"
        )

    def _collect(self, file: IO[bytes]) -> None:
        # damage is met again when the images are read
        with suppress(ShardError), open_tar(self._store, self._shard) as archive:
            for member in members_of(archive):
                if member.islnk():
                    self._targets[_normal(member.name)] = _normal(member.linkname)
        wanted = {self._final(name) for name in self._targets}
        with suppress(ShardError), open_tar(self._store, self._shard) as archive:
            for index, member in enumerate(members_of(archive)):
                name = _normal(member.name)
                if member.isfile() and name in wanted and name not in self._held and member.size <= self._max_bytes:
                    self._held[name] = _Held(index, file.tell(), member.size)
                    file.write(content_of(archive, member))

    def _final(self, name: str) -> str:
        """The name that a chain of links ends at; of a circle, one of its names."""
        passed = set[str]()
        while name in self._targets and name not in passed:
            passed.add(name)
            name = self._targets[name]
        return name


def _normal(name: str) -> str:
    return name.removeprefix("./")
