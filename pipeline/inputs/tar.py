"""Tar shards as WebDataset writes them.

A member's key is its path up to the first dot of its file name, as WebDataset defines it, or up to the last one where
that is asked for. Members are not grouped by adjacency: each image is a row of its own, wherever it stands, and what is
carried along is joined to it by key. Suffixes compare without case. Every member is a sample or is counted as skipped.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa

from pipeline.errors import ShardError, UsageError
from pipeline.inputs.sample import MAX_IMAGE_BYTES, Columns, Sample, too_large
from pipeline.inputs.tar_links import Links
from pipeline.inputs.tar_names import Names, skip_reason
from pipeline.inputs.tar_stream import check_end, content_of, members_of, open_tar
from pipeline.shards import Shard, is_image
from pipeline.storage import Store

MAX_SIDECAR_BYTES = 1 << 20
MAX_SIDECARS_BYTES = 512 << 20  # of a shard: they are held until their images come


class TarReader:
    """A tar archive, plain or compressed, read as a stream. Sidecars are text, carried under their suffix's name."""

    def __init__(self, store: Store, shard: Shard, columns: Columns) -> None:
        if columns.key:
            raise UsageError(f"{columns.key!r} is asked for as the key, but in a tar the names of members are the keys")
        self._store, self._shard = store, shard
        self._names = Names(columns.key_until)
        self._image = columns.image and columns.image.lower().lstrip(".")
        self._carry = {suffix.lower().lstrip("."): suffix for suffix in columns.carry}
        self._links = Links(store, shard, MAX_IMAGE_BYTES)
        self.carried = pa.schema([(suffix, pa.string()) for suffix in columns.carry])
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sample]:
        # A sidecar may stand before its image or long after it, so those that are wanted are collected first.
        seen: dict[str, str] = {}
        row = 0
        with self._links, open_tar(self._store, self._shard) as archive:
            sidecars = self._sidecars() if self._carry else {}
            for index, member in enumerate(members_of(archive)):
                if reason := skip_reason(member):
                    self.skipped[reason] += 1
                elif self._is_image(member.name):
                    yield self._sample(archive, index, member, row, seen, sidecars)
                    row += 1
                else:
                    self.skipped[self._reason(member.name)] += 1
            check_end(archive, self._shard.name)

    def close(self) -> None:
        """Nothing is open but while it is read."""

    def _is_image(self, name: str) -> bool:
        stem, suffix = self._names.split_file(name)
        return bool(stem) and (suffix.lower() == self._image if self._image else is_image(name))

    def _reason(self, name: str) -> str:
        """Why a file is no sample."""
        _, suffix = self._names.split_file(name)
        return "carried" if suffix.lower() in self._carry else self._names.last_suffix(name)

    def _sample(
        self,
        archive: tarfile.TarFile,
        index: int,
        member: tarfile.TarInfo,
        row: int,
        seen: dict[str, str],
        sidecars: dict[tuple[str, str], str | int],
    ) -> Sample:
        key, _ = self._names.split(member.name)
        if key in seen:
            reason = self._names.twice(key, seen[key], member.name)
            return Sample(row=row, key=f"{key}@{row}", data=None, error=reason, carried=self._carried(key, sidecars))
        seen[key] = member.name
        data, error = self._content(archive, index, member)
        large = next((suffix for suffix in self._carry if isinstance(sidecars.get((key, suffix)), int)), None)
        if large is not None:
            size = sidecars[key, large]
            error = f"its sidecar {key}.{large} has {size} bytes; the limit is {MAX_SIDECAR_BYTES}"
        return Sample(
            row=row, key=key, data=None if error else data, error=error, carried=self._carried(key, sidecars)
        )  # fmt: skip

    def _content(
        self, archive: tarfile.TarFile, index: int, member: tarfile.TarInfo
    ) -> tuple[bytes | None, str | None]:
        """The member's bytes, or why there are none."""
        if member.islnk():
            data = self._links.content(index, member)
            return data, self._links.problem(member) if data is None else None
        if member.size > MAX_IMAGE_BYTES:
            return None, too_large(member.size)
        return content_of(archive, member), None

    def _carried(self, key: str, sidecars: dict[tuple[str, str], str | int]) -> pa.RecordBatch | None:
        if not self._carry:
            return None
        texts = (sidecars.get((key, suffix)) for suffix in self._carry)
        values = [pa.array([text if isinstance(text, str) else None], pa.string()) for text in texts]
        return pa.RecordBatch.from_arrays(values, schema=self.carried)

    def _sidecars(self) -> dict[tuple[str, str], str | int]:
        """The wanted sidecars' texts by key and suffix; of one that is too large, its size."""
        found: dict[tuple[str, str], str | int] = {}
        held_bytes = 0
        # damage is met again when the images are read, after those that stand before it
        with suppress(ShardError), open_tar(self._store, self._shard) as archive:
            for index, member in enumerate(members_of(archive)):
                key, suffix = self._names.split(member.name)
                if suffix.lower() not in self._carry or skip_reason(member):
                    continue
                if member.size > MAX_SIDECAR_BYTES:
                    found[key, suffix.lower()] = member.size
                    continue
                data = self._links.content(index, member) if member.islnk() else content_of(archive, member)
                held_bytes += len(data or b"")
                if held_bytes > MAX_SIDECARS_BYTES:
                    break
                if data is not None:
                    found[key, suffix.lower()] = data.decode(errors="replace").strip()
        if held_bytes > MAX_SIDECARS_BYTES:
            raise ShardError(
                f"{self._shard.name}: its sidecars {', '.join(self._carry.values())} have more than "
                f"{MAX_SIDECARS_BYTES} bytes in all; carry fewer, or split the shard"
            )
        return found
