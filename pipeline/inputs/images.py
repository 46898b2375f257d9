"""A slice of a listing of image files, each an object of its own."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from pipeline.errors import Changed, NotFound, Refused, ShardError, UsageError
from pipeline.inputs.sample import MAX_IMAGE_BYTES, Columns, Sample, too_large
from pipeline.shards import Fingerprint, Shard, slice_of
from pipeline.storage import ObjectInfo, Store

READS_AT_ONCE = 16  # a small object costs a round trip, not bandwidth


class ImagesReader:
    """Image files by name. The slice is listed again, and must hold what it held when the job was planned."""

    def __init__(self, store: Store, shard: Shard, columns: Columns) -> None:
        columns.check_not_tar()
        if names := [*columns.carry, *filter(None, (columns.image, columns.key))]:
            raise UsageError(f"{names[0]!r} is asked for, but plain image files have no columns")
        self._store, self._shard = store, shard
        self.carried = pa.schema([])
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sample]:
        files = list(slice_of(self._store.list(after=self._shard.after), self._shard.last))
        self._check_unchanged(files)
        threads = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="tandem-read")
        try:
            ahead: deque[Future[Sample]] = deque()
            for row, info in enumerate(files):
                ahead.append(threads.submit(self._sample, row, info))
                if len(ahead) > 2 * READS_AT_ONCE:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Nothing is open but while it is read."""

    def _sample(self, row: int, info: ObjectInfo) -> Sample:
        if info.size > MAX_IMAGE_BYTES:
            return Sample(row=row, key=info.name, data=None, error=too_large(info.size))
        try:
            data = self._store.read(info.name, etag=info.etag)
        except NotFound:
            return Sample(row=row, key=info.name, data=None, error="the file was deleted while the job ran")
        except Changed:
            return Sample(row=row, key=info.name, data=None, error="the file was replaced while the job ran")
        except Refused as error:
            return Sample(row=row, key=info.name, data=None, error=str(error))
        return Sample(row=row, key=info.name, data=data)

    def _check_unchanged(self, files: list[ObjectInfo]) -> None:
        now = Fingerprint()
        for info in files:
            now.add(info)
        if now.etag() != self._shard.etag:
            raise ShardError(
                f"{self._shard.name} (files after {self._shard.after!r} up to {self._shard.last!r}) changed since the "
                "job was planned; submit to a new OUTPUT"
            )
