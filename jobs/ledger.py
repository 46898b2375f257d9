"""Which chunks are staged and which shards are committed: all that is known of a job's progress.

Plain Python. It is filled from a listing of OUTPUT when a job starts or goes on, and by receipts while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jobs.spec import JobPaths
from pipeline.shards import Shard


@dataclass
class _Staged:
    chunks: set[int] = field(default_factory=set)
    last: int | None = None

    def complete(self) -> bool:
        return self.last is not None and len(self.chunks) == self.last + 1 and max(self.chunks) == self.last


class Ledger:
    """The state of every shard. Holds chunk numbers only of shards that are begun and not committed."""

    def __init__(self, shards: Iterable[Shard], names: Iterable[str]) -> None:
        """`names` are those of all objects under OUTPUT."""
        self._staged: dict[int, _Staged] = {}
        self._committed: set[int] = set()
        outputs = {shard.output: shard.number for shard in shards}
        known = set(outputs.values())
        for name in names:
            if name in outputs:
                self._committed.add(outputs[name])
            elif (staged := JobPaths.parse_staged(name)) and staged[0] in known:
                self.stage(*staged)

    def stage(self, shard: int, chunk: int, last: bool) -> bool:
        """Notes a staged chunk; True when it was the one that the shard still lacked, and so once for each shard.

        A chunk may be noted again, as workers that are retried stage it again.
        """
        staged = self._staged.setdefault(shard, _Staged())
        lacked = not staged.complete()
        staged.chunks.add(chunk)
        if last:
            staged.last = chunk
        return lacked and staged.complete() and shard not in self._committed

    def commit(self, shard: int) -> None:
        """Notes that the shard's output file stands, and forgets its chunks."""
        self._committed.add(shard)
        self._staged.pop(shard, None)

    def committed(self, shard: int) -> bool:
        """Whether the shard's output file stands."""
        return shard in self._committed

    def staged(self, shard: int) -> frozenset[int]:
        """The shard's staged chunks."""
        return frozenset(self._staged[shard].chunks) if shard in self._staged else frozenset()

    def names(self, shard: int) -> list[str]:
        """The names of the shard's staged chunks, in order."""
        staged = self._staged.get(shard, _Staged())
        return [JobPaths.staged(shard, chunk, last=chunk == staged.last) for chunk in sorted(staged.chunks)]

    def leftovers(self) -> list[int]:
        """Shards that are committed while chunks of them are staged: a driver died in between, or a worker was late."""
        return sorted(self._committed & self._staged.keys())

    def ready(self) -> list[int]:
        """Shards with all chunks staged that are not committed."""
        return sorted(n for n, staged in self._staged.items() if staged.complete() and n not in self._committed)

    def committed_shards(self) -> frozenset[int]:
        """The shards whose output files stand."""
        return frozenset(self._committed)

    @property
    def done(self) -> int:
        """The number of committed shards."""
        return len(self._committed)
