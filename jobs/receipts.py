"""Receipts: what each chunk reports to the driver, and what the driver makes of them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.counts import Counts
from pipeline.errors import JobError

# A share is not judged by fewer: three bad images in the first chunk say little about a million.
IMAGES_FOR_SHARE = 1000


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One staged chunk: where it belongs, what it held (`bytes` of encoded images), seconds by stage, who scored it.

    `example` is the first of its errors in words, or empty. `counts` is the chunk's `Counts` in JSON; where it is
    empty, no more is known than the other fields state.
    """

    shard: int
    chunk: int
    last: bool
    rows: int
    errors: int
    bytes: int
    read_s: float
    decode_s: float
    score_s: float
    stage_s: float
    replica: str
    example: str
    counts: str = ""

    def to_table(self) -> pa.Table:
        return pa.Table.from_pylist([self.__dict__])

    def counted(self) -> Counts:
        """What the chunk adds to the job's counts."""
        if self.counts:
            return Counts.from_dict(json.loads(self.counts))
        failed = self.last and self.chunk == 0 and self.rows == self.errors == 1 and not self.bytes
        whole = self.last and not failed
        return Counts(
            rows=self.rows,
            errors=self.errors,
            read=self.rows,
            bytes=self.bytes,
            failed_shards=int(failed),
            whole_shards=int(whole),
            whole_rows=self.rows * whole,
            example=self.example,
        )


@dataclass
class Tally:
    """The counts of a whole job, and the effort of this run.

    Committed shards count exactly, over all runs; of the others, what receipts of this run report (twice, where a chunk
    was staged twice).
    """

    run_images: int = 0
    bytes: int = 0
    chunks: int = 0
    replicas: Counter[str] = field(default_factory=Counter)
    stage_seconds: Counter[str] = field(default_factory=Counter)
    started_s: float = field(default_factory=time.monotonic)
    committed: Counts = field(default_factory=Counts)
    _open: Counts = field(default_factory=Counts)
    _shards: dict[int, Counts] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        return self.committed + self._open

    @property
    def images(self) -> int:
        return self.committed.rows + self._open.rows

    @property
    def errors(self) -> int:
        return self.committed.errors + self._open.errors

    def add(self, receipt: Receipt) -> None:
        """Adds a chunk of a shard that is not committed."""
        counts = receipt.counted()
        self._open += counts
        self._shards[receipt.shard] = self._shards.get(receipt.shard, Counts()) + counts
        self.run_images += receipt.rows
        self.bytes += receipt.bytes
        self.chunks += 1
        if receipt.replica:
            self.replicas[receipt.replica] += receipt.rows - receipt.errors
        for stage in ("read", "decode", "score", "stage"):
            self.stage_seconds[stage] += getattr(receipt, f"{stage}_s")

    def commit(self, shard: int, counts: Counts) -> None:
        """Replaces what receipts reported of a shard by its exact counts."""
        self._open -= self._shards.pop(shard, Counts())
        self.committed += counts

    def check_errors(self, max_share: float | None, *, at_least: int = IMAGES_FOR_SHARE) -> None:
        """Raises `JobError` where more than `max_share` of the images (or of `at_least`, if they are fewer) failed.

        Images that were lost with a shard failed, too: their number is estimated where it is unknown.
        """
        counts = self.counts
        lost = counts.lost + counts.estimated
        failed, images = counts.errors + lost, counts.rows + lost
        if max_share is not None and failed > max_share * max(images, at_least):
            raise JobError(
                f"{failed:,} of {images:,} images failed{_of_which(counts)}, more than --max-error-share {max_share:g} "
                f"allows (the first: {counts.example}); finished work is kept: submit again with a larger share to "
                "resume"
            )

    def check_scored(self) -> None:
        """Raises `JobError` where no image was scored."""
        counts = self.counts
        if not counts.rows:
            raise JobError("no image was scored: INPUT holds none; check INPUT, --format and the columns")
        if not counts.scored:
            lost = counts.lost + counts.estimated
            raise JobError(
                f"no image was scored: {counts.errors + lost:,} failed{_of_which(counts)} (the first: "
                f"{counts.example}); the error table in OUTPUT lists them"
            )

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s


def _of_which(counts: Counts) -> str:
    """The share of failed images that no error row stands for, in words."""
    parts = [f"{counts.lost:,} lost with their shards"] * bool(counts.lost)
    parts += [f"an estimated {counts.estimated:,} in shards that could not be read"] * bool(counts.estimated)
    return f" ({', '.join(parts)})" if parts else ""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is, for a person who watches.

    `images`, of which `scored` and `errors`, and `skipped` (counts by reason) are the whole job's, over all runs.
    `run_images` of these are this run's, as are `elapsed_s` and `images_per_s`.
    """

    phase: str  # "pool", "score", "done"
    shards: int = 0
    shards_done: int = 0
    images: int = 0
    scored: int = 0
    errors: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bytes_total: int = 0
    bytes_done: int = 0
    run_images: int = 0
    elapsed_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        return self.run_images / self.elapsed_s if self.elapsed_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "images_per_s": round(self.images_per_s, 1)}


OnProgress = Callable[[Progress], None]
