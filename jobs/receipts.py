"""Receipts: what the driver hears of each chunk, and what it makes of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import JobError

# A share is not judged by fewer: three bad images in the first chunk say little about a million.
IMAGES_FOR_SHARE = 1000


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One staged chunk: where it belongs, what it held (`bytes` of encoded images), seconds by stage, who scored it.

    `example` is the first of its errors in words, or empty.
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

    def to_table(self) -> pa.Table:
        return pa.Table.from_pylist([self.__dict__])


@dataclass
class Tally:
    """The sum of a run's receipts."""

    images: int = 0
    errors: int = 0
    bytes: int = 0
    chunks: int = 0
    example: str = ""
    replicas: Counter[str] = field(default_factory=Counter)
    stage_seconds: Counter[str] = field(default_factory=Counter)
    started_s: float = field(default_factory=time.monotonic)

    def add(self, receipt: Receipt) -> None:
        self.images += receipt.rows
        self.errors += receipt.errors
        self.bytes += receipt.bytes
        self.chunks += 1
        self.example = self.example or receipt.example
        if receipt.replica:
            self.replicas[receipt.replica] += receipt.rows - receipt.errors
        for stage in ("read", "decode", "score", "stage"):
            self.stage_seconds[stage] += getattr(receipt, f"{stage}_s")

    def check_errors(self, max_share: float | None, *, at_least: int = IMAGES_FOR_SHARE) -> None:
        """Raises `JobError` where more than `max_share` of the images (or of `at_least`, if they are fewer) failed."""
        if max_share is not None and self.errors > max_share * max(self.images, at_least):
            raise JobError(
                f"{self.errors:,} of {self.images:,} images failed, more than --max-error-share {max_share:g} allows "
                f"(the first: {self.example}); what is done stands, and the job goes on if it is submitted again"
            )

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is, for a person who watches. Counts of images and errors are this run's."""

    phase: str  # "pool", "score", "done"
    shards: int = 0
    shards_done: int = 0
    images: int = 0
    errors: int = 0
    bytes_total: int = 0
    bytes_done: int = 0
    elapsed_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        return self.images / self.elapsed_s if self.elapsed_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "images_per_s": round(self.images_per_s, 1)}


OnProgress = Callable[[Progress], None]
